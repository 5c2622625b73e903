"""What `benchmarks/advgame.py` makes of its measurements; the measuring itself needs a model and minutes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import advgame

    return advgame


def told(value, n=10):
    return {"value": value, "low": value, "high": value, "n": n, "unscored": 0}


def changed(difference, low, high):
    return {"difference": difference, "low": low, "high": high, "n": 10}


def results(bench, **other):
    """A run in which everything went as it should, but for what is given."""
    cells = {f"{who} against {d}": told(0.5) for who in ("direct", "trained") for d in bench.DEFENDERS}
    found = {
        "yield": {player: told(0.5) for player in bench.PLAYERS}, "yield_cold": None,
        "duels": {
            "n": 10,
            "cells": {"initial against initial": {p: told(3.0) for p in bench.PLAYERS} | {"statuses": {"x OK": 9}}},
            "attacker": changed(1.0, 0.5, 1.5), "defender": changed(1.0, 0.5, 1.5),
        },
        "held_out": {
            "n": 10, "tries": 2, "judge": "rules", "cells": cells,
            "defender": {who: {f"trained - {d}": changed(-0.2, -0.3, -0.1) for d in ("original", "initial")}
                         for who in ("direct", "trained")},
            "attacker": {"trained - direct": changed(0.2, 0.1, 0.3)},
        },
        "prices": {name: {d: told(0.1) for d in bench.DEFENDERS} | {"difference": changed(0.0, 0.0, 0.0)}
                   for name in bench.PRICES},
        "memory": {"game": {"peak_mb": 150.0}, "sft": {"peak_mb": 100.0}, "ratio": 1.5},
        "parts_of_a_step": {"rollouts": {"seconds": 20.0, "tokens": 0}, "updates": {"seconds": 10.0, "tokens": 3000}},
        "steps": 10, "minutes": {"game": 12.0, "duels": 3.0},
    }  # fmt: skip
    found |= other
    return {**found, "bars": bench.bars(found)}


def test_all_bars_are_met_by_a_run_that_meets_them(bench):
    assert all(results(bench)["bars"].values())


def test_what_is_missed_and_what_cannot_be_told_is_said(bench):
    missed = results(
        bench,
        **{"yield": {"attacker": told(0.39), "defender": told(0.4)}},
        minutes={"game": 31.0},
        duels={**results(bench)["duels"], "attacker": changed(0.4, -0.1, 0.9), "defender": changed(None, None, None)},
    )
    kept = {name: met for name, met in missed["bars"].items() if met is not True}
    assert list(kept.values()) == [False, False, None, False]
    text = bench.table(missed)
    assert text.count("**missed**") == 3 and text.count("**cannot be told**") == 1
    assert "| updates | 1.00 | 300 |" in text and "Minutes: 31.0" in text


def test_unscored_seeds_are_in_no_mean_and_in_no_pair(bench):
    a, b = {"s": 1.0, "t": None, "u": 3.0}, {"s": 0.0, "t": 5.0, "u": None}
    assert bench.mean(a)["value"] == 2.0 and bench.mean(a)["unscored"] == 1
    assert bench.paired(a, b)["difference"] == 1.0 and bench.paired(a, b)["n"] == 1
    assert bench.paired(a, {})["difference"] is None


def test_the_yield_is_of_pairs_that_there_could_have_been(bench, tmp_path):
    """Two steps of two seeds a class, two attacks: 4 pairs of the attacker a class, 8 of the defender."""
    config = {"rollout": {"seeds": 2, "attacks": 2}, "data": {"classes": ["harmful", "benign"]}, "steps": 2}
    rows = [{"player": "attacker", "class": "harmful"}] * 3 + [{"player": "defender", "class": "benign"}] * 4
    run = SimpleNamespace(config=config, has=lambda name: True, read_rows=lambda name: json.loads(json.dumps(rows)))
    found = bench.pair_yield(run)
    assert {name: (one["value"], one["n"]) for name, one in found.items()} == {
        "attacker/harmful": (0.75, 4), "attacker/benign": (0.0, 4), "attacker": (0.375, 8),
        "defender/harmful": (0.0, 8), "defender/benign": (0.5, 8), "defender": (0.25, 16),
    }  # fmt: skip


def test_the_plan_asks_for_nothing(bench, capsys, tmp_path):
    assert bench.main(["--plan", "--out", str(tmp_path / "out")]) == 0
    assert "fixed trees" in capsys.readouterr().out and not (tmp_path / "out").exists()
