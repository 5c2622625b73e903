"""Reading LoRA experts from PEFT folders, and stacking them into the tensors that are mixed per token.

Everything that PEFT can express and the mixture cannot is refused here, by expert and field: an expert that is
silently another function would be worse than none.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from tempering.core.quarantine import SUFFIX
from tempering.core.run import file_hash

PREFIX = "base_model.model."

MUST_BE = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False}
MUST_BE_EMPTY = (
    "modules_to_save", "target_parameters", "layer_replication", "alora_invocation_tokens", "trainable_token_indices",
    "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip
KNOWN_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)} | {
    "peft_version",
    "peft_type",
    "auto_mapping",
}


class ExpertWeights(NamedTuple):
    """All experts of one linear layer, in index order; the update of expert e is scale[e] * B[:, e] @ A[e]."""

    A: Tensor  # (K, r, d_in)
    B: Tensor  # (d_out, K, r), in memory (K, r, d_out): see `expert_major`
    scale: Tensor  # (K,) float32


def expert_major(B: Tensor) -> Tensor:
    """The same B (d_out, K, r), with r x d_out of each expert in one piece, as the products read it fastest.

    Both [K, r, d_out] and [K*r, d_out] are then views of it, so that one copy serves every back-end.
    """
    return B.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts in index order, their weights by module path in the base, what they sit on, and their origins."""

    domains: tuple[str, ...]
    modules: dict[str, ExpertWeights]
    base: dict[str, Any]
    sources: tuple[dict[str, Any], ...]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Experts:
        """The same experts elsewhere, in the type that they are computed in; scales stay float32."""
        moved = {
            name: ExpertWeights(w.A.to(device, dtype), expert_major(w.B.to(device, dtype)), w.scale.to(device))
            for name, w in self.modules.items()
        }
        return dataclasses.replace(self, modules=moved)


class Adapter(NamedTuple):
    """One expert as it lies on disk: its domain, PEFT configuration, tensors, and provenance."""

    domain: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: dict[str, Any]


