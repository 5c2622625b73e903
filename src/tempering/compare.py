"""Comparisons: arms (recipes) times seeds, each a complete run folder with its evals, on one loaded model.

Sits above methods and evals, as the command line does: it is where the two meet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from tempering.api import evaluate, method_module, report
from tempering.core.config import Config, build, merge, read_yaml
from tempering.core.loading import Dtype
from tempering.core.policy import Policy
from tempering.core.progress import say
from tempering.core.run import Run
from tempering.core.sampling import local_sampler

BASE = "base"
NEED_PAIRS = ("separation", "depth")
"""Evals of held-out pairs, which the run holds."""


class Arm(Config):
    """One recipe of a comparison."""

    name: str
    """Row in the report; the run folder is arms/NAME-seedS."""
    recipe: str | None = None
    """Bundled recipe (METHOD/NAME, or NAME of the method compared) laid on `shared`; null: none. `METHOD/`: that
    method with `shared` alone."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings on top of both."""


class EvalStep(Config):
    """One eval that every arm is measured with."""

    eval: str
    """harm, over_refusal, capability, toxicity, knowledge, separation, depth."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its settings."""


class CompareConfig(Config):
    """Configuration of a comparison: `arms` x `seeds`."""

    arms: tuple[Arm, ...] = Field(min_length=1)
    """What is compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; the split and the scoring are the same for all."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Settings of every arm whose recipe does not say otherwise; those that its method has."""
    evals: tuple[EvalStep, ...] = ()
    """What every arm, and the start model, is measured with."""
    model: str = "smollm2"
    """Start model."""
    dtype: Dtype = "auto"
    """Type of the base weights."""
    out: str = "runs/compare"
    """Folder to make."""
    shard: str = Field("0/1", pattern=r"^\d+/\d+$")
    """I/N: take every N-th run, starting at I, so that N processes share a comparison. The last one reports."""


def run_compare(config: CompareConfig, method: str, *, resume: bool = False) -> dict[str, Any]:
    """Train and measure what is not done yet, then write the report.

    Raises:
        FileExistsError: the folder holds something and neither `resume` nor a shard is given.
        ValueError: a recipe or setting that does not fit; nothing has been trained.
    """
    index, count = map(int, config.shard.split("/"))
    if index >= count:
        raise ValueError(f"shard={config.shard}: expected I/N with I below N")
    root = Path(config.out)
    kept = config.model_copy(update={"shard": "0/1"})
    jobs = plan_jobs(config, method)
    run = Run.create(root, "compare", kept, resume=resume or count > 1, share=count > 1)
    policy: Policy | None = None
    for number, (name, module, settings) in enumerate(jobs):
        if number % count != index or _is_complete(root / "arms" / name, config):
            continue
        say(f"arm {number + 1} of {len(jobs)}: {name}")
        is_base = policy is not None and not policy.source.adapter and not policy.source.edit
        if policy is None or not is_base or getattr(settings, "handover", "stack") != "stack":
            policy = Policy.load(config.model, dtype=config.dtype)
        else:
            policy.drop_adapters()
        folder = root / "arms" / name
        if module is None:
            Run.create(folder, "base", settings, resume=True)
        else:
            was_done = Run(folder).is_done
            module.train(settings, resume=folder.exists(), policy=policy)
            # It was trained before, and only evals are missing; all weights changed; or an edit, whose evals read
            # what its run knows.
            if was_done or not policy.adapters or policy.originals:
                policy = Policy.load(str(folder), dtype=config.dtype)
        for step in config.evals:
            given = dict(step.settings)
            if step.eval in NEED_PAIRS:
                if module is None:
                    continue  # the start model against itself
                given.setdefault("data", str(folder / "data" / "heldout.jsonl"))
            if not Run(folder).has(f"evals/{step.eval}.json"):
                sampler = local_sampler(policy, name=config.model if module is None else str(folder))
                evaluate(sampler, [step.eval], out=folder, resume=True, system=name, **given)
        if module is None:
            Run(folder).write_provenance(method="base", judges=[], unsafe=False)
            Run(folder).finish()
        if getattr(settings, "handover", "stack") != "stack":
            policy = None
    left = [name for name, _, _ in jobs if not _is_complete(root / "arms" / name, config)]
    if left:
        say(f"{len(left)} of {len(jobs)} runs are left to other shards: {', '.join(left[:6])}")
        return {"run": str(root), "left": left}
    run.write_provenance(method="compare", compared=method, judges=[], unsafe=False)
    content = report([root])
    run.finish()
    say(f"wrote {root / 'report.html'}")
    return content


def plan_jobs(config: CompareConfig, method: str) -> list[tuple[str, Any, Config]]:
    """List (run name, method module or None for the start model, configuration), arm by arm, seed by seed.

    Seeds are outermost, so that a comparison cut short has every arm at its first seeds.
    """
    jobs: list[tuple[str, Any, Config]] = [(f"{BASE}-seed0", None, _Base(model=config.model))]
    for seed in config.seeds:
        for arm in config.arms:
            folder, _, recipe = (arm.recipe or "").rpartition("/")
            name = folder or method
            module = method_module(name)
            # The recipe has the last word over what is shared: it is what makes an arm a control.
            tree = _fitting(config.shared, module.CONFIG)
            tree = merge(tree, read_yaml(_recipe_file(name, recipe)) if recipe else {})
            tree = merge(tree, arm.overrides)
            tree |= {
                "model": config.model,
                "seed": seed,
                "out": str(Path(config.out) / "arms" / f"{arm.name}-seed{seed}"),
            }
            jobs.append((f"{arm.name}-seed{seed}", module, build(module.CONFIG, tree, f"arm {arm.name}")))
    names = [name for name, _, _ in jobs]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms are called {next(n for n in names if names.count(n) > 1)}")
    return jobs


class _Base(Config):
    """The start model as an arm."""

    model: str


def _fitting(shared: dict[str, Any], cls: type[Config]) -> dict[str, Any]:
    """The shared settings that this method has: `sft` has no curriculum."""
    return {key: value for key, value in shared.items() if key in cls.model_fields}


def _recipe_file(method: str, name: str) -> Path:
    return Path(__file__).parent / "recipes" / method / f"{name}.yaml"


def _is_complete(folder: Path, config: CompareConfig) -> bool:
    run = Run(folder)
    is_base = folder.name.startswith(f"{BASE}-")
    wanted = [step.eval for step in config.evals if not (is_base and step.eval in NEED_PAIRS)]
    return run.is_done and all(run.has(f"evals/{name}.json") for name in wanted)
