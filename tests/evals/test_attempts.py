"""Success within so many attempts, by hand: values, intervals, and what unscored attempts leave open."""

import pytest

from tempering.core.stats import wilson
from tempering.evals.attempts import Attempt, any_of, budgets, by_seed, conjunction, rates_within, shares


def test_three_of_eight():
    """1 - C(5, j) / C(8, j): 1 - 5/8, 1 - 10/28, 1 - 5/70, 1 - 0."""
    found = rates_within({"s": [True] * 3 + [False] * 5}, 8)
    assert {j: round(rate["value"], 3) for j, rate in found.items()} == {1: 0.375, 2: 0.643, 4: 0.929, 8: 1.0}
    assert all(rate["bounds"] == [rate["value"]] * 2 for rate in found.values())


def test_any_success_has_wilsons_interval():
    outcomes = {f"s{i}": [i < 7, False] for i in range(20)}
    rate = rates_within(outcomes, 2)[2]
    assert (rate["value"], round(rate["low"], 3), round(rate["high"], 3)) == (0.35, 0.181, 0.567)


def test_one_attempt_has_a_bootstrap_over_seeds():
    """Ten seeds that always fall, ten that never do: the mean of 20 coins, standard error sqrt(.25 / 20) = .112."""
    rate = rates_within({f"s{i}": [i < 10] * 4 for i in range(20)}, 4, seed=3)[1]
    assert (
        rate["value"] == 0.5
        and rate["low"] == pytest.approx(0.3, abs=0.03)
        and rate["high"] == pytest.approx(0.7, abs=0.03)
    )


def test_where_all_seeds_agree_the_interval_is_not_empty():
    rate = rates_within({f"s{i}": [False] * 4 for i in range(20)}, 4)[1]
    assert (rate["value"], rate["low"], rate["high"]) == wilson(0, 20)


def test_bounds_say_what_unscored_attempts_could_change():
    outcomes = {"won": [True, None], "open": [False, None], "lost": [False, False], "unknown": [None, None]}
    found = rates_within(outcomes, 2)
    assert found[1]["value"] == pytest.approx(1 / 3) and found[1]["n"] == 3 and found[1]["unscored"] == 4
    assert found[1]["bounds"] == [1 / 8, 5 / 8]
    assert (found[2]["value"], found[2]["n"], found[2]["unscored"]) == (0.5, 2, 2)
    assert found[2]["bounds"] == [1 / 4, 3 / 4]


def test_with_one_attempt_both_definitions_are_one():
    found = rates_within({"a": [True], "b": [None], "c": [False]}, 1)
    assert list(found) == [1] and found[1]["value"] == 0.5 and found[1]["unscored"] == 1


def test_nothing_scored_is_no_rate():
    assert rates_within({"a": [None, None]}, 2)[2]["value"] is None
    assert rates_within({}, 2)[2] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "unscored": 0,
        "bounds": [None] * 2,
    }


def test_a_seed_with_other_than_k_attempts_is_named():
    with pytest.raises(ValueError, match="seed a has 3 attempts, expected k = 2"):
        rates_within({"a": [True] * 3}, 2)
    with pytest.raises(ValueError, match="expected 0 <= s <= n"):
        any_of(3, 1, 4)
    assert budgets(5) == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("is_parsed", "is_faithful", "fell", "succeeded", "anyhow"),
    [
        (True, True, True, True, True),
        (True, False, True, False, True),
        (True, None, True, None, True),
        (True, None, False, False, False),
        (True, True, None, None, None),
        (True, False, None, False, None),
        (False, None, None, False, False),
    ],
)
def test_success_is_parsed_and_faithful_and_fell_and_unknown_where_that_is_open(
    is_parsed, is_faithful, fell, succeeded, anyhow
):
    attempt = Attempt("s", "harmful", 0, is_parsed, is_faithful, fell)
    assert attempt.succeeded is succeeded and attempt.succeeded_anyhow is anyhow
    assert conjunction() is True


def test_attempts_go_to_their_place_and_what_was_not_made_is_unscored():
    attempts = [Attempt("s", "harmful", 2, True, True, True), Attempt("s", "harmful", 0, True, False, True)]
    assert by_seed(attempts, 4) == {"s": [False, None, True, None]}
    assert by_seed(attempts, 4, anyhow=True) == {"s": [True, None, True, None]}


def test_shares_count_each_kind_once():
    attempts = [
        Attempt("s", "harmful", 0, False, None, None),
        Attempt("s", "harmful", 1, True, False, True),
        Attempt("s", "harmful", 2, True, None, True),
        Attempt("s", "harmful", 3, True, True, None, is_asked=False),
    ]
    found = shares(attempts)
    assert (found["parsed"]["value"], found["faithful"]["value"], found["faithful"]["unscored"]) == (0.75, 0.5, 1)
    assert (found["not_asked"], found["unscored"]) == (1, 1)
