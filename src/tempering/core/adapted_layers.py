"""Which layers of a model a LoRA adapter goes on, and how such a layer computes.

Used by `policy`; refuses to know what an adapter is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KEPT = "_tempering_joined"
"""Attribute of a layer inside `adapters_joined_once`."""
Joined = tuple[Tensor, Tensor]
"""A of all active adapters, (sum of ranks, in), and their s B transposed, (sum of ranks, out)."""


def default_targets(model: Any) -> list[str]:
    """Return q_proj and v_proj, or what PEFT's table names for an architecture that has neither.

    Raises:
        ValueError: neither is known.
    """
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if {"q_proj", "v_proj"} <= leaves:
        return ["q_proj", "v_proj"]
    known = PEFT_TARGETS.get(model.config.model_type)
    if not known:
        raise ValueError(f"no default LoRA layers for {model.config.model_type}; set lora.target_modules")
    return list(known)


def all_linear(model: Any) -> list[str]:
    """Return the last names of all linear layers but the output layer, adapted already or not, sorted.

    PEFT's own `all-linear` would find the parts of earlier adapters too.
    """
    head = model.get_output_embeddings()
    found = set()
    for name, module in model.named_modules():
        is_linear = isinstance(module, (LoraLayer, nn.Linear, Conv1D))
        if is_linear and module is not head and ".lora_" not in name and not name.endswith(".base_layer"):
            found.add(name.rsplit(".", 1)[-1])
    return sorted(found)


def add_adapters_at_once(layer: LoraLayer) -> None:
    """Let a plain linear layer compute all its active adapters together, in the dtype of its input.

    y = W x + B A x with A = concat(A_k), B = concat(s_k B_k): two small products and one sum, however many stages
    there are. PEFT adds one adapter after the other, each in float32; in half precision that copies the layer's
    input and output several times. Gradients reach the float32 parameters. Where PEFT does something else (merged,
    disabled, mixed batches, variants, dropout, bias) it still does.
    """
    if isinstance(layer, Linear) and isinstance(layer.base_layer, nn.Linear):
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or layer.lora_variant or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    kept: dict[Any, Joined] | None = layer.__dict__.get(KEPT)
    key = (*layer.active_adapters, x.dtype)
    joined = kept.get(key) if kept is not None else None
    if joined is None:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if not names or not all(_is_product(layer, name) for name in names):
            return type(layer).forward(layer, x, *args, **kwargs)
        joined = _joined(layer, names, x.dtype)
        if kept is not None:
            kept[key] = joined
    a, b = joined
    result = layer.base_layer(x)
    small = nn.functional.linear(x, a).flatten(0, -2)
    return torch.addmm(result.flatten(0, -2), small, b).view_as(result)


def _joined(layer: Linear, names: list[str], dtype: torch.dtype) -> Joined:
    weights: Any = layer.lora_A, layer.lora_B
    a = torch.cat([weights[0][name].weight for name in names]).to(dtype)
    b = torch.cat([layer.scaling[name] * weights[1][name].weight for name in names], dim=1).to(dtype)
    return a, b.t()


@contextmanager
def adapters_joined_once(model: nn.Module) -> Iterator[None]:
    """Inside, each layer joins its adapters at its first pass and not again: the same bits, decoded faster.

    For passes without gradient, between which no adapter changes. Which are active may change. Inside another, the
    outer one keeps them.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and KEPT not in module.__dict__]
    try:
        for layer in layers:
            layer.__dict__[KEPT] = {}
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(KEPT, None)


def _is_product(layer: Linear, name: str) -> bool:
    """Whether an adapter is s B A and nothing else: no dropout, no bias."""
    b: Any = layer.lora_B[name]
    return isinstance(layer.lora_dropout[name], nn.Identity) and b.bias is None
