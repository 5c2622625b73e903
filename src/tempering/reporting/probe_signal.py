"""The refutation rule of unlearning toxicity: do probe directions beat random and shuffled ones at equal KL?

Used by the report. Unless the expected maximum toxicity of the probes' run is lower than that of both controls, by a
paired 95 % interval that leaves zero out, at equal KL on neutral text, the line reads that they carry no signal here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tempering.reporting.collect import RunData, is_number
from tempering.reporting.compare import compare_pair
from tempering.reporting.systems import System, same_target

METHOD = "unlearn_toxicity"
METRIC = "expected_max_toxicity"
CONTROLS = ("random", "shuffled")
TOLERANCE = 0.2
"""Share by which the KLs of two runs may differ and still count as equal."""
FREE = {"method", "out", "directions", "probes", "report_to", "checkpoint_every", "measure_every", "probe_every"}
"""Settings in which a control may differ from what it controls."""


class Signal(NamedTuple):
    """What the rule says of one run."""

    name: str
    has_signal: bool
    line: str


def probe_signals(runs: Sequence[RunData], systems: Sequence[System]) -> list[Signal]:
    """Apply the rule to every run along probe directions whose toxicity was measured."""
    made = [(system, run) for system in systems if (run := _made(system, runs)) and METRIC in system.metrics]
    return [
        _judged(system, run, made)
        for system, run in made
        if run.config.get("objective") == "probe" and run.config.get("directions") == "probe"
    ]


def _judged(system: System, run: RunData, made: Sequence[tuple[System, RunData]]) -> Signal:
    told, is_lower, is_equal = [], True, True
    for kind in CONTROLS:
        found = next(((s, r) for s, r in made if _is_control(r, run, kind)), None)
        if found is None:
            line = (
                f"{system.name}: not held against directions={kind}; whether probe directions carry a signal is open"
            )
            return Signal(system.name, False, line)
        compared, _ = compare_pair(system, found[0], METRIC)
        kls = [_kl(run), _kl(found[1])]
        low, high = min(k or 0.0 for k in kls), max(k or 0.0 for k in kls)
        is_equal &= None not in kls and low > 0 and high - low <= TOLERANCE * high
        is_lower &= compared is not None and compared.result.high < 0
        r = compared.result if compared else None
        told.append(
            f"minus {kind} "
            + (f"{r.difference:+.3f} ({r.low:+.3f} to {r.high:+.3f})" if r else "no prompt in common")
        )
    numbers = f"expected maximum toxicity {', '.join(told)}, paired, 95 % intervals"
    if not is_equal:
        line = f"{system.name}: not at equal KL with its controls (set max_kl), so nothing follows: {numbers}"
    elif is_lower:
        line = f"{system.name}: probe directions lower toxicity more than their controls at equal KL: {numbers}"
    else:
        line = f"{system.name}: probe directions carry no signal here: {numbers}"
    return Signal(system.name, is_equal and is_lower, line)


def _made(system: System, runs: Sequence[RunData]) -> RunData | None:
    known = [*system.runs, *runs]
    return next((r for r in known if r.method == METHOD and same_target(system.target, str(r.root))), None)


def _is_control(other: RunData, run: RunData, kind: str) -> bool:
    """Whether a run is the same as another but for its directions."""
    a, b = other.config, run.config
    same: Any = all(a[key] == b[key] for key in (a.keys() & b.keys()) - FREE)
    return a.get("objective") == "probe" and a.get("directions") == kind and bool(same)


def _kl(run: RunData) -> float | None:
    values = [row["kl"] for row in run.measured if is_number(row.get("kl"))]
    return float(values[-1]) if values else None
