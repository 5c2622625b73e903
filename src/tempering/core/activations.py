"""Hidden states of a model as it is: `capture` reads them at named layers, and can stop the pass after the last one.

Used by methods that compare or steer representations; refuses to know what the states are for. The losses on such
states are pure functions at the end of the file.

| index | is | shape |
|---|---|---|
| 0 | the token embeddings, as the first block receives them | (B, T, D) |
| l = 1..n | the residual stream after block l, before the final norm | (B, T, D) |

For l < n that is `output_hidden_states[l]` of transformers; entry n of theirs is after the final norm, ours is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor

States = dict[int, Tensor]
"""Layer index -> its states, in the dtype of the model."""


class _Stop(Exception):  # noqa: N818  # no error: the pass has gone as far as it needs to
    """Leaves the forward pass."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer's blocks, first to last; adapters on them stay active.

    Raises:
        ValueError: the model's blocks are not one list as long as its configuration says.
    """
    body, count = _body(model)
    lists = [m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(body).__name__}: expected one list of {count} blocks, found {len(lists)}; "
            "hidden states of this architecture cannot be read"
        )
    return list(lists[0])


def block_count(model: nn.Module) -> int:
    """Return n: layer indices are 0..n."""
    return len(blocks(model))


class _Freed(nn.Module):
    """Stands where weights were."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this part of the model was freed: it holds what its scores need, and cannot answer")


def free_after(model: nn.Module, last: int) -> None:
    """Free all blocks behind block `last`, counted from 1, and the output layer where it has weights of its own.

    What is left computes states up to that layer, with `capture(..., stop_after=last)`, and nothing else.

    Raises:
        ValueError: the model has no such block.
    """
    found = blocks(model)
    if not 1 <= last <= len(found):
        raise ValueError(f"layer {last}: expected 1 to {len(found)}, the last block")
    body, _ = _body(model)
    (stack,) = (m for m in body.children() if isinstance(m, nn.ModuleList) and list(m) == found)
    for place in range(last, len(found)):
        stack[place] = _Freed()
    top: Any = model
    causal = top.get_base_model() if hasattr(top, "get_base_model") else top
    head = causal.get_output_embeddings()
    if head is not None and causal.get_input_embeddings().weight is not getattr(head, "weight", None):
        causal.set_output_embeddings(_Freed())


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[int],
    *,
    stop_after: int | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[States]:
    """Keep the states at `layers` of each forward pass inside the block; the last pass's are what is left.

    `keep` turns (B, T, D) into what is worth keeping, at once, so that all layers never exist together. With
    `stop_after`, at least the last of `layers`, the first pass leaves the `with` block right after that layer: no
    later block, final norm or output layer runs, and no statement after the pass.

        with capture(model, [5, 12], stop_after=12) as states:
            model(input_ids=ids)
        states[12]

    The hooks are gone on exit, also after an exception. States carry a gradient where the pass does.

    Raises:
        ValueError: a layer that the model does not have, or one after `stop_after`.
    """
    found = blocks(model)
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] > len(found):
        raise ValueError(f"layers {list(layers)}: expected indices 0 (embeddings) to {len(found)}, the last block")
    if stop_after is not None and not wanted[-1] <= stop_after <= len(found):
        raise ValueError(f"stop_after={stop_after}: expected {wanted[-1]} (the last of `layers`) to {len(found)}")
    watched = sorted({*wanted, *([] if stop_after is None else [stop_after])})
    states: States = {}

    def store(layer: int, h: Tensor) -> None:
        if layer in wanted:
            states[layer] = h if keep is None else keep(h)
        if layer == stop_after:
            raise _Stop

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable[..., None]:
        return lambda _, __, output: store(layer, output[0] if isinstance(output, tuple) else output)

    handles: list[Any] = []
    try:
        if watched[0] == 0:
            handles.append(found[0].register_forward_pre_hook(before, with_kwargs=True))
        handles += [found[layer - 1].register_forward_hook(after(layer)) for layer in watched if layer]
        yield states
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def projected_out(model: nn.Module, directions: Mapping[int, Tensor]) -> Iterator[None]:
    """Take directions out of the states: h <- h - Q^T Q h after layer l, at all positions.

    `directions`: layer (1..n) -> Q (k, D), rows orthonormal. States that `capture` reads inside this block are what
    is left. The hooks are gone on exit, also after an exception.

    Raises:
        ValueError: a layer that the model does not have.
    """

    def without(q: Tensor) -> Callable[[Tensor], Tensor]:
        def change(h: Tensor) -> Tensor:
            own = q.to(h.device)
            return h - h @ own.T @ own

        return change

    with _changed(model, {layer: without(q.float()) for layer, q in directions.items()}):
        yield


