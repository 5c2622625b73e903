import json

import pytest
import torch

from tempering.core.chat import Encoded, collate
from tempering.core.config import Config
from tempering.core.policy import LoraSettings
from tempering.core.run import Run
from tempering.core.training import (
    Optimisation,
    Processes,
    Stopwatch,
    last_checkpoint,
    linear_to_zero,
    save_checkpoint,
    step_batches,
)

ROWS = [[Encoded([5 + i, 6, 7, 8 + i, 9], 2)] for i in range(4)]


@pytest.fixture
def started(tiny_policy):
    def start(family="llama", name="a", **settings):
        policy = tiny_policy(family)
        if name != "full":
            policy.add_adapter(name, LoraSettings(r=4), seed=1)
        policy.train_only(name)
        return policy, Optimisation(policy, Processes(policy.device), lr=1e-2, steps=8, **settings)

    return start


def one_step(policy, optimisation, t):
    with optimisation.accumulate(is_last=True):
        loss = -optimisation.scorer(collate(ROWS, 0)).logprob.mean()
        optimisation.backward(loss)
    return optimisation.step(t)


@pytest.mark.parametrize("name", ["a", "full"])
def test_a_resumed_optimiser_goes_on_bit_for_bit(started, tmp_path, name):
    run = Run.create(tmp_path / "run", "test", Config())
    policy, optimisation = started(name=name)
    for t in range(3):
        one_step(policy, optimisation, t)
    state = {"step": 3, "float": 0.1 + 0.2}
    save_checkpoint(run, policy, optimisation, state, whole=name == "full")
    for t in range(3, 8):
        one_step(policy, optimisation, t)
    want = policy.state()

    again, resumed = started(name=name)
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None and checkpoint.state == state
    again.load_state(checkpoint.weights)
    resumed.load_state(checkpoint.optimizer)
    for t in range(3, 8):
        one_step(again, resumed, t)
    assert all(torch.equal(tensor, want[n]) for n, tensor in again.state().items())


def test_only_the_newest_checkpoint_is_kept_and_torn_ones_are_not_read(started, tmp_path):
    run = Run.create(tmp_path / "run", "test", Config())
    assert last_checkpoint(run) is None
    policy, optimisation = started()
    for step in (9, 10):
        one_step(policy, optimisation, 0)
        save_checkpoint(run, policy, optimisation, {"step": step}, whole=False)
    (run.root / "checkpoints" / "step-11").mkdir()
    (run.root / "checkpoints" / ".saving-x").mkdir()
    assert last_checkpoint(run).state == {"step": 10}
    one_step(policy, optimisation, 1)
    save_checkpoint(run, policy, optimisation, {"step": 12}, whole=False)
    names = sorted(p.name for p in (run.root / "checkpoints").iterdir())
    assert names == ["step-11", "step-12"]  # what a killed process left half-written is gone


def test_a_failed_save_leaves_the_last_checkpoint(started, tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", "test", Config())
    policy, optimisation = started()
    save_checkpoint(run, policy, optimisation, {"step": 1}, whole=False)
    with pytest.raises(TypeError):
        save_checkpoint(run, policy, optimisation, {"step": 2, "bad": object()}, whole=False)
    assert last_checkpoint(run).state == {"step": 1}
    assert [p.name for p in (run.root / "checkpoints").iterdir()] == ["step-1"]


def test_gradients_are_clipped_and_their_norm_reported(started):
    policy, optimisation = started(clip=1e-9)
    before = policy.adapter_state()
    result = one_step(policy, optimisation, 0)
    assert result.grad_norm > 1e-3 and result.lr == 1e-2
    # AdamW divides by the gradient's own size, but eps keeps a clipped one small.
    moved = max(float((t - before[n]).abs().max()) for n, t in policy.adapter_state().items())
    assert moved < 1e-2


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(started):
    policy, optimisation = started()
    before = policy.state()
    loss = optimisation.scorer(collate(ROWS, 0)).logprob.mean() * float("inf")
    optimisation.backward(loss)
    with pytest.raises(RuntimeError, match="gradient is not finite at step 5"):
        optimisation.step(5)
    assert all(torch.equal(t, before[n]) for n, t in policy.state().items())


def test_micro_batches_accumulate_to_the_whole(started):
    def norm(split):
        _, optimisation = started()
        parts = [ROWS] if not split else [ROWS[:1], ROWS[1:]]
        for part in parts:
            optimisation.backward(-optimisation.scorer(collate(part, 0)).logprob.sum() / len(ROWS))
        return optimisation.step(0).grad_norm

    assert norm(True) == pytest.approx(norm(False), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    """Four steps after two of warm-up: 1/2, 1, then 4/4, 3/4, 2/4, 1/4 of what is left."""
    assert [linear_to_zero(t, 6, 2) for t in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert linear_to_zero(0, 1) == 1.0 and linear_to_zero(9, 4) == 0.0


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_a_step_in_equally_many_micro_batches(world):
    lengths = [7, 30, 5, 28, 9, 3, 3]
    shares = [step_batches(lengths, 40, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    done = sorted(i for share in shares for micro in share for i in micro.rows if micro.weight)
    assert done == list(range(len(lengths)))
    for share in shares:
        for micro in share:
            assert micro.rows and (
                len(micro.rows) == 1 or len(micro.rows) * max(lengths[i] for i in micro.rows) <= 40
            )


def test_one_process_alone_adds_nothing():
    processes = Processes(torch.device("cpu"))
    assert processes.sum([1.5, 2.0]) == [1.5, 2.0] and processes.same("x") == "x" and processes.is_main


def test_stopwatch_adds_up_phases():
    watch = Stopwatch()
    watch.add("training", 1.5, 10)
    watch.add("training", 0.5, 5)
    with watch.timed("export"):
        pass
    assert watch.phases["training"] == {"seconds": 2.0, "tokens": 15} and "export" in watch.phases
    json.dumps(watch.phases)
