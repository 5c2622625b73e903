"""Sequence log-probabilities: the only place that normalises logits over the vocabulary.

Used by preference losses, difficulty scores, multiple choice and KL; refuses to know what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tempering.core.chat import Encoded, TokenBatch, collate, fill_batches

POSITIONS_PER_CHUNK = 1024
"""Logits exist for this many positions at a time (0.2 GB at a vocabulary of 49k in float32)."""


class SequenceScores(NamedTuple):
    """Per row: the sum of completion log-probabilities (nats, float32), and the number of tokens in it."""

    logprob: Float[Tensor, " B"]
    tokens: Float[Tensor, " B"]


class SequenceScorer(nn.Module):
    """Score the completion tokens of a batch: sum_t log pi(y_t | x, y_<t).

    A module, so that DDP and FSDP see one forward pass. The vocabulary projection runs only where a token
    is scored, in chunks that are recomputed in the backward pass, so full logits never exist.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> SequenceScores:
        """Return one sum a row; padding more, permuting rows or splitting the batch changes nothing."""
        predicts = batch.completion_mask[:, 1:]  # (B, T-1): position t predicts token t+1
        hidden = hidden_states(self.model, batch.ids)[:, :-1][predicts]  # (P, D)
        targets = batch.ids[:, 1:][predicts]  # (P,)
        head, cap = _head(self.model)
        parts = []
        for h, y in zip(hidden.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True):
            if torch.is_grad_enabled() and h.requires_grad:
                parts.append(checkpoint(_token_logprobs, head, cap, h, y, use_reentrant=False))
            else:
                parts.append(_token_logprobs(head, cap, h, y))
        logprobs = torch.zeros(predicts.shape, dtype=torch.float32, device=hidden.device)
        if parts:
            logprobs = logprobs.masked_scatter(predicts, torch.cat(parts))
        return SequenceScores(logprobs.sum(-1), predicts.sum(-1).float())


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Run the transformer without its vocabulary projection: (B, T) -> (B, T, D), after the final norm."""
    causal = _unwrap(model)
    body = getattr(causal, causal.base_model_prefix)
    return body(input_ids=ids, use_cache=False).last_hidden_state


def score_rows(
    scorer: Callable[[TokenBatch], SequenceScores],
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 4096,
    on_done: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """Score rows without gradient, similar lengths together; returns (nats, tokens) in the order given."""
    out: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for batch in fill_batches([len(row.ids) for row in rows], max_tokens):
        with torch.no_grad():
            scores = scorer(collate([rows[i] for i in batch], pad_id, device))
        for i, logprob, tokens in zip(batch, scores.logprob.tolist(), scores.tokens.tolist(), strict=True):
            out[i] = (logprob, int(tokens))
        if on_done:
            on_done(len(batch))
    return out


def projection_matches(model: nn.Module) -> bool:
    """Whether `hidden_states` and our projection give this model's own logits (some scale or cap them)."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    head, cap = _head(model)
    with torch.no_grad():
        ours = _project(head, cap, hidden_states(model, ids))
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    return torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)


def _token_logprobs(head: nn.Module, cap: float | None, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = _project(head, cap, hidden)  # (P, V)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _project(head: nn.Module, cap: float | None, hidden: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _head(model: nn.Module) -> tuple[nn.Module, float | None]:
    causal = _unwrap(model)
    return causal.get_output_embeddings(), getattr(causal.config, "final_logit_softcapping", None)


def _unwrap(model: Any) -> Any:
    """Return the transformers model inside a PEFT one; adapters live in its layers, so they stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
