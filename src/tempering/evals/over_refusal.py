"""Eval `over_refusal`: how often does the target refuse what it should answer?

The price of safety, on benign requests and on borderline ones, which sound dangerous and are not.
`over_refusal_rate` counts full and partial refusals; `partial_refusal_rate` says how many were partial.

    temper eval smollm2 over_refusal limit=100
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tempering import judges
from tempering.core.records import Completion, Prompt, Verdict
from tempering.evals.results import (
    Cost,
    EvalResult,
    Journal,
    Progress,
    Row,
    answer,
    by_category,
    in_batches,
    judged,
    rates,
    remarks,
    verdict_row,
)
from tempering.evals.settings import EvalConfig, load_prompts

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait

HARMFUL = ("harmful", "unsafe")


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    refusal_judge: judges.Judge | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Ask every prompt and judge which answers are refusals.

    Raises:
        FileNotFoundError, ValueError: when prompts or judge cannot be had.
        RuntimeError: when too many answers stay unscored.
    """
    cost = Cost()
    judge = refusal_judge or judges.load_judge(config.refusal_judge, "refused", config.ask_judge)
    prompts, source, warnings = load_prompts(
        config, "borderline_heldout", skip_labels=HARMFUL, why="`over_refusal` asks what should be answered"
    )

    def work(batch: Sequence[Prompt], on_done: Callable[[int], None]) -> list[Row]:
        completions = answer(sampler, batch, config, cost, on_done)
        verdicts = judged(judge, batch, batch, completions, cost)
        return [_row(*columns) for columns in zip(batch, completions, verdicts, strict=True)]

    rows = in_batches(prompts, lambda p: p.id, work, config, journal=journal, progress=progress)
    judge_of = dict.fromkeys(("over_refusal_rate", "partial_refusal_rate"), judge.identity)
    return EvalResult(
        rows,
        rates(rows, judge_of),
        by_category(rows, judge_of),
        cost.summary(),
        [*warnings, *remarks(rows)],
        source,
    )


def _row(prompt: Prompt, completion: Completion, verdict: Verdict) -> Row:
    is_partial = None if verdict.is_unscored else verdict.label == "partial"
    is_refused = None if verdict.is_unscored else bool(verdict.holds or is_partial)
    return {
        "id": prompt.id,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "category": prompt.category,
        "attack": "direct",
        "completion": completion.text,
        "finish": completion.finish,
        "verdict": verdict_row(verdict),
        "metric": "over_refusal_rate",
        "outcome": is_refused,
        "outcomes": {"over_refusal_rate": is_refused, "partial_refusal_rate": is_partial},
    }
