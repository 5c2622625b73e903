"""Hidden states of texts as they were before training: computed when asked for, or kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempering.core.chat import fill_batches
from tempering.core.policy import Policy
from tempering.core.text_rows import TokenRows, Tokens, collate_rows, moved, read_states

CACHE_BYTES = 2 * 10**9


class FrozenStates:
    """States as they were before this stage: computed when asked for, or once for all texts in advance.

    In advance, batches depend on the texts alone: a resumed run reads the same bits. A batch that counts pads is
    always computed, since its states belong to it.
    """

    def __init__(self, policy: Policy, layer: int, skip_first: int, pad_id: int) -> None:
        self.policy, self.layer, self.skip_first, self.pad_id = policy, layer, skip_first, pad_id
        self.kept: dict[tuple[int, ...], Tensor] = {}
        """By tokens: rows of two files may have the same id."""

    def keep(self, rows: Sequence[Tokens], batch_tokens: int) -> None:
        """Compute the states of all texts once, and keep them on the CPU in the dtype of the model."""
        rows = list({tuple(row.ids): row for row in rows}.values())
        for picked in fill_batches([len(row.ids) for row in rows], batch_tokens):
            part = [rows[i] for i in picked]
            h = self._computed(moved(collate_rows(part, self.pad_id, self.skip_first), self.policy.device))
            for row, states in zip(part, h, strict=True):
                self.kept[tuple(row.ids)] = states[: len(row.ids)].cpu().clone()

    def size(self, rows: Sequence[Tokens]) -> int:
        """Bytes that `keep` would take."""
        width = self.policy.base.config.hidden_size
        return sum(map(len, {tuple(row.ids) for row in rows})) * width * self.policy.dtype.itemsize

    def of(self, rows: Sequence[Tokens], batch: TokenRows) -> Tensor:
        """The states of a batch of these texts, (B, T, D), without gradient."""
        if not self.kept or batch.attention is not None:
            return self._computed(batch)
        parts = [self.kept[tuple(row.ids)] for row in rows]
        out = torch.zeros(*batch.ids.shape, parts[0].shape[-1], dtype=parts[0].dtype)
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
        return out.to(batch.ids.device)

    def _computed(self, batch: TokenRows) -> Tensor:
        with self.policy.reference():
            return read_states(self.policy, batch, [self.layer])[0]
