"""Named adapters on one frozen base: who may change what, and that everything is as before afterwards."""

import pytest
import torch

from tempering.core.chat import Encoded, collate
from tempering.core.policy import LoraSettings, Policy

SETTINGS = LoraSettings(r=4, alpha=8, target_modules="all-linear")
ROWS = [[Encoded([5, 6, 7, 8, 9], 2)], [Encoded([5, 9, 4], 1)]]


def facts(policy):
    flags = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    modes = {n: m.training for n, m in policy.model.named_modules()}
    return flags, modes, list(policy._active())


def logprobs(policy):
    return policy.scorer(collate(ROWS, 0)).logprob


def parameters(policy, name):
    return [p for _, a, b, _ in policy.player_layers(name) for p in (a, b)]


@pytest.fixture
def players(tiny_policy):
    policy = tiny_policy()
    for name in ("attacker", "defender", "attacker_ema"):
        policy.add_player(name, SETTINGS, seed=1)
    policy.copy_player("attacker", "attacker_ema")
    return policy


def stir(policy, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, _, b, _ in policy.player_layers(name):
        b.data = torch.randn(b.shape, generator=generator) * 0.1


def test_a_player_that_joins_changes_nothing(tiny_policy):
    policy = tiny_policy()
    policy.add_adapter("below", SETTINGS, seed=0)
    policy.train_only("below")
    policy.model.eval()
    flags, modes, active = facts(policy)
    before = logprobs(policy)
    policy.add_player("attacker", SETTINGS, seed=1)
    new_flags, new_modes, new_active = facts(policy)
    assert new_active == active and policy.adapters == ["below"] and policy.players == ["attacker"]
    assert {n: new_flags[n] for n in flags} == flags and {n: new_modes[n] for n in modes} == modes
    joined = {n for n in new_flags if n not in flags}
    assert joined and not any(new_flags[n] for n in joined) and not any(new_modes.values())
    assert torch.equal(logprobs(policy), before)
    with pytest.raises(ValueError, match="already"):
        policy.add_player("attacker", SETTINGS, seed=1)


def test_using_a_player_restores_flags_adapters_and_modes_also_after_an_error(players):
    players.base.model.layers[0].train()
    before = facts(players)
    with (
        pytest.raises(RuntimeError, match="inside"),
        players.using(["attacker"], training=parameters(players, "attacker")),
    ):
        players.model.train()
        assert players._active() == ["attacker"] and any(p.requires_grad for p in players.model.parameters())
        raise RuntimeError("inside")
    assert facts(players) == before
    with pytest.raises(ValueError, match="no adapter called nobody"), players.using(["nobody"]):
        pass


def test_the_backward_of_one_player_reaches_no_other_nor_the_base(players):
    stir(players, "defender"), stir(players, "attacker_ema", 1)
    own = parameters(players, "attacker")
    with players.using(["attacker"], training=own):
        logprobs(players).sum().backward()
    mine = {id(p) for p in own}
    touched = [n for n, p in players.model.named_parameters() if p.grad is not None and id(p) not in mine]
    assert not touched and any(p.grad is not None and bool(p.grad.abs().sum()) for p in own)


def test_an_optimiser_leaves_the_others_unchanged_bit_for_bit(players):
    stir(players, "attacker")
    players.copy_player("attacker", "attacker_ema")
    kept = players.adapter_state(["attacker_ema", "defender"])
    own = parameters(players, "attacker")
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.1)
    with players.using(["attacker"], training=own):
        (-logprobs(players).sum()).backward()
    optimizer.step()
    after = players.adapter_state(["attacker_ema", "defender"])
    assert kept.keys() == after.keys() and all(torch.equal(kept[n], after[n]) for n in kept)
    assert players.adapter_hash(["attacker"]) != players.adapter_hash(["attacker_ema"])


def test_players_on_a_shared_base_score_as_models_loaded_by_themselves(players, tmp_path):
    stir(players, "attacker", 2), stir(players, "defender", 3)
    for name in ("attacker", "defender"):
        with players.using([name]):
            shared = logprobs(players)
        players.export(tmp_path / name, names=[name])
        alone = logprobs(Policy.load(str(tmp_path / name), dtype="float32", device="cpu"))
        assert torch.allclose(shared, alone, atol=1e-5)


def test_a_loaded_player_stands_beneath_another(players, tmp_path):
    stir(players, "defender", 3)
    players.export(tmp_path / "start", names=["defender"])
    players.load_player("start", tmp_path / "start")
    stir(players, "attacker", 4)
    with players.using(["defender", "attacker"]):
        want = logprobs(players)
    with players.using(["start", "attacker"]):
        assert torch.allclose(logprobs(players), want, atol=1e-5)
    players.export(tmp_path / "both", names=["start", "attacker"])
    alone = Policy.load(str(tmp_path / "both"), dtype="float32", device="cpu")
    assert torch.allclose(logprobs(alone), want, atol=1e-5)
