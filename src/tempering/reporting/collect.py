"""Run folders as plain dataclasses: everything a report needs, and what was wrong or missing.

Used by the report and the model card; refuses to interpret a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from tempering.core.run import Run

Row = dict[str, Any]
_ARM = re.compile(r"(?P<arm>.+)-seed(?P<seed>\d+)")
CORRECTED = "/corrected"
"""What the name of a corrected rate ends with, after the name of the raw one."""
_NOT_TRAINING = ("eval", "redteam", "report", "judge", "export")
ANALYSES = ("attribution", "attack", "gap")
"""Documents in `evals/` that are of another form than an eval's."""

CELLS = "cells"
"""Key by which a campaign of attackers is told from an eval."""


@dataclass(frozen=True)
class Metric:
    """One measured number. `n` counts what was scored; `unscored` what the judge could not score."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0
    judge: str | None = None
    corrected: Metric | None = None
    """The same rate, corrected for the judge's error (`METRIC/corrected` in JSON)."""

    def to_json(self) -> Row:
        """Return the entry of `report.json`."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "unscored": self.unscored,
            "judge": self.judge,
        }


@dataclass(frozen=True)
class Eval:
    """One `evals/NAME.json` with its per-prompt lines."""

    name: str
    kind: str
    target: str
    system: str | None
    metrics: dict[str, Metric]
    breakdown: dict[str, dict[str, Metric]]
    settings: Row
    source: str
    """Where the prompts come from."""
    data_hash: str | None
    """SHA-256 of the file of prompts."""
    cost: Row
    warnings: tuple[str, ...]
    rows: tuple[Row, ...]
    judge_cards: tuple[Row, ...] = ()
    """By which rates were corrected."""
    details: Row = field(default_factory=dict)
    """What else stands in the file, such as curves."""


_COMMON = (
    "schema", "eval", "target", "system", "metrics", "breakdown", "settings", "data", "cost", "warnings",
    "correction",
)  # fmt: skip
"""Keys of an eval's file that all evals have."""


