"""Evals: what a target does, as numbers with their intervals. `run_eval` runs one and writes its two files.

`evals/NAME.jsonl` has one row per answer, with `outcomes` (metric -> true, false or a number, null where unscored);
`evals/NAME.json` has the rates and means over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering import judges
from tempering.core.quarantine import override
from tempering.core.run import Run
from tempering.evals import (
    attack_success,
    capability,
    collapse,
    depth,
    direction_ablation,
    harm,
    knowledge,
    lm_eval,
    over_erasure,
    over_refusal,
    policy_retrieval,
    quantisation,
    relearning,
    safe_informative,
    separation,
    toxicity,
)
from tempering.evals.capability import Scorer
from tempering.evals.correction import correct, correct_finished, load_cards
from tempering.evals.results import EvalResult, Journal, Progress, Row
from tempering.evals.settings import HOW_ASKED, OWN_DEFAULTS, EvalConfig, failed_gates, settled

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait

EVALS: dict[str, Callable[..., EvalResult]] = {
    "harm": harm.evaluate,
    "attack_success": attack_success.evaluate,
    "over_refusal": over_refusal.evaluate,
    "policy_retrieval": policy_retrieval.evaluate,
    "capability": capability.evaluate,
    "toxicity": toxicity.evaluate,
    "over_erasure": over_erasure.evaluate,
    "collapse": collapse.evaluate,
    "knowledge": knowledge.evaluate,
    "lm_eval": lm_eval.evaluate,
    "separation": separation.evaluate,
    "depth": depth.evaluate,
    "safe_informative": safe_informative.evaluate,
    "relearning": relearning.evaluate,
    "quantisation": quantisation.evaluate,
    "direction_ablation": direction_ablation.evaluate,
}
"""Name -> `evaluate(sampler, config, *, journal, progress)`."""

QUESTIONS: dict[str, judges.Asks] = {"judge": "harmful", "refusal_judge": "refused", "toxicity_judge": "toxic"}
"""Setting that names a judge, and argument of the evals that use it -> what the judge is asked."""


def judges_of(name: str) -> list[str]:
    """Return which judges an eval asks, as keys of `QUESTIONS`."""
    taken = inspect.signature(EVALS[name]).parameters
    return [which for which in QUESTIONS if which in taken]


def require_judges(names: Sequence[str], config: EvalConfig) -> None:
    """Make sure that the judges of these evals can be had, before anything is asked or written.

    Raises:
        ValueError: one is unknown, cannot answer its question, or cannot be read from its files.
    """
    for which in dict.fromkeys(which for name in names for which in judges_of(name)):
        judges.check_files(judges.load_judge(getattr(config, which), QUESTIONS[which], config.ask_judge))


def run_eval(
    name: str,
    sampler: Sampler,
    config: EvalConfig,
    run: Run,
    *,
    system: str | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run one eval and write `evals/NAME.jsonl` and `evals/NAME.json`; return what the latter holds.

    Finished batches are kept in `evals/NAME.partial.jsonl` until the end. `resume` takes over the scored
    rows of an interrupted eval of the same target with the same settings.

    Raises:
        ValueError: for an unknown eval, or data, settings or judge cards that do not fit.
        RuntimeError: when too many answers stay unscored; the rows are in the partial file.
    """
    if name not in EVALS:
        raise ValueError(f"unknown eval {name!r}; expected one of {', '.join(EVALS)}")
    cards, config = load_cards(config), settled(name, config)
    settings = config.model_dump(mode="json", exclude=HOW_ASKED)
    journal = _journal(run, name, {"target": sampler.name, "settings": settings}, resume)
    result = EVALS[name](sampler, with_cache(config, run.root), journal=journal, progress=progress)
    metrics, account = correct(result.metrics, result.rows, cards)
    label = {"unsafe_override": True} if override() else {}
    document = {
        "schema": 1,
        "eval": name,
        "target": sampler.name,
        "system": system,
        "metrics": metrics,
        "breakdown": result.breakdown,
        "settings": {**settings, "judge_card": list(config.judge_card)},
        "data": result.source,
        "cost": result.cost,
        "warnings": result.warnings,
        **({"correction": account} if account else {}),
        **result.details,
        **label,
    }
    run.write_rows(f"evals/{name}.jsonl", [{**row, **label} for row in result.rows])
    run.write_json(f"evals/{name}.json", document)
    run.path(f"evals/{name}.partial.jsonl").unlink(missing_ok=True)
    return document


def with_cache(config: EvalConfig, root: Path) -> EvalConfig:
    """Return the configuration with a cache folder: its own, or one in the run folder."""
    return config.model_copy(update={"cache": config.cache or str(root / "cache")})


def _journal(run: Run, name: str, settings: dict[str, Any], resume: bool) -> Journal:
    """Open the file of finished batches; its first row says of what target and settings they are."""
    file = f"evals/{name}.partial.jsonl"
    old = run.read_rows(file) if resume and run.has(file) else []
    done = (
        {row["id"]: row for row in old[1:] if None not in row["outcomes"].values()} if old[:1] == [settings] else {}
    )
    run.write_rows(file, [settings, *done.values()])

    def keep(rows: Sequence[Row]) -> None:
        for row in rows:
            run.append_row(file, row)

    return Journal(done, keep, str(run.root / file), run.root)


__all__ = [
    "EVALS",
    "HOW_ASKED",
    "OWN_DEFAULTS",
    "QUESTIONS",
    "EvalConfig",
    "EvalResult",
    "Journal",
    "Scorer",
    "correct_finished",
    "failed_gates",
    "judges_of",
    "load_cards",
    "require_judges",
    "run_eval",
    "settled",
    "with_cache",
]