def read_adapter(folder: str | Path) -> Adapter:
    """Read an expert from a run of `sft` or a PEFT folder, quarantined or not.

    Its domain is what the run recorded; without one, the name of the folder.

    Raises:
        FileNotFoundError: a file is missing, by name.
        ValueError: the configuration is no JSON, or the weights cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"expert {folder}: no such folder; name a run of `temper train sft` or a PEFT folder")
    is_run = (root / "config.yaml").is_file()
    if is_run and not (root / "DONE").is_file():
        raise ValueError(f"expert {folder}: its training has not ended; finish it with --resume first")
    inner = root / "final" if is_run else root
    config_file, weights_file = (_file(inner, name) for name in ("adapter_config.json", "adapter_model.safetensors"))
    lineage = inner / "lineage.json"
    try:
        config = _mapping(config_file)
        tensors = load_file(weights_file)
        recorded = _mapping(root / "provenance.json") if is_run else {}
        known = _mapping(lineage) if lineage.is_file() else {}
    except Exception as error:  # JSON's, safetensors' own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"expert {folder}: cannot be read ({first})") from error
    inputs = recorded.get("inputs")
    domain = recorded.get("domain") or root.name.removesuffix(SUFFIX)
    source = {
        "domain": domain,
        "sha256": file_hash(weights_file),
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "base": known.get("base") or config.get("base_model_name_or_path"),
        "base_fingerprint": known.get("base_fingerprint"),
        "inputs": inputs if isinstance(inputs, dict) else {},
        "data_licences": recorded.get("data_licences", {}),
        "unsafe": bool(recorded.get("unsafe", config_file.name.endswith(SUFFIX))),
    }
    return Adapter(domain, config, tensors, source)


def _mapping(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return found


def _file(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}{SUFFIX}", folder / name):
        if file.is_file():
            return file
    raise FileNotFoundError(f"expert {folder}: {name} is missing (nor is there a quarantined {name}{SUFFIX})")


def stack_experts(adapters: Sequence[Adapter]) -> dict[str, ExpertWeights]:
    """Stack experts by module path in the base; the order of the list is the expert index.

    scale = alpha / r, with rsLoRA alpha / sqrt(r); it multiplies the gate's weight and is never folded into B. Where
    ranks differ, A and B are padded with zeros to the largest.

    Raises:
        ValueError: there are none, two have one domain, or one is not a plain LoRA on the layers of the first; names
            the expert and the field.
    """
    read = layers_of(adapters)
    if not read:
        raise ValueError("experts: there are none; name runs or folders with experts=[...], or give expert_data")
    first = read[0]
    stacked = {}
    for name in first:
        parts = [layers[name] for layers in read]
        a0, b0, _ = parts[0]
        for adapter, (a, b, _) in zip(adapters, parts, strict=True):
            if a.shape[1] != a0.shape[1] or b.shape[0] != b0.shape[0]:
                raise ValueError(
                    f"expert {adapter.domain}: {name} is {b.shape[0]} x {a.shape[1]}, that of expert "
                    f"{adapters[0].domain} {b0.shape[0]} x {a0.shape[1]}; experts must be of one base"
                )
        rank = max(a.shape[0] for a, _, _ in parts)
        A = torch.zeros(len(parts), rank, a0.shape[1], dtype=a0.dtype)
        B = torch.zeros(len(parts), rank, b0.shape[0], dtype=b0.dtype).permute(2, 0, 1)
        for e, (a, b, _) in enumerate(parts):
            A[e, : a.shape[0]], B[:, e, : a.shape[0]] = a, b
        stacked[name] = ExpertWeights(A, B, torch.tensor([s for _, _, s in parts], dtype=torch.float32))
    return stacked


def layers_of(adapters: Sequence[Adapter]) -> list[dict[str, tuple[Tensor, Tensor, float]]]:
    """Check experts, each by itself and against the first; returns (A, B, scale) by module path of each.

    Raises:
        ValueError: naming the expert and the field.
    """
    seen: set[str] = set()
    for adapter in adapters:
        if adapter.domain in seen:
            raise ValueError(f"expert {adapter.domain}: domain: two experts have it; each needs its own")
        seen.add(adapter.domain)
    read = [_layers(adapter) for adapter in adapters]
    for adapter, layers in zip(adapters, read, strict=True):
        if layers.keys() != read[0].keys():
            odd = sorted(layers.keys() ^ read[0].keys())
            raise ValueError(
                f"expert {adapter.domain}: target_modules: {'lacks' if odd[0] in read[0] else 'has'} {odd[0]} "
                f"({len(odd)} differ), other than expert {adapters[0].domain}; all need the same layers"
            )
    return read


def _layers(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Check one expert and return (A, B, scale) by module path."""
    config, who = adapter.config, f"expert {adapter.domain}"
    for field, wanted in MUST_BE.items():
        if (found := config.get(field, wanted)) != wanted:
            raise ValueError(f"{who}: {field} is {found!r}; only {wanted!r} can be mixed per token")
    for field in MUST_BE_EMPTY:
        if config.get(field):
            raise ValueError(f"{who}: {field} is {config[field]!r}; it cannot be mixed per token, train without it")
    if unknown := sorted(set(config) - KNOWN_FIELDS):
        raise ValueError(f"{who}: {unknown[0]} is no field of a LoRA that this version of PEFT knows")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float) or not 0 < config[field] < math.inf:
            raise ValueError(f"{who}: {field} is {config.get(field)!r}; expected a positive number")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{who}: unknown tensor {key}; expected only lora_A and lora_B weights")
        if tensor.dim() != 2 or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{who}: {key} is not a finite matrix ({tensor.dtype}, {tuple(tensor.shape)})")
        halves.setdefault(match[1], {})[match[2]] = tensor
    out = {}
    for name in sorted(halves):
        if missing := {"A", "B"} - halves[name].keys():
            raise ValueError(f"{who}: {name}.lora_{missing.pop()} is missing")
        a, b = halves[name]["A"], halves[name]["B"]
        rank = _by_pattern(adapter, "rank_pattern", name, config["r"])
        alpha = _by_pattern(adapter, "alpha_pattern", name, config["lora_alpha"])
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{who}: r: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but the configuration says {rank}"
            )
        out[name] = a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not out:
        raise ValueError(f"{who}: target_modules: it has no LoRA weights")
    return out


