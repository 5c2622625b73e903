"""A simulated relearning attack, and the defender's gradient at the weights that it leaves.

With the attacker's weights phi* held fixed, the gradient of L(theta (+) phi*) with respect to theta *is* the
first-order meta-gradient: nothing is differentiated through the attack. The attacker is unsafe by construction and
never saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tempering.core.activations import blocks
from tempering.core.editing import block_parameters, swapped
from tempering.core.policy import LoraSettings, Policy
from tempering.core.text_rows import Tokens
from tempering.core.training import generator, stream_rows
from tempering.methods.unlearn_knowledge.settings import MetaSettings

ATTACKER = "attacker"
STREAM_DRAWS, STREAM_ATTACK, STREAM_BENIGN, STREAM_QUERY, STREAM_MCQ = 10, 11, 12, 13, 14
LR = {"lora": (5e-5, 5e-4), "persistent": (5e-5, 5e-4), "full": (2e-6, 4e-5)}


class Attack(NamedTuple):
    """What one simulated attack does."""

    kind: str
    lr: float
    is_everywhere: bool
    """All blocks, not only those up to the loss layer."""
    benign_steps: int
    """First steps, on texts to keep, of `retain_then_forget`."""


def draw_attack(settings: MetaSettings, seed: int, index: int, has_mcq: bool) -> Attack:
    """Draw the attack of an outer step from (seed, step): the same again after a kill."""
    draw = generator(seed, STREAM_DRAWS, index)
    kinds = list(settings.mix)
    shares = np.array([settings.mix[k] for k in kinds], dtype=float)
    kind = kinds[int(draw.choice(len(kinds), p=shares / shares.sum()))]
    low, high = settings.lr or LR[settings.adversary]
    lr = float(np.exp(draw.uniform(math.log(low), math.log(high))))
    is_everywhere = {"all": True, "below": False, "random": bool(draw.random() < 0.5)}[settings.scope]
    benign = round(settings.life * float(draw.beta(6, 3)))
    if kind == "mcq" and not has_mcq:
        kind = "forget_ce"
    return Attack(kind, lr, is_everywhere, benign if kind == "retain_then_forget" else 0)


def checkpoint_weights(checkpoints: Sequence[int], steps: int) -> dict[int, float]:
    """Return w_j ~ exp((j - K) / 4), sum 1: late attack steps count more.

    >>> [round(w, 4) for w in checkpoint_weights([2, 4, 6, 8], 8).values()]
    [0.1015, 0.1674, 0.276, 0.4551]
    """
    raw = {j: math.exp(0.25 * (j - steps)) for j in sorted(set(checkpoints))}
    return {j: w / sum(raw.values()) for j, w in raw.items()}


class Pools(NamedTuple):
    """What attacks train on, and what the defence is judged on: records of `query` are in no other."""

    support: list[Tokens]
    query: list[Tokens]
    benign: list[Tokens]
    mcq: list[Tokens]

    def batch(self, attack: Attack, step: int, index: int, size: int, seed: int) -> list[Tokens]:
        """The texts of the attack's own `step`, batch `index` of a stream that goes on from attack to attack."""
        is_benign = attack.kind == "benign" or step < attack.benign_steps
        pool, stream = (self.benign, STREAM_BENIGN) if is_benign else (self.support, STREAM_ATTACK)
        if attack.kind == "mcq":
            pool, stream = self.mcq, STREAM_MCQ
        return [pool[i] for i in stream_rows(len(pool), min(size, len(pool)), index, seed, stream)]


