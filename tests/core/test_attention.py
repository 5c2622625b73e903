"""Attention of short rows in float32: the same function, in more digits, where it is faster and nowhere else."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tempering.core.attention import LONGEST, NAME, attend, use_fast_attention
from tempering.core.policy import Policy


class Module(torch.nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def drawn(tokens, heads=4, kv_heads=4, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(tokens)
    shapes = [(2, h, tokens, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("tokens", [2, 17, LONGEST])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", ["causal", "bool", "float"])
def test_it_is_float32_attention_rounded_once_and_so_is_its_gradient(tokens, kv_heads, masked):
    query, key, value = drawn(tokens, kv_heads=kv_heads)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    allowed[0, :, 1:, 0] = False  # left padding
    mask = {"causal": None, "bool": allowed, "float": torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)}[masked]
    given = mask.bfloat16() if masked == "float" else mask
    out, weights = attend(Module(4 // kv_heads), query, key, value, given)
    exact = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wide = [exact[0], *(x.repeat_interleave(4 // kv_heads, 1) for x in exact[1:])]
    want = scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    assert weights is None and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.bfloat16())
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(slope)
    want.backward(slope.float())
    for ours, theirs in zip((query, key, value), exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (LONGEST + 1, LONGEST + 1), (8, LONGEST + 8)])
def test_single_tokens_and_long_rows_are_those_of_transformers(queries, keys, monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = drawn(keys)
    query = query[:, :, :queries]
    mask = torch.ones(queries, keys, dtype=torch.bool)[None, None]
    ours, _ = attend(Module(), query, key, value, mask)
    assert torch.equal(ours, sdpa_attention_forward(Module(), query, key, value, mask)[0])


def test_a_model_in_bfloat16_attends_so_and_one_in_float32_does_not(tiny_model_dir, tmp_path):
    half, whole = (Policy.load(str(tiny_model_dir("llama")), dtype=d, device="cpu") for d in ("bfloat16", "float32"))
    assert half.base.config._attn_implementation == NAME
    assert whole.base.config._attn_implementation == "sdpa" and not use_fast_attention(whole.base)
    half.base.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_a_model_that_attends_in_its_own_way_goes_on_doing_so(tiny_model_dir):
    policy = Policy.load(str(tiny_model_dir("llama")), dtype="float32", device="cpu")
    model = policy.base.bfloat16()
    model.set_attn_implementation("eager")
    assert not use_fast_attention(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_every_family_computes_what_it_did_to_the_last_digits(family, tiny_model_dir):
    policy = Policy.load(str(tiny_model_dir(family)), dtype="bfloat16", device="cpu")
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        fast = policy.model(ids).logits
        policy.base.set_attn_implementation("sdpa")
        plain = policy.model(ids).logits
    torch.testing.assert_close(fast, plain, rtol=0, atol=0.03 * float(plain.abs().max()))
