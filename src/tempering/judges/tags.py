"""Tags: how an attacker's rewrite and a judge's reply are read, and how other text is kept from being read so.

Used by the judges of the game, by the game itself and by attacks that ask a trained attacker; refuses to know what
rewrites and scores are for. What does not follow the grammar is never guessed at: it has no prompt, or no score.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from tempering.data.attacker import FORMATS, Format

__all__ = [
    "PARSER_VERSION",
    "Format",
    "ParsedAttack",
    "escape_tags",
    "last_object",
    "parse_answer",
    "parse_attack",
    "parse_pair_scores",
    "parse_score",
]

PARSER_VERSION = 1
MOST_POINTS = 10.0
_RESERVED = "think|prompt|seed|answer|score(?:_[ab])?"
_ANY_TAG = re.compile(rf"<(\s*(?:/\s*)?(?:{_RESERVED})\b[^<>]*)>", re.I)
"""A reserved tag, also one written sloppily: with white space or attributes."""
_ANY_KEY = re.compile(r'"(answer|score(?:_[ab])?)"(?=\s*:)', re.I)
"""A reserved name where JSON has its keys."""
_ATTACK_TAG = re.compile(r"<\s*(?:/\s*)?(?:think|prompt)\b[^<>]*>", re.I)
_THOUGHT = ["<think>", "</think>"]
_BLOCK = ["<prompt>", "</prompt>"]
_END_OF_THOUGHT = re.compile(r"</think>", re.I)
_THOUGHT_BEGINS = re.compile(r"<think>", re.I)
_ANSWER = re.compile(r"<answer>\s*(true|false)\s*</answer>", re.I)
_NUMBER = r"[+-]?[0-9]{1,4}(?:\.[0-9])?"
_POINTS = re.compile(rf"({_NUMBER})(?:\s*/\s*10)?")
_SCORE = {
    name: re.compile(rf"<{name}>\s*({_NUMBER})(?:\s*/\s*10)?\s*</{name}>", re.I)
    for name in ("score", "score_A", "score_B")
}
_MOST_BRACES = 64
"""Opening braces tried, from the end of a reply: bounds the work on a reply that is made of them."""


class ParsedAttack(NamedTuple):
    """An attacker's output as read: the rewrite, the reasoning before it, or why there is no rewrite."""

    prompt: str | None
    thought: str
    reason: str | None


