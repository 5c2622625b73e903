"""One pass of the aligned model and one of its base over the candidates of a prompt: what every scorer reads.

The prompt is computed once a model, and its keys and values serve all candidates. Both models are one set of weights
where the aligned one is an adapter. Passes stop after the last layer that is read, unless likelihoods are. Where the
aligned model's states were kept while it drew the candidates, only the base is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import DynamicCache

from tempering.core.activations import block_count, capture, free_after
from tempering.core.logprobs import compare_positions
from tempering.core.policy import Policy
from tempering.core.think import Spans
from tempering.methods.attribution.readout import readout_positions
from tempering.methods.attribution.scores import Likelihood, cosine
from tempering.methods.attribution.settings import Distance, ReadOut

ROWS = 32
"""Candidates computed at a time."""


class Response(NamedTuple):
    """A candidate as it is scored."""

    ids: list[int]
    """Ends with an end-of-turn token; one is appended, for scoring only, where the candidate has none."""
    sampled: int
    """How many of them were sampled: likelihoods are of these."""
    spans: Spans


class Measured(NamedTuple):
    """What the passes gave for N candidates."""

    states: Tensor | None
    """Read-outs of model and base, float32, on the CPU: (2, N, read-outs, layers, D)."""
    likelihood: Likelihood | None


class Pair:
    """An aligned model and the model that it was made from.

    Raises:
        ValueError: there is no base in the weights and none is given; or tokenizers or depths differ.
    """

    def __init__(self, policy: Policy, base: Policy | None = None) -> None:
        if base is None and not policy.adapters:
            raise ValueError(
                f"{policy.source.reference} has no adapter, so its weights do not hold the model before alignment; "
                "name that model with base=MODEL"
            )
        self.policy, self.base = policy, base
        self.blocks = block_count(policy.model)
        if base is not None:
            if tokenizer_text(base.tokenizer) != tokenizer_text(policy.tokenizer):
                raise ValueError(f"{policy.source.reference} and base {base.source.reference} have other tokenizers")
            if block_count(base.model) != self.blocks:
                raise ValueError(
                    f"{policy.source.reference} has {self.blocks} blocks, base {base.source.reference} "
                    f"{block_count(base.model)}"
                )

    @contextmanager
    def side(self, is_base: bool) -> Iterator[Any]:
        """The model of one side, in eval mode and without gradient; adapters and mode as before on exit."""
        policy = self.base if is_base and self.base is not None else self.policy
        model, was_training = policy.model, policy.model.training
        model.eval()
        try:
            with torch.no_grad():
                if is_base and self.base is None:
                    with policy.reference(initial=True):
                        yield model
                else:
                    yield model
        finally:
            model.train(was_training)

    def keep_only(self, last: int) -> None:
        """Free what lies behind layer `last` in both models: scores up to it stay what they are, answers are gone."""
        for policy in (self.policy, self.base):
            if policy is not None:
                free_after(policy.model, last)

    @property
    def has_adapted_head(self) -> bool:
        """Whether an adapter changes the output layer or brings its own, which both sides' logits would share."""
        head = self.policy.base.get_output_embeddings()
        return isinstance(head, (LoraLayer, AuxiliaryTrainingWrapper))


