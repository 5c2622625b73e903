"""Edits: the right tensors by role, the reference in the same weights, and the base's own bits back."""

import gc

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tempering.core.activations import capture
from tempering.core.editing import block_parameters, clones, select_parameters, shorten
from tempering.core.policy import LoraSettings, Policy

SHAPE = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "mixtral": MixtralConfig,
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def toy(kind):
    if kind == "gpt2":
        config = GPT2Config(vocab_size=61, n_embd=16, n_layer=4, n_head=2, bos_token_id=None, eos_token_id=2)
    elif kind == "gpt_neox":
        config = GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"})
    else:
        config = KINDS[kind](**SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize(
    ("kind", "role", "want"),
    [
        ("llama", "mlp.down_proj", "model.layers.{}.mlp.down_proj.weight"),
        ("qwen2", "mlp.down_proj", "model.layers.{}.mlp.down_proj.weight"),
        ("qwen3", "attn.o_proj", "model.layers.{}.self_attn.o_proj.weight"),
        ("qwen3", "mlp.gate_proj", "model.layers.{}.mlp.gate_proj.weight"),
        ("phi3", "mlp.down_proj", "model.layers.{}.mlp.down_proj.weight"),
        ("gpt_neox", "mlp.down_proj", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
        ("gpt_neox", "attn.o_proj", "gpt_neox.layers.{}.attention.dense.weight"),
        ("gpt2", "mlp.up_proj", "transformer.h.{}.mlp.c_fc.weight"),
        ("gpt2", "mlp.down_proj", "transformer.h.{}.mlp.c_proj.weight"),
    ],
)
def test_a_role_finds_its_weight_in_every_architecture(kind, role, want):
    assert list(select_parameters(toy(kind), [role], [2, 1])) == [want.format(1), want.format(2)]


@pytest.mark.parametrize(
    ("kind", "role", "layers", "told"),
    [
        ("phi3", "mlp.up_proj", [1], "block 0 has .*mlp.gate_up_proj"),
        ("gpt2", "mlp.gate_proj", [1], "no mlp.gate_proj"),
        ("mixtral", "mlp.down_proj", [1], "mixture of experts"),
        ("llama", "mlp.down_proj", [4], "expected blocks 0 to 3"),
    ],
)
def test_a_role_that_is_not_there_is_named(kind, role, layers, told):
    with pytest.raises(ValueError, match=told):
        select_parameters(toy(kind), [role], layers)


def test_adapters_do_not_hide_a_weight(tiny_policy):
    policy = tiny_policy()
    plain = select_parameters(policy.model, ["mlp.down_proj", "attn.o_proj"], None)
    policy.add_adapter("a", LoraSettings(r=2, target_modules="all-linear"), seed=0)
    adapted = select_parameters(policy.model, ["mlp.down_proj", "attn.o_proj"], None)
    assert list(plain) == list(adapted) and all(plain[n] is adapted[n] for n in plain)
    assert not any("lora" in name for name in block_parameters(policy.model))


def test_the_reference_is_the_model_as_it_was_and_leaves_bits_and_flags(tiny_policy):
    policy = tiny_policy()
    want = policy.model(input_ids=IDS).logits
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [0]))
    [(_, weight)] = policy.trainable_parameters()
    weight.data += 0.1
    edited, bits = policy.model(input_ids=IDS).logits, clones(dict(policy.model.named_parameters()))
    with policy.reference():
        assert torch.equal(policy.model(input_ids=IDS).logits, want) and not torch.is_grad_enabled()
    with pytest.raises(KeyError, match="planted"), policy.reference():
        raise KeyError("planted")
    assert not torch.equal(edited, want)
    assert all(torch.equal(p, bits[n]) for n, p in policy.model.named_parameters())
    assert [p.requires_grad for _, p in policy.model.named_parameters()].count(True) == 1 and weight.requires_grad


def test_undoing_a_trial_leaves_the_edit_that_was_there(tiny_policy, tmp_path):
    policy = tiny_policy()
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [0]))
    next(iter(policy.edited.values())).data += 0.1
    policy.export(tmp_path / "edit")
    again = tiny_policy()
    again.apply_edit(tmp_path / "edit" / "edit.safetensors")
    start, originals = clones(again.base_parameters()), list(again.originals)
    again.train_edit(select_parameters(again.model, ["mlp.down_proj"], [0, 1]))
    for parameter in again.edited.values():
        parameter.data += 1
    again.undo_edit()
    assert all(torch.equal(p, start[n]) for n, p in again.base_parameters().items())
    assert list(again.originals) == originals and not again.edited and again.trainable is None


