"""Which token a sample draws: uniform numbers of its own, and the inverse transform. Pure."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, str, int]
"""(seed, id of the prompt, index of the sample): what a sample depends on."""
HEAD = 1024
"""So many of the most likely tokens are sorted to sample from, unless the pick lies beyond them."""


def uniforms(key: Key, steps: int) -> np.ndarray:
    """The uniform numbers of a sample, one a token; fewer steps are the first of more."""
    seed, prompt_id, index = key
    digest = hashlib.sha256(f"{seed}:{prompt_id}:{index}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(steps)


def inverse_transform(scores: Tensor, u: Tensor, temperature: float | Tensor, top_p: float | Tensor) -> Tensor:
    """Pick a token a row by inverse transform of u in [0, 1), the most likely tokens first. (B, V), (B,) -> (B,).

    `temperature` and `top_p` may differ by row, (B, 1): what is picked in a row does not depend on the others.

    Sorting a whole vocabulary would take longer than a small model's forward pass. Nearly always the pick is among
    the `HEAD` most likely tokens, and they say so themselves; only the other rows are sorted as a whole.
    """
    probs = torch.softmax(scores.double() / temperature, -1)
    ids = scores.topk(min(HEAD, scores.shape[1]), -1).indices.sort(-1).values
    head, order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    # Tokens as likely as the last one may be among those left out, in front of it.
    is_sure = head > head[:, -1:] if ids.shape[1] < scores.shape[1] else torch.ones_like(head, dtype=torch.bool)
    kept = _nucleus(head, top_p)
    ends = ((head.cumsum(-1) >= top_p) & is_sure).any(-1)  # the nucleus, within the head
    at = u * torch.where(ends, kept[:, -1], probs.sum(-1))
    is_known = ends | (torch.as_tensor(top_p, device=scores.device) >= 1).reshape(-1)
    is_found = is_known & (at < (head * is_sure).sum(-1))
    picked = _pick(kept, ids.gather(1, order), at)
    if not is_found.all():
        rest = ~is_found
        whole, order = probs[rest].sort(dim=-1, descending=True, stable=True)
        kept = _nucleus(whole, top_p[rest] if isinstance(top_p, Tensor) else top_p)
        picked[rest] = _pick(kept, order, u[rest] * kept[:, -1])
    return picked


def _nucleus(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """Cumulated mass of the smallest set that reaches top_p, the first token always. Sorted (B, K) -> (B, K)."""
    return probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0).cumsum(-1)


def _pick(kept: Tensor, order: Tensor, at: Tensor) -> Tensor:
    """The token in whose share of the cumulated mass `at` lies. (B, K), ids (B, K), (B,) -> (B,)."""
    place = torch.searchsorted(kept, at[:, None], right=True).clamp(max=kept.shape[1] - 1)
    return order.gather(1, place)[:, 0]
