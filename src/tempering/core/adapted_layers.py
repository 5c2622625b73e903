"""Which layers of a model a LoRA adapter goes on.

Used by `policy`; refuses to know about adapters' values.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
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
