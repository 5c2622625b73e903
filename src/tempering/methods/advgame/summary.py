"""What is left to say when a game has ended: what it was made of, what came of it, and what it took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tempering.core.stats import wilson
from tempering.core.training import Stopwatch
from tempering.data.describe import inputs_of, licences_of
from tempering.data.seeds import Seed, seeds_hash
from tempering.methods.advgame.players import Seats
from tempering.methods.advgame.rollout import Dealer, Judges
from tempering.methods.advgame.settings import ROLES, AdvGameConfig


def provenance(
    config: AdvGameConfig,
    seats: Seats,
    dealer: Dealer,
    judges: Judges,
    seeds: Sequence[Seed],
    dropped: int,
    watch: Stopwatch,
) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    policy = seats.defender.policy
    is_demo = config.data.train == "demo"
    return {
        "method": "advgame",
        "model": policy.source.to_row(),
        "players": {role: seats.of(role).policy.source.to_row() for role in ROLES},
        "base_fingerprint": seats.defender.start_fingerprint,
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "inputs": {"demo": seeds_hash(seeds)} if is_demo else inputs_of(config.data.train),
        "dropped": {"prompt too long": dropped},
        "judges": [judge.identity for judge in judges.each],
        "data_licences": {"demo seeds": "Apache-2.0"} if is_demo else licences_of(config.data.train, config.model),
        # The run itself is its defender, which is not unsafe.
        "unsafe": False,
        "unsafe_parts": [
            "final/attacker",
            "final/attacker_raw",
            "checkpoints/*/attacker",
            "checkpoints/*/attacker_ema",
        ],
        "cost": {**watch.phases, "generated_tokens": dealer.tokens},
    }


def summarise(config: AdvGameConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `data/game.json` holds: pair yield and statuses of all steps, last distances, last and best validation."""
    steps = [row for row in rows if "event" not in row]
    facts: dict[str, Any] = {"steps": len(steps), "yield": {}, "statuses": {}}
    for role in ROLES:
        for category in config.data.classes:
            name = f"{role}/{category}"
            made, possible = (sum(row.get(f"{name}/{what}", 0) for row in steps) for what in ("pairs", "possible"))
            if possible:
                low, high = wilson(made, possible)[-2:]
                found = {"pairs": made, "possible": possible, "value": made / possible, "low": low, "high": high}
                facts["yield"][name] = found
            start = f"{name}/status/"
            statuses = sorted({key.removeprefix(start) for row in steps for key in row if key.startswith(start)})
            facts["statuses"][name] = {s: sum(row.get(start + s, 0) for row in steps) for s in statuses}
    for name in ("kl_initial_nats", "kl_ema_nats", "drift", "drift_accumulated"):
        for player in ("shared",) if config.players.shared else ROLES:
            told = [row[f"{player}/{name}"] for row in steps if row.get(f"{player}/{name}") is not None]
            if told:
                facts[f"{player}/{name}"] = told[-1]
    facts["seconds_per_step"] = float(np.mean([row["step_seconds"] for row in steps]))
    facts["validation"] = next((row for row in reversed(rows) if row.get("event") == "validation"), None)
    facts["best_step"] = {}
    for role in ROLES:
        changes = {row["step"]: row[f"{role}/change"][0] for row in rows if f"{role}/change" in row}
        if changes:
            facts["best_step"][role] = max(changes, key=changes.__getitem__)
    return facts


def peak_bytes(device: torch.device) -> int:
    """Most memory that was taken: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else 1024))
