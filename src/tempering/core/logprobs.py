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

from tempering.core.chat import Encoded, TokenBatch, collate, fill_batches, group_length

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
        """Return one sum a completion; padding more, permuting rows or splitting the batch changes nothing."""
        parts = self.by_token(batch).split(batch.lengths)
        tokens = torch.tensor(batch.lengths, dtype=torch.float32, device=batch.ids.device)
        return SequenceScores(torch.stack([part.sum() for part in parts]), tokens)

    def by_token(self, batch: TokenBatch, temperature: float = 1.0) -> Float[Tensor, " P"]:
        """Return the log-probability of every scored token, completion after completion, of logits / temperature."""
        hidden = hidden_states(self.model, batch.ids, batch.positions, batch.mask)  # (B, T, D)
        hidden = hidden.flatten(0, 1)[batch.source]  # (P, D)
        head, cap = _head(self.model)
        parts = []
        for h, y in zip(hidden.split(POSITIONS_PER_CHUNK), batch.target.split(POSITIONS_PER_CHUNK), strict=True):
            if torch.is_grad_enabled() and h.requires_grad:
                parts.append(checkpoint(_token_logprobs, head, cap, h, y, temperature, use_reentrant=False))
            else:
                parts.append(_token_logprobs(head, cap, h, y, temperature))
        return torch.cat(parts)


def nll_share(logprob: Float[Tensor, " B"], step_tokens: int) -> Float[Tensor, ""]:
    """This micro-batch's share of the step's loss: minus its summed log-probabilities over *all* the step's tokens.

    `logprob` is in nats; the shares of a step's micro-batches add up to its mean negative log-likelihood a token.
    """
    return -logprob.sum() / step_tokens


def hidden_states(
    model: nn.Module, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Run the transformer without its vocabulary projection: (B, T) -> (B, T, D), after the final norm."""
    causal = _unwrap(model)
    body = getattr(causal, causal.base_model_prefix)
    return body(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state


def token_gradients(model: nn.Module, row: Encoded, slots: Sequence[int]) -> Float[Tensor, "S V"]:
    """Return the gradient of the completion's mean NLL with respect to the one-hot tokens at `slots`.

    Where the embedding is scaled, the gradient is too, by the same positive number everywhere.
    """
    causal = _unwrap(model)
    table = causal.get_input_embeddings()
    ids = torch.tensor([row.ids], device=table.weight.device)
    with torch.enable_grad():
        embedded = table(ids).detach().requires_grad_()
        body = getattr(causal, causal.base_model_prefix)
        hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
        head, cap = _head(model)
        p = row.prompt_tokens
        loss = -_token_logprobs(head, cap, hidden[p - 1 : -1], ids[0, p:]).mean()
        (gradient,) = torch.autograd.grad(loss, embedded)
    return gradient[0, list(slots)].float() @ table.weight.detach().float().T


def score_groups(
    scorer: Callable[[TokenBatch], SequenceScores],
    groups: Sequence[Sequence[Encoded]],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 4096,
    on_done: Callable[[int], None] | None = None,
) -> list[list[tuple[float, int]]]:
    """Score the completions of each prompt without gradient, similar lengths together.

    Returns (nats, tokens) for each completion, in the order given. `on_done` counts groups.
    """
    out: list[list[tuple[float, int]]] = [[] for _ in groups]
    for batch in fill_batches([group_length(group) for group in groups], max_tokens):
        with torch.no_grad():
            scores = scorer(collate([groups[i] for i in batch], pad_id, device))
        flat = iter(zip(scores.logprob.tolist(), map(int, scores.tokens.tolist()), strict=True))
        for i in batch:
            out[i] = [next(flat) for _ in groups[i]]
        if on_done:
            on_done(len(batch))
    return out


def share_limit(model: nn.Module) -> int:
    """Longest row, in tokens, in which completions may share their prompt; 0 where this model cannot.

    Tried on the model itself: an attention that ignores our mask, or positions, gives other hidden states.
    """
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]], device=next(model.parameters()).device)
    rows = [[Encoded([5, 6, 7, 8], 2), Encoded([5, 6, 9, 10], 2)]]
    batch = collate(rows, 0, ids.device)
    try:
        with torch.no_grad():
            shared = hidden_states(model, batch.ids, batch.positions, batch.mask)[0, 4:]
            alone = hidden_states(model, torch.tensor([[5, 6, 9, 10]], device=ids.device))[0, 2:]
    except (ValueError, TypeError, RuntimeError):
        return 0
    if not torch.allclose(shared.float(), alone.float(), atol=5e-2, rtol=5e-2):
        return 0
    # A mask is for all rows of a batch, so a row beyond a sliding window would be computed without its window.
    config, unlimited = _unwrap(model).config, 1 << 30
    context = getattr(config, "max_position_embeddings", None) or unlimited
    return unlimited if (getattr(config, "sliding_window", None) or unlimited) >= context else 0


def projection_matches(model: nn.Module) -> bool:
    """Whether `hidden_states` and our projection give this model's own logits (some scale or cap them)."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    head, cap = _head(model)
    with torch.no_grad():
        ours = _project(head, cap, hidden_states(model, ids))
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    return torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)


def _token_logprobs(
    head: nn.Module, cap: float | None, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    logits = _project(head, cap, hidden) / temperature  # (P, V)
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
