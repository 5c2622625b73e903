"""Eval `depth`: how far into a rejected answer does the policy push it down?

A policy that only changes its first tokens is undone by putting those into its mouth. With p0 the recorded base:

    delta_i(t) = log p0(y-_t | x, y-_<t) - log pi(y-_t | x, y-_<t)       in nats, t < 128
    delta(t)   = mean over the pairs whose rejected answer is longer than t (`curves.count`)
    C(t)       = sum of delta(s) for s <= t                              (`curves.cumulative`)
    depth_q    = smallest t by which a share q of the sum of max(delta, 0) is reached; null where that sum is 0

Metrics: `depth_0.5` and `depth_0.9` (tokens, larger is deeper) and `cumulative_delta`, C at its end, with bootstrap
intervals over prompts; `rejected_suppression`, the mean over pairs of their own sum, which the report can pair.

    temper eval runs/mine depth
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempering.core.records import content_id
from tempering.core.stats import Interval, bootstrap_mean
from tempering.evals.pairs import EncodedPair, has_start, initial, load_pairs, local
from tempering.evals.results import Cost, EvalResult, Journal, Progress, Row
from tempering.evals.separation import entry
from tempering.evals.settings import EvalConfig

if TYPE_CHECKING:
    from tempering.core.policy import Policy
    from tempering.core.sampling import Sampler

POSITIONS = 128
PAIRS = 200
LONGEST = 512
"""Tokens of prompt + rejected answer; longer ones are cut at their end."""
SHARES = (0.5, 0.9)
DRAWS = 2000
BATCH_TOKENS = 4096


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Score the rejected answers token by token under the policy and its start.

    Raises:
        FileNotFoundError, ValueError: there are no pairs to be had, or the target has no weights here.
    """
    del journal  # one pass of scoring: there is little to take over
    cost, target = Cost(), local(sampler, "depth")
    policy = target.policy
    loaded = load_pairs(target, config, config.limit or PAIRS)
    pairs = [p for p in loaded.pairs if p.rejected.prompt_tokens < LONGEST]
    if not pairs:
        raise ValueError(
            f"{loaded.source['source']}: every prompt fills {LONGEST} tokens, no answer is left to score"
        )
    now = rejected_logprobs(policy, pairs)
    if progress:
        progress(len(pairs) // 2, len(pairs))
    start = now
    if has_start(policy):
        with initial(policy) as first:
            start = rejected_logprobs(first, pairs)
    delta = start - now
    if progress:
        progress(len(pairs), len(pairs))
    prompts = [content_id(p.pair.messages) for p in pairs]
    mean, count = mean_delta(delta)
    own = np.nansum(delta, axis=1)
    metrics = {
        **depth_metrics(delta, prompts),
        "rejected_suppression": entry(bootstrap_mean(own, groups=prompts), len(own)),
    }
    curves = {"delta": mean.tolist(), "count": count.tolist(), "cumulative": np.cumsum(mean).tolist()}
    return EvalResult(
        _rows(pairs, delta, own), metrics, {}, cost.summary(), loaded.warnings, loaded.source, {"curves": curves}
    )


# --- pure functions -----------------------------------------------------------------------------------


def mean_delta(delta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Average (pairs, t) over the pairs that have a token at t (NaN: none); stops where no pair has."""
    there = ~np.isnan(delta)
    count = there.sum(axis=0)
    width = int((count > 0).sum())  # answers have no holes: the counts only fall
    return np.nansum(delta, axis=0)[:width] / count[:width], count[:width]


def depth_at(mean: NDArray[np.float64], share: float) -> float | None:
    """Smallest t by which `share` of the sum of max(mean, 0) is reached; `None` where nothing was pushed down.

    >>> depth_at(np.array([3.0, -1.0, 1.0]), 0.5), depth_at(np.array([3.0, -1.0, 1.0]), 0.9)
    (0.0, 2.0)
    """
    reached = np.cumsum(np.maximum(mean, 0))
    if not len(reached) or reached[-1] <= 0:
        return None
    return float(np.argmax(reached >= share * reached[-1]))


def depth_metrics(delta: NDArray[np.float64], prompts: Sequence[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`depth_q` and the end of C, with percentile intervals of the bootstrap over whole prompts."""
    mean, _ = mean_delta(delta)
    numbers: dict[str, int] = {}
    group = np.array([numbers.setdefault(p, len(numbers)) for p in prompts])
    # Sums and counts of each prompt: a resampled curve is a ratio of weighted sums.
    onto = np.zeros((len(numbers), len(prompts)))
    onto[group, np.arange(len(prompts))] = 1
    sums, counts = onto @ np.nan_to_num(delta), onto @ (~np.isnan(delta)).astype(np.float64)
    weights = np.random.default_rng(seed).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), size=DRAWS
    )
    total = weights @ counts
    curves = np.divide(weights @ sums, total, out=np.zeros_like(total), where=total > 0)
    n = len(prompts)
    metrics = {}
    for share in SHARES:
        value = depth_at(mean, share)
        drawn = [d for curve in curves if (d := depth_at(curve, share)) is not None]
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn and value is not None else (None, None)
        metrics[f"depth_{share}"] = {**entry(Interval(0, 0, 0), n), "value": value, "low": low, "high": high}
    low, high = np.quantile(curves.sum(axis=1), [0.025, 0.975]).tolist()
    metrics["cumulative_delta"] = entry(Interval(float(mean.sum()), low, high), n)
    return metrics


# --- scoring ------------------------------------------------------------------------------------------


def rejected_logprobs(policy: Policy, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
    """Log-probability in nats of each of the first tokens of each rejected answer: (pairs, t), NaN where none."""
    import torch

    from tempering.core.chat import Encoded, collate, fill_batches

    cut = [Encoded(p.rejected.ids[: min(LONGEST, p.rejected.prompt_tokens + POSITIONS)], p.rejected.prompt_tokens)
           for p in pairs]  # fmt: skip
    out = np.full((len(pairs), POSITIONS), np.nan)
    for batch in fill_batches([len(row.ids) for row in cut], BATCH_TOKENS):
        tokens = collate([[cut[i]] for i in batch], policy.tokenizer.pad_token_id, policy.device)
        with torch.no_grad():
            flat = policy.scorer.by_token(tokens).cpu()
        for i, values in zip(batch, torch.split(flat, list(tokens.lengths)), strict=True):
            out[i, : len(values)] = values.numpy()
    return out


def _rows(pairs: Sequence[EncodedPair], delta: NDArray[np.float64], own: NDArray[np.float64]) -> list[Row]:
    return [
        {
            "id": p.pair.id,
            "prompt_id": content_id(p.pair.messages),
            "prompt": p.pair.text,
            "category": p.pair.category,
            "delta": np.round(d[~np.isnan(d)], 6).tolist(),
            "outcomes": {"rejected_suppression": float(total)},
        }
        for p, d, total in zip(pairs, delta, own, strict=True)
    ]
