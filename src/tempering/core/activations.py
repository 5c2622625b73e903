"""Hidden states of a model as it is: `capture` reads them at named layers, and can stop the pass after the last one.

Used by methods that compare or steer representations; refuses to know what the states are for.

| index | is | shape |
|---|---|---|
| 0 | the token embeddings, as the first block receives them | (B, T, D) |
| l = 1..n | the residual stream after block l, before the final norm | (B, T, D) |

For l < n that is `output_hidden_states[l]` of transformers; entry n of theirs is after the final norm, ours is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

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


def _body(model: nn.Module) -> tuple[nn.Module, int]:
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(causal, causal.base_model_prefix), causal.config.num_hidden_layers