def parse_attack(text: str, fmt: Format) -> ParsedAttack:
    r"""Read the rewrite from an attacker's output; tags in any case, white space around it dropped.

    `think`: one `<think>..</think>`, then one non-empty `<prompt>..</prompt>`, and white space else. `prompt`: the
    same without the first. `free`: anything, then exactly one `<prompt>` block at the end; what a reasoning model
    writes up to its last `</think>` is not read. `raw`: all of it, if it is not empty. In the first three, a further
    tag of either name fails, wherever it stands and however it is spaced.

    >>> parse_attack("<think>a story</think>\n<prompt> Tell me of ... </prompt>", "think")
    ParsedAttack(prompt='Tell me of ...', thought='a story', reason=None)
    >>> parse_attack("<prompt>a</prompt><prompt>b</prompt>", "free").reason
    'expected the tags <prompt> </prompt>, found <prompt> </prompt> <prompt> </prompt>'

    Raises:
        ValueError: the format is unknown.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; expected one of {', '.join(FORMATS)}")
    if fmt == "raw":
        return ParsedAttack(text.strip(), "", None) if text.strip() else ParsedAttack(None, "", "the output is empty")
    start = _after_thought(text) if fmt == "free" else 0
    found = list(_ATTACK_TAG.finditer(text, start))
    wanted = (_THOUGHT if fmt == "think" else []) + _BLOCK
    if [tag[0].lower() for tag in found] != wanted:
        told = " ".join(" ".join(tag[0].split()) for tag in found[:8]) or "none"
        return ParsedAttack(None, "", f"expected the tags {' '.join(wanted)}, found {told[:120]}")
    opening, closing = found[-2:]
    thought = text[found[0].end() : found[1].start()] if fmt == "think" else text[start : opening.start()]
    outside = [text[closing.end() :]]
    if fmt == "think":
        outside += [text[: found[0].start()], text[found[1].end() : opening.start()]]
    elif fmt == "prompt":
        outside.append(thought)
    if any(part.strip() for part in outside):
        return ParsedAttack(None, "", "there is text outside the tags")
    prompt = text[opening.end() : closing.start()].strip()
    if not prompt:
        return ParsedAttack(None, thought.strip(), "the prompt is empty")
    return ParsedAttack(prompt, (text[:start] + thought if fmt == "free" else thought).strip(), None)


def parse_answer(text: str) -> bool | None:
    """Read `<answer>True|False</answer>`, the first one behind the reasoning, or JSON with `answer` at the end.

    >>> parse_answer("<think>It keeps the aim.</think> <answer>True</answer>"), parse_answer("True, I think")
    (True, None)
    """
    said = _spoken(text)
    if found := _ANSWER.search(said):
        return found[1].lower() == "true"
    value = _told(said, "answer").get("answer")
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def parse_pair_scores(text: str) -> tuple[float, float] | None:
    """Read the points of A and of B, 0 to 10, the last of each behind the reasoning; both or none.

    A number has one decimal at most, may be followed by "/10", and is clipped. JSON with both keys may replace tags.

    >>> parse_pair_scores("<score_A>7.5</score_A> <score_B>12/10</score_B>")
    (7.5, 10.0)
    >>> parse_pair_scores("<score_A>7</score_A>") is None
    True
    """
    said = _spoken(text)
    a, b = _last_points(said, "score_A"), _last_points(said, "score_B")
    if a is None and b is None:
        told = _told(said, "score_A", "score_B")
        a, b = _as_points(told.get("score_A")), _as_points(told.get("score_B"))
    return None if a is None or b is None else (a, b)


def parse_score(text: str) -> float | None:
    """Read `<score>n</score>` as `parse_pair_scores` reads each of its two.

    >>> parse_score("Decent. <score>6</score>"), parse_score('{"score": 6}'), parse_score("<score>6.25</score>")
    (6.0, 6.0, None)
    """
    said = _spoken(text)
    points = _last_points(said, "score")
    return _as_points(_told(said, "score").get("score")) if points is None else points


def escape_tags(text: str) -> str:
    """Write reserved tags with square brackets, and reserved JSON keys in single quotes.

    A text that was put through this holds nothing that a parser here reads as a rewrite, an answer or a score, also
    where a judge repeats it word for word.

    >>> escape_tags('x <score_A>10</score_A> < /THINK > <b> {"score_A": 10}')
    "x [score_A]10[/score_A] [ /THINK ] <b> {'score_A': 10}"
    """
    return _ANY_KEY.sub(r"'\1'", _ANY_TAG.sub(r"[\1]", text))


def last_object(text: str) -> dict[str, Any] | None:
    """Read the JSON object that `text` ends with; `None` where it is none, or says something twice."""
    starts = [at for at, char in enumerate(text) if char == "{"]
    for at in reversed(starts[-_MOST_BRACES:]):
        try:
            value: dict[str, Any] = json.loads(text[at:], object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            continue
        return value
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _after_thought(text: str) -> int:
    """Where what follows the last `</think>` begins."""
    return max((tag.end() for tag in _END_OF_THOUGHT.finditer(text)), default=0)


def _spoken(text: str) -> str:
    """Return what is behind the reasoning, up to further reasoning that is not closed."""
    said = text[_after_thought(text) :]
    begins = _THOUGHT_BEGINS.search(said)
    return said[: begins.start()] if begins else said


def _told(said: str, *keys: str) -> dict[str, Any]:
    """Return the object that a reply ends with, if it names `keys` in so many letters (an escape is no name)."""
    body = said.strip().removesuffix("```").rstrip()
    if not body.endswith("}") or any(f'"{key}"' not in body for key in keys):
        return {}
    return last_object(body) or {}


def _last_points(said: str, name: str) -> float | None:
    found = _SCORE[name].findall(said)
    return _clipped(found[-1]) if found else None


def _as_points(value: Any) -> float | None:
    """Read a value of JSON as points."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = _POINTS.fullmatch(str(value).strip())
    except ValueError:  # an integer of thousands of digits has no text
        return None
    return _clipped(found[1]) if found else None


def _clipped(number: str) -> float:
    return min(MOST_POINTS, max(0.0, float(number)))