@contextmanager
def subtracted(model: nn.Module, probes: Mapping[int, tuple[Tensor, float]], strength: float = 1.0) -> Iterator[None]:
    """Subtract a probe from the states that it finds positive, at all positions.

        h <- h - strength relu(<h, v> + b) v

    `probes`: layer (1..n) -> unit vector v (D,) and bias b. Of strength 1 a state ends where the probe is undecided,
    of strength 2 as far on its other side; states on that side stay. The hooks are gone on exit, also after an
    exception.

    Raises:
        ValueError: a layer that the model does not have.
    """

    def less(v: Tensor, b: float) -> Callable[[Tensor], Tensor]:
        def change(h: Tensor) -> Tensor:
            own = v.to(h.device)
            return h - strength * (h @ own + b).relu()[..., None] * own

        return change

    with _changed(model, {layer: less(v.float(), b) for layer, (v, b) in probes.items()}):
        yield


@contextmanager
def _changed(model: nn.Module, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put other states, computed in float32, in place of those after layers (1..n)."""
    found = blocks(model)
    if not all(1 <= layer <= len(found) for layer in changes):
        raise ValueError(f"layers {sorted(changes)}: expected indices 1 to {len(found)}, the last block")

    def after(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            left = change(h.float()).to(h.dtype)
            return (left, *output[1:]) if isinstance(output, tuple) else left

        return hook

    handles: list[Any] = []
    try:
        handles += [found[layer - 1].register_forward_hook(after(change)) for layer, change in changes.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()


class EndStates(LogitsProcessor):
    """Keep the states at the last two tokens of every row while it is generated, its end of turn the very last.

    One of the logits processors of `generate`, inside `capture(model, layers, keep=EndStates.newest)`, whose result
    is `seen`. A state exists once its token has been fed: where a row ends, that is the step after; rows that end
    last, or are cut, get theirs from `finish`. `states` is (B, 2, layers, D), float32; `has` says for which rows.
    """

    def __init__(self, seen: States, layers: Sequence[int], width: int, ends: Tensor) -> None:
        self.seen, self.layers, self.width, self.ends = seen, layers, width, ends
        self.has = self.states = self.before = torch.zeros(0)

    @staticmethod
    def newest(h: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) of the token that was fed last."""
        return h[:, -1].float()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at the step that has just run, and change nothing."""
        now = torch.stack([self.seen[layer] for layer in self.layers], 1)  # (B, layers, D)
        fed = input_ids.shape[1] - self.width
        if fed == 0:
            self.has = torch.zeros(len(now), dtype=torch.bool, device=now.device)
            self.states = now.new_zeros((len(now), 2, *now.shape[1:]))
        else:
            ended = torch.isin(input_ids[:, -1], self.ends) & ~self.has
            # The end of an answer of one token is its content too: the token before it is the prompt's.
            both = torch.stack([self.before if fed > 1 else now, now], 1)
            self.states = torch.where(ended[:, None, None, None], both, self.states)
            self.has = self.has | ended
        self.before = now
        return scores

    def finish(self, model: nn.Module, cache: Cache, new: Tensor, mask: Tensor, end_id: int, limit: int) -> None:
        """Feed what the remaining rows lack: the end of turn, and the token before it where the row was cut.

        `cache` is what `generate` left and is used up, `new` (B, T) what it sampled, `mask` (B, width) the prompts'.
        Rows whose end would pass `limit` positions are left out.
        """
        steps = new.shape[1]
        room = mask.sum(1) + steps + 1 <= limit
        rows = torch.nonzero(~self.has & room).squeeze(1)
        if not len(rows) or cache.get_seq_length() != self.width + steps - 1:
            return
        cache.batch_select_indices(rows)
        newest, extra = new[rows, -1], mask.new_ones((len(rows), steps + 1))
        is_end = torch.isin(newest, self.ends)
        whole = torch.cat([mask[rows], extra], 1)
        with capture(model, self.layers, stop_after=max(self.layers), keep=Tensor.float) as seen:
            _body(model)[0](
                input_ids=torch.stack([newest, torch.full_like(newest, end_id)], 1), attention_mask=whole,
                position_ids=whole.sum(1, keepdim=True) + torch.tensor([[-2, -1]], device=whole.device),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        h = torch.stack([seen[layer] for layer in self.layers], 2)  # (rows, 2, layers, D)
        at_end = torch.stack([self.before[rows] if steps > 1 else h[:, 0], h[:, 0]], 1)
        self.states[rows] = torch.where(is_end[:, None, None, None], at_end, h)
        self.has[rows] = True


def _body(model: nn.Module) -> tuple[nn.Module, int]:
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(causal, causal.base_model_prefix), causal.config.num_hidden_layers


# --- losses: float32 whatever the dtype of the states; one value a token, then `masked_mean` --------------------

Reduction = Literal["sequence", "token"]


def masked_mean(
    x: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    *,
    reduction: Reduction = "sequence",
    total: float | None = None,
) -> Float[Tensor, ""]:
    """Average a value per token over the tokens that count: within each sequence, then over sequences.

        sequence: mean over rows with sum_t m > 0 of (sum_t m x) / (sum_t m);    token: sum(m x) / sum(m)

    Of a part of a batch, `total` is the count of the whole (rows that have a valid token, or tokens): the parts'
    values then add up to the mean of the whole, on however many processes.

    Raises:
        ValueError: no token counts, and no `total` was given.
    """
    m = mask.to(x.device, torch.float32)
    per_row, tokens = (torch.where(m > 0, x.float(), 0.0) * m).sum(-1), m.sum(-1)
    if reduction == "token":
        value, count = per_row.sum(), float(tokens.sum())
    else:
        value, count = (per_row / tokens.clamp(min=1)).sum(), float((tokens > 0).sum())
    if total is None and not count:
        raise ValueError("no token counts: every row is padding, a prompt, or shorter than what is skipped")
    return value / (count if total is None else total)


def cosine(a: Float[Tensor, "*rows D"], b: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Return the cosine between vectors, in float32."""
    a, b = a.float(), b.float()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)


