"""The players: what each is called, how its networks compute, learn and are averaged, and what is left of it on disk.

A player is named networks (`networks`): adapters on one frozen base, which the other player uses too where it starts
from the same weights; or weights of its own. Refuses to know about rollouts and losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempering.core.loading import quiet_libraries, resolve
from tempering.core.policy import Policy
from tempering.core.quarantine import LOADABLE, SUFFIX, WHOLE
from tempering.core.records import content_id
from tempering.core.run import atomic_write, file_hash
from tempering.data.attacker import INSTRUCTIONS
from tempering.judges.tags import PARSER_VERSION
from tempering.methods.advgame.networks import AdapterNetworks, Networks, Weights, WholeNetworks
from tempering.methods.advgame.settings import ROLES, AdvGameConfig, PlayerConfig, Role

WARM = "warm"
"""Ends the name of the adapter of a warm start."""


class Player:
    """One of the two, or both in one: its networks, and whether it learns."""

    def __init__(self, name: str, networks: Networks, settings: PlayerConfig, config: AdvGameConfig) -> None:
        self.name, self.networks, self.config = name, networks, config
        self.trains, self.tuning = settings.train, settings.tuning
        self.start_fingerprint = networks.policy.base_fingerprint()
        """Of the weights that it was loaded with."""

    @property
    def policy(self) -> Policy:
        """What computes."""
        return self.networks.policy

    @property
    def below(self) -> list[str]:
        """Frozen adapters that are part of its start, until the game begins."""
        return self.networks.below

    def begin(self) -> None:
        """Take the start as it is now, after any warm start, as what trains and what is averaged."""
        self.networks.begin(self.trains)

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The (name, parameter)s that train, in a fixed order."""
        return self.networks.named_parameters

    def playing(self, weights: Weights) -> Any:
        """Compute with one of the player's networks."""
        return self.networks.playing(weights)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Compute with the newest weights, with gradients; everything else is frozen, and as before on exit."""
        own = [parameter for _, parameter in self.named_parameters]
        with self.networks.playing("current", own), self._checkpointing():
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

    def average(self) -> dict[str, float]:
        """Update all averages, once a step; returns how far they drift from the exact ones."""
        return self.networks.average()

    def version(self, weights: Weights, *more: Any) -> str:
        """Identify one of the networks, its tokenizer, and what else a sample depends on."""
        tokenizer = self.policy.tokenizer
        own = self.networks.hash(weights)
        return content_id(self.start_fingerprint, own, tokenizer.chat_template, len(tokenizer), *more)

    def state(self) -> dict[str, Tensor]:
        """Copy what a resumed run needs of the player and its averages."""
        return self.networks.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, bit for bit."""
        self.networks.load_state(state)

    def export(
        self, folder: Path, role: Role, weights: Weights, facts: dict[str, Any], config: AdvGameConfig
    ) -> None:
        """Write one of the networks as a model reference; an attacker is quarantined, and says how it is asked."""
        is_attacker = role == "attacker"
        lineage = {"method": "advgame", "role": role, "weights": weights, "run": facts["run"]}
        self.networks.export(folder, lineage, weights, unsafe=is_attacker)
        if is_attacker:
            card = self._card(folder, facts, config)
            atomic_write(folder / "player.json", (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())

    def _card(self, folder: Path, facts: dict[str, Any], config: AdvGameConfig) -> dict[str, Any]:
        source = self.policy.source
        files = [folder / (name + SUFFIX) for name in (LOADABLE[0], WHOLE[0])]
        weights = next((file for file in files if file.is_file()), None)  # none where they are in several files
        return {
            "schema": 1,
            "role": "attacker",
            "instructions": dict(INSTRUCTIONS),
            "format": config.rollout.format,
            "parser_version": PARSER_VERSION,
            "base": source.base,
            "revision": source.revision,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "adapter_sha256": file_hash(weights) if weights else None,
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

    A player all of whose weights train has a base of its own.

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
        plain = f"{source.base}@{source.revision}" if source.revision else source.base
        is_whole = settings.tuning == "full"
        key = (source.base, source.revision, source.edit, role if is_whole else None)
        if key not in bases:
            given = policy if policy is not None and reference == config.model and not is_whole else None
            dtype = "float32" if is_whole else config.dtype
            bases[key] = given or Policy.load(reference if source.edit else plain, dtype=dtype)
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
        seats[role] = Player(name, _networks(name, base, below, settings, config), settings, config)
    return Seats(seats["attacker"], seats["defender"])


def _networks(
    name: str, base: Policy, below: list[str], settings: PlayerConfig, config: AdvGameConfig
) -> AdapterNetworks | WholeNetworks:
    decays = {"ema": config.ema.decay}
    if settings.reference == "slow_ema":
        decays["slow_ema"] = config.ema.slow_decay
    if settings.tuning == "full":
        return WholeNetworks(name, base, below, decays, keeps_start=config.needs_start(settings))
    return AdapterNetworks(name, base, below, decays, config)
