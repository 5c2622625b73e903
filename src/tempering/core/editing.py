"""Weights that are trained in place: chosen by role, put back to what they were, written as the difference.

Used by methods that edit a few tensors of a base; refuses to know what the edit is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tempering.core.activations import blocks

Role = Literal["mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "attn.o_proj"]

ROLES: dict[Role, tuple[str, ...]] = {
    "mlp.down_proj": ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj"),
    "mlp.up_proj": ("mlp.up_proj", "mlp.dense_h_to_4h", "mlp.c_fc"),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "attn.o_proj": ("self_attn.o_proj", "attention.dense", "attn.c_proj"),
}
"""What a role is called inside a block: of Llama and its kin, of GPT-NeoX, of GPT-2."""


def select_parameters(
    model: nn.Module, roles: Sequence[Role], layers: Sequence[int] | None
) -> dict[str, nn.Parameter]:
    """Return name -> weight for these roles of these blocks (counted from 0; `None`: all), in a fixed order.

    By role, never by position: the seventh tensor of a block is `down_proj` on Llama, `o_proj` on Qwen2. Names are
    those of the transformers model; adapters on a layer do not hide its own weight.

    Raises:
        ValueError: a block that is not there, a mixture of experts, or a role that this architecture lacks.
    """
    found = blocks(model)
    names = {id(p): plain_name(n) for n, p in model.named_parameters()}
    wanted = range(len(found)) if layers is None else sorted(set(layers))
    if not roles or not wanted or not all(0 <= layer < len(found) for layer in wanted):
        raise ValueError(f"edit_roles {list(roles)} of edit_layers {layers}: expected blocks 0 to {len(found) - 1}")
    chosen: dict[str, nn.Parameter] = {}
    for layer in wanted:
        modules = {_plain_path(name): module for name, module in found[layer].named_modules()}
        if any("experts" in name.split(".") for name in modules):
            raise ValueError(f"block {layer} is a mixture of experts, of which single tensors cannot be edited")
        for role in roles:
            module = next((modules[path] for path in ROLES[role] if path in modules), None)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter):
                linear = sorted(n for n, m in modules.items() if n and isinstance(getattr(m, "weight", None), Tensor))
                raise ValueError(f"edit_roles: no {role} in this architecture; block 0 has {', '.join(linear)}")
            chosen[names[id(weight)]] = weight
    return chosen


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of everything in the blocks but adapters: not embeddings, final norm and head."""
    own = {id(p) for block in blocks(model) for p in block.parameters()}
    return {plain_name(n): p for n, p in sorted(model.named_parameters()) if id(p) in own and ".lora_" not in n}


def plain_name(parameter: str) -> str:
    """Return a parameter's name in the transformers model, without what adapters put around it.

    >>> plain_name("base_model.model.model.layers.5.mlp.down_proj.base_layer.weight")
    'model.layers.5.mlp.down_proj.weight'
    """
    return parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _plain_path(module: str) -> str:
    return module.removesuffix(".base_layer").replace(".base_layer.", ".")


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with other values in these parameters; the same bits are back on exit, also after an exception.

    Storage is exchanged, not copied: it costs nothing, and no graph sees a write.
    """
    own = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, data in own.items():
            parameters[name].data = data


def clones(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy tensors where they are."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write values into parameters, bit for bit where the dtype is the same.

    Raises:
        ValueError: a tensor that is not there, or of another shape.
    """
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"edited tensor {name} does not fit this model; was the edit made for another?")
        with torch.no_grad():
            parameters[name].copy_(value)


BISECTIONS = 7


def shorten(
    parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], measure: Callable[[], float], most: float
) -> tuple[float, float]:
    """Go back on the straight line to `before` until `measure()` is at most `most`, by bisection.

    Returns the share of the way that is kept, and what is measured there. Runs that are shortened to the same value
    compare at the same price, whichever objective they had.
    """
    far = clones(parameters)
    low, high, value = 0.0, 1.0, 0.0

    def go(share: float) -> None:
        line = {n: b.float() + share * (far[n].float() - b.float()) for n, b in before.items()}
        put(parameters, {n: value.to(before[n].dtype) for n, value in line.items()})

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        go(middle)
        found = measure()
        low, high, value = (middle, high, found) if found <= most else (low, middle, value)
    go(low)
    return low, value
