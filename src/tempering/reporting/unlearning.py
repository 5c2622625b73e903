"""What a reader should know of models that were made to forget something.

Used by the report and the model card; refuses to call anything forgotten that no attack has tried to bring back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tempering.reporting.collect import Metric, RunData
from tempering.reporting.systems import System

ATTACKS = ("relearning", "quantisation", "direction_ablation")
FORGET = "forget"
LEVELS = {"knowledge_accuracy": "accuracy on what was to be forgotten", "expected_max_toxicity": "maximum toxicity"}
TERMS = "Of the paper only title, abstract and opening were known: no number here may be set beside one of its."


def is_reconstruction(run: RunData) -> bool:
    """Whether a run's method was rebuilt from a description."""
    return run.provenance.get("reconstruction") is True


def called(run: RunData) -> str:
    """The name of a run's method, with `(reconstruction)` where it is one."""
    return f"{run.method} (reconstruction)" if is_reconstruction(run) else run.method


def unattacked(system: System) -> list[str]:
    """The attacks that have not tried to bring back what a system unlearned; none where it unlearned nothing."""
    if not any(is_reconstruction(run) for run in system.runs):
        return []
    return [name for name in ATTACKS if f"recovered_fraction/{name}" not in system.metrics]


def cautions(runs: Sequence[RunData], systems: Sequence[System]) -> Iterator[str]:
    """Say what is a reconstruction, what claims nothing, and which robustness was not measured."""
    everything = list(itertools.chain.from_iterable(run.everything for run in runs))
    for method in dict.fromkeys(run.method for run in everything if is_reconstruction(run)):
        yield f"{method} is a reconstruction. {TERMS}"
    for run in everything:
        start = run.provenance.get("start")
        claim = run.provenance.get("claim", start.get("claim") if isinstance(start, dict) else None)
        if is_reconstruction(run) and claim == "none":
            yield f"{run.name} claims nothing: its start model was not shown to have what was to be forgotten"
    for system in systems:
        if missing := unattacked(system):
            yield f"{system.name}: robustness not measured (no {', '.join(missing)}): what is gone may be hidden only"


def headline(system: System, base: System | None) -> str | None:
    """Say what was forgotten and how much attacks bring back; `None` where a system unlearned nothing.

    Without all three attacks there is no headline, and it says so.
    """
    if not any(is_reconstruction(run) for run in system.runs):
        return None
    if missing := unattacked(system):
        return f"Robustness not measured (no {', '.join(missing)}), so no headline."
    parts = []
    for metric, words in LEVELS.items():
        now, was = level(system, metric), level(base, metric)
        if now is not None and now.value is not None:
            before = f"{was.value:.2f} → " if was is not None and was.value is not None else ""
            parts.append(f"{words} {before}{now.value:.2f}")
    back = {name: system.metrics[f"recovered_fraction/{name}"] for name in ATTACKS}
    known = {name: m for name, m in back.items() if m.value is not None}
    if known:
        worst = max(known, key=lambda name: known[name].value or 0)
        m = known[worst]
        interval = "" if m.low is None or m.high is None else f" (95 % interval {m.low:.2f}–{m.high:.2f})"
        parts.append(f"{worst.replace('_', ' ')} brings back {m.value:.2f} of the difference{interval}")
    else:
        parts.append("no attack could be scored, since the start model was no better than this one")
    return f"{system.name}: " + "; ".join(parts) + "."


def level(system: System | None, metric: str) -> Metric | None:
    """What a system reached, on what was to be forgotten where the eval tells that apart."""
    if system is None:
        return None
    return system.breakdown.get(FORGET, {}).get(metric) or system.metrics.get(metric)
