"""What a run will take of a device's memory, from configurations alone: no weights are loaded.

    weights     parameters of each base once, in its dtype; of a player all of whose weights train, float32, its own
    adapters    float32: each player, its averages, (one layer) the audit; gradient and two moments of what trains;
                of a player all of whose weights train, the copies of them instead
    update      activations of one micro-batch, with their gradients; the vocabulary in chunks
    sampling    the KV cache of one batch of samples, and its logits

An estimate, to a factor of about 1.3: allocators keep more than is asked for. Update and sampling take turns.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tempering.core.adapted_layers import all_linear, default_targets
from tempering.core.loading import ModelSource, base_files, pick_dtype, quiet_libraries, resolve
from tempering.core.logprobs import POSITIONS_PER_CHUNK
from tempering.core.progress import say
from tempering.methods.advgame.settings import ROLES, AdvGameConfig

GB = 1e9
MARGIN = 1.3
"""What is asked for may be so much less than what is taken."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for, and what the device has."""

    weights: int
    adapters: int
    update: int
    sampling: int
    available: int
    device: str

    @property
    def peak(self) -> int:
        """Weights, adapters, and the larger of the two that take turns."""
        return self.weights + self.adapters + max(self.update, self.sampling)

    @property
    def fits(self) -> bool:
        """Whether the peak fits with its margin."""
        return MARGIN * self.peak <= self.available

    def to_row(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides about memory."""

    parameters: int
    hidden: int
    inner: int
    layers: int
    kv: int
    """Numbers that one token leaves in the cache of one layer."""
    vocabulary: int
    lora: int
    """LoRA parameters of rank one."""
    adapted: int
    """Adapted linear layers."""


def shape_of(source: ModelSource, config: AdvGameConfig) -> Shape:
    """Build the model without weights (on the meta device) and count.

    Raises:
        ValueError: its configuration cannot be read.
    """
    folder, where = base_files(source)
    try:
        with quiet_libraries():
            own = AutoConfig.from_pretrained(folder, **where)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(own)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError ...
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {source.reference}: cannot read its configuration ({first}), so that there is no memory plan; a "
            "Hub id needs network or a filled cache"
        ) from error
    targets = config.lora.target_modules or default_targets(model)
    names = set(all_linear(model) if targets == "all-linear" else targets)
    linear = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names and hasattr(m, "weight")]
    text = own.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        sum(p.numel() for p in model.parameters()), text.hidden_size, getattr(text, "intermediate_size", 0) or 0,
        text.num_hidden_layers, 2 * heads * width, text.vocab_size, sum(sum(m.weight.shape) for m in linear),
        len(linear),
    )  # fmt: skip


def memory_plan(config: AdvGameConfig) -> MemoryPlan:
    """Estimate the bytes of a run on the device that it would use.

    Raises:
        ValueError: a model whose configuration cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes: dict[tuple[Any, ...], Shape] = {}
    weights = adapters = update = sampling = 0
    shared = set[tuple[Any, ...]]()
    for role in ROLES:
        if config.players.shared and role == "defender":
            continue
        player, source = config.player(role), resolve(config.player(role).model or config.model)
        key = (source.base, source.revision, source.edit)
        if key not in shapes:
            shapes[key] = shape_of(source, config)
        shape = shapes[key]
        kept = 1 + (player.reference == "slow_ema") + (role == "attacker" and config.opponents.probability > 0)
        states = 3 if player.train else 0  # gradient and two moments
        if player.tuning == "full":
            size = 4
            weights += size * shape.parameters
            adapters += size * shape.parameters * (kept + states + config.needs_start(player))
        else:
            size = torch.finfo(pick_dtype(config.dtype, device)).bits // 8
            weights += 0 if key in shared else size * shape.parameters
            shared.add(key)
            adapters += 4 * config.lora.r * shape.lora * (1 + kept + states)
            if config.ema.audit:
                adapters += 4 * 2 * shape.hidden * max(shape.hidden, shape.inner)
        update = max(update, _update_bytes(config, shape, size))
        tokens = config.rollout.attacker_tokens if role == "attacker" else config.rollout.defender_tokens
        sampling = max(sampling, _sampling_bytes(config, shape, size, tokens))
    return MemoryPlan(weights, adapters, update, sampling, _available(device), str(device))


def _update_bytes(config: AdvGameConfig, shape: Shape, size: int) -> int:
    """Activations of one micro-batch: per token and layer about 14 hidden and 5 inner widths, and what LoRA keeps."""
    per_layer = 14 * shape.hidden + 5 * shape.inner
    lora = config.lora.r * shape.adapted // max(1, shape.layers)
    kept = 1 if config.gradient_checkpointing else shape.layers
    activations = config.batch_tokens * size * ((per_layer + lora) * kept + shape.hidden * shape.layers)
    vocabulary = 3 * 4 * min(POSITIONS_PER_CHUNK, config.batch_tokens) * shape.vocabulary
    return activations + vocabulary


def _sampling_bytes(config: AdvGameConfig, shape: Shape, size: int, tokens: int) -> int:
    """KV cache of a full batch, and float64 probabilities of its last position, sorted and summed."""
    longest = min(config.max_length, config.max_prompt_length + tokens)
    rows = max(1, min(config.rollout.rows, config.sample_tokens // longest))
    return rows * longest * shape.kv * shape.layers * size + rows * shape.vocabulary * 8 * 5


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    told = Path("/proc/meminfo")
    if told.is_file():
        lines = told.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def say_plan(plan: MemoryPlan) -> None:
    """Tell what takes how much, and whether it fits."""
    parts = ("weights", "adapters", "update", "sampling")
    say("memory, about: " + ", ".join(f"{name} {getattr(plan, name) / GB:.2f} GB" for name in parts))
    verdict = "fits" if plan.fits else (
        "[yellow]does not fit[/]: lower batch_tokens or sample_tokens, set gradient_checkpointing=true, or take a "
        "smaller model"
    )  # fmt: skip
    say(
        f"peak about {plan.peak / GB:.2f} GB ({MARGIN * plan.peak / GB:.2f} GB with the allocator's margin) of "
        f"{plan.available / GB:.1f} GB on {plan.device}: {verdict}"
    )
