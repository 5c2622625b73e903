"""What a player minimises: DPO or IPO on summed log-probabilities, or a policy gradient without clipping. Pure.

Built on `core/preference` and `core/policy_gradient`; what is here is the arrangement that AdvGame has. Log-
probabilities are sums over the completion's tokens, in nats, at temperature 1 and untruncated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.core.policy_gradient import clipped_surrogate, group_advantages, kl_k2, kl_k3, truncated_is
from tempering.core.preference import LossOptions, PairLoss, PairScores, sigmoid
from tempering.core.preference import ipo as ipo_of_rates

PairName = Literal["dpo", "ipo"]
Baseline = Literal["batch", "group", "none"]
Estimator = Literal["k3", "k2"]


def sums(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    ref_chosen: Float[Tensor, " B"],
    ref_rejected: Float[Tensor, " B"],
) -> PairScores:
    """Hold summed log-probabilities so that losses which divide by lengths divide by one."""
    one = torch.ones_like(chosen)
    return PairScores(chosen, rejected, ref_chosen, ref_rejected, one, one)


def dpo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """-log sigmoid(beta Delta), Delta of sums. Policy = reference: ln 2."""
    return sigmoid(s, o)


def ipo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """(Delta - 1/(2 beta))^2, Delta of *sums*: at beta 0.1 a margin of 5 nats is the target.

    Azar et al. 2023 (arXiv:2310.12036), Eq. 17. Differs from `core.preference.ipo`, which has rates per token, and
    from the print of arXiv:2512.20806, which has beta Delta in the residual; its code has Delta.
    """
    one = torch.ones_like(s.chosen)
    return ipo_of_rates(s._replace(chosen_tokens=one, rejected_tokens=one), o)


LOSSES: dict[PairName, PairLoss] = {"dpo": dpo, "ipo": ipo}


def pair_loss(name: PairName, s: PairScores, beta: float, nll_scale: float = 0.0) -> Float[Tensor, " B"]:
    """The loss of each pair; `nll_scale` adds the mean negative log-probability of the chosen side's tokens."""
    loss = LOSSES[name](s, LossOptions(beta))
    return loss - nll_scale * s.chosen / s.chosen_tokens if nll_scale else loss


def class_weights(counts: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """What one pair of each class weighs in a player's loss, so that the weighted losses of pairs just add up.

        L = sum_c w_c mean(loss over the pairs of c) / sum of w_c that have pairs

    `counts` are of the whole step, summed over processes. A class without pairs is not there.

    >>> class_weights({"harmful": 4, "benign": 0}, {"harmful": 1.0, "benign": 1.0})
    {'harmful': 0.25}
    """
    total = sum(weights[c] for c, n in counts.items() if n)
    return {c: weights[c] / (n * total) for c, n in counts.items() if n and total}


def advantages(
    reward: Float[Tensor, "P G"], valid: Bool[Tensor, "P G"], baseline: Baseline = "batch"
) -> Float[Tensor, "P G"]:
    """Reward minus the mean of the valid ones: of the whole batch (a player's, of one class), or of each group.

    Not divided by a spread. 0 where invalid; what stands there may be NaN.

    >>> r = torch.tensor([[8.0, 5.0, float("nan"), -1.0]])
    >>> advantages(r, ~r.isnan()).tolist()
    [[4.0, 1.0, 0.0, -5.0]]
    """
    return group_advantages(reward, valid, baseline=baseline, scale="none").advantage


def row_shares(counted: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """What each rollout counts in `grpo`: the mean over its group's, then over groups that have any."""
    per_group = counted.sum(1, keepdim=True)
    groups = (per_group > 0).sum().clamp(min=1)
    return counted / (per_group.clamp(min=1) * groups)


class GrpoTerms(NamedTuple):
    """The loss to minimise, with what was penalised, summed with the same weights."""

    loss: Float[Tensor, ""]
    kl_nats: Float[Tensor, ""]


def grpo(
    logprob: Float[Tensor, "B T"],
    sampler_logprob: Float[Tensor, "B T"],
    ref_logprob: Float[Tensor, "B T"],
    advantage: Float[Tensor, " B"],
    share: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    beta: float,
    *,
    cap: float = 2.0,
    estimator: Estimator = "k3",
) -> GrpoTerms:
    """Raise what earned more than its baseline; per token, not divided by length, not clipped.

        w_t   = stop_grad(min(exp(lp - lp_sampler), cap))
        obj_t = exp(lp - stop_grad(lp)) w_t adv - beta (exp(lp_ref - lp) - (lp_ref - lp) - 1)
        loss  = - sum_rows share sum_t obj_t

    `share` is `row_shares`: mean over the rollouts of a group, then over groups; rows of several micro-batches add
    up. One update per rollout, so that exp(lp - stop_grad(lp)) is 1 and carries the gradient of adv lp. Masked tokens
    may hold anything, and get no gradient. `k2` puts (lp - lp_ref)^2 / 2 for the last bracket: for tokens of the
    policy's own its gradient is that of KL(policy || reference), which the one of k3 is not.

    Differs: w is detached. The authors' code does not detach it, which doubles gradients below the cap.
    """
    at = torch.where(mask, logprob, torch.zeros_like(logprob))
    sampler, reference = (torch.where(mask, x, torch.zeros_like(x)) for x in (sampler_logprob, ref_logprob))
    weight = truncated_is(at, sampler, cap) * share[:, None]
    gain = clipped_surrogate(
        at, at.detach(), advantage, mask, low=None, high=None, weight=weight, agg="sum", total=1.0
    )
    kl = (kl_k3 if estimator == "k3" else kl_k2)(at, reference) * mask
    penalty = (kl.sum(1) * share).sum()
    return GrpoTerms(gain.loss + beta * penalty, penalty.detach())