def measure(
    pair: Pair,
    prompt: Sequence[int],
    responses: Sequence[Response],
    *,
    layers: Sequence[int] = (),
    readouts: Sequence[ReadOut] = ("eos",),
    likelihood: bool = False,
    against_base: bool = True,
    known: Mapping[int, Tensor] | None = None,
    rows: int = ROWS,
) -> Measured:
    """Run both models over the candidates of one prompt; `likelihood` runs all blocks, else the last of `layers`.

    `against_base=False`: the base is not needed for the likelihoods. `known`: read-outs of the model, (read-outs,
    layers, D) by index of the candidate, that need no pass; not with `likelihood`. Candidates are computed longest
    first, `rows` at a time, right-padded behind the shared prompt; a causal model sees neither order nor padding.

    Raises:
        ValueError: likelihoods against a base where an adapter changes the output layer.
    """
    if likelihood and against_base and pair.base is None and pair.has_adapted_head:
        raise ValueError("an adapter of this model changes its output layer, so base logits need base=MODEL")
    order = sorted(range(len(responses)), key=lambda i: (-len(responses[i].ids), i))
    known = known or {}
    read: list[dict[int, Tensor]] = []
    finals: list[Tensor] = []
    for is_base in [False, True] if layers or (likelihood and against_base) else [False]:
        todo = order if is_base else [i for i in order if i not in known]
        with pair.side(is_base) as model:
            parts = _pass(model, prompt, [responses[i] for i in todo], layers, readouts, likelihood, rows)
        if layers:
            found = dict(zip(todo, (row for part, _ in parts if part is not None for row in part), strict=True))
            read.append(found if is_base else {**known, **found})
        if likelihood:
            finals.append(torch.cat([h for _, h in parts if h is not None]))
    states = torch.stack([torch.stack([side[i] for i in sorted(order)]) for side in read]) if layers else None
    if not likelihood:
        return Measured(states, None)
    back = np.argsort(order)
    base = pair.base or pair.policy
    sampled = [responses[i] for i in order]
    targets = torch.tensor([t for r in sampled for t in r.ids[: r.sampled]], device=finals[0].device)
    with torch.no_grad():
        terms = compare_positions(
            pair.policy.model, finals[0], base.model, finals[1] if len(finals) > 1 and against_base else None, targets
        )
    lengths = [r.sampled for r in sampled]

    def means(values: Tensor) -> np.ndarray:
        split = values.double().cpu().split(lengths)
        return np.array([float(v.mean()) if len(v) else np.nan for v in split])[back]

    return Measured(
        states,
        Likelihood(
            means(-terms.logprob), means(-terms.base_logprob), means(terms.kl), means(terms.reverse_kl),
            means(terms.self_certainty),
        ),
    )  # fmt: skip


def similarity(states: Tensor, distance: Distance, means: Tensor | None = None) -> np.ndarray:
    """Compare (2, N, ..., D) states of model and base: (N, ...); `means` (2, ..., D) are subtracted first."""
    if means is not None:
        states = states - means[:, None]
    if distance == "cos":
        return cosine(states[0], states[1]).double().numpy()
    return -(states[0] - states[1]).norm(dim=-1).double().numpy()


def tokenizer_text(tokenizer: Any) -> str:
    """What a tokenizer is, as text: without the padding and truncation that a call leaves in it."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return repr(sorted(tokenizer.get_vocab().items()))
    tree = json.loads(inner.to_str())
    return json.dumps({k: v for k, v in tree.items() if k not in ("padding", "truncation")}, sort_keys=True)


def _pass(
    model: Any,
    prompt: Sequence[int],
    responses: Sequence[Response],
    layers: Sequence[int],
    readouts: Sequence[ReadOut],
    likelihood: bool,
    rows: int,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """One model over the candidates: for each batch of rows its read-outs, and the states that predict its tokens."""
    device = next(model.parameters()).device
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(causal, causal.base_model_prefix)
    last = None if likelihood else max(layers)
    p = len(prompt)

    def forward(ids: Tensor, start: int, cache: DynamicCache, keep: Any) -> tuple[dict[int, Tensor], Tensor | None]:
        positions = torch.arange(start, start + ids.shape[1], device=device)[None].expand(len(ids), -1)
        final = None
        with capture(model, layers or [0], stop_after=last, keep=keep) as states:
            final = body(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
        return states, final

    out = []
    for start in range(0, len(responses), rows):
        batch = responses[start : start + rows]
        width = max(len(r.ids) for r in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        weights = torch.zeros((len(batch), len(readouts), width))
        for i, r in enumerate(batch):
            ids[i, : len(r.ids)] = torch.tensor(r.ids)
            for k, kind in enumerate(readouts):
                at = readout_positions(0, r.spans, len(r.ids), kind)
                weights[i, k, at] = 1 / len(at)
        weights = weights.to(device)
        # A plain cache keeps all positions of sliding-window layers too; their mask does the sliding.
        cache = DynamicCache()
        _, first = forward(torch.tensor([list(prompt)], device=device), 0, cache, lambda h: h[:, :0])
        cache.batch_repeat_interleave(len(batch))

        def keep(h: Tensor, w: Tensor = weights) -> Tensor:
            return w @ h.float()  # (B, R, D): positions are averaged before anything is compared

        states, final = forward(ids.to(device), p, cache, keep)
        read = torch.stack([states[layer] for layer in layers], dim=2).cpu() if layers else None
        predicts = None
        if likelihood:
            assert first is not None and final is not None
            before = torch.cat([first[:, -1:].expand(len(batch), -1, -1), final[:, :-1]], dim=1)
            predicts = torch.cat([before[i, : r.sampled] for i, r in enumerate(batch)])
        out.append((read, predicts))
    return out
