"""Attention of short rows on a CPU, in float32: there the backward pass of half-precision kernels is slower.

PyTorch's fused attention on a CPU takes several times as long to differentiate in bfloat16 as in float32 where rows
are short (`benchmarks/attention.py`). Rows longer than `LONGEST`, tokens that are sampled one at a time, and other
devices are left to transformers' `sdpa`. By length alone, so that a reference without gradient and the model that
learns compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "sdpa_short_rows_in_float32"
LONGEST = 256
"""Tokens; beyond it, what float32 loses in the forward pass is more than it gains in the backward pass."""


def use_fast_attention(model: Any) -> bool:
    """Let a transformers model on a CPU attend as told above; returns whether it does.

    Left alone: float32, other devices, and models that attend in another way than `sdpa` (`eager` for soft caps).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    if config._attn_implementation != "sdpa" or config.sub_configs:
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa` of transformers, (B, H, T, d) -> (B, T, H, d), in float32 where rows have 2 to `LONGEST` tokens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not 1 < query.shape[2] <= key.shape[2] <= LONGEST:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), None
