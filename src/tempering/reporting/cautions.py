"""What a reader should know before believing the numbers.

Used by the report; refuses to stop for any of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tempering.core.run import Run
from tempering.reporting import reconstruction
from tempering.reporting.collect import Eval, RunData, texts
from tempering.reporting.systems import System
from tempering.reporting.unlearning import warnings_of_unlearning

SMALL_N = 30
UNSCORED_LIMIT = 0.05
_MODEL = re.compile(r"llm:.+?@[^/]+|(?:guard|classifier):.+?(?=/(?:harmful|refused|toxic)[/-])")
"""What of a judge's identity names its model, with its slashes."""
_REPORTING_ROLES = ("report", "eval", "evaluation", "reports")


def warnings_of(runs: Sequence[RunData], systems: Sequence[System]) -> list[str]:
    """List what a reader should know before believing the numbers."""
    out: list[str] = []
    for run in itertools.chain.from_iterable(r.everything for r in runs):
        out += [f"{run.name}: {problem}" for problem in run.problems]
        if not run.is_done:
            out.append(f"{run.name}: no DONE, the run did not finish; its numbers may be partial")
        if run.provenance.get("unsafe"):
            out.append(f"{run.name} is labelled unsafe: do not deploy or publish it")
        out += [f"{run.name}, eval {e.name}: {w}" for e in run.evals for w in e.warnings]
        out += [f"{run.name}, difficulty: {w}" for w in texts(run.difficulty.get("warnings"))]
    out += reconstruction.cautions(runs)
    trained = [(r.name, str(r.root)) for r in runs if r.is_trained and r.method.startswith("unlearn_")]
    out += warnings_of_unlearning(systems, trained)
    out += _small(systems)
    for system in systems:
        out += _metric_warnings(system)
        out += _shared_judges(system)
        out += _judged_by_its_guard(system)
    out += _settings_warnings(systems)
    return list(dict.fromkeys(out))


def _small(systems: Sequence[System]) -> Iterator[str]:
    """Say once for all systems that it is true of what was scored on few answers."""
    named: dict[str, list[str]] = {}
    for system in systems:
        if small := [f"{k} (n = {m.n})" for k, m in system.metrics.items() if m.n < SMALL_N]:
            named.setdefault(", ".join(small), []).append(system.name)
    for small_metrics, names in named.items():
        yield f"{', '.join(names)}: fewer than {SMALL_N} scored for {small_metrics}; the intervals are wide"


def _metric_warnings(system: System) -> Iterator[str]:
    for key, m in system.metrics.items():
        total = m.n + m.unscored
        if total and m.unscored / total > UNSCORED_LIMIT:
            yield (
                f"{system.name}: {m.unscored} of {total} verdicts of {key} are unscored "
                f"(limit {UNSCORED_LIMIT:.0%}); the rate may be biased"
            )
    bases = {k.partition("/")[0].partition("@")[0] for k in system.metrics}
    if bases & {"harmful_rate", "attack_success_rate"}:
        for price, name in (("over_refusal_rate", "over-refusal"), ("capability_accuracy", "capability")):
            if price not in bases:
                yield f"{system.name}: harm is reported without its price, {name} was not measured"


def _shared_judges(system: System) -> Iterator[str]:
    """Say where a judge of training reports too, or is the model of one that does; and where two roles are one."""
    reporting = {m.judge: k for k, m in reversed(system.metrics.items()) if m.judge}
    for run in system.runs:
        named = list(_training_judges(run)) if run.is_trained else []
        for role, identity in named:
            if identity in reporting:
                yield (
                    f"{system.name}: judge {identity} reports {reporting[identity]} and was also used "
                    f"in training ({role}); the rate may flatter the model"
                )
                continue
            theirs = [other for other in reporting if models_of(identity) & models_of(other)]
            if theirs:
                yield (
                    f"{system.name}: judge {identity} ({role}) of training is the model of {theirs[0]}, which "
                    f"reports {reporting[theirs[0]]}; the rate may flatter the model"
                )
        roles: dict[str, list[str]] = {}
        for role, identity in named:
            for model in sorted(models_of(identity)):
                if role not in roles.setdefault(model, []):
                    roles[model].append(role)
        for model, several in roles.items():
            if len(several) > 1:
                yield (
                    f"{system.name}: judge {model} is {' and '.join(several)}: what it overlooks in one it overlooks "
                    "in the other"
                )


