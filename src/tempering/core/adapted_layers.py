"""Which layers of a model a LoRA adapter goes on, and how such a layer computes.

Used by `policy`; refuses to know what an adapter is for.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    is_plain = not (layer.disable_adapters or layer.merged or layer.lora_variant or args or kwargs)
    if not (is_plain and names and all(_is_product(layer, name) for name in names)):
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    weights: Any = layer.lora_A, layer.lora_B
    a = torch.cat([weights[0][name].weight for name in names]).to(x.dtype)
    b = torch.cat([layer.scaling[name] * weights[1][name].weight for name in names], dim=1).to(x.dtype)
    small = nn.functional.linear(x, a).flatten(0, -2)
    return torch.addmm(result.flatten(0, -2), small, b.t()).view_as(result)


def _is_product(layer: Linear, name: str) -> bool:
    """Whether an adapter is s B A and nothing else: no dropout, no bias."""
    b: Any = layer.lora_B[name]
    return isinstance(layer.lora_dropout[name], nn.Identity) and b.bias is None
