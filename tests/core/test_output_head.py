"""The output layer sees contiguous states, and computes the same."""

import pytest
import torch


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_token_s_logits_come_of_contiguous_states_and_are_those_of_the_slice(family, dtype, tiny_policy):
    base, seen = tiny_policy(family, dtype=dtype).base, []
    ids = torch.arange(3, 27).view(4, 6)
    head = base.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    with torch.no_grad():
        mine = base(input_ids=ids, logits_to_keep=1).logits
        head._forward_pre_hooks.clear()
        theirs = base(input_ids=ids, logits_to_keep=1).logits
    assert seen == [True] and mine.shape[1] == 1
    torch.testing.assert_close(mine, theirs)
