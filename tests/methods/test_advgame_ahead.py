"""Trees that are played ahead: exactly so old, the same whatever a judge takes, resumed like any, and quicker."""

import time

import pytest
from advgame_parts import Counting, judged_by, lines, untimed

from tempering.methods import advgame
from tempering.methods.advgame.players import Player
from tempering.methods.advgame.rollout import Dealer

FILES = ("data/rollouts.jsonl", "data/judgements.jsonl", "data/pairs.jsonl")


class Slow(Counting):
    """Takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def __call__(self, questions):
        time.sleep(self.seconds)
        return super().__call__(questions)


class Stopping(Counting):
    """Ends the game when it is asked so many more times after the first checkpoint."""

    def __init__(self, run, more):
        super().__init__()
        self.checkpoint, self.left = run / "checkpoints/step-2/state.json", more

    def __call__(self, questions):
        if self.checkpoint.is_file():
            self.left -= 1
            if self.left < 0:
                raise InterruptedError
        return super().__call__(questions)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_trees_are_exactly_so_many_steps_old(game, monkeypatch, staleness):
    learned, played = {"defender": 0, "attacker": 0}, []
    average, attack, answer = Player.average, Dealer.attack, Dealer.answer

    def averaging(self):
        learned[self.name] += 1
        return average(self)

    def attacking(self, tables):
        played.append(("attacker", tables[0].step, learned["attacker"]))
        return attack(self, tables)

    def answering(self, tables, trees):
        played.append(("defender", tables[0].step, learned["defender"]))
        return answer(self, tables, trees)

    monkeypatch.setattr(Player, "average", averaging)
    monkeypatch.setattr(Dealer, "attack", attacking)
    monkeypatch.setattr(Dealer, "answer", answering)
    run = advgame.train(
        game(steps=5, eval_every=0, rollout={"staleness": staleness}), make_judges=judged_by(Counting())
    )
    ages = [min(t, staleness) for t in range(5)]
    assert sorted(played) == sorted((role, t + 1, t - ages[t]) for role in learned for t in range(5))
    rows = run.read_rows("data/rollouts.jsonl")
    metrics = run.read_rows("metrics.jsonl")
    if staleness:
        assert {(row["step"], row["staleness"]) for row in rows} == {(t + 1, ages[t]) for t in range(5)}
        assert [row["staleness"] for row in metrics] == ages and all("waited_seconds" in row for row in metrics)
    else:
        assert not any("staleness" in row for row in [*rows, *metrics])
    # One version a role and step drawn in: what was drawn in step one by the first weights is of one version.
    versions = {(row["role"], row["step"] - 1 - row.get("staleness", 0), row["policy_version"]) for row in rows}
    assert len(versions) == len({version[:2] for version in versions})


def test_how_long_a_judge_takes_changes_nothing_but_the_time(game, tmp_path):
    runs = [
        advgame.train(
            game(steps=4, rollout={"staleness": 2}, out=str(tmp_path / str(seconds))),
            make_judges=judged_by(Slow(seconds)),
        )
        for seconds in (0.0, 0.05)
    ]
    assert untimed(runs[0]) == untimed(runs[1])
    for name in FILES:
        assert lines(runs[0].root / name) == lines(runs[1].root / name), name


@pytest.mark.parametrize(
    "over",
    [
        {"rollout": {"staleness": 1}},
        {
            "rollout": {"staleness": 2},
            "per_class_updates": True,
            "opponents": {"probability": 0.7, "every": 1},
            "players": {"attacker": {"sampler": "current"}, "defender": {"sampler": "current"}},
        },
    ],
    ids=["one", "two"],
)
def test_a_resumed_game_that_plays_ahead_is_the_same_game(game, tmp_path, over):
    whole = advgame.train(game(**over, steps=5, out=str(tmp_path / "whole")), make_judges=judged_by(Counting()))
    broken = game(**over, steps=5, out=str(tmp_path / "cut"))

    first, second = Stopping(tmp_path / "cut", 3), Counting()
    with pytest.raises(InterruptedError):
        advgame.train(broken, make_judges=judged_by(first))
    cut = advgame.train(broken, resume=True, make_judges=judged_by(second))
    assert not set(first.asked) & set(second.asked)
    assert untimed(cut) == untimed(whole)
    for name in FILES:
        assert lines(cut.root / name) == lines(whole.root / name), name
    for name in ("weights.safetensors", "optimizer.safetensors"):
        place = f"checkpoints/step-5/{name}"
        assert (cut.root / place).read_bytes() == (whole.root / place).read_bytes()


def test_samples_that_a_resumed_game_needs_and_that_are_gone_are_named(game, tmp_path):
    config = game(steps=4, eval_every=0, rollout={"staleness": 1})
    with pytest.raises(InterruptedError):
        advgame.train(config, make_judges=judged_by(Stopping(tmp_path / "run", 0)))
    file = tmp_path / "run/data/rollouts.jsonl"
    file.write_bytes(b"".join(line for line in file.read_bytes().splitlines(True) if b'"step": 3' not in line))
    with pytest.raises(RuntimeError, match=r"rollouts\.jsonl: samples of step 3 are missing"):
        advgame.train(config, resume=True, make_judges=judged_by(Counting()))


def test_judges_are_asked_while_players_learn(game, tmp_path, monkeypatch):
    """A step has three questions of 0.1 s to judges and two updates made to take as long; what overlaps is saved."""
    update, busy = advgame.update, {"judge": [], "update": []}

    def learning(*args, **more):
        began = time.monotonic()
        time.sleep(0.1)
        found = update(*args, **more)
        busy["update"].append((began, time.monotonic()))
        return found

    class Watched(Slow):
        def __call__(self, questions):
            began = time.monotonic()
            said = super().__call__(questions)
            busy["judge"].append((began, time.monotonic()))
            return said

    def overlap():
        return sum(
            max(0.0, min(end, stop) - max(start, begin))
            for start, end in busy["judge"]
            for begin, stop in busy["update"]
        )

    monkeypatch.setattr(advgame, "update", learning)
    for staleness in (0, 1):
        busy["judge"], busy["update"] = [], []
        config = game(steps=4, eval_every=0, out=str(tmp_path / str(staleness)), rollout={"staleness": staleness})
        advgame.train(config, make_judges=judged_by(Watched(0.1)))
        assert overlap() >= 0.3 if staleness else overlap() == 0


def test_a_policy_gradient_does_not_play_ahead(game):
    with pytest.raises(ValueError, match=r"rollout\.staleness"):
        game(loss="grpo", judges={"kind": "pointwise"}, rollout={"staleness": 1})
