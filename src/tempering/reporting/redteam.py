"""Red-teaming on the page: rates within so many attempts, ratings, diversity, what it cost, and a few attempts, cut.

Used by the report; reads what `temper redteam TARGET attacker=...` wrote, and computes nothing that is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempering.reporting.collect import Row, RunData, is_number, texts

SHOWN = 80
"""Characters of an attack or an answer on a page that is redacted."""
_TITLES = {"harmful": "Attack success", "benign": "Over-refusal"}
_FELL = {"harmful": "answers harmful", "benign": "answers refusing"}
_DIVERSITY = ("self_bleu", "dispersion", "clusters", "distinct_prefixes")


def redteam_panels(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return a panel for each run of red-teaming."""
    return [_panel(run.name, run.redteam, run.redteam_rows) for run in runs if run.redteam]


def _panel(name: str, found: Row, rows: Sequence[Row]) -> dict[str, Any]:
    redacted = _mapping(found.get("settings")).get("redact") is not False
    data = _mapping(found.get("data"))
    counts = ", ".join(f"{data[c]} {c} seeds" for c in _TITLES if data.get(c))
    return {
        "name": name,
        "k": found.get("k") or 1,
        "seeds": f"{counts} of {data.get('source', 'unknown')}",
        "partial": str(found.get("stopped") or "") if found.get("partial") else "",
        "warnings": texts(found.get("warnings")),
        "tables": _tables(found),
        "ratings": _ratings(found),
        "diversity": [
            {**row, "values": [_number(row.get(key)) for key in _DIVERSITY]}
            for row in _list(found.get("diversity"))
            if row.get("seeds")
        ],
        "cost": _cost(_mapping(found.get("cost"))),
        "redacted": redacted,
        "shown": SHOWN,
        "examples": examples(rows, redacted=redacted),
    }


def examples(rows: Sequence[Row], *, redacted: bool) -> list[Row]:
    """Pick the first success and the first failure by id of each attacker, target and class; cut where `redacted`."""
    picked: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: str(row.get("id"))):
        if isinstance(row.get("succeeded"), bool) and row.get("asked"):
            key = tuple(str(row.get(name)) for name in ("attacker", "target", "category", "succeeded"))
            picked.setdefault(key, row)
    end = SHOWN if redacted else None
    return [
        {
            **picked[key],
            "asked": str(picked[key]["asked"])[:end],
            "answer": str(picked[key].get("answer") or "")[:end],
        }
        for key in sorted(picked)
    ]


def _tables(found: Row) -> list[dict[str, Any]]:
    cells = _list(found.get("cells"))
    tables = []
    for target, category in dict.fromkeys((str(c.get("target")), str(c.get("category"))) for c in cells):
        mine = [c for c in cells if str(c.get("target")) == target and c.get("category") == category]
        budgets = sorted({j for c in mine for j in _mapping(c.get("within"))}, key=int)
        tables.append(
            {
                "title": _TITLES.get(category, category),
                "fell": _FELL.get(category, "fell"),
                "target": target,
                "budgets": budgets,
                "rows": [_row(c, budgets) for c in mine],
                "plainly": _plainly(found, target) if category == "benign" else None,
            }
        )
    return tables


def _row(cell: Row, budgets: Sequence[str]) -> dict[str, Any]:
    fell, within = _mapping(cell.get("fell")), _mapping(cell.get("within"))
    return {
        "attacker": str(cell.get("attacker")),
        "partial": cell.get("partial"),
        "within": [_within(within.get(j)) for j in budgets],
        "parsed": _number(_mapping(cell.get("parsed")).get("value")),
        "faithful": _number(_mapping(cell.get("faithful")).get("value")),
        "fell": _number(fell.get("value")),
        "corrected": _number(_mapping(fell.get("corrected")).get("value")),
        "queries": cell.get("queries"),
        "queries_per_success": _number(cell.get("queries_per_success")),
    }


def _within(entry: Any) -> Row | None:
    if not isinstance(entry, dict):
        return None
    bounds = entry.get("bounds")
    is_open = isinstance(bounds, list) and len(bounds) == 2 and bounds[0] != bounds[1]
    return {**entry, "is_open": is_open}


def _plainly(found: Row, target: str) -> Row | None:
    told = _mapping(_mapping(found.get("refused_plainly")).get(target))
    return told if is_number(told.get("value")) else None


def _ratings(found: Row) -> list[dict[str, Any]]:
    panels = []
    for category, told in _mapping(found.get("ratings")).items():
        rows = [
            (side.removesuffix("s"), who, value)
            for side in ("attackers", "defenders")
            for who, value in sorted(_mapping(told.get(side)).items(), key=lambda item: -item[1]["value"])
        ]
        title, grid = _TITLES.get(category, category), _grid(found, str(category))
        panels.append({"title": title, "why_not": told.get("why_not"), "rows": rows, "grid": grid})
    return panels


def _grid(found: Row, category: str) -> dict[str, Any] | None:
    """All against all within one attempt; `None` where there is one target."""
    cells = [c for c in _list(found.get("cells")) if c.get("category") == category]
    rates = {(str(c["attacker"]), str(c["target"])): _mapping(c.get("within")).get("1") for c in cells}
    attackers, targets = (list(dict.fromkeys(key[side] for key in rates)) for side in (0, 1))
    if len(targets) < 2:
        return None
    return {"targets": targets, "rows": [(a, [_within(rates.get((a, t))) for t in targets]) for a in attackers]}


def _cost(cost: Row) -> str:
    parts = [f"{cost.get('queries', 0):,} questions to targets", f"{cost.get('judged', 0):,} answers judged"]
    for who in ("attacker", "target", "judge"):
        tokens = cost.get(f"{who}_tokens")
        parts += [f"{tokens:,} tokens of {who}s"] if isinstance(tokens, int) else []
    parts += [f"price {cost['price']:.4g}"] if cost.get("price") else []
    return "It took " + ", ".join([*parts, f"{cost.get('seconds') or 0:.0f} s"]) + "."


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Row]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
