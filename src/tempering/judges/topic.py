"""What a request is about, and whether an answer is about the same: word stems, no model.

Used by the rule-based judge; refuses to know about refusals.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

# Words that say what form an answer should take, or nothing, rather than what it is about.
_GENERIC = frozenset(
    """a about above accurate across act actually add after again against ago all almost along already also
    although always am amazing among an and another answer any anyone anything are around article as ask
    at available away basic basics be beautiful because been before being below best better between
    beyond big blog both brainstorm brief bunch but by call can certain certainly change check classic
    come common complete comprehensive concept concise cool could couple cover create creative current
    daily day deep delicious describe design detail detailed details develop devise did differ
    difference different discuss do does doing done down draft during each easily easy educate effective
    eg eight either else engaging especially essay etc even ever every everyone everything exactly
    example examples explain explanation fact famous few fictional find five follow following for form
    forms four from full fun function further gave general generate get give given go going good got
    great group guide had happen has have having he help helpful her here high him himself his how
    however hypothetical i idea ideas ie if important in include including information informative
    inspiration inspire inspiring instruct instruction instructions interesting into is it its itself
    just keep key kind know large last least less let letter like line list little long look lot made
    main make making many may me mean means method might mine more most much must my myself name names
    need never new nice nine no non nor not note now of off offer often ok old on once one only onto or
    order other our out outline over overview own paragraph part particular passage people perfect
    person piece place plan please poem point popular possible post present process program project
    properly propose prove provide purpose put question quick quite random rather real realistic really
    recipe recommend recommendation regarding related response right role said same say script section
    see seem sentence set seven several share she short should show similar simple since six small so
    some someone something speech start step steps still story strategies strategy such suggest
    suggestion summarize summary super sure take talk tasty teach tell ten text than thank that the
    their them theme themes themselves then there these they thing things think this those three through
    time tip tips title to too tool tools top topic topics toward traditional try tutorial two type
    types typical under understand unique until up upon us use used useful user using various very via
    vs want was way ways we well were what when where whether which while who whole whom whose why will
    with within without word words work world would write written year years yes yet you your yourself""".split()  # noqa: SIM905
)
FORM = re.compile(
    r"\b(?:poem|story|song|lyrics|haiku|limerick|rap|novel|scene|dialogue|screenplay|joke|jokes|riddle|riddles|"
    r"pun|puns|quote|quotes|tweet|slogan|fiction\w*|character|roleplay|sonnet|ballad|verse|monologue|diary|journal|manifesto|"
    r"speech|sermon|teaser|teasers)\b"
)
"""Requests for creative or playful text, which may treat their topic without naming it."""
_CODE = re.compile(
    r"\b(?:code|script|program|function|query|algorithm|python|java\w*|sql|html|worm|malware|exploit|regex|"
    r"virus)\b"
)
_WORD = re.compile(r"[a-z][a-z0-9]+")
_ENDING = re.compile(
    r"(?:ational|ization|isation|ibility|ability|fulness|ingly|ation|ition|ness|ment|ists?|ings?|ical|ion|ous|"
    r"ive|ity|ers?|ors?|ed|es|al|ic|s|e)$"
)


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Cut common endings, then everything after six letters, so that word families meet.

    >>> stem("flexibility") == stem("flexible"), stem("cookies") == stem("cooking")
    (True, False)
    """
    if len(word) > 3:
        word = word[:-2] if word.endswith("ies") else word[:-1] + "i" if word.endswith("y") else word
        cut = _ENDING.sub("", word)
        word = cut if len(cut) >= 3 else word
    return word[:6]


_GENERIC_STEMS = frozenset(map(stem, _GENERIC))


def topic_stems(text: str) -> list[str]:
    """Return the stems of the words that carry the topic, in order, with repeats."""
    return [s for w in _WORD.findall(text) if w not in _GENERIC and (s := stem(w)) not in _GENERIC_STEMS]


class Relation:
    """How an answer relates to its request.

    `coverage`: share of the request's topic words that the answer takes up (in its opening or repeatedly
    counts 1; once, later, 1/2). `declared`: topics of its own that it opens with and returns to.
    """

    def __init__(self, request: str, answer: str, opening: str) -> None:
        self.wanted = set(topic_stems(request))
        counts = Counter(topic_stems(answer))
        first = set(topic_stems(opening))
        hits = sum(1.0 if w in first or counts[w] > 1 else 0.5 * (w in counts) for w in self.wanted)
        self.coverage = hits / len(self.wanted) if self.wanted else 1.0
        self.shared_first = len(first & self.wanted)
        self.first = first
        self.own = [w for w, n in counts.most_common(8) if n >= 3 and w not in self.wanted]
        self.declared = [w for w in self.own if w in first]


def is_about_code(request: str) -> bool:
    """Whether the request may be met by code, which need not contain its words."""
    return _CODE.search(request) is not None
