"""Runs side by side: one HTML page, its tables as `report.md`, `report.json`, and a model card for each trained run.

Used by `temper report` and the demo; reads run folders only. Equal run folders give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempering.core.run import atomic_write
from tempering.reporting.card import model_card
from tempering.reporting.cautions import warnings_of
from tempering.reporting.collect import RunData, read_run
from tempering.reporting.compare import compare
from tempering.reporting.compare import refutation as refutation_of
from tempering.reporting.markdown import markdown
from tempering.reporting.probe_signal import probe_signals
from tempering.reporting.systems import System, corrected_name, same_target, systems_of
from tempering.reporting.view import page

SCHEMA = 1


def write_report(runs: Sequence[Path], out: Path, *, title: str | None = None) -> dict[str, Any]:
    """Write `report.html`, `report.md`, `report.json` and model cards into `out`, and return the content of the JSON.

    The first run's first system is the base that the others are compared with. `model_card.md` is the card
    of the last trained run; where there are several, each also has `model_card-NAME.md`.

    Raises:
        ValueError: when `runs` is empty, or a configuration is damaged.
        FileNotFoundError: when one is not a run folder.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    data = [read_run(Path(root)) for root in dict.fromkeys(runs)]
    systems = systems_of(data)
    comparisons, problems = compare(systems)
    refutation = refutation_of(systems, comparisons)
    warnings = warnings_of(data, systems) + problems
    signals = probe_signals(data, systems)
    warnings += [signal.line for signal in signals if not signal.has_signal]
    warnings += [
        f"staged_competence is refuted on {r.metric} for this setting: {r.control} matches it ({r.reason})"
        for r in refutation
        if r.verdict == "refuted"
    ]
    if not systems and not any(run.attribution or run.attack or run.gap or run.redteam for run in data):
        warnings.append("no evals in these runs: nothing is measured")
    content = {
        "schema": SCHEMA,
        "systems": [
            {
                "name": s.name,
                "target": s.target,
                "metrics": _metrics(s),
            }
            for s in systems
        ],
        "comparisons": [c.to_json() for c in comparisons],
        "warnings": warnings,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    html = page(data, systems, comparisons, refutation, warnings, title=title)
    for name, card in _cards(data, systems).items():
        _write(out / name, card)
    _write(out / "report.html", html)
    _write(out / "report.md", markdown(systems, comparisons, refutation, [signal.line for signal in signals]))
    _write(out / "report.json", text)
    return content


def card_of(run: RunData, *, release: dict[str, Any] | None = None) -> str:
    """Return the card of one run, with what its own folder says was measured, and how a release gate ended."""
    systems = systems_of([run])
    system = _system_of(run, systems)
    return model_card(run, system, warnings_of([run], [system] if system else []), release=release)


def _metrics(system: System) -> dict[str, Any]:
    """Return the metrics of a system as JSON, each corrected rate after its raw one."""
    out = {}
    for key, metric in system.metrics.items():
        out[key] = metric.to_json()
        if metric.corrected:
            out[corrected_name(key)] = metric.corrected.to_json()
    return out


def _cards(runs: Sequence[RunData], systems: Sequence[System]) -> dict[str, str]:
    trained = [run for run in runs if run.is_trained]
    cards = {}
    for run in trained:
        system = _system_of(run, systems)
        own = warnings_of([run], [system] if system else [])
        card = model_card(run, system, own)
        if len(trained) > 1:
            cards[f"model_card-{re.sub(r'[^A-Za-z0-9._-]+', '_', run.name)}.md"] = card
        cards["model_card.md"] = card
    return cards


def _system_of(run: RunData, systems: Sequence[System]) -> System | None:
    """Find what measured this run's own model: evals that name it as target, else those in its folder."""
    named = [s for s in systems if not s.is_arm and same_target(s.target, str(run.root))]
    inside = [s for s in systems if any(r.root == run.root for r in s.runs) and not _is_start(s, run)]
    return (named + inside)[0] if named or inside else None


def _is_start(system: System, run: RunData) -> bool:
    return system.name == "base" or system.target == str(run.config.get("model"))


def _write(path: Path, text: str) -> None:
    # Model text may hold half a surrogate pair, which UTF-8 cannot carry.
    atomic_write(path, text.encode("utf-8", "replace"))
