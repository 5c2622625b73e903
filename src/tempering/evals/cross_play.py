"""Attackers against defenders, each with each: ratings that order both sides on one scale. Pure.

Bradley-Terry: an attempt of attacker a on defender d is a game that a wins with probability sigmoid(r_a - r_d).
Ratings maximise

    sum_{a,d} w_ad log sigmoid(r_a - r_d) + (g_ad - w_ad) log sigmoid(r_d - r_a) - (ridge / 2) |r|^2

with w successes of g scored attempts. The ridge (1e-2) makes them finite where one side never wins, and fixes the
free constant: they sum to 0. On the scale of Elo: 400 / ln 10 times r. Intervals: bootstrap over seeds, which all
cells share; only differences have a meaning, and only among these players.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ELO = 400 / math.log(10)
"""Points of Elo a nat of log odds."""
RIDGE = 1e-2
DRAWS = 1000
"""Resamplings of the seeds."""
_STEPS = 60
_LONGEST_STEP = 2.0
"""Nats that a rating may change by in a step of Newton's method: far from the optimum it overshoots."""
Floats = NDArray[np.float64]


class Cell(NamedTuple):
    """One attacker against one defender."""

    attacker: str
    defender: str
    protocol: Mapping[str, Any]
    """What must be equal for cells to be comparable: seeds, k, decoding, judges."""
    outcomes: Mapping[str, Sequence[bool | None]]
    """Seed id -> its attempts; `None`: unscored."""
    is_complete: bool = True


def why_not_ranked(cells: Sequence[Cell]) -> str | None:
    """Say why these cells give no ranking; `None` where they do."""
    attackers, defenders = (set(names) for names in _sides(cells))
    if len(attackers) < 2 and len(defenders) < 2:
        return "there is only one attacker and one defender"
    for cell in cells[1:]:
        for key in {*cell.protocol, *cells[0].protocol}:
            if cell.protocol.get(key) != cells[0].protocol.get(key):
                return f"the cells differ in {key}: {cells[0].protocol.get(key)!r} and {cell.protocol.get(key)!r}"
        if set(cell.outcomes) != set(cells[0].outcomes):
            return "the cells are of different seeds"
    if len({(cell.attacker, cell.defender) for cell in cells}) < len(cells):
        return "a pair of attacker and defender is there twice"
    if partial := [cell for cell in cells if not cell.is_complete]:
        return f"{partial[0].attacker} against {partial[0].defender} is partial"
    if len(cells) < len(attackers) * len(defenders):
        return "a cell is missing"
    scored = {o for cell in cells for tries in cell.outcomes.values() for o in tries} - {None}
    if len(scored) < 2:  # the ridge alone would say how far apart the sides are
        return (
            "every attempt succeeded" if scored == {True} else "no attempt succeeded" if scored else "none is scored"
        )
    return None


def ratings(cells: Sequence[Cell], *, seed: int = 0, draws: int = DRAWS) -> dict[str, dict[str, dict[str, float]]]:
    """Rate `attackers` and `defenders` in points of Elo, with 95 % intervals; a higher defender resists better.

    Raises:
        ValueError: the cells are not comparable, with the reason.
    """
    if reason := why_not_ranked(cells):
        raise ValueError(f"no ranking: {reason}")
    attackers, defenders = (list(dict.fromkeys(names)) for names in _sides(cells))
    names = sorted(cells[0].outcomes)
    wins, games = (np.zeros((len(names), len(attackers), len(defenders))) for _ in range(2))
    for cell in cells:
        a, d = attackers.index(cell.attacker), defenders.index(cell.defender)
        for s, name in enumerate(names):
            scored = [o for o in cell.outcomes[name] if o is not None]
            wins[s, a, d], games[s, a, d] = sum(scored), len(scored)
    picks = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    weights = np.concatenate([np.ones((1, len(names))), picks])  # (1 + draws, S)
    shape = (len(weights), len(attackers), len(defenders))
    won, played = ((weights @ x.reshape(len(names), -1)).reshape(shape) for x in (wins, games))
    found = ELO * bradley_terry(won, played)  # (1 + draws, A + D)
    ends = np.quantile(found[1:], [0.025, 0.975], axis=0)
    rows = [
        {"value": float(v), "low": float(low), "high": float(high)}
        for v, low, high in zip(found[0], ends[0], ends[1], strict=True)
    ]
    return {
        "attackers": dict(zip(attackers, rows[: len(attackers)], strict=True)),
        "defenders": dict(zip(defenders, rows[len(attackers) :], strict=True)),
    }


def _sides(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    return [cell.attacker for cell in cells], [cell.defender for cell in cells]


def bradley_terry(wins: ArrayLike, games: ArrayLike, ridge: float = RIDGE) -> Floats:
    """Return ratings in nats, attackers then defenders, (..., A + D), of counts (..., A, D), by Newton's method."""
    won, played = (np.asarray(x, dtype=float) for x in (wins, games))
    count_a, count_d = won.shape[-2:]
    size = count_a + count_d
    flat_w, flat_g = (x.reshape(-1, count_a, count_d) for x in (won, played))
    r = np.zeros((len(flat_w), size))
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(r[:, :count_a, None] - r[:, None, count_a:])))
        excess, spread = flat_w - flat_g * p, flat_g * p * (1 - p)
        gradient = np.concatenate([excess.sum(2), -excess.sum(1)], 1) - ridge * r
        hessian = np.zeros((len(r), size, size))
        hessian[:, :count_a, count_a:] = -spread
        hessian[:, count_a:, :count_a] = -spread.transpose(0, 2, 1)
        diagonal = np.concatenate([spread.sum(2), spread.sum(1)], 1) + ridge
        hessian[:, np.arange(size), np.arange(size)] = diagonal
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        longest = np.abs(step).max(1, keepdims=True)
        step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(longest, 1e-300))
        r += step
        if longest.max() < 1e-10:
            break
    return np.asarray(r.reshape(*won.shape[:-2], size))
