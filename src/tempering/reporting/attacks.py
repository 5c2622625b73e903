"""Attacks ranked: how often each succeeded, and how many questions that took.

Used by the report; refuses to rerun or to judge anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from tempering.reporting.collect import Metric, Row
from tempering.reporting.systems import System

PREFIX = "attack_success_rate/"


class Ranked(NamedTuple):
    """One attack on one system."""

    name: str
    metric: Metric
    queries: float | None
    """Questions put to the target per request, on average; `None` where rows do not say."""
    queries_to_success: float | None
    """Median over the requests that fell."""
    tokens: float | None
    """Tokens that the target wrote per request."""
    attacker_calls: float | None
    """Calls of the attacker model per request."""


def ranking(system: System) -> list[Ranked]:
    """List the system's attacks, the most successful first; equal ones by name."""
    ranked = []
    for key, metric in system.metrics.items():
        if key.startswith(PREFIX) and metric.value is not None:
            rows = [
                row
                for evals in system.members
                for e in evals
                for row in e.rows
                if row.get("metric") == key and isinstance(row.get("queries"), int)
            ]
            won = [row["queries"] for row in rows if row.get("outcome")]
            ranked.append(
                Ranked(
                    key.removeprefix(PREFIX),
                    metric,
                    _mean(rows, "queries"),
                    statistics.median(won) if won else None,
                    _mean(rows, "completion_tokens"),
                    _mean(rows, "attacker_calls"),
                )
            )
    return sorted(ranked, key=lambda r: (-(r.metric.value or 0.0), r.name))


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [value for row in rows if isinstance(value := row.get(key), int)]
    return statistics.fmean(values) if values and len(values) == len(rows) else None
