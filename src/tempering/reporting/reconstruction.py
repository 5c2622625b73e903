"""What a report calls a method that was rebuilt from a description, and what such a run claims.

Used by the report and the model card; refuses to compute anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tempering.reporting.collect import RunData

TERMS = "Of the paper only title, abstract and opening were known: no number here may be set beside one of its."


def is_reconstruction(run: RunData) -> bool:
    """Whether a run's method was rebuilt from a description."""
    return run.provenance.get("reconstruction") is True


def called(run: RunData) -> str:
    """The name of a run's method, with `(reconstruction)` where it is one."""
    return f"{run.method} (reconstruction)" if is_reconstruction(run) else run.method


def cautions(runs: Sequence[RunData]) -> Iterator[str]:
    """Say what is a reconstruction, and which run claims nothing."""
    everything = [run for run in itertools.chain.from_iterable(r.everything for r in runs) if is_reconstruction(run)]
    for method in dict.fromkeys(run.method for run in everything):
        yield f"{method} is a reconstruction. {TERMS}"
    for run in everything:
        start = run.provenance.get("start")
        claim = run.provenance.get("claim", start.get("claim") if isinstance(start, dict) else None)
        if claim == "none":
            yield f"{run.name} claims nothing: its start model was not shown to have what was to be forgotten"
