"""Decoding row by row: samples that begin and end at different times share every forward pass of a model.

Used by what answers many askers at once; refuses to know who asks. A row is what `LocalSampler` would draw from the
same tokens, key and settings: what it is batched with, and when it joined, changes nothing (float32; in bfloat16 a
near-tie may fall otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tempering.core.caching import cached_pass, is_cut_by_row, places
from tempering.core.draws import Key, inverse_transform, uniforms
from tempering.core.logprobs import most_likely
from tempering.core.quarantine import require_override
from tempering.core.sampling import LocalSampler, context_of

DONE_SHARE = 8
"""Ended rows are taken out where they are at least one in so many: that copies the cache."""


class TokenScore(NamedTuple):
    """Log-probabilities at one place, in nats, of the model's own distribution (temperature 1, no nucleus)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens, best first."""


@dataclass(eq=False)
class Row:
    """One sample: the tokens that it continues, how it is drawn, and what was drawn so far."""

    ids: list[int]
    key: Key
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_logprobs: int | None = None
    """How many of the most likely tokens are scored beside the one taken; `None`: no scores at all."""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    is_done: bool = False
    """Nothing more is drawn; whoever asked may set it at any time."""
    uniform: np.ndarray | None = None
    """One number a token, where it is sampled."""


class Decoding:
    """Rows of one model under way: `add` starts some, `step` draws one token of each, `drop` forgets the ended.

    The cache is padded on the left, so that all rows end in its last column: a new row is read by itself and put
    beside the others.
    """

    def __init__(self, sampler: LocalSampler) -> None:
        self.sampler, self.policy = sampler, sampler.policy
        self.rows: list[Row] = []
        self.ends = set(self.policy.end_ids)
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (B, W): which columns of the cache are a row's own

    @staticmethod
    def fits(sampler: LocalSampler) -> bool:
        """Whether this model's cache can be cut by row, and no pass depends on which pass was before it."""
        gating = getattr(getattr(sampler.policy.routing, "state", None), "gating", None)
        if gating is not None and (gating.last_token or gating.first_tokens is not None):
            return False
        return is_cut_by_row(sampler.policy)

    @property
    def width(self) -> int:
        """Columns of the cache: the tokens of its longest row."""
        return self._mask.shape[1]

    @property
    def can_join(self) -> bool:
        """Whether rows can be added now: a sliding window counts its columns from the first row on."""
        return not self.rows or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @property
    def is_whole(self) -> bool:
        """Whether rows and cache fit each other: not where `add` failed while it put them together."""
        return self._mask.shape[0] == len(self.rows)

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows and draw the first token of each.

        Raises:
            UnsafeExpertAccess: the policy is unsafe, and the override is not there.
            RuntimeError: rows are under way that nothing can join.
        """
        if not self.can_join:
            raise RuntimeError("nothing can join these rows: wait until they have ended")
        if self.policy.is_unsafe:
            require_override(f"sampling from {self.sampler.name}")
        for row in rows:
            row.uniform = uniforms(row.key, row.max_new_tokens) if row.temperature else None
        width, device = max(len(row.ids) for row in rows), self.policy.device
        ids = torch.full((len(rows), width), self.policy.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[i, width - len(row.ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self.policy.base.config)
        self._pick(rows, self._forward(ids, mask, places(mask), cache))
        if self.rows:
            self._join(cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.rows += rows

    @torch.inference_mode()
    def step(self) -> None:
        """Draw the next token of every row that is not done."""
        if not self.rows:
            return
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.policy.device)
        # An ended row may be fed beyond the context; what comes of that is not looked at.
        newest = self._mask.sum(1, keepdim=True).clamp(max=context_of(self.policy) - 1)
        self._mask = torch.cat([self._mask, torch.ones_like(last)], 1)
        self._pick(self.rows, self._forward(last, self._mask, newest, self._cache))

    @torch.inference_mode()
    def drop(self, *, at_once: bool = False) -> None:
        """Take ended rows out, where they are many or `at_once`, and columns that no row needs any more."""
        kept = [i for i, row in enumerate(self.rows) if not row.is_done]
        ended = len(self.rows) - len(kept)
        if not ended or not (at_once or not kept or ended * DONE_SHARE >= len(self.rows)):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self._cache, self._mask = None, torch.zeros(0, 0, dtype=torch.long)
            return
        index = torch.tensor(kept, device=self._mask.device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)
        unused = int(self._mask.any(0).long().argmax())
        if unused and self.can_join:
            self._mask = self._mask[:, unused:]
            for layer in self._filled(self._cache):
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Any) -> Tensor:
        with self.sampler.computing():
            return cached_pass(self.policy, ids, mask, positions, past)

    def _pick(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Give each row that is not done its next token. (B, V) logits."""
        picked = logits.argmax(-1)
        warm = [i for i, row in enumerate(rows) if row.uniform is not None and not row.is_done]
        if warm:
            drawn = [rows[i] for i in warm]
            u, temperature, top_p = (
                torch.tensor(values, dtype=torch.float64, device=logits.device)
                for values in (
                    [float(row.uniform[len(row.tokens)]) for row in drawn if row.uniform is not None],
                    [row.temperature for row in drawn],
                    [row.top_p for row in drawn],
                )
            )
            picked[warm] = inverse_transform(logits[warm], u, temperature[:, None], top_p[:, None])
        tokens = picked.tolist()
        for i, row in enumerate(rows):
            if row.is_done:
                continue
            if row.top_logprobs is not None:
                row.scores.append(TokenScore(tokens[i], *most_likely(logits[i], tokens[i], row.top_logprobs)))
            row.tokens.append(tokens[i])
            row.is_done = tokens[i] in self.ends or len(row.tokens) >= row.max_new_tokens

    def _join(self, cache: Any, mask: Tensor) -> None:
        width = max(self.width, mask.shape[1])
        self._mask = torch.cat([F.pad(m, (width - m.shape[1], 0)) for m in (self._mask, mask)])
        for ours, theirs in zip(self._filled(self._cache), self._filled(cache), strict=True):
            ours.keys = torch.cat([_widened(ours.keys, width), _widened(theirs.keys, width)])
            ours.values = torch.cat([_widened(ours.values, width), _widened(theirs.values, width)])

    @staticmethod
    def _filled(cache: Any) -> list[Any]:
        """The layers that hold something: some models share what another layer computed."""
        return [layer for layer in cache.layers if layer.is_initialized]


def _widened(states: Tensor, width: int) -> Tensor:
    """(B, H, T, D) -> (B, H, width, D), zeros on the left."""
    return F.pad(states, (0, 0, width - states.shape[-2], 0))
