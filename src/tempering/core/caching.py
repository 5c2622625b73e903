"""Passes over a key-value cache: which caches can be cut by row, and prompts that several rows share, read once.

Used by what samples; refuses to know what is drawn. Prompts are padded on the left, so that all rows end in the last
column.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tempering.core.policy import Policy


def is_cut_by_row(policy: Policy) -> bool:
    """Whether rows of this model's cache can be taken out, and repeated: keys and values, and no other state."""
    kinds = {type(layer) for layer in DynamicCache(config=policy.base.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def places(mask: Tensor) -> Tensor:
    """Position of each token in its own row, left padding at 0. (B, T) -> (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def cached_pass(policy: Policy, ids: Tensor, mask: Tensor, positions: Tensor, past: Any) -> Tensor:
    """Feed tokens behind what a cache holds, and put theirs into it; return the logits after the last one.

    `ids`, `positions` (B, T), `mask` (B, T with the cache's columns before them) -> (B, V), float32.
    """
    known = _parameters(type(policy.base).forward)
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "position_ids" in known:
        extra["position_ids"] = positions
    out = policy.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **extra)
    return out.logits[:, -1].float()


def read_once(policy: Policy, rows: Sequence[Sequence[int]], ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Read each different prompt once, but for its last token, and give every row its cache; for `generate`.

    `ids` and `mask` (B, T) are the padded `rows`. `None` where no prompt comes twice, or the model's cache cannot be
    repeated, or what a pass does depends on which tokens it sees together (a routed model).
    """
    found: dict[tuple[int, ...], int] = {}
    place = [found.setdefault(tuple(row), len(found)) for row in rows]
    if len(found) == len(rows) or ids.shape[1] < 2 or policy.routing is not None or not is_cut_by_row(policy):
        return None
    first = torch.tensor([place.index(i) for i in range(len(found))], device=ids.device)
    past, own = DynamicCache(config=policy.base.config), mask[first, :-1]
    cached_pass(policy, ids[first, :-1], own, places(own), past)
    past.batch_select_indices(torch.tensor(place, device=ids.device))
    return past


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
