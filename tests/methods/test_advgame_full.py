"""Players all of whose weights train: averaged exactly, resumed, quarantined, counted, and asked again."""

import json

import pytest
import torch
from advgame_parts import Counting, assert_served_with_its_flag_alone, judged_by, lines, untimed
from safetensors.torch import load_file

from tempering.attacks.trained import find_trained, load_attacker
from tempering.core.chat import Encoded, collate
from tempering.core.loading import resolve
from tempering.core.policy import LoraSettings, Policy
from tempering.core.quarantine import UnsafeExpertAccess
from tempering.core.records import Prompt
from tempering.methods import advgame
from tempering.methods.advgame.planner import memory_plan
from tempering.methods.advgame.players import load_seats

WHOLE = {"tuning": "full"}


def weights_of(folder):
    name = "model.safetensors" + (".unsafe" if folder.name.startswith("attacker") else "")
    return load_file(folder / name)


def test_a_whole_player_is_averaged_exactly_quarantined_and_asked_again(game, quick_model, monkeypatch):
    config = game(steps=1, players={"attacker": WHOLE, "defender": {**WHOLE, "reference": "fixed"}}, eval_every=1)
    run = advgame.train(config, make_judges=judged_by(Counting()))
    start = load_file(f"{quick_model}/model.safetensors")
    for role in ("attacker", "defender"):
        average, newest = (weights_of(run.root / "final" / name) for name in (role, f"{role}_raw"))
        assert any(not torch.equal(newest[n], start[n]) for n in start), role
        for name, value in average.items():
            assert torch.allclose(value, 0.95 * start[name] + 0.05 * newest[name], atol=1e-6), name
        assert not (run.root / "checkpoints/step-1" / role).exists()
    row = run.read_rows("metrics.jsonl")[1]
    assert row["defender/delta"] == 0 and row["step"] == 1 and "defender/drift" not in row
    assert resolve(str(run.root)).base == str(run.root / "final/defender")
    with pytest.raises(UnsafeExpertAccess):
        resolve(str(run.root / "final/attacker"))
    assert not (run.root / "final/attacker/config.json").exists()
    trained = find_trained(str(run.root))
    asked = Prompt(({"role": "user", "content": "paint"},))
    ((answer,),) = load_attacker(trained, dtype="float32")([asked], max_new_tokens=2)
    assert answer.token_ids
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    assert_served_with_its_flag_alone(run, [asked])
    file = run.root / "final/attacker/model.safetensors.unsafe"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="not the weights"):
        find_trained(str(run.root))


def test_a_game_of_a_whole_player_and_an_adapter_is_resumed_bit_for_bit(game, tmp_path):
    over = {
        "players": {"attacker": {**WHOLE, "reference": "slow_ema"}},
        "opponents": {"probability": 0.7, "every": 1},
        "rollout": {"staleness": 1},
        "lr": 1e-3,
    }
    whole = advgame.train(game(**over, out=str(tmp_path / "whole")), make_judges=judged_by(Counting()))
    cut = game(**over, out=str(tmp_path / "cut"))

    class Stopping(Counting):
        def __call__(self, questions):
            if (tmp_path / "cut/checkpoints/step-2/state.json").is_file():
                raise InterruptedError
            return super().__call__(questions)

    with pytest.raises(InterruptedError):
        advgame.train(cut, make_judges=judged_by(Stopping()))
    run = advgame.train(cut, resume=True, make_judges=judged_by(Counting()))
    assert untimed(run) == untimed(whole)
    for name in ("data/rollouts.jsonl", "data/judgements.jsonl", "data/pairs.jsonl"):
        assert lines(run.root / name) == lines(whole.root / name), name
    for name in ("weights.safetensors", "optimizer.safetensors"):
        place = f"checkpoints/step-3/{name}"
        assert (run.root / place).read_bytes() == (whole.root / place).read_bytes()


def test_the_start_of_a_whole_player_takes_its_adapters_in(game, tmp_path, quick_model):
    start = Policy.load(quick_model, dtype="float32")
    start.add_adapter("sft", LoraSettings(r=2, alpha=4), seed=0)
    for _, _, b, _ in start.player_layers("sft"):
        b.data.fill_(0.05)
    start.export(tmp_path / "start")
    row = collate([[Encoded([5, 6, 7, 8], 2)]], 0)
    seats = load_seats(game(players={"attacker": {**WHOLE, "init": str(tmp_path / "start")}}))
    player = seats.attacker
    assert player.policy is not seats.defender.policy
    with torch.no_grad(), player.policy.using(player.below):
        before = player.policy.scorer(row).logprob
    player.begin()
    assert player.below == []
    for weights in ("current", "ema", "initial"):
        with torch.no_grad(), player.playing(weights):
            assert torch.allclose(player.policy.scorer(row).logprob, before, atol=1e-5), weights
    # Averages move by themselves, and the newest weights are as they were.
    name, parameter = player.named_parameters[0]
    assert name.startswith("attacker.")
    old, version = parameter.detach().clone(), player.version("ema")
    player.networks.kept["ema"][name.removeprefix("attacker.")].add_(1)
    player.average()
    assert torch.equal(parameter, old) and player.version("ema") != version


def test_the_plan_counts_the_copies_of_whole_players(game, quick_model):
    size = 4 * sum(p.numel() for p in Policy.load(quick_model, dtype="float32").model.parameters())
    both = {"attacker": WHOLE, "defender": WHOLE}
    plan = memory_plan(game(players=both))
    # Weights of their own; average, gradient, two moments, and the start that distances are taken to.
    assert (plan.weights, plan.adapters) == (2 * size, 2 * 5 * size)
    assert memory_plan(game(players=both, kl_every=0, eval_every=0)).adapters == 2 * 4 * size
    one = memory_plan(game(players={"attacker": WHOLE}))
    assert one.weights == 2 * size and one.adapters > 5 * size


def test_whole_players_compute_in_float32(game):
    with pytest.raises(ValueError, match=r"players\.\*\.tuning=full"):
        game(players={"attacker": WHOLE}, dtype="bfloat16")
    assert json.loads(game(players={"attacker": WHOLE}).model_dump_json())["players"]["attacker"]["tuning"] == "full"
