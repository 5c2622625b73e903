"""Sequence log-probabilities: the only place that normalises logits over the vocabulary.

Used by preference losses, difficulty scores, multiple choice and KL; refuses to know what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
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
        self.telling: Callable[[TokenBatch], AbstractContextManager[Any]] = nullcontext
        """Told of each batch around its pass, for a model that has to know where answers start."""

    def forward(self, batch: TokenBatch) -> SequenceScores:
        """Return one sum a completion; padding more, permuting rows or splitting the batch changes nothing."""
        parts = self.by_token(batch).split(batch.lengths)
        tokens = torch.tensor(batch.lengths, dtype=torch.float32, device=batch.ids.device)
        return SequenceScores(torch.stack([part.sum() for part in parts]), tokens)

    def by_token(self, batch: TokenBatch, temperature: float = 1.0) -> Float[Tensor, " P"]:
        """Return the log-probability of every scored token, completion after completion, of logits / temperature."""
        return self._logprobs(self._hidden(batch), batch, temperature)

    def with_entropies(self, batch: TokenBatch) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Return what `by_token` does, and the entropy of each token's distribution, in nats; one pass."""
        hidden = self._hidden(batch)
        return self._logprobs(hidden, batch, 1.0), entropies(self.model, hidden)

    def _hidden(self, batch: TokenBatch) -> Float[Tensor, "P D"]:
        with self.telling(batch):
            hidden = hidden_states(self.model, batch.ids, batch.positions, batch.mask)  # (B, T, D)
        return hidden.flatten(0, 1)[batch.source]

    def _logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float) -> Float[Tensor, " P"]:
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


class DistributionTerms(NamedTuple):
    """What two models say at each of P positions, in nats, float32. Base terms are NaN where there is no base."""

    logprob: Float[Tensor, " P"]
    """Of the token that follows, under the model."""
    base_logprob: Float[Tensor, " P"]
    kl: Float[Tensor, " P"]
    """KL(model || base), over the whole vocabulary."""
    reverse_kl: Float[Tensor, " P"]
    self_certainty: Float[Tensor, " P"]
    """KL(uniform || model)."""


def distribution_terms(
    logits: Float[Tensor, "P V"], base_logits: Float[Tensor, "P V"] | None, targets: Int[Tensor, " P"]
) -> DistributionTerms:
    """Compare next-token distributions: sum_v p (log p - log q), and -(1/V) sum_v log(V p_v) (arXiv:2502.18581).

    >>> p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    >>> found = distribution_terms(p.log(), q.log(), torch.tensor([0]))
    >>> round(float(found.kl), 7), round(float(found.self_certainty), 7)
    (0.1732868, 0.056633)
    """
    log_p = logits.float().log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    certainty = (-log_p.mean(-1) - math.log(log_p.shape[-1])).clamp(min=0)
    if base_logits is None:
        nothing = torch.full_like(logprob, torch.nan)
        return DistributionTerms(logprob, nothing, nothing, nothing, certainty)
    log_q = base_logits.float().log_softmax(-1)
    difference = log_p - log_q
    return DistributionTerms(
        logprob,
        log_q.gather(-1, targets[:, None]).squeeze(-1),
        (log_p.exp() * difference).sum(-1).clamp(min=0),
        (log_q.exp() * -difference).sum(-1).clamp(min=0),
        certainty,
    )


def compare_positions(
    model: nn.Module,
    hidden: Float[Tensor, "P D"],
    base: nn.Module,
    base_hidden: Float[Tensor, "P D"] | None,
    targets: Int[Tensor, " P"],
    chunk: int = 64,
) -> DistributionTerms:
    """Compare two models' distributions from their final hidden states; logits exist for `chunk` positions at a time.

    Adapters on an output layer would apply to both: the caller sees to it that there are none.
    """
    (head, cap), (base_head, base_cap) = _head(model), _head(base)
    parts = []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        q = None if base_hidden is None else _project(base_head, base_cap, base_hidden[rows])
        parts.append(distribution_terms(_project(head, cap, hidden[rows]), q, targets[rows]))
    return DistributionTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))


def entropies(
    model: nn.Module, hidden: Float[Tensor, "P D"], chunk: int = POSITIONS_PER_CHUNK
) -> Float[Tensor, " P"]:
    """Entropy of the next-token distribution, in nats, from final hidden states; recomputed in the backward pass."""
    head, cap = _head(model)
    return torch.cat([checkpoint(_entropy, head, cap, h, use_reentrant=False) for h in hidden.split(chunk)])


def most_likely(logits: Float[Tensor, " V"], token: int, k: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token, in nats, and the k most likely tokens with theirs, best first."""
    log_p = logits.float().log_softmax(-1)
    best, ids = log_p.topk(min(k, len(log_p)))
    return float(log_p[token]), list(zip(ids.tolist(), best.tolist(), strict=True))


def kl_from_base(
    model: nn.Module, hidden: Float[Tensor, "P D"], base_hidden: Float[Tensor, "P D"], chunk: int = 64
) -> Float[Tensor, " P"]:
    """KL(base || model) of the next token over the whole vocabulary, in nats, from final hidden states of both.

    Gradients reach `hidden`; logits exist for `chunk` positions at a time and are recomputed in the backward pass.
    """
    head, cap = _head(model)
    parts = []
    for h, b in zip(hidden.split(chunk), base_hidden.split(chunk), strict=True):
        if torch.is_grad_enabled() and h.requires_grad:
            parts.append(checkpoint(_kl, head, cap, h, b, use_reentrant=False))
        else:
            parts.append(_kl(head, cap, h, b))
    return torch.cat(parts)


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


def _entropy(head: nn.Module, cap: float | None, hidden: Tensor) -> Tensor:
    log_p = _project(head, cap, hidden).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _kl(head: nn.Module, cap: float | None, hidden: Tensor, base_hidden: Tensor) -> Tensor:
    log_q = _project(head, cap, hidden).log_softmax(-1)
    with torch.no_grad():
        log_p = _project(head, cap, base_hidden).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _project(head: nn.Module, cap: float | None, hidden: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _head(model: nn.Module) -> tuple[nn.Module, float | None]:
    causal = _unwrap(model)
    return causal.get_output_embeddings(), getattr(causal.config, "final_logit_softcapping", None)


def _unwrap(model: Any) -> Any:
    """Return the transformers model inside a PEFT one; adapters live in its layers, so they stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