def _by_pattern(adapter: Adapter, field: str, name: str, default: float) -> Any:
    pattern = adapter.config.get(field) or {}
    try:
        found = pattern.get(get_pattern_key(list(pattern), name), default)
    except (AttributeError, re.error):
        found = None
    if not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ValueError(
            f"expert {adapter.domain}: {field} is {pattern!r}; expected patterns of layers with positive numbers"
        )
    return found


def require_base(adapters: Sequence[Adapter], base: dict[str, Any]) -> None:
    """Refuse experts of other base weights; those that do not say are taken at their shapes (checked when attached).

    Raises:
        ValueError: naming the expert.
    """
    for adapter in adapters:
        found = adapter.source["base_fingerprint"]
        if found is not None and found != base["sha256"]:
            raise ValueError(
                f"expert {adapter.domain}: base: it was trained on other base weights than {base['id']} "
                f"(fingerprint {found[:12]}, found {base['sha256'][:12]})"
            )


def require_named_base(adapters: Sequence[Adapter], base: str) -> None:
    """Refuse experts that carry no fingerprint and name another base; a folder and a hub may hold the same one.

    Raises:
        ValueError: naming the expert.
    """
    for adapter in adapters:
        named = adapter.source["base"]
        if adapter.source["base_fingerprint"] is None and named and Path(named).name != Path(base).name:
            raise ValueError(
                f"expert {adapter.domain}: base_model_name_or_path is {named}, and the model here is {base}; give "
                "model= that base (where it is the same under another name, correct the expert's adapter_config.json)"
            )


def only_layers(experts: Experts, layers: Sequence[int] | None) -> Experts:
    """Keep the experts of these decoder layers only, counted from 0 (`None`: of all).

    Raises:
        ValueError: none of them has an expert.
    """
    if layers is None:
        return experts
    kept = {name: w for name, w in experts.modules.items() if layer_of(name) in layers}
    if not kept:
        raise ValueError(f"layers={list(layers)}: no expert is on any of them")
    return dataclasses.replace(experts, modules=kept)


def layer_of(module: str) -> int | None:
    """The number of the decoder layer that a module is in: the first number of its path.

    >>> layer_of("model.layers.7.mlp.gate_proj")
    7
    """
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else None


def random_experts(experts: Experts, seed: int) -> Experts:
    """Replace experts by noise of the same size: the control that asks whether *what* they learned matters.

    A as LoRA initialises it, B normal, and both experts' updates rescaled, per module, to the mean Frobenius norm of
    scale * B A over the trained experts.
    """
    out = {}
    for number, (name, w) in enumerate(sorted(experts.modules.items())):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = w.A.shape[2] ** -0.5
        A = torch.rand(w.A.shape, generator=generator) * 2 * bound - bound
        B = torch.randn(w.B.shape, generator=generator)
        wanted = _norms(w).mean()
        B = B * (wanted / _norms(ExpertWeights(A, B, w.scale)).clamp(min=1e-30))[None, :, None]
        out[name] = ExpertWeights(A.to(w.A.dtype), B.to(w.B.dtype), w.scale)
    return dataclasses.replace(experts, modules=out)


def _norms(w: ExpertWeights) -> Tensor:
    """Frobenius norm of each expert's update, (K,): ||B A||^2 = trace(A A' B' B), without making B A."""
    A, B = w.A.float(), w.B.float()
    gram_a, gram_b = torch.einsum("krd,ksd->krs", A, A), torch.einsum("okr,oks->krs", B, B)
    return w.scale * torch.einsum("krs,krs->k", gram_a, gram_b).clamp(min=0).sqrt()