@dataclass(frozen=True)
class RunData:
    """What one run folder holds; absent files leave their field empty."""

    root: Path
    name: str
    method: str
    config: Row
    provenance: Row
    is_done: bool
    steps: list[Row]
    heldout: list[Row]
    scored: list[Row]
    plan: list[Row]
    exposure: list[Row]
    difficulty: Row
    adapter: Row
    """`final/adapter_config.json`."""
    evals: list[Eval]
    attribution: Row = field(default_factory=dict)
    """What `temper attribution controls` found."""
    attribution_candidates: list[Row] = field(default_factory=list)
    """Of the harmful prompts."""
    attribution_scores: list[Row] = field(default_factory=list)
    attack: Row = field(default_factory=dict)
    """What `temper attribution attack` found."""
    gap: Row = field(default_factory=dict)
    """What `temper attribution gap` found."""
    redteam: Row = field(default_factory=dict)
    """What `temper redteam TARGET attacker=...` found."""
    redteam_rows: list[Row] = field(default_factory=list)
    """Its attempts."""
    measured: list[Row] = field(default_factory=list)
    """What a training of unlearning measured on the way, such as its KL."""
    arms: dict[str, list[RunData]] = field(default_factory=dict)
    """Arm name -> its runs, by seed."""
    problems: tuple[str, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether this run made a model (rather than only measured one, or only holds arms)."""
        return self.method not in _NOT_TRAINING and bool(self.steps or (self.root / "final").is_dir())

    @property
    def everything(self) -> Iterator[RunData]:
        """This run, then its arms."""
        yield self
        for runs in self.arms.values():
            yield from runs


def read_run(root: Path) -> RunData:
    """Read a run folder. What is broken is left out and named in `problems`.

    Raises:
        FileNotFoundError: when `root` has no `config.yaml`: it is not a run folder.
        ValueError: when `config.yaml` is not a mapping.
    """
    run, problems = Run.open(root), []
    try:
        config = run.config
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{root}/config.yaml: not valid YAML; is the run folder damaged?") from error
    if not isinstance(config, dict):
        raise ValueError(f"{root}/config.yaml: expected keys and values, got {type(config).__name__}")

    def rows(name: str) -> list[Row]:
        if not run.has(name):
            return []
        try:
            return [row for row in run.read_rows(name) if isinstance(row, dict)]
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{name} could not be read ({error}) and is left out")
            return []

    def document(name: str) -> Row:
        if not run.has(name):
            return {}
        try:
            got = run.read_json(name)
        except (OSError, ValueError) as error:
            problems.append(f"{name} could not be read ({error}) and is left out")
            return {}
        if not isinstance(got, dict):
            problems.append(f"{name} is not a JSON object and is left out")
            return {}
        return got

    lines = rows("metrics.jsonl")
    evals = [
        read_eval(path.stem, got, rows(f"evals/{path.stem}.jsonl"), problems)
        for path in sorted((root / "evals").glob("*.json"))
        if path.stem not in ANALYSES and (got := document(f"evals/{path.name}")) and CELLS not in got
    ]
    attribution = document("evals/attribution.json")
    redteam = document("evals/redteam.json")
    redteam = redteam if CELLS in redteam else {}
    if not run.has("provenance.json"):
        problems.append("no provenance.json: versions, judges, licences and cost are unknown")
    return RunData(
        root=root,
        name=root.resolve().name,
        method=str(config.get("method", "unknown")),
        config=config,
        provenance=document("provenance.json"),
        is_done=run.is_done,
        steps=[line for line in lines if "event" not in line and is_number(line.get("step"))],
        heldout=[line for line in lines if line.get("event") == "heldout" and is_number(line.get("step"))],
        measured=[line for line in lines if line.get("event") == "measured" and is_number(line.get("step"))],
        scored=rows("data/scored.jsonl"),
        plan=rows("data/plan.jsonl"),
        exposure=rows("data/exposure.jsonl"),
        difficulty=document("data/difficulty.json"),
        adapter=document("final/adapter_config.json"),
        evals=evals,
        attribution=attribution,
        attribution_candidates=[r for r in rows("data/candidates.jsonl") if r["kind"] == "harmful"]
        if attribution
        else [],
        attribution_scores=rows("data/scores.jsonl") if attribution else [],
        attack=document("evals/attack.json"),
        gap=document("evals/gap.json"),
        redteam=redteam,
        redteam_rows=rows("evals/redteam.jsonl") if redteam else [],
        arms=_read_arms(root, _arm_names(config), problems),
        problems=tuple(problems),
    )


def read_eval(name: str, document: Mapping[str, Any], rows: list[Row], problems: list[str]) -> Eval:
    """Make an `Eval` of one JSON document; a metric that is no number is dropped and named."""
    metrics = _metrics(document.get("metrics"), f"evals/{name}.json", problems)
    breakdown = {
        str(category): _metrics(entry, f"evals/{name}.json, {category}", problems)
        for category, entry in _mapping(document.get("breakdown")).items()
    }
    system, correction = document.get("system"), _mapping(document.get("correction"))
    cards, data = correction.get("cards"), _mapping(document.get("data"))
    return Eval(
        name=name,
        kind=str(document.get("eval") or name),
        target=str(document.get("target") or "unknown"),
        system=str(system) if system else None,
        metrics=metrics,
        breakdown=breakdown,
        settings=_mapping(document.get("settings")),
        source=str(data.get("source") or "unknown"),
        data_hash=data.get("sha256"),
        cost=_mapping(document.get("cost")),
        warnings=(*texts(document.get("warnings")), *texts(correction.get("warnings"))),
        rows=tuple(rows),
        judge_cards=tuple(c for c in cards if isinstance(c, dict)) if isinstance(cards, list) else (),
        details={str(key): value for key, value in document.items() if key not in _COMMON},
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number (a boolean is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def texts(value: Any) -> list[str]:
    """Return a list of texts, from a list, from one text, or from nothing."""
    return [str(v) for v in value] if isinstance(value, list) else [str(value)] if value else []


def phase_seconds(cost: Mapping[str, Any]) -> dict[str, float]:
    """Return seconds per phase of a `cost` record, whether given as numbers or as records."""
    seconds = {phase: c.get("seconds") if isinstance(c, dict) else c for phase, c in cost.items()}
    return {phase: float(s) for phase, s in seconds.items() if is_number(s)}


def _metrics(entries: Any, where: str, problems: list[str]) -> dict[str, Metric]:
    metrics = {}
    for key, entry in _mapping(entries).items():
        entry = entry if isinstance(entry, dict) else {"value": entry}
        value, low, high = (entry.get(k) for k in ("value", "low", "high"))
        if value is not None and not is_number(value):
            problems.append(f"{where}: {key} is {json.dumps(value, default=str)}, not a number; left out")
            continue
        judge = entry.get("judge")
        metrics[str(key)] = Metric(
            value=value,
            low=low if is_number(low) else None,
            high=high if is_number(high) else None,
            n=_count(entry.get("n")),
            unscored=_count(entry.get("unscored")),
            judge=str(judge) if judge else None,
        )
    for key in [k for k in metrics if k.endswith(CORRECTED) and k.removesuffix(CORRECTED) in metrics]:
        raw = key.removesuffix(CORRECTED)
        metrics[raw] = replace(metrics[raw], corrected=metrics.pop(key))
    return metrics


def _arm_names(config: Row) -> list[str]:
    arms = config.get("arms")
    return [str(a["name"]) for a in arms if isinstance(a, dict) and "name" in a] if isinstance(arms, list) else []


def _read_arms(root: Path, order: list[str], problems: list[str]) -> dict[str, list[RunData]]:
    found: dict[str, list[tuple[int, RunData]]] = {}
    for folder in sorted((root / "arms").glob("*")):
        match = _ARM.fullmatch(folder.name)
        if not match or not folder.is_dir():
            problems.append(f"arms/{folder.name} is not named NAME-seedS and is left out")
        elif not (folder / "config.yaml").is_file():
            problems.append(f"arms/{folder.name} was not started (no config.yaml) and is left out")
        else:
            found.setdefault(match["arm"], []).append((int(match["seed"]), read_run(folder)))
    ranked = sorted(found, key=lambda arm: (order.index(arm) if arm in order else len(order), arm))
    return {arm: [run for _, run in sorted(found[arm], key=lambda r: r[0])] for arm in ranked}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return int(value) if is_number(value) and value >= 0 else 0
