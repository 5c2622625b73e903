"""Averages of LoRA players over steps: three rules, what the cheap one gets wrong, and how far it has drifted. Pure.

An update is dW = scale B A, so averaging the factors is not averaging dW. With the average (B_e, A_e), the player
(B, A) and the decay g, the exact average is g scale B_e A_e + (1 - g) scale B A, of twice the rank. Averages are
float32: a step of 0.05 times a small change is lost in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Mode = Literal["factors", "frozen_a", "retruncate"]


class Factors(NamedTuple):
    """The LoRA factors of one layer; the scale is the same for a player and its average, and stands apart."""

    b: Float[Tensor, "D R"]
    a: Float[Tensor, "R E"]

    @property
    def product(self) -> Float[Tensor, "D E"]:
        """B A, dense: for tests and the audit."""
        return self.b @ self.a


class Drift(NamedTuple):
    """The error of averaging factors, relative to the exact average, over the layers."""

    largest: float
    mean: float


class Truncated(NamedTuple):
    """The exact average at a given rank, and the norm of what that left out."""

    factors: Factors
    dropped: float


def copy(player: Mapping[str, Factors]) -> dict[str, Factors]:
    """Start an average: the player's own tensors in float32 (float64 where they are), without gradient."""
    return {name: Factors(*(_high(tensor).clone() for tensor in factors)) for name, factors in player.items()}


def average(old: Float[Tensor, "*S"], new: Float[Tensor, "*S"], decay: float) -> Float[Tensor, "*S"]:
    """Move an average towards a value: decay old + (1 - decay) new, in the precision of the average."""
    return decay * old + (1 - decay) * new.detach().to(old.dtype)


def update(
    averages: Mapping[str, Factors],
    player: Mapping[str, Factors],
    decay: float,
    mode: Mode = "factors",
    rank: int | None = None,
) -> dict[str, Factors]:
    """Average a player into its EMA, layer by layer; once a step.

        factors     B_e <- g B_e + (1-g) B and the same for A; off by `factor_error`
        frozen_a    A is the same for both and stays; B is averaged, which is exact
        retruncate  the exact average, cut to `rank` (default: the rank that it has)

    Raises:
        ValueError: layers differ; the decay is not in [0, 1]; with `frozen_a`, A has been trained.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"ema.decay is in [0, 1], got {decay}")
    if set(averages) != set(player):
        odd = sorted(set(averages) ^ set(player))[0]
        raise ValueError(f"the average and the player adapt other layers: {odd} is on one side only")
    out = {}
    for name, old in averages.items():
        new = player[name]
        if mode == "retruncate":
            out[name] = retruncate(old, new, decay, rank or old.a.shape[0]).factors
        elif mode == "factors":
            out[name] = Factors(average(old.b, new.b, decay), average(old.a, new.a, decay))
        elif torch.equal(old.a, new.a.detach().to(old.a.dtype)):
            out[name] = Factors(average(old.b, new.b, decay), old.a)
        else:
            raise ValueError(f"ema.mode frozen_a: A of {name} is not that of its average; train B alone")
    return out


def factor_error(averages: Factors, player: Factors, decay: float) -> Float[Tensor, "D E"]:
    """What averaging factors adds to the exact average of B A in one step: -g (1-g) (B - B_e)(A - A_e)."""
    return -decay * (1 - decay) * (player.b - averages.b) @ (player.a - averages.a)


def drift(averages: Factors, player: Factors, decay: float) -> float:
    """The norm of `factor_error` over that of the exact average, from R x R Gram matrices; 0 where both are 0.

        norm(B A)^2 = tr((B^T B)(A A^T))

    Once a step, before `update`.
    """
    gap = Factors(_high(player.b) - _high(averages.b), _high(player.a) - _high(averages.a))
    error = decay * (1 - decay) * product_norm(gap)
    return error / exact if (exact := product_norm(exact_average(averages, player, decay))) else 0.0


def drift_over(averages: Mapping[str, Factors], player: Mapping[str, Factors], decay: float) -> Drift:
    """The drift of one step over all layers."""
    found = [drift(averages[name], player[name], decay) for name in averages]
    return Drift(max(found), sum(found) / len(found)) if found else Drift(0.0, 0.0)


def exact_average(averages: Factors, player: Factors, decay: float) -> Factors:
    """The exact average as factors of the ranks' sum: [sqrt(g) B_e, sqrt(1-g) B] and [sqrt(g) A_e; sqrt(1-g) A]."""
    g, h = decay**0.5, (1 - decay) ** 0.5
    return Factors(
        torch.cat([g * _high(averages.b), h * _high(player.b)], dim=1),
        torch.cat([g * _high(averages.a), h * _high(player.a)], dim=0),
    )


def retruncate(averages: Factors, player: Factors, decay: float, rank: int) -> Truncated:
    """The best approximation of the exact average at this rank: SVD of the small core between two QRs.

    sqrt(sigma) goes to each side. `dropped` is sqrt(sum of the dropped sigma^2), the least possible
    (Eckart & Young 1936).
    """
    whole = exact_average(averages, player, decay)
    q_left, r_left = torch.linalg.qr(whole.b)
    q_right, r_right = torch.linalg.qr(whole.a.T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    cut = Factors((q_left @ u[:, :rank]) * root, (vh[:rank] @ q_right.T) * root[:, None])
    short = rank - len(root)
    if short > 0:
        cut = Factors(
            *(torch.nn.functional.pad(t, p) for t, p in zip(cut, ((0, short), (0, 0, 0, short)), strict=True))
        )
    return Truncated(cut, float(sigma[rank:].norm()))


def product_norm(factors: Factors) -> float:
    """The Frobenius norm of B A without forming it."""
    square = torch.sum((factors.b.T @ factors.b) * (factors.a @ factors.a.T))  # both symmetric: the trace
    return float(square.clamp(min=0).sqrt())


def audit(exact: Float[Tensor, "D E"], player: Factors, decay: float) -> Float[Tensor, "D E"]:
    """Go on with the exact average of one layer's B A, dense: what the accumulated drift is measured against."""
    return average(exact, _high(player.product), decay)


def accumulated_drift(exact: Float[Tensor, "D E"], averages: Factors) -> float:
    """How far an average's B A has gone from the exact one, relative to it; 0 where both are 0."""
    norm = float(exact.norm())
    gap = float((averages.product - exact).norm())
    return gap / norm if norm else gap


def _high(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
