"""The players: one adapter each that trains, its averages, and the network that they started as.

All of a player's networks are stacks of named adapters on one frozen base, which the other player uses too where it
starts from the same weights. Refuses to know about rollouts and losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tempering.core.loading import quiet_libraries, resolve
from tempering.core.policy import Policy
from tempering.core.quarantine import LOADABLE, SUFFIX
from tempering.core.records import content_id
from tempering.core.run import atomic_write, file_hash
from tempering.data.attacker import INSTRUCTIONS
from tempering.judges.tags import PARSER_VERSION
from tempering.methods.advgame import ema
from tempering.methods.advgame.ema import Drift, Factors
from tempering.methods.advgame.settings import ROLES, AdvGameConfig, PlayerConfig, Role

WARM = "warm"
"""Ends the name of the adapter of a warm start."""
Weights = Literal["current", "ema", "slow_ema", "initial", "past"]
"""Which of a player's networks."""


class Player:
    """One adapter that trains, named as the player, on top of frozen ones (`below`); and averages of it."""

    def __init__(
        self, name: str, policy: Policy, below: Sequence[str], settings: PlayerConfig, config: AdvGameConfig
    ) -> None:
        self.name, self.policy, self.below, self.config = name, policy, list(below), config
        self.trains = settings.train
        self.decays = {"ema": config.ema.decay}
        if settings.reference == "slow_ema":
            self.decays["slow_ema"] = config.ema.slow_decay
        policy.add_player(name, config.lora, config.seed)
        for average in self.decays:
            policy.add_player(f"{name}_{average}", config.lora, config.seed)
            policy.copy_player(name, f"{name}_{average}")
        self.exact: Tensor | None = None
        if config.ema.audit and self.trains:
            self.exact = next(iter(self.factors().values())).product.detach().float().clone()
        self._base = policy.base_fingerprint()

    def stack(self, weights: Weights) -> list[str]:
        """The adapters of one of this player's networks, for `Policy.using`."""
        if weights == "initial":
            return self.below
        return [*self.below, self.name if weights == "current" else f"{self.name}_{weights}"]

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The (name, parameter)s that train, in a fixed order: B alone where A is frozen."""
        wanted = {id(b) for _, _, b, _ in self.policy.player_layers(self.name)}
        if self.config.ema.mode != "frozen_a":
            wanted |= {id(a) for _, a, _, _ in self.policy.player_layers(self.name)}
        return sorted((n, p) for n, p in self.policy.model.named_parameters() if id(p) in wanted)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Compute with the newest weights, with gradients; everything else is frozen, and as before on exit."""
        own = [parameter for _, parameter in self.named_parameters]
        with self.policy.using(self.stack("current"), training=own), self._checkpointing():
            yield

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        if not self.config.gradient_checkpointing:
            yield
            return
        with quiet_libraries():  # renamed within transformers 5
            self.policy.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy.base.train()  # dropout is zero everywhere; checkpointing is off in eval mode
        try:
            yield
        finally:
            with quiet_libraries():
                self.policy.base.gradient_checkpointing_disable()

    def factors(self, weights: Weights = "current") -> dict[str, Factors]:
        """The LoRA factors of the player's own adapter, or of an average, layer by layer."""
        name = self.stack(weights)[-1]
        return {layer: Factors(b, a) for layer, a, b, _ in self.policy.player_layers(name)}

    def average(self) -> dict[str, float]:
        """Update all averages, once a step; returns how far they drift from the exact ones."""
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

    def version(self, weights: Weights, *more: Any) -> str:
        """Identify one of the networks, its tokenizer, and what else a sample depends on."""
        tokenizer = self.policy.tokenizer
        stack = self.policy.adapter_hash(self.stack(weights)) if self.stack(weights) else ""
        return content_id(self._base, stack, tokenizer.chat_template, len(tokenizer), *more)

    def state(self) -> dict[str, Tensor]:
        """Copy what a resumed run needs of the player and its averages."""
        names = [self.name, *(f"{self.name}_{average}" for average in self.decays)]
        exact = {} if self.exact is None else {f"exact:{self.name}": self.exact.cpu().clone()}
        return {**self.policy.adapter_state(names), **exact}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, bit for bit."""
        own = self.state()
        self.policy.load_state({name: state[name] for name in own if not name.startswith("exact:")})
        if self.exact is not None:
            self.exact = state[f"exact:{self.name}"].to(self.exact.device)

    def export(
        self, folder: Path, role: Role, weights: Weights, facts: dict[str, Any], config: AdvGameConfig
    ) -> None:
        """Write one of the networks as a PEFT adapter; an attacker's is quarantined, and says how it is asked."""
        is_attacker = role == "attacker"
        lineage = {"method": "advgame", "role": role, "weights": weights, "run": facts["run"]}
        self.policy.export(folder, lineage, unsafe=is_attacker, names=self.stack(weights))
        if is_attacker:
            card = self._card(folder / (LOADABLE[0] + SUFFIX), facts, config)
            atomic_write(folder / "player.json", (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())

    def _card(self, adapter: Path, facts: dict[str, Any], config: AdvGameConfig) -> dict[str, Any]:
        source = self.policy.source
        return {
            "schema": 1,
            "role": "attacker",
            "instructions": dict(INSTRUCTIONS),
            "format": config.rollout.format,
            "parser_version": PARSER_VERSION,
            "base": source.base,
            "revision": source.revision,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "adapter_sha256": file_hash(adapter),
            "decoding": config.plays,
            "seeds_sha256": facts["seeds_sha256"],
            "seed_ids": facts["seed_ids"],
            "unsafe": True,
        }


@dataclass(frozen=True)
class Seats:
    """Who sits where; one player in both seats where they share an adapter."""

    attacker: Player
    defender: Player

    def of(self, role: Role) -> Player:
        """The player in a seat."""
        return self.attacker if role == "attacker" else self.defender

    @property
    def players(self) -> list[Player]:
        """Each player once."""
        return [self.attacker] if self.attacker is self.defender else [self.attacker, self.defender]

    def roles(self, player: Player) -> list[Role]:
        """The seats of a player."""
        return [role for role in ROLES if self.of(role) is player]


def load_seats(config: AdvGameConfig, policy: Policy | None = None) -> Seats:
    """Load the bases, equal ones once, and seat the players; `policy`: `config.model` where the caller has it.

    Raises:
        FileNotFoundError, ValueError: a reference that cannot be loaded, or an `init` of another base.
    """
    bases: dict[tuple[Any, ...], Policy] = {}
    seats: dict[Role, Player] = {}
    for role in ROLES:
        if config.players.shared and seats:
            seats[role] = seats["attacker"]
            continue
        settings = config.player(role)
        reference = settings.model or config.model
        source = resolve(reference)
        key = (source.base, source.revision, source.edit)
        plain = f"{source.base}@{source.revision}" if source.revision else source.base
        if key not in bases:
            given = policy if policy is not None and reference == config.model else None
            bases[key] = given or Policy.load(reference if source.edit else plain, dtype=config.dtype)
        base = bases[key]
        below = list(base.adapters)  # of an edited start, or of the caller's policy
        if source.adapter and not below:
            base.load_player(f"{role}_start", Path(source.adapter))
            below = [f"{role}_start"]
        if settings.init:
            start = resolve(settings.init)
            if start.adapter is None or (start.base, start.revision) != (source.base, source.revision):
                raise ValueError(
                    f"players.{role}.init={settings.init}: expected a run with an adapter on {plain}, found "
                    f"{'one on ' + start.base if start.adapter else 'no adapter'}"
                )
            base.load_player(f"{role}_init", Path(start.adapter))
            below = [*below, f"{role}_init"]
        name = "shared" if config.players.shared else role
        if any(config.warm_rows(r) for r in (ROLES if config.players.shared else (role,))):
            base.add_player(f"{name}_{WARM}", config.lora, config.seed)
            below = [*below, f"{name}_{WARM}"]
        seats[role] = Player(name, base, below, settings, config)
    return Seats(seats["attacker"], seats["defender"])
