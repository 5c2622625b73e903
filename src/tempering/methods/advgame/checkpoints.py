"""Joint checkpoints: both players, their averages and optimisers, past attackers, and where the game stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.training import Checkpoint, Optimisation, retire_checkpoints, write_checkpoint
from tempering.methods.advgame.opponents import Pool
from tempering.methods.advgame.players import Seats
from tempering.methods.advgame.rollout import JUDGEMENTS, ROLLOUTS
from tempering.methods.advgame.settings import ROLES, AdvGameConfig


def save(
    run: Run,
    config: AdvGameConfig,
    seats: Seats,
    optimisations: Mapping[str, Optimisation],
    pool: Pool,
    state: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write a joint checkpoint: what a resumed run reads, and each player as an adapter that can be asked."""
    weights = {name: tensor for player in seats.players for name, tensor in player.state().items()} | pool.state()
    moments = {name: tensor for own in optimisations.values() for name, tensor in own.state().items()}
    sizes = {name: run.path(name).stat().st_size for name in (ROLLOUTS, JUDGEMENTS) if run.has(name)}

    def more(folder: Any) -> None:
        for role in ROLES:
            if seats.of(role).tuning == "lora":  # all weights are large, and what plays is the average
                seats.of(role).export(folder / role, role, "current", facts, config)
            seats.of(role).export(folder / f"{role}_ema", role, "ema", facts, config)

    whole = {**state, "sizes_bytes": sizes, "config": content_id(config.model_dump(mode="json", exclude={"out"}))}
    write_checkpoint(run, Checkpoint(weights, moments, whole), more)
    retire_checkpoints(run)


def restore(checkpoint: Checkpoint, seats: Seats, optimisations: Mapping[str, Optimisation], pool: Pool) -> None:
    """Put back what `save` wrote, bit for bit."""
    for player in seats.players:
        player.load_state(checkpoint.weights)
    for optimisation in optimisations.values():
        optimisation.load_state(checkpoint.optimizer)
    pool.load_state(checkpoint.weights, checkpoint.state["past"])
