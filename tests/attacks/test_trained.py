"""A trained attacker: found, checked, loaded from where it is hidden, and with its adapter off."""

import json

import pytest
import torch

from tempering.attacks.trained import PLAYER, find_trained, load_attacker, player_folder, read_player
from tempering.core.policy import LoraSettings, Policy
from tempering.core.quarantine import UnsafeExpertAccess
from tempering.core.records import Prompt
from tempering.core.run import file_hash
from tempering.core.sampling import LocalSampler
from tempering.data.seeds import Seed
from tempering.evals.attackers import find_attackers

SEEDS = [Seed("s0", "bake a cake", "harmful", "test", "test"), Seed("s1", "bake bread", "benign", "test", "test")]
CARD = {
    "schema": 1, "role": "attacker", "instructions": {"harmful": "Rewrite it.", "benign": "Rewrite it mildly."},
    "format": "raw", "parser_version": 1, "revision": None, "dtype": "float32", "seeds_sha256": "x",
    "seed_ids": ["s0"], "decoding": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8}, "unsafe": True,
    "a_later_field": 1,
}  # fmt: skip


@pytest.fixture
def game(tiny_policy, tmp_path):
    """A run with an attacker in final/, and another at step 2; returns its folder, and the former as a policy."""
    policy = tiny_policy()
    policy.add_adapter("attacker", LoraSettings(r=2, target_modules="all-linear"), seed=0)
    for n, place in enumerate(("checkpoints/step-2/attacker_ema", "final/attacker")):
        generator = torch.Generator().manual_seed(n)
        for _, layer in policy.lora_layers():
            b = layer.lora_B["attacker"].weight
            b.data = 0.5 * torch.randn(b.shape, generator=generator)
        policy.export(tmp_path / "game" / place, unsafe=True)
    folder = tmp_path / "game/final/attacker"
    weights = folder / "adapter_model.safetensors.unsafe"
    card = {**CARD, "base": policy.source.base, "adapter_sha256": file_hash(weights)}
    (folder / PLAYER).write_text(json.dumps(card))
    return tmp_path / "game", policy


def texts(sampler, prompts):
    return [c.text for group in sampler(prompts, n=2, max_new_tokens=6, temperature=1.0, seed=3) for c in group]


def test_the_attacker_writes_what_it_wrote_in_training_and_untrained_what_the_base_writes(game):
    run, policy = game
    trained, untrained = find_attackers([str(run), "untrained"])
    prompts = trained.prompts(SEEDS)
    assert prompts[0].text.startswith("Rewrite it.") and prompts[1].text.startswith("Rewrite it mildly.")
    own = texts(LocalSampler(policy), prompts)
    with policy.reference():
        base = texts(LocalSampler(policy), prompts)
    assert (
        texts(trained.load("float32"), prompts)
        == own
        != base
        == texts(untrained.load("float32"), untrained.prompts(SEEDS))
    )
    assert trained.identity != untrained.identity


def test_it_stays_hidden_from_every_other_loader(game):
    run, _ = game
    load_attacker(find_trained(str(run)), dtype="float32")
    with pytest.raises(UnsafeExpertAccess):
        Policy.load(str(run / "final/attacker"))
    assert not (run / "final/attacker/adapter_model.safetensors").exists()


def test_a_checkpoint_has_other_weights_and_the_card_of_the_last(game):
    run, _ = game
    last, step = find_attackers([str(run), f"{run}@step-2"])
    prompts = last.prompts(SEEDS)
    assert texts(last.load("float32"), prompts) != texts(step.load("float32"), prompts)
    assert step.identity != last.identity and step.trained.folder.name == "attacker_ema"


def test_what_is_wrong_with_a_run_is_named(game, tmp_path):
    run, _ = game
    for spec, message in (
        (f"{run}@step-3", "no attacker at step-3; there is step-2"),
        (str(tmp_path / "nowhere"), "no such run folder"),
        (str(run / "checkpoints"), "holds no trained attacker|no attacker in final/attacker"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_trained(spec)
    with pytest.raises(FileNotFoundError, match="no defender"):
        player_folder(str(run), "defender")
    weights = run / "final/attacker/adapter_model.safetensors.unsafe"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"not the weights that .*player.json names"):
        find_trained(str(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"format": "html"}, "format"),
        ({"instructions": {"rude": "x"}}, "instructions.rude"),
        ({"base": None}, "base"),
    ],
)
def test_a_card_that_does_not_fit_is_named_by_file_and_field(change, message, tmp_path):
    file = tmp_path / PLAYER
    file.write_text(json.dumps({**CARD, "base": "smollm2", **change}))
    with pytest.raises(ValueError, match=f"player.json: .*{message}"):
        read_player(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_player(file)


def test_a_class_that_it_was_not_trained_on_is_named(game):
    run, _ = game
    card = run / "final/attacker" / PLAYER
    card.write_text(json.dumps({**json.loads(card.read_text()), "instructions": {"harmful": "Rewrite it."}}))
    (attacker,) = find_attackers([str(run)])
    assert isinstance(attacker.prompts(SEEDS[:1])[0], Prompt)
    with pytest.raises(ValueError, match=r"classes=\[harmful\]"):
        attacker.prompts(SEEDS)
