"""The summary and the tests as Markdown tables, for a paper, a pull request or these docs.

Used by the report; the same numbers as its page.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tempering.reporting.card import plain
from tempering.reporting.collect import Metric
from tempering.reporting.compare import Compared, Refutation
from tempering.reporting.systems import System, judge_cards, meaning, summary_metrics
from tempering.reporting.unlearning import ATTACKS, RECOVERED, headline, unlearned_of
from tempering.reporting.wording import correction_note, show, show_interval

ARMS_ALSO = ("margin_initial", "kl_initial")
"""Columns that a comparison of arms has as well."""


def markdown(
    systems: Sequence[System],
    comparisons: Sequence[Compared],
    refutation: Sequence[Refutation],
    signals: Sequence[str] = (),
) -> str:
    """Return one table of systems, one of differences per reference, and what the controls say.

    `signals`: sentences on what probe directions carry.
    """
    if not systems:
        return "Nothing was evaluated.\n"
    present = {m for s in systems for m in s.metrics}
    metrics = [*summary_metrics(systems), *(m for m in ARMS_ALSO if m in present)]
    n = {m: sorted({s.metrics[m].n for s in systems if m in s.metrics}) for m in metrics}
    heads = [f"{meaning(m).label} (n {' or '.join(map(str, n[m]))})" for m in metrics]
    parts = [
        _table(["system", *heads], [[s.name, *(_value(s, m) for m in metrics)] for s in systems]),
        "With each value: its 95 % interval. Arms: mean over seeds, n of all seeds, the interval is over prompts.\n",
    ]
    if note := correction_note(judge_cards(systems)):
        parts.append(plain(note) + "\n")
    parts += _unlearned(systems)
    shown = [c for c in comparisons if c.metric in metrics]
    for against, group in itertools.groupby(shown, key=lambda c: c.b):
        rows: dict[str, dict[str, Compared]] = {}
        for c in group:
            rows.setdefault(c.a, {})[c.metric] = c
        columns = [m for m in metrics if any(m in row for row in rows.values())]
        cells = [[name, *(_difference(row.get(m)) for m in columns)] for name, row in rows.items()]
        parts += [
            f"Difference from {plain(against)}, paired by prompt, and its 95 % interval; bold where 0 is outside.\n",
            _table(["system", *(meaning(m).label for m in columns)], cells),
        ]
    lines = [f"- {r.control}, {meaning(r.metric).label.lower()}: **{r.verdict}**, {r.reason}\n" for r in refutation]
    lines += [f"- {plain(signal)}\n" for signal in signals]
    return "\n".join([*parts, "".join(lines)]).rstrip("\n") + "\n"


def _unlearned(systems: Sequence[System]) -> list[str]:
    """What was forgotten and kept, what each attack brings back, and H; a sentence on each system."""
    found = unlearned_of(systems)
    if not found:
        return []
    rows = [
        [
            u.system.name,
            *("–" if part is None else f"{part:.2f}" for part in (u.forgotten, u.retain_ratio)),
            *(_value(u.system, f"{RECOVERED}/{name}") for name in ATTACKS),
            "–" if u.aggregate is None else f"{u.aggregate:.2f}",
        ]
        for u in found
    ]
    heads = ["unlearning", "forgotten", "kept", *(f"back by {name.replace('_', ' ')}" for name in ATTACKS), "H"]
    return [_table(heads, rows), "".join(f"- {plain(headline(u))}\n" for u in found)]


def _value(system: System, metric: str) -> str:
    m = system.metrics.get(metric)
    if m is None or m.value is None:
        return "–"
    return _rate(metric, m) + (f"; corrected {_rate(metric, m.corrected)}" if m.corrected else "")


def _rate(metric: str, m: Metric) -> str:
    ends = show_interval(metric, m.low, m.high)
    return show(metric, m.value) + (f" ({ends})" if ends else "")


def _difference(c: Compared | None) -> str:
    if c is None:
        return "–"
    value = show(c.metric, c.result.difference, is_signed=True)
    ends = show_interval(c.metric, c.result.low, c.result.high, is_signed=True)
    return f"{f'**{value}**' if c.is_clear else value} ({ends})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *([plain(row[0]), *row[1:]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
