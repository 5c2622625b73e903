"""Preference losses: pure functions of per-pair sequence log-probabilities, one value a pair.

Used by the methods that train on pairs; refuses to know about models, batches or steps. `LOSSES` is the
literal table behind the configuration key `loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


class PairScores(NamedTuple):
    """Summed completion log-probabilities in nats under policy and reference, and lengths in tokens."""

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    ref_chosen: Float[Tensor, " B"]
    ref_rejected: Float[Tensor, " B"]
    chosen_tokens: Float[Tensor, " B"]
    rejected_tokens: Float[Tensor, " B"]

    @property
    def delta_chosen(self) -> Float[Tensor, " B"]:
        """Log pi(y+|x) - log pi_ref(y+|x), in nats."""
        return self.chosen - self.ref_chosen

    @property
    def delta_rejected(self) -> Float[Tensor, " B"]:
        """Log pi(y-|x) - log pi_ref(y-|x), in nats."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Float[Tensor, " B"]:
        """Difference of the two log-ratios, in nats; times beta it is the implicit reward margin."""
        return self.delta_chosen - self.delta_rejected


class LossOptions(NamedTuple):
    """Parameters of the losses; each names the losses that read it."""

    beta: float
    """All: inverse temperature of the KL penalty (`ipo`: its tau)."""
    label_smoothing: float = 0.1
    """`robust`: assumed share of flipped labels, in [0, 0.5)."""
    gamma: float = 1.0
    """`simpo`: target margin."""


def sigmoid(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Penalise ranking rejected above chosen, relative to the reference (DPO).

    Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7: -log sigmoid(beta * delta). Policy = reference: ln 2.
    """
    return -logsigmoid(o.beta * s.delta)


def ipo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Regress the log-ratio difference to 1 / (2 beta).

    Azar et al. 2023 (arXiv:2310.12036), Eq. 17. Differs: log-ratios are per token, which is not in the
    paper but is what its authors advised and TRL does. Policy = reference: 1 / (2 beta)^2.
    """
    per_token = s.delta_chosen / s.chosen_tokens - s.delta_rejected / s.rejected_tokens
    return (per_token - 1 / (2 * o.beta)) ** 2


def hinge(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Ask for a margin of one (SLiC). Zhao et al. 2023 (arXiv:2305.10425): max(0, 1 - beta * delta)."""
    return relu(1 - o.beta * s.delta)


def robust(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """DPO that is unbiased when a share epsilon of the labels is flipped; unbounded below.

    Chowdhury et al. 2024 (arXiv:2403.00409), Eq. 14, with epsilon = `label_smoothing`.
    """
    eps, x = o.label_smoothing, o.beta * s.delta
    return (-(1 - eps) * logsigmoid(x) + eps * logsigmoid(-x)) / (1 - 2 * eps)


def apo_zero(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Raise chosen and lower rejected, each against its reference. D'Oosterlinck et al. 2024 (2408.06266)."""
    return 1 - torch.sigmoid(o.beta * s.delta_chosen) + torch.sigmoid(o.beta * s.delta_rejected)


def apo_down(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Lower chosen, and rejected further, for models already better than the data (2408.06266)."""
    return torch.sigmoid(o.beta * s.delta_chosen) + 1 - torch.sigmoid(o.beta * s.delta)


def simpo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """DPO without reference, on mean log-probabilities, with target margin gamma.

    Meng et al. 2024 (arXiv:2405.14734), Eq. 6. TRL calls this CPO with `loss_type="simpo"`, `cpo_alpha=0`.
    """
    return -logsigmoid(o.beta * (s.chosen / s.chosen_tokens - s.rejected / s.rejected_tokens) - o.gamma)


def cpo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """DPO with a uniform reference. Xu et al. 2024 (arXiv:2401.08417), Eq. 5, first term.

    Its second term, the likelihood of the chosen answer, is `nll_weight` of the training loop.
    """
    return -logsigmoid(o.beta * (s.chosen - s.rejected))


def orpo(s: PairScores, o: LossOptions) -> Float[Tensor, " B"]:
    """Odds-ratio penalty of ORPO. Hong et al. 2024 (arXiv:2403.07691), Eq. 7, times beta (their lambda).

    Its first term, the likelihood of the chosen answer, is `nll_weight` of the training loop.
    """
    a, b = s.chosen / s.chosen_tokens, s.rejected / s.rejected_tokens
    return -o.beta * logsigmoid((a - b) - (log1mexp(a) - log1mexp(b)))


def kto_desirable(delta: Float[Tensor, " B"], kl_nats: Tensor | float, beta: float) -> Float[Tensor, " B"]:
    """KTO for a desirable completion. Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 8, lambda_D = 1."""
    return 1 - torch.sigmoid(beta * (delta - kl_nats))


def kto_undesirable(delta: Float[Tensor, " B"], kl_nats: Tensor | float, beta: float) -> Float[Tensor, " B"]:
    """KTO for an undesirable completion. Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 8, lambda_U = 1."""
    return 1 - torch.sigmoid(beta * (kl_nats - delta))


def kto(s: PairScores, o: LossOptions, kl_nats: Tensor | float) -> Float[Tensor, " B"]:
    """KTO of a pair: the mean of its desirable and its undesirable row. Policy = reference, kl 0: 1/2."""
    desirable = kto_desirable(s.delta_chosen, kl_nats, o.beta)
    return (desirable + kto_undesirable(s.delta_rejected, kl_nats, o.beta)) / 2


def kto_kl(total: float, rows: int) -> float:
    """KTO's estimate z of KL(policy || reference), in nats: the mean log-ratio of mismatched rows, at least 0.

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.2; `total` sums log pi(y'|x) - log pi_ref(y'|x).
    """
    return max(0.0, total / rows)


def log1mexp(x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012)."""
    # Both branches are evaluated; the clamp keeps the unused one finite, so that its gradient is not NaN.
    threshold = -math.log(2)
    far = torch.log1p(-torch.exp(torch.clamp(x, max=threshold)))
    near = torch.log(-torch.expm1(torch.clamp(x, min=threshold, max=-1e-7)))
    return torch.where(x < threshold, far, near)


PairLoss = Callable[[PairScores, LossOptions], Tensor]

LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}
"""`kto` is not here: it is a loss of single completions and of a step-wide KL estimate."""

REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})

NLL_WEIGHT = {"cpo": 1.0, "orpo": 1.0}
"""Losses that contain the likelihood of the chosen answer, and its weight."""


def start_value(loss: str, beta: float) -> float | None:
    """The value of the pair loss where policy equals reference, or `None` where there is no such value.

    >>> round(start_value("sigmoid", 0.1), 6), start_value("simpo", 2.0)
    (0.693147, None)
    """
    values = {"hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0, "kto": 0.5, "ipo": 1 / (2 * beta) ** 2}
    return None if loss in REFERENCE_FREE else values.get(loss, math.log(2))
