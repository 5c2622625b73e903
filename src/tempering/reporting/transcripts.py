"""Example answers of several systems to the same prompt, picked by a rule and not by hand.

Used by the report. Everything here was written by a model or a stranger: it is shown, never trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tempering.reporting.collect import Row
from tempering.reporting.systems import System, measures, prompt_text, row_key

LONGEST = 1200
"""Characters shown of one answer."""
COLUMNS = 3
_METRICS = ("harmful_rate", "over_refusal_rate", "attack_success_rate")


class Answer(NamedTuple):
    """What one system said, with its verdict."""

    system: str
    text: str
    is_cut: bool
    outcome: bool | None
    verdict: str


class Example(NamedTuple):
    """One prompt with the answers side by side."""

    kind: str
    metric: str
    category: str
    attack: str
    prompt: str
    answers: list[Answer]


def examples(systems: Sequence[System], *, per_kind: int = 2) -> list[Example]:
    """Pick prompts that all the shown systems answered.

    For each metric: the first by id whose outcome improved, worsened, stayed bad, stayed good between the
    first and the last of the systems, `per_kind` of each.
    """
    shown = list(systems)[:COLUMNS]
    if not shown:
        return []
    picked = []
    for metric in _METRICS:
        lines = [_lines(system, metric) for system in shown]
        kinds: dict[str, list[Example]] = {"improved": [], "worse": [], "still": [], "unchanged": []}
        for key in sorted(set.intersection(*(set(found) for found in lines))):
            rows = [found[key] for found in lines]
            kind = _kind(rows[0].get("outcome"), rows[-1].get("outcome"))
            if kind and len(kinds[kind]) < per_kind:
                kinds[kind].append(_example(kind, metric, shown, rows))
        picked += [e for found in kinds.values() for e in found]
    return picked


def _lines(system: System, metric: str) -> dict[tuple[str, str], Row]:
    found: dict[tuple[str, str], Row] = {}
    for e in system.members[0]:
        for row in e.rows:
            if measures(row, metric) and "completion" in row:
                found.setdefault(row_key(row), row)
    return found


def _kind(before: object, after: object) -> str | None:
    kinds = {
        (True, False): "improved",
        (False, True): "worse",
        (True, True): "still",
        (False, False): "unchanged",
    }
    if isinstance(before, bool) and isinstance(after, bool):
        return kinds[before, after]
    return None


def _example(kind: str, metric: str, systems: Sequence[System], rows: Sequence[Row]) -> Example:
    first = rows[0]
    answers = [_answer(system.name, row) for system, row in zip(systems, rows, strict=True)]
    category, attack = (str(first.get(k) or "") for k in ("category", "attack"))
    return Example(kind, metric, category, attack, prompt_text(first), answers)


def _answer(system: str, row: Row) -> Answer:
    text, verdict = str(row.get("completion") or ""), row.get("verdict")
    verdict = verdict if isinstance(verdict, dict) else {}
    words = [str(verdict[k]) for k in ("label", "reason") if verdict.get(k)]
    outcome = row.get("outcome")
    return Answer(
        system,
        text[:LONGEST],
        len(text) > LONGEST or row.get("finish") == "length",
        outcome if isinstance(outcome, bool) else None,
        " · ".join(words),
    )
