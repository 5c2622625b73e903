"""Ratings of attackers and defenders: known odds, bounds where one never wins, and no ranking of unlike cells."""

import math

import numpy as np
import pytest

from tempering.evals.cross_play import ELO, Cell, bradley_terry, ratings, why_not_ranked

SAME = {"seeds": "abc", "k": 2, "judge": "rules"}


def cells(rates, seeds=20, k=10, **changes):
    """A cell a (attacker, defender) with a fixed number of successes at every seed."""
    return [
        Cell(a, d, {**SAME, **changes}, {f"s{i}": [t < rate for t in range(k)] for i in range(seeds)})
        for (a, d), rate in rates.items()
    ]


def test_ratings_are_the_log_odds():
    """Both attackers on one defender: 8 of 10 and 2 of 10 are odds of 4 and 1/4, 2 ln 4 nats apart."""
    r = bradley_terry([[800.0], [200.0]], [[1000.0], [1000.0]], ridge=1e-9)
    assert r[0] - r[2] == pytest.approx(math.log(4)) and r[2] - r[1] == pytest.approx(math.log(4))


def test_the_gradient_is_zero_at_the_solution_and_ratings_sum_to_zero():
    wins, games = np.array([[3.0, 0.0], [10.0, 5.0], [7.0, 1.0]]), np.full((3, 2), 10.0)
    r = bradley_terry(wins, games)
    p = 1 / (1 + np.exp(-(r[:3, None] - r[None, 3:])))
    gradient = np.concatenate([(wins - games * p).sum(1), -(wins - games * p).sum(0)]) - 1e-2 * r
    assert np.abs(gradient).max() < 1e-8 and r.sum() == pytest.approx(0, abs=1e-9)


def test_who_never_loses_has_a_finite_rating():
    r = bradley_terry([[1e4], [0.0]], [[1e4], [1e4]])
    assert np.isfinite(r).all() and r[0] > r[2] > r[1]


def test_a_batch_is_solved_as_each_alone():
    rng = np.random.default_rng(0)
    games = np.full((5, 3, 2), 20.0)
    wins = rng.binomial(20, 0.4, games.shape).astype(float)
    assert bradley_terry(wins, games) == pytest.approx(
        np.stack([bradley_terry(w, g) for w, g in zip(wins, games, strict=True)])
    )


def test_the_matrix_orders_both_sides_and_the_interval_is_over_seeds():
    found = ratings(cells({("a", "x"): 9, ("a", "y"): 6, ("b", "x"): 5, ("b", "y"): 2}))
    attackers, defenders = found["attackers"], found["defenders"]
    assert attackers["a"]["value"] > attackers["b"]["value"] and defenders["y"]["value"] > defenders["x"]["value"]
    gap = attackers["a"]["value"] - attackers["b"]["value"]
    assert gap == pytest.approx(ELO * math.log(6), rel=0.1), (
        "odds ratios 9 and 6: near ln 6 at the corner with more data"
    )
    for row in attackers.values():
        assert row["low"] == pytest.approx(row["value"]) == pytest.approx(row["high"]), "all seeds are alike here"


def test_unlike_seeds_give_a_wide_interval():
    outcomes = {f"s{i}": [i % 2 == 0] * 4 for i in range(10)}
    found = ratings(
        [Cell("a", "x", SAME, outcomes), Cell("b", "x", SAME, {s: [False] * 4 for s in outcomes})], draws=200
    )
    assert found["attackers"]["a"]["low"] < found["attackers"]["a"]["value"] < found["attackers"]["a"]["high"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cs: [cs[0], cs[1]._replace(protocol={**SAME, "judge": "other"})], "differ in judge"),
        (lambda cs: [cs[0], cs[1]._replace(protocol={**SAME, "k": 3})], "differ in k"),
        (lambda cs: [cs[0], cs[1]._replace(outcomes={"t": [True]})], "different seeds"),
        (lambda cs: [cs[0], cs[1]._replace(is_complete=False)], "partial"),
        (lambda cs: [cs[0], cs[1]._replace(defender="y")], "missing"),
        (lambda cs: [cs[0], cs[0]], "only one attacker"),
        (lambda cs: [cs[0], cs[1], cs[1]], "twice"),
        (lambda cs: [c._replace(outcomes={"s": [None]}) for c in cs], "none is scored"),
        (lambda cs: [c._replace(outcomes={"s": [None, False]}) for c in cs], "no attempt succeeded"),
        (lambda cs: [c._replace(outcomes={"s": [True, None]}) for c in cs], "every attempt succeeded"),
    ],
)
def test_cells_that_are_not_alike_are_not_ranked(change, reason):
    given = change(cells({("a", "x"): 3, ("b", "x"): 5}))
    assert reason in str(why_not_ranked(given))
    with pytest.raises(ValueError, match="no ranking"):
        ratings(given)