def models_of(identity: str) -> set[str]:
    """Take an identity apart into the models behind it: without question, rubric and version, each of an ensemble.

    >>> sorted(models_of("ensemble:rules/harmful/v3 + llm:org/m@host:80/harmful-cd/parser-v2/v1"))
    ['llm:org/m@host:80', 'rules']
    """
    names = identity.removeprefix("ensemble:").split(" + ") if identity.startswith("ensemble:") else [identity]
    return {found[0] if (found := _MODEL.match(name)) else name.partition("/")[0] for name in names}


def _training_judges(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield (role, identity) of the judges of a run's training, and of every run that it starts or learns from."""
    seen: set[Path] = set()
    todo = [(run.root, run.config, run.provenance)]
    while todo:
        root, config, provenance = todo.pop(0)
        if root.resolve() in seen:
            continue
        seen.add(root.resolve())
        for role, identity in _judges_in(provenance):
            if role not in _REPORTING_ROLES:
                yield (role if root == run.root else f"{role} of {root}"), identity
        data = config.get("data")
        sources = [config.get("model"), data.get("train") if isinstance(data, dict) else data]
        parents = provenance.get("parents")
        for source in [*sources, *(parents if isinstance(parents, list) else [])]:
            if isinstance(source, str) and (parent := _run_of(Path(source))) is not None:
                todo.append(parent)


def _run_of(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """A run folder, or the one that a file lies in, with configuration and provenance; None where it is neither."""
    for root in (path, path.parent, path.parent.parent):  # a file may lie in its `data/`
        if (root / "config.yaml").is_file():
            run = Run.open(root)
            try:
                provenance = run.read_json("provenance.json") if run.has("provenance.json") else {}
                config = run.config
            except (ValueError, yaml.YAMLError):
                return None
            is_read = isinstance(config, dict) and isinstance(provenance, dict)
            return (root, config, provenance) if is_read else None
    return None


def _judged_by_its_guard(system: System) -> Iterator[str]:
    for e in itertools.chain.from_iterable(system.members):
        chosen = e.settings.get("attribution")
        guard = chosen.get("guard") if isinstance(chosen, dict) else None
        if guard is not None and guard == e.settings.get("judge"):
            yield f"{system.name}, eval {e.name}: judge {guard} also chose among the answers: an oracle's rates"


def judges_of(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield (role, identity) of the judges in a run's provenance, whichever way they are written down."""
    return _judges_in(run.provenance)


def _judges_in(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    judges = provenance.get("judges") or {}
    items = judges.items() if isinstance(judges, dict) else [("judge", judges)]
    for role, entry in items:
        for one in entry if isinstance(entry, list) else [entry]:
            if isinstance(one, dict):
                yield str(one.get("role", role)), str(one.get("identity") or one.get("judge") or one)
            elif one:
                yield str(role), str(one)


def _settings_warnings(systems: Sequence[System]) -> Iterator[str]:
    first: dict[str, tuple[str, Eval]] = {}
    for system in systems:
        for e in itertools.chain.from_iterable(system.members):
            name, one = first.setdefault(e.name, (system.name, e))
            ignored = {"out", "data"} if e.data_hash and e.data_hash == one.data_hash else {"out"}
            keys = one.settings.keys() & e.settings.keys() - ignored
            differ = sorted(k for k in keys if one.settings[k] != e.settings[k])
            if differ and name != system.name:
                yield f"eval {e.name}: {system.name} and {name} differ in settings: {', '.join(differ)}"
