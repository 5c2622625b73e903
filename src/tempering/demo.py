"""`temper demo`: align the embedded model with Staged-Competence, measure before and after, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tempering.api import evaluate, report
from tempering.core.config import Config, build, merge, read_yaml
from tempering.core.policy import Policy
from tempering.core.progress import metrics_table, say
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.methods import staged_competence

RECIPE = Path(__file__).parent / "recipes" / "staged_competence" / "demo.yaml"

EVALS: dict[str, dict[str, Any]] = {
    "harm": {"attacks": ["direct", "prefill"], "max_new_tokens": 48},
    "over_refusal": {"max_new_tokens": 48},
    "capability": {},
}
"""What both models are measured with."""


class DemoConfig(Config):
    """Settings of `temper demo`."""

    out: str = "runs/demo"
    """Run folder to make."""
    seed: int = 0
    """Of training."""
    limit: int | None = None
    """Prompts per eval (default: all); small for a first look."""


def run_demo(config: DemoConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run the demo and return `report.json`'s content."""
    start = time.monotonic()
    settings = merge(read_yaml(RECIPE), {"out": config.out, "seed": config.seed})
    training = build(staged_competence.CONFIG, settings, f"recipe {RECIPE.name}")
    Run.require_free(config.out, resume)
    say("1/4 load SmolLM2-135M-Instruct (the first time, its weights are converted: about 20 s)")
    policy = Policy.load(training.model, dtype=training.dtype)
    say("2/4 align it with Staged-Competence on the bundled preference pairs")
    run = staged_competence.train(training, resume=resume, policy=policy)
    if not policy.adapters:  # training was done already: take its result
        policy = Policy.load(str(run.root), dtype=training.dtype)
    say("3/4 measure it, and the model as it was, on held-out prompts of other categories")
    limits = {} if config.limit is None else {"limit": config.limit}
    base = run.root / "base"
    results: dict[str, dict[str, Any]] = {}
    systems: tuple[tuple[str, str, Path, list[str]], ...] = (
        ("base", training.model, base, []),
        ("staged_competence", str(run.root), run.root, list(policy.adapters)),
    )
    for system, target, folder, adapters in systems:
        results[system] = {}
        with policy.using(adapters):
            for name, given in EVALS.items():
                done = evaluate(
                    LocalSampler(policy, name=target),
                    [name],
                    out=folder,
                    resume=True,
                    system=system,
                    **merge(given, limits),
                )
                results[system] |= done[name]["metrics"]
    say("4/4 report")
    content = report([base, run.root], run.root, title="Staged-Competence on SmolLM2-135M-Instruct")
    metrics_table(results, title="before and after, 95 % intervals")
    say(f"report: {run.root / 'report.html'}   ({(time.monotonic() - start) / 60:.1f} minutes)")
    return content
