"""The networks of one player in as little memory as its tuning allows: newest, averages, start, a past one.

    adapters   stacks of named LoRA adapters on one frozen base, which the other player may use too
    whole      weights of its own, float32; the others are copies, exchanged for them while they compute

Both answer to the same names (`Weights`). Refuses to know about roles, rollouts and losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from tempering.core.editing import clones, put, swapped
from tempering.core.policy import Policy
from tempering.methods.advgame import ema
from tempering.methods.advgame.ema import Drift, Factors
from tempering.methods.advgame.settings import AdvGameConfig

Weights = Literal["current", "ema", "slow_ema", "initial", "past"]
"""Which of a player's networks."""


class Networks(Protocol):
    """What a player is made of."""

    policy: Policy
    below: list[str]
    """Frozen adapters that are part of its start."""

    def begin(self, trains: bool) -> None:
        """Take the start as it is now, after any warm start, as what trains and what is averaged."""
        ...

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The (name, parameter)s that train, in a fixed order."""
        ...

    def playing(self, weights: Weights, training: Sequence[nn.Parameter] = ()) -> Any:
        """Compute with one of the networks; only `training` has gradients."""
        ...

    def average(self) -> dict[str, float]:
        """Update all averages; returns how far they drift from the exact ones, where they do."""
        ...

    def hash(self, weights: Weights) -> str:
        """Identify what one of the networks has beside the base that the run began with."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copy what a resumed run needs."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, bit for bit."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the average, for `take_past`."""
        ...

    def take_past(self, state: Mapping[str, Tensor]) -> None:
        """Let `past` be what `snapshot` returned."""
        ...

    def export(self, folder: Path, lineage: dict[str, Any], weights: Weights, *, unsafe: bool) -> None:
        """Write one of the networks as a model reference."""
        ...


