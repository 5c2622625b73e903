"""Hidden states: transformers' own at every index but the last, no block too many, no hook left behind."""

import pytest
import torch

from tempering.core.activations import block_count, blocks, capture
from tempering.core.logprobs import hidden_states
from tempering.core.policy import LoraSettings

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_transformers_own_and_the_last_is_before_the_norm(family, tiny_policy):
    model = tiny_policy(family).model
    n = block_count(model)
    with torch.no_grad():
        want = model(input_ids=IDS, output_hidden_states=True).hidden_states
        with capture(model, range(n + 1)) as states:
            model(input_ids=IDS)
        assert sorted(states) == list(range(n + 1))
        for layer in range(n):
            assert torch.equal(states[layer], want[layer]), layer
        assert not torch.allclose(states[n], want[n])
        norm = next(m for name, m in blocks_parent(model).named_children() if "norm" in name)
        assert torch.equal(norm(states[n]), want[n])


def blocks_parent(model):
    return getattr(model, model.base_model_prefix)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_stopping_runs_no_block_past_the_last_and_changes_no_bit(family, layer, tiny_policy):
    model = tiny_policy(family).model
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks(model), 1)]
    head = model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    with torch.no_grad():
        with capture(model, [layer]) as whole:
            model(input_ids=IDS)
        ran.clear()
        is_past = False
        with capture(model, [layer], stop_after=layer) as states:
            model(input_ids=IDS)
            is_past = True
    assert ran == list(range(1, layer + 1)) and not is_past
    assert torch.equal(states[layer], whole[layer])
    for handle in (*handles, head):
        handle.remove()


def test_hooks_are_gone_after_a_pass_a_stop_and_an_exception(tiny_policy):
    model = tiny_policy().model
    own = hooks_of(model)
    with torch.no_grad(), capture(model, [0, 1, 2]):
        model(input_ids=IDS)
    assert hooks_of(model) == own
    with torch.no_grad(), capture(model, [0, 1], stop_after=1):
        model(input_ids=IDS)
    assert hooks_of(model) == own
    with pytest.raises(RuntimeError, match="planted"), capture(model, [0, 1, 2]):
        raise RuntimeError("planted")
    assert hooks_of(model) == own
    with torch.no_grad():
        assert model(input_ids=IDS).logits.shape[:2] == IDS.shape  # nothing stops it any more


def test_what_is_kept_is_made_at_once(tiny_policy):
    model = tiny_policy().model
    with torch.no_grad(), capture(model, [1, 2], keep=lambda h: h[:, -1].float()) as states:
        hidden_states(model, IDS)
    assert states[1].shape == (3, 32)


def test_adapters_are_in_the_states_and_gradients_flow(tiny_policy):
    policy = tiny_policy()
    policy.add_adapter("a", LoraSettings(r=2, alpha=4), seed=0)
    policy.train_only("a")
    for _, layer in policy.lora_layers():
        torch.nn.init.normal_(layer.lora_B["a"].weight)
    with capture(policy.model, [0, 2], stop_after=2) as states:
        hidden_states(policy.model, IDS)
    with policy.reference(), capture(policy.model, [0, 2], stop_after=2) as before:
        hidden_states(policy.model, IDS)
    assert torch.equal(states[0], before[0]) and not torch.allclose(states[2], before[2])
    states[2].sum().backward()
    assert all(p.grad is not None for _, p in policy.trainable_parameters())


@pytest.mark.parametrize("layers", [[], [-1], [3]])
def test_a_layer_that_is_not_there_is_named(layers, tiny_policy):
    with pytest.raises(ValueError, match="to 2, the last block"), capture(tiny_policy().model, layers):
        pass


def test_stopping_later_than_the_last_wanted_layer(tiny_policy):
    model = tiny_policy().model
    with torch.no_grad(), capture(model, [0], stop_after=1) as states:
        model(input_ids=IDS)
    assert list(states) == [0]
    with pytest.raises(ValueError, match="stop_after=1: expected 2"), capture(model, [2], stop_after=1):
        pass