def test_an_edit_is_shortened_to_a_price(tiny_policy):
    policy = tiny_policy()
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [0]))
    [(name, weight)] = policy.edited.items()
    weight.data += 1.0

    def price():  # the squared share of the way
        return float((weight.data - policy.before[name]).square().mean())

    share, value = shorten(policy.edited, policy.before, price, 0.25)
    assert share == pytest.approx(0.5, abs=0.01) and 0.24 < value <= 0.25
    assert torch.allclose(weight.data, policy.before[name] + share, atol=1e-5)


@pytest.mark.slow
def test_a_thousand_references_and_captures_leave_nothing(tiny_policy):
    policy = tiny_policy()
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [0]))

    def tensors():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.model.modules()]

    own, counts = hooks(), []
    for i in range(1000):
        with policy.reference(), capture(policy.model, [1], stop_after=1) as states:
            policy.model(input_ids=IDS)
        del states
        if i in (9, 999):
            counts.append(tensors())
    assert counts[0] == counts[1]
    assert hooks() == own


def test_a_reference_between_forward_and_backward_does_not_disturb_the_gradient(tiny_policy):
    def gradient(is_disturbed):
        policy = tiny_policy()
        policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [0, 1]))
        for _, p in policy.trainable_parameters():
            p.data *= 1.1
        loss = policy.model(input_ids=IDS).logits.square().sum()
        if is_disturbed:
            with policy.reference():
                policy.model(input_ids=IDS)
        return torch.autograd.grad(loss, [p for _, p in policy.trainable_parameters()])

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))


@pytest.mark.parametrize("has_adapter", [False, True])
def test_an_exported_edit_loads_and_reverts_to_the_base_bit_for_bit(has_adapter, tiny_policy, tmp_path):
    policy = tiny_policy()
    if has_adapter:
        policy.add_adapter("a", LoraSettings(r=2, target_modules="all-linear"), seed=0)
        for _, layer in policy.lora_layers():
            torch.nn.init.normal_(layer.lora_B["a"].weight, std=0.1)
    start = policy.model(input_ids=IDS).logits
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [1]))
    for _, p in policy.trainable_parameters():
        p.data += 0.1
    edited = policy.model(input_ids=IDS).logits
    policy.export(tmp_path / "final")
    assert not (tmp_path / "final" / "model.safetensors").exists()
    again = Policy.load(str(tmp_path / "final"), dtype="float32")
    assert torch.allclose(again.model(input_ids=IDS).logits, edited, atol=1e-5)
    again.export(tmp_path / "twice")
    assert (tmp_path / "twice" / "edit.safetensors").read_bytes() == (
        tmp_path / "final" / "edit.safetensors"
    ).read_bytes()
    again.revert_edit()
    assert torch.allclose(again.model(input_ids=IDS).logits, start, atol=1e-5)
    policy.revert_edit()
    assert torch.equal(policy.model(input_ids=IDS).logits, start)
    plain = tiny_policy()
    own = policy.base_parameters()
    assert all(torch.equal(p, own[n]) for n, p in plain.base_parameters().items())


def test_an_edit_of_another_base_is_refused(tiny_policy, tmp_path):
    policy = tiny_policy()
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [1]))
    policy.export(tmp_path / "final")
    with pytest.raises(ValueError, match="other base weights"):
        tiny_policy(seed=1).apply_edit(tmp_path / "final" / "edit.safetensors")


def test_merging_keeps_the_edit_as_plain_weights(tiny_policy, tmp_path):
    policy = tiny_policy()
    policy.train_edit(select_parameters(policy.model, ["mlp.down_proj"], [1]))
    for _, p in policy.trainable_parameters():
        p.data += 0.1
    edited = policy.model(input_ids=IDS).logits
    policy.merge()
    policy.export(tmp_path / "merged")
    assert torch.equal(Policy.load(str(tmp_path / "merged"), dtype="float32").model(input_ids=IDS).logits, edited)