class AdapterNetworks:
    """One adapter that trains, named as the player, on top of frozen ones (`below`); and averages of it."""

    def __init__(
        self, name: str, policy: Policy, below: Sequence[str], decays: Mapping[str, float], config: AdvGameConfig
    ) -> None:
        self.name, self.policy, self.below, self.config = name, policy, list(below), config
        self.decays = dict(decays)
        policy.add_player(name, config.lora, config.seed)
        for average in self.decays:
            policy.add_player(f"{name}_{average}", config.lora, config.seed)
            policy.copy_player(name, f"{name}_{average}")
        self.exact: Tensor | None = None

    def begin(self, trains: bool) -> None:
        """See `Networks`."""
        if self.config.ema.audit and trains:
            self.exact = next(iter(self.factors().values())).product.detach().float().clone()

    def stack(self, weights: Weights) -> list[str]:
        """The adapters of one of the networks, for `Policy.using`."""
        if weights == "initial":
            return self.below
        return [*self.below, self.name if weights == "current" else f"{self.name}_{weights}"]

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """See `Networks`; B alone where A is frozen."""
        wanted = {id(b) for _, _, b, _ in self.policy.player_layers(self.name)}
        if self.config.ema.mode != "frozen_a":
            wanted |= {id(a) for _, a, _, _ in self.policy.player_layers(self.name)}
        return sorted((n, p) for n, p in self.policy.model.named_parameters() if id(p) in wanted)

    def playing(self, weights: Weights, training: Sequence[nn.Parameter] = ()) -> Any:
        """See `Networks`."""
        return self.policy.using(self.stack(weights), training=training)

    def factors(self, weights: Weights = "current") -> dict[str, Factors]:
        """The LoRA factors of the player's own adapter, or of an average, layer by layer."""
        name = self.stack(weights)[-1]
        return {layer: Factors(b, a) for layer, a, b, _ in self.policy.player_layers(name)}

    def average(self) -> dict[str, float]:
        """See `Networks`."""
        facts: dict[str, float] = {}
        own, settings = self.factors(), self.config.ema
        for average, decay in self.decays.items():
            old = self.factors(average)  # type: ignore[arg-type]  # the keys are weights
            if average == "ema":
                drift = Drift(0.0, 0.0) if settings.mode == "frozen_a" else ema.drift_over(old, own, decay)
                facts |= {"drift": drift.mean, "drift_largest": drift.largest}
            for layer, new in ema.update(old, own, decay, settings.mode).items():
                old[layer].a.data.copy_(new.a)
                old[layer].b.data.copy_(new.b)
        if self.exact is not None:
            layer = next(iter(own))
            self.exact = ema.audit(self.exact, own[layer], self.config.ema.decay)
            facts["drift_accumulated"] = ema.accumulated_drift(self.exact, self.factors("ema")[layer])
        return facts

    def hash(self, weights: Weights) -> str:
        """See `Networks`."""
        return self.policy.adapter_hash(self.stack(weights)) if self.stack(weights) else ""

    def state(self) -> dict[str, Tensor]:
        """See `Networks`."""
        names = [self.name, *(f"{self.name}_{average}" for average in self.decays)]
        exact = {} if self.exact is None else {f"exact:{self.name}": self.exact.cpu().clone()}
        return {**self.policy.adapter_state(names), **exact}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Networks`."""
        own = self.state()
        self.policy.load_state({name: state[name] for name in own if not name.startswith("exact:")})
        if self.exact is not None:
            self.exact = state[f"exact:{self.name}"].to(self.exact.device)

    def snapshot(self) -> dict[str, Tensor]:
        """See `Networks`."""
        self._make_room()
        self.policy.copy_player(self.stack("ema")[-1], f"{self.name}_past")
        return self.policy.adapter_state([f"{self.name}_past"])

    def take_past(self, state: Mapping[str, Tensor]) -> None:
        """See `Networks`."""
        self._make_room()
        self.policy.load_state(dict(state))

    def _make_room(self) -> None:
        if f"{self.name}_past" not in self.policy.players:
            self.policy.add_player(f"{self.name}_past", self.config.lora, self.config.seed)

    def export(self, folder: Path, lineage: dict[str, Any], weights: Weights, *, unsafe: bool) -> None:
        """Write the stack as one PEFT adapter."""
        self.policy.export(folder, lineage, unsafe=unsafe, names=self.stack(weights))


class WholeNetworks:
    """All weights of a policy that is the player's alone; averages and the start are copies beside it."""

    def __init__(
        self, name: str, policy: Policy, below: Sequence[str], decays: Mapping[str, float], *, keeps_start: bool
    ) -> None:
        self.name, self.policy, self.below, self.decays = name, policy, list(below), dict(decays)
        self.keeps_start = keeps_start
        self.kept: dict[str, dict[str, Tensor]] = {}
        self._hashes: dict[str, str] = {}

    def begin(self, trains: bool) -> None:
        """See `Networks`; the adapters of the start become part of the weights."""
        self.policy.adapters = list(self.below)
        self.policy.merge()
        self.below = []
        own = self.policy.base_parameters()
        self.kept = {average: clones(own) for average in self.decays}
        if self.keeps_start:
            self.kept["initial"] = clones(own)

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """See `Networks`; the names say whose, since two players have equal layers."""
        return [(f"{self.name}.{n}", p) for n, p in sorted(self.policy.base_parameters().items())]

    @contextmanager
    def playing(self, weights: Weights, training: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        """See `Networks`."""
        values: Mapping[str, Tensor] = {} if weights == "current" else self.kept[weights]
        if training:
            self._hashes.pop("current", None)  # what has gradients will change
        with swapped(self.policy.base_parameters(), values), self.policy.using([], training=training):
            yield

    def average(self) -> dict[str, float]:
        """Average every weight, which is exact."""
        own = self.policy.base_parameters()
        for average, decay in self.decays.items():
            for name, old in self.kept[average].items():
                old.mul_(decay).add_(own[name].detach(), alpha=1 - decay)
            self._hashes.pop(average, None)
        return {}

    def hash(self, weights: Weights) -> str:
        """See `Networks`; taken once, until the weights change."""
        if weights not in self._hashes:
            digest = hashlib.sha256()
            values = clones(self.policy.base_parameters()) if weights == "current" else self.kept[weights]
            for name in sorted(values):
                digest.update(name.encode() + values[name].cpu().contiguous().numpy().tobytes())
            self._hashes[weights] = digest.hexdigest()[:16]
        return self._hashes[weights]

    def state(self) -> dict[str, Tensor]:
        """See `Networks`."""
        kept: dict[str, Mapping[str, Tensor]] = {"current": self.policy.base_parameters()}
        kept |= {average: self.kept[average] for average in self.decays}
        return {
            f"{self.name}.{weights}:{name}": tensor.detach().cpu().clone()
            for weights, own in kept.items()
            for name, tensor in own.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Networks`."""
        self._hashes = {}
        put(self.policy.base_parameters(), self._part(state, "current"))
        for average in self.decays:
            for name, tensor in self._part(state, average).items():
                self.kept[average][name].copy_(tensor)

    def _part(self, state: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
        start = f"{self.name}.{weights}:"
        return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}

    def snapshot(self) -> dict[str, Tensor]:
        """See `Networks`."""
        return {name: tensor.cpu().clone() for name, tensor in self.kept["ema"].items()}

    def take_past(self, state: Mapping[str, Tensor]) -> None:
        """See `Networks`."""
        self.kept["past"] = {name: tensor.to(self.policy.device) for name, tensor in state.items()}
        self._hashes.pop("past", None)

    def export(self, folder: Path, lineage: dict[str, Any], weights: Weights, *, unsafe: bool) -> None:
        """Write a plain transformers folder."""
        with self.playing(weights):
            self.policy.export(folder, lineage, unsafe=unsafe, names=[])
