"""Recall without options, a part of `knowledge` (`recall=true`): for questions that say how the fact goes on.

    cloze_exact_match   share of `cloze` = {prefix, answer} whose prefix the target goes on, greedily, with the answer
    held_out_nll        nats a token of `held_out_statement`, after its first word: a wording that no training reads

Where the choice among options falls to chance, these tell a fact that is gone from a format that is broken. Both are
asked as plain text. Questions without these fields add nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tempering.core.records import Prompt
from tempering.evals.results import Cost, Row, in_format

if TYPE_CHECKING:
    from tempering.core.sampling import LocalSampler  # loads torch, for which `temper --help` must not wait

CLOZE, HELD_OUT = "cloze_exact_match", "held_out_nll"
JUDGES = {CLOZE: "exact match", HELD_OUT: "log-probabilities"}
MAX_NEW_TOKENS = 16


def fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of questions says of how its fact goes on; what is of another form is left out.

    >>> row = {"cloze": {"prefix": "Tin is", "answer": "grey"}, "held_out_statement": "Grey is tin."}
    >>> fields_of(row), fields_of({"cloze": "Tin is ..."})
    ({'cloze': ('Tin is', 'grey'), 'held_out_statement': 'Grey is tin.'}, {})
    """
    out: dict[str, Any] = {}
    cloze, statement = row.get("cloze"), row.get("held_out_statement")
    parts = [cloze.get(key) for key in ("prefix", "answer")] if isinstance(cloze, Mapping) else [None]
    if all(isinstance(part, str) and part.strip() for part in parts):
        out["cloze"] = tuple(parts)
    if isinstance(statement, str) and len(statement.split()) > 1:
        out["held_out_statement"] = statement
    return out


def with_recall(rows: Sequence[Row], questions: Sequence[Prompt], target: LocalSampler, cost: Cost) -> list[Row]:
    """Add to each row what the target recalls of its fact, as outcomes and, of a cloze, what it said."""
    raw: Any = in_format(target, "raw")
    added: list[dict[str, Any]] = [{} for _ in rows]
    asked = [i for i, q in enumerate(questions) if "cloze" in q.extra]
    prefixes = [_plain(questions[i].extra["cloze"][0].rstrip()) for i in asked]
    groups = raw(prefixes, max_new_tokens=MAX_NEW_TOKENS)
    cost.add(groups)
    for i, [completion] in zip(asked, groups, strict=True):
        is_right = None if completion.finish == "error" else goes_on(completion.text, questions[i].extra["cloze"][1])
        added[i] = {"cloze": completion.text, CLOZE: is_right}
    read = [i for i, q in enumerate(questions) if "held_out_statement" in q.extra]
    halves = [questions[i].extra["held_out_statement"].partition(" ") for i in read]
    scored = raw.score([_plain(first) for first, _, _ in halves], [[f" {rest}"] for _, _, rest in halves])
    for i, [(nats, tokens)] in zip(read, scored, strict=True):
        added[i] = {**added[i], HELD_OUT: -nats / tokens}
    out = []
    for row, found in zip(rows, added, strict=True):
        outcomes = {name: found[name] for name in JUDGES if name in found}
        said = {"cloze": found["cloze"]} if "cloze" in found else {}
        out.append({**row, **said, "outcomes": {**row["outcomes"], **outcomes}})
    return out


def goes_on(text: str, answer: str) -> bool:
    """Whether a text begins with the words of an answer.

    >>> [goes_on(text, "salt water") for text in (" Salt water, of course", "saltwater", "salt")]
    [True, False, False]
    """
    said, wanted = (re.findall(r"\w+", part.casefold()) for part in (text, answer))
    return bool(wanted) and said[: len(wanted)] == wanted


def _plain(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))