class Attacker:
    """The weights of a simulated attacker: LoRA factors on all linear layers, or a copy of the blocks' weights."""

    def __init__(self, policy: Policy, settings: MetaSettings, edited: Mapping[str, nn.Parameter], top: int) -> None:
        self.policy, self.settings, self.edited, self.top = policy, settings, dict(edited), top
        self.is_lora = settings.adversary != "full"
        if self.is_lora:
            shape = LoraSettings(r=settings.rank, alpha=settings.rank, target_modules="all-linear")
            policy.add_adapter(ATTACKER, shape, 0)
            policy.set_aside(ATTACKER)
        self.adam: torch.optim.Adam | None = None
        self.copies: dict[str, nn.Parameter] = {}
        """Float32 copies that Adam updates: in bfloat16 weights of 0.1 would not move by 4e-5."""
        self.overlay: dict[str, Tensor] = {}

    def reset(self, seed: int, index: int, attack: Attack) -> None:
        """Begin an attack: factors drawn from (seed, step) and zero, or a copy of the weights; a fresh Adam."""
        if self.is_lora:
            for name, layer in self.policy.lora_layers():
                a, b = layer.lora_A[ATTACKER].weight, layer.lora_B[ATTACKER].weight
                key = hashlib.sha256(f"{seed}:{index}:{name}".encode()).digest()
                draw = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
                bound = a.shape[1] ** -0.5
                a.data = (torch.rand(a.shape, generator=draw) * 2 * bound - bound).to(a.device)
                b.data = torch.zeros_like(b)
        else:
            weights = block_parameters(self.policy.model)
            self.overlay = {n: p.detach().clone() for n, p in weights.items()}
        phi = self.phi(attack.is_everywhere)
        self.copies = {n: nn.Parameter(p.detach().float().clone()) for n, p in phi.items()}
        self.adam = torch.optim.Adam(list(self.copies.values()), lr=attack.lr, foreach=False)

    def phi(self, is_everywhere: bool) -> dict[str, nn.Parameter]:
        """The attacker's trainable parameters by name, in a fixed order."""
        found = blocks(self.policy.model)
        reach = found if is_everywhere else found[: self.top + 1]
        own = {id(p) for block in reach for p in block.parameters()}
        if self.is_lora:
            named = self.policy.model.named_parameters()
            return {n: p for n, p in sorted(named) if f".{ATTACKER}." in n and id(p) in own}
        return {n: p for n, p in block_parameters(self.policy.model).items() if id(p) in own}

    @contextmanager
    def present(self, training: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Compute at the attacked weights, with gradients of `training` alone; all is as before on exit."""
        with self._overlaid():
            for parameter in self.policy.model.parameters():
                parameter.requires_grad_(False)
            for parameter in training.values():
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                self.policy.freeze()

    @contextmanager
    def _overlaid(self) -> Iterator[None]:
        if self.is_lora:
            with self.policy.beside(ATTACKER):
                yield
            return
        weights = block_parameters(self.policy.model)
        with swapped(weights, self.overlay):
            yield

    def learn(self, loss: Callable[[], Tensor], is_everywhere: bool) -> float:
        """Take one step of the attack; returns its loss."""
        phi = self.phi(is_everywhere)
        assert self.adam is not None
        with self.present(phi):
            value = loss()
            gradients = torch.autograd.grad(value, list(phi.values()), allow_unused=True)
            for copy, gradient in zip(self.copies.values(), gradients, strict=True):
                copy.grad = None if gradient is None else gradient.float()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            for name, parameter in phi.items():
                parameter.data.copy_(self.copies[name].data)
        return float(value.detach())

    def defend(self, loss: Callable[[], Tensor]) -> tuple[dict[str, Tensor], float]:
        """Return the gradient of the defender's loss at the attacked weights, and the loss."""
        with self.present(self.edited):
            value = loss()
            gradients = torch.autograd.grad(value, list(self.edited.values()))
        return dict(zip(self.edited, gradients, strict=True)), float(value.detach())

    def drop(self) -> None:
        """Delete the attacker."""
        self.overlay, self.copies, self.adam = {}, {}, None
        if self.is_lora:
            self.policy.drop_aside(ATTACKER)


def capped(gradient: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Scale a gradient down to the norm `limit` where it is longer."""
    norm = math.sqrt(sum(float(g.float().norm()) ** 2 for g in gradient.values()))
    factor = min(1.0, limit / norm) if norm else 1.0
    return {name: g * factor for name, g in gradient.items()}


def agreeing(gradient: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero the entries whose sign opposes the running mean of the retain gradient (arXiv:2506.12484)."""
    return {name: g * (g.sign() * running[name].sign() >= 0) for name, g in gradient.items()}


def differentiated_through(
    inner: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    query: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    theta: Mapping[str, Tensor],
    phi: Mapping[str, Tensor],
    lr: float,
    steps: int,
    *,
    order: int,
) -> dict[str, Tensor]:
    """Gradient of query(theta, phi*) in theta after `steps` of SGD on inner(theta, phi): of toys, to check by.

    `order=2` differentiates through the steps; `order=1` takes phi* as given, which is what training does.
    """
    theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
    phi = {n: t.detach().requires_grad_() for n, t in phi.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(inner(theta, phi), list(phi.values()), create_graph=order == 2)
        phi = {n: t - lr * g for (n, t), g in zip(phi.items(), gradients, strict=True)}
        if order == 1:
            phi = {n: t.detach().requires_grad_() for n, t in phi.items()}
    found = torch.autograd.grad(query(theta, phi), list(theta.values()))
    return dict(zip(theta, found, strict=True))
