"""What the benchmarks of unlearning make of their measurements, on hand-made ones."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EVERYTHING = slice(None)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def curve(*levels, n=8, steps=(0, 5, 10, 20)):
    """A relearning curve of n questions that the original answered all: `levels` of them right at each step."""
    values = np.array([[1.0] * right + [0.0] * (n - right) for right in levels])
    return {"steps": list(steps), "values": values, "original": np.ones(n)}


def test_half_is_back_at_the_first_step_that_has_half_of_what_was_forgotten():
    from unlearn_knowledge import half_back

    assert half_back(curve(2, 4, 5, 8), EVERYTHING) == 10.0  # 2 of 8 are left: half of the 6 forgotten is at 5
    assert half_back(curve(2, 3, 3, 3), EVERYTHING) == 20.0  # never: the last step, a lower bound
    assert half_back(curve(8, 8, 8, 8), EVERYTHING) is None  # nothing was forgotten
    assert half_back(curve(2, 4, 5, 8), np.array([0, 1])) is None  # nor of these two


def test_steps_are_compared_over_the_same_questions_and_seeds():
    from unlearn_knowledge import compared

    slow, quick = [curve(0, 0, 0, 8)] * 3, [curve(0, 8, 8, 8)] * 3
    found = compared(slow, quick)
    assert found["steps"] == [20.0, 5.0] and found["difference"] == found["low"] == found["high"] == 15.0
    assert compared(slow, slow)["difference"] == 0.0
    assert compared(slow, [])["difference"] is None


class Cell:
    """A cell of the table whose score is the same whatever is resampled, or changes with it."""

    def __init__(self, score, spread=0.0):
        self.value, self.spread = score, spread

    def score(self, seeds, rng, *, is_attacked):
        return self.value if rng is None or self.value is None else self.value + self.spread * rng.standard_normal()


def test_the_interaction_is_a_difference_of_differences():
    from objective_swap import interaction

    cells = {
        ("cosine", "knowledge"): Cell(0.8), ("probe", "knowledge"): Cell(0.3),
        ("cosine", "toxicity"): Cell(0.4), ("probe", "toxicity"): Cell(0.6),
    }  # fmt: skip
    found = interaction(cells, 1, is_attacked=True)
    assert found["value"] == pytest.approx(0.7) and found["low"] == pytest.approx(found["high"]) == pytest.approx(0.7)
    cells["probe", "toxicity"] = Cell(0.6, spread=0.1)
    found = interaction(cells, 1, is_attacked=True)
    assert found["low"] == pytest.approx(0.7 - 0.196, abs=0.02) and found["high"] == pytest.approx(0.896, abs=0.02)
    cells["probe", "toxicity"] = Cell(None)
    assert interaction(cells, 1, is_attacked=True) == {"value": None, "low": None, "high": None, "draws": 0}


def test_what_was_forgotten_is_measured_above_chance_and_what_came_back_of_what_was_taken():
    from unlearning_runs import forget_share, known, recovered

    columns = {
        "original": np.array([1.0] * 7 + [0.0]), "unattacked": np.array([1.0] * 3 + [0.0] * 5),
        "relearning/x": np.array([1.0] * 5 + [0.0] * 3), "gold": np.ones(8),
    }  # fmt: skip
    assert forget_share(columns, 0.25) == pytest.approx(4 / 5)  # of 7/8 - 2/8 above chance 3/8 - 2/8 is left
    assert recovered(columns) == {"relearning/x": pytest.approx(0.5)}  # 2 of 4
    assert recovered({**columns, "unattacked": np.ones(8)}) == {}
    kept = known({"forget": np.ones(4), "near": np.array([1.0, 1, 1, 0])}, {"near": np.array([1.0, 1, 0, 0])}, None)
    assert kept == [pytest.approx(0.5)]  # (1/2 - 1/4) / (3/4 - 1/4)


@pytest.mark.parametrize(
    ("high", "reached", "told"),
    [(-0.01, True, "more than the controls"), (0.01, True, "no signal"), (-0.01, False, "Not at equal KL")],
)
def test_the_rule_of_directions(high, reached, told):
    from unlearn_toxicity import CONTROLS, PRIMARY, verdict

    minus = {"difference": -0.1, "low": -0.2, "high": high}
    probe = {"sets": {"x": {f"minus_{c}": {PRIMARY: minus} for c in CONTROLS}}, "reached_kl": reached}
    arms = {"probe": probe, **{c: {"reached_kl": True} for c in CONTROLS}}
    assert told in verdict(arms, "x")
    assert "needs the arms" in verdict({"probe": probe}, "x")