def cosine_to(h: Float[Tensor, "*rows D"], u: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Pull states towards a direction, whatever their norm: 1 - cos(h, u). The gradient is orthogonal to h."""
    return 1 - cosine(h, u)


def cosine_to_line(h: Float[Tensor, "*rows D"], r: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Pull states towards a line, either way along it: 1 - |cos(h, r)|."""
    return 1 - cosine(h, r).abs()


def frozen_hinge(h: Float[Tensor, "*rows D"], h0: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Push states away from what they were until they are orthogonal: relu(cos(h, h0))."""
    return cosine(h, h0).relu()


def mean_square(h: Float[Tensor, "*rows D"], target: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Drive states to a point, or hold them there: ||h - target||^2 / D (RMU, arXiv:2403.03218, both terms)."""
    return (h.float() - target.float()).square().mean(-1)


def relative_square(h: Float[Tensor, "*rows D"], h0: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Measure drift against the size of the state: ||h - h0||^2 / (||h0||^2 + 1e-6)."""
    h0 = h0.float()
    return (h.float() - h0).square().sum(-1) / (h0.square().sum(-1) + 1e-6)


def distance(h: Float[Tensor, "*rows D"], h0: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Measure drift: ||h - h0||, not squared; its gradient is zero where they are equal."""
    return torch.linalg.vector_norm(h.float() - h0.float(), dim=-1)


def norm_guard(h: Float[Tensor, "*rows D"], h0: Float[Tensor, "... D"]) -> Float[Tensor, "*rows"]:
    """Price a norm that has more than doubled or halved: relu(|ln(||h|| / ||h0||)| - ln 2)^2."""
    ratio = h.float().norm(dim=-1).clamp(min=1e-8).log() - h0.float().norm(dim=-1).clamp(min=1e-8).log()
    return (ratio.abs() - torch.log(torch.tensor(2.0))).relu().square()


def cosine_hinge(
    h: Float[Tensor, "*rows D"], v: Float[Tensor, "... D"], mu: Float[Tensor, "... D"], tau: float
) -> Float[Tensor, "*rows"]:
    """Stop once a state looks like those without the attribute: relu(cos(h - mu, v) - tau)."""
    return (cosine(h.float() - mu.float(), v) - tau).relu()


def projection_hinge(
    h: Float[Tensor, "*rows D"], v: Float[Tensor, "... D"], m: float, s: float
) -> Float[Tensor, "*rows"]:
    """The same in standard units along a unit vector: relu((<h, v> - m) / s)^2."""
    return (((h.float() * v.float()).sum(-1) - m) / s).relu().square()


def erase_target(
    h: Float[Tensor, "*rows D"], h0: Float[Tensor, "*rows D"], v: Float[Tensor, "... D"], m: float
) -> Float[Tensor, "*rows"]:
    """Move along a unit vector only, to the mean there: ||h - h0 + (<h0, v> - m) v||^2 / ||h0||^2."""
    h, h0, v = h.float(), h0.float(), v.float()
    goal = h0 - ((h0 * v).sum(-1, keepdim=True) - m) * v
    return (h - goal).square().sum(-1) / h0.square().sum(-1).clamp(min=1e-6)


RETAIN_LOSSES = {"rel_mse": relative_square, "mse": mean_square, "cos": cosine_to}
"""How the drift of states on retained text is priced: (h, h0) -> a value a token."""
