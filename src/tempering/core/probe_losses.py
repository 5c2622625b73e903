"""Losses on states along probe directions, over several layers at once.

Used by objectives that take an attribute away from states; refuses to know what the attribute is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from tempering.core.activations import (
    cosine_hinge,
    cosine_to,
    erase_target,
    masked_mean,
    mean_square,
    projection_hinge,
    relative_square,
)
from tempering.core.logprobs import kl_from_base
from tempering.core.policy import Policy
from tempering.core.probes import Probe
from tempering.core.text_rows import TokenRows, read_states

Mode = Literal["cos_hinge", "proj_hinge", "cos_steer", "mse_steer", "erase_target"]
"""How a state along a direction is priced: a key of `STATE_LOSSES`."""

StateLoss = Callable[[Tensor, Tensor | None, Probe], Tensor]

STATE_LOSSES: dict[Mode, StateLoss] = {
    "cos_hinge": lambda h, h0, p: cosine_hinge(h, p.direction, p.mean, p.threshold),
    "proj_hinge": lambda h, h0, p: projection_hinge(h, p.direction, p.projection, p.spread),
    "cos_steer": lambda h, h0, p: cosine_to(h, -p.direction),
    "mse_steer": lambda h, h0, p: mean_square(h, -p.norm * p.direction),
    "erase_target": lambda h, h0, p: erase_target(h, given(h0), p.direction, p.projection),
}
"""How states that carry the attribute are priced. The hinges stop where states look like those without it; the
steers, RMU towards -v with and without a length, never stop; `erase_target` moves along v alone, to the mean."""
NEEDS_FROZEN: tuple[Mode, ...] = ("erase_target",)
"""Those that compare with the states as they were."""


def given(h0: Tensor | None) -> Tensor:
    """The states as they were, where a loss needs them."""
    if h0 is None:
        raise ValueError("this loss compares with the states as they were, and got none")
    return h0


def forget_share(
    policy: Policy,
    batch: TokenRows,
    probes: Mapping[int, Probe],
    weights: Mapping[int, float],
    phi: StateLoss,
    total: float,
    *,
    needs_frozen: bool = False,
) -> Tensor:
    """Return this part's share of sum_l w_l mean(phi(h_l)), of a mean over `total` texts.

    One forward for all layers, which ends at the last of them.
    """
    layers = sorted(weights)
    frozen: list[Tensor | None] = [None] * len(layers)
    if needs_frozen:
        with policy.reference():
            frozen = list(read_states(policy, batch, layers))
    loss = torch.zeros((), device=policy.device)
    for layer, h, h0 in zip(layers, read_states(policy, batch, layers), frozen, strict=True):
        loss = loss + weights[layer] * masked_mean(phi(h, h0, probes[layer]), batch.mask, total=total)
    return loss


def retain_share(
    policy: Policy, batch: TokenRows, weights: Mapping[int, float], alpha: float, beta_kl: float, total: float
) -> Tensor:
    """Return this part's share of alpha sum_l w_l mean(||h - h0||^2 / ||h0||^2) + beta_kl mean(KL(before || now)).

    With beta_kl = 0 the pass ends at the last layer.
    """
    layers, to_end = sorted(weights), beta_kl > 0
    with policy.reference():
        before = read_states(policy, batch, layers, to_end=to_end)
    now = read_states(policy, batch, layers, to_end=to_end)
    loss = torch.zeros((), device=policy.device)
    for layer, h, h0 in zip(layers, now, before, strict=False):
        loss = loss + alpha * weights[layer] * masked_mean(relative_square(h, h0), batch.mask, total=total)
    if to_end:
        kl = kl_from_base(policy.model, now[-1].flatten(0, 1), before[-1].flatten(0, 1)).view(batch.ids.shape)
        loss = loss + beta_kl * masked_mean(kl, batch.mask, total=total)
    return loss


def tensors_of(probes: Mapping[int, Probe]) -> dict[str, Tensor]:
    """Directions and statistics, for `directions.safetensors`."""
    out = {}
    for layer, p in probes.items():
        out[f"{layer}.direction"], out[f"{layer}.mean"] = p.direction.cpu(), p.mean.cpu()
        out[f"{layer}.statistics"] = torch.tensor([p.projection, p.spread, p.threshold, p.norm])
    return out


def probes_of(tensors: Mapping[str, Tensor], device: torch.device) -> dict[int, Probe]:
    """Read what `tensors_of` made."""
    found = {}
    for layer in sorted(int(name.partition(".")[0]) for name in tensors if name.endswith(".statistics")):
        v, mean = (tensors[f"{layer}.{what}"].to(device) for what in ("direction", "mean"))
        found[layer] = Probe(layer, v, mean, *map(float, tensors[f"{layer}.statistics"]))
    return found
