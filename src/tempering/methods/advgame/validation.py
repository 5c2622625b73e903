"""Fixed trees that a validation plays: each player as it is against the other as it was, paired with the start.

    attacker   its average against the initial defender, minus the initial attacker against the same
    defender   its average against the initial attacker, minus the initial defender against the same

Places in the game are the same every time, so that the initial players are sampled once and never again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tempering.core.stats import paired_bootstrap
from tempering.data.attacker import Category
from tempering.data.seeds import Seed
from tempering.methods.advgame.networks import Weights
from tempering.methods.advgame.pairs import Tree
from tempering.methods.advgame.rollout import Dealer, Table
from tempering.methods.advgame.settings import ROLES, Role


def validate(dealer: Dealer, seeds: Mapping[Category, Sequence[Seed]], step: int) -> dict[str, Any]:
    """Play the fixed trees with the initial players and, after the first step, with the averages."""
    matches: dict[Role, tuple[Weights, Weights]] = {"attacker": ("ema", "initial"), "defender": ("initial", "ema")}
    before = _trees(dealer, seeds, ("initial", "initial"), step)
    facts: dict[str, Any] = {"trees": len(before)}
    for role in ROLES:
        start = [_reward(tree, role) for tree in before]
        facts[f"{role}/reward_initial"] = _mean(start)
        if not step or not dealer.config.player(role).train:
            continue
        now = [_reward(tree, role) for tree in _trees(dealer, seeds, matches[role], step)]
        facts[f"{role}/reward"] = _mean(now)
        both = [(a, b) for a, b in zip(now, start, strict=True) if a is not None and b is not None]
        if both:
            change = paired_bootstrap([a for a, _ in both], [b for _, b in both])
            facts[f"{role}/change"] = [change.difference, change.low, change.high]
        facts[f"{role}/n"] = len(both)
    return facts


def _trees(
    dealer: Dealer, seeds: Mapping[Category, Sequence[Seed]], match: tuple[Weights, Weights], step: int
) -> list[Tree]:
    places = range(-(-dealer.config.eval_trees // len(seeds)))
    return dealer.play(
        *(
            Table(
                category, [own[b % len(own)] for b in places], [("valid", b) for b in places], *match,
                attacks=1, responses=1, step=step,
            )
            for category, own in seeds.items()
        )
    )  # fmt: skip


def _reward(tree: Tree, role: Role) -> float | None:
    node = tree.attacks[0]
    return node.attack.reward if role == "attacker" else node.responses[0].reward


def _mean(rewards: Sequence[float | None]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    return float(np.mean(known)) if known else None
