"""Attack `gcg`: a suffix, found by gradients, after which the model itself begins to comply.

Zou et al. 2023 (arXiv:2307.15043), Algorithm 1: the loss is the negative log-likelihood of a complying opening; each
step takes the gradient with respect to the suffix's one-hot tokens, draws `candidates` single-token replacements from
the `top_k` best of each position, computes their losses, and keeps the best.

Differs from the paper: the losses are of the candidates *as text*, through the chat template and the tokenizer again,
so what is found is what can be sent (token sequences that no text gives cannot win); the best suffix so far is kept
where no candidate is better; far fewer steps by default (the paper: 500 steps, 512 candidates, top 256). Needs the
weights: local models only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tempering.attacks.encodings import rewritten
from tempering.attacks.prefill import opening
from tempering.core.records import Prompt, content_id

if TYPE_CHECKING:
    from tempering.core.sampling import LocalSampler  # loads torch, for which `temper --help` must not wait

START = " !" * 12


class Budget(NamedTuple):
    """What the search may spend on one request."""

    steps: int = 30
    candidates: int = 32
    top_k: int = 64


class Suffix(NamedTuple):
    """A request with the suffix that was found."""

    prompt: Prompt
    loss: float
    """Mean negative log-likelihood of the opening, nats per token."""
    first_loss: float
    """The same before the first step."""
    scored: int
    """Candidates whose loss was computed."""


def gcg(
    requests: Sequence[Prompt],
    sampler: LocalSampler,
    budget: Budget = Budget(),  # noqa: B008 - immutable
    *,
    enough: float = 0.2,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Suffix]:
    """Search a suffix for each request; stops early once the opening's loss is below `enough` nats per token."""
    found = []
    for request in requests:
        found.append(_search(request, sampler, budget, enough, seed))
        if on_done:
            on_done(1)
    return found


def _search(request: Prompt, sampler: LocalSampler, budget: Budget, enough: float, seed: int) -> Suffix:
    target = str(request.extra.get("prefill") or "").strip() or opening(request.text)
    best = START
    best_loss = first_loss = _losses(request, [best], target, sampler)[0]
    scored = 1
    for step in range(budget.steps):
        if best_loss < enough:
            break
        generator = np.random.default_rng(int(content_id(seed, request.id, step)[:8], 16))
        children = _children(request, best, target, sampler, budget, generator)
        if not children:
            break
        losses = _losses(request, children, target, sampler)
        scored += len(children)
        i = int(np.argmin(losses))
        if losses[i] < best_loss:
            best, best_loss = children[i], losses[i]
    return Suffix(_with(request, best), best_loss, first_loss, scored)


def _children(
    request: Prompt, suffix: str, target: str, sampler: LocalSampler, budget: Budget, generator: np.random.Generator
) -> list[str]:
    """Draw suffixes that differ from this one in one token, by the gradient's choice; equal texts once."""
    from tempering.core.chat import Encoded, token_spans
    from tempering.core.logprobs import token_gradients

    tokenizer = sampler.policy.tokenizer
    prompt = _with(request, suffix)
    ids, spans, text = token_spans(tokenizer, prompt.messages, sampler.fmt)
    start = text.rindex(suffix)
    slots = [i for i, (a, b) in enumerate(spans) if start <= a < b <= start + len(suffix)]
    answer = list(tokenizer(target, add_special_tokens=False)["input_ids"])
    gradient = token_gradients(sampler.policy.model, Encoded(ids + answer, len(ids)), slots)
    gradient[:, _unusable(tokenizer, gradient.shape[1])] = float("inf")
    top = (-gradient).topk(budget.top_k, dim=-1).indices.tolist()
    children = []
    for _ in range(budget.candidates):
        slot = int(generator.integers(len(slots)))
        piece = tokenizer.decode([top[slot][int(generator.integers(budget.top_k))]])
        a, b = (x - start for x in spans[slots[slot]])
        children.append(suffix[:a] + piece + suffix[b:])
    return [c for c in dict.fromkeys(children) if c.strip() and c != suffix]


def _losses(request: Prompt, suffixes: Sequence[str], target: str, sampler: LocalSampler) -> list[float]:
    scored = sampler.score([_with(request, s) for s in suffixes], [[target]] * len(suffixes))
    return [-logprob / max(1, tokens) for ((logprob, tokens),) in scored]


def _with(request: Prompt, suffix: str) -> Prompt:
    return rewritten(request, "gcg", request.text + suffix)


def _unusable(tokenizer: Any, size: int) -> list[int]:
    """Tokens that are not plain printable ASCII text by themselves, and ids that the tokenizer does not have."""
    cached: list[int] | None = getattr(tokenizer, "_tempering_unusable", None)
    if cached is None:
        special, known = set(tokenizer.all_special_ids), len(tokenizer)
        pieces = tokenizer.batch_decode([[i] for i in range(known)])
        cached = [
            i
            for i in range(size)
            if i >= known
            or i in special
            or not (pieces[i].isascii() and pieces[i].isprintable() and pieces[i].strip())
        ]
        tokenizer._tempering_unusable = cached
    return cached
