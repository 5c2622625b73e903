"""`temper export`: one PEFT adapter on the public base, merged weights, GGUF, sealed experts, or logs of Inspect."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tempering.api import is_calibration
from tempering.core.config import Config
from tempering.core.policy import Policy
from tempering.core.progress import say
from tempering.core.quarantine import is_quarantined, require_override, require_safe, unsafe_name
from tempering.core.run import replace_folder
from tempering.core.sampling import THINK_TOKENS
from tempering.hosting import GATED, GGUFType, find_converter, write_card, write_gguf
from tempering.methods.safemoe.bundle import is_bundle
from tempering.methods.safemoe.keys import BundleSettings
from tempering.releasing import release
from tempering.reporting.inspect_logs import write_inspect_logs


class ExportConfig(Config):
    """Settings of `temper export`."""

    out: str
    """Folder to make."""
    format: Literal["adapter", "merged", "gguf", "bundle", "inspect"] | None = None
    """`adapter`: a PEFT adapter. `merged`: a plain transformers folder. `gguf`: merged weights in one file, by
    llama.cpp's converter. `bundle`: a safemoe run's sealed experts, behind the release gate. `inspect`: evals as logs
    of Inspect. Null: bundle where there is one, merged where the run edited weights of the base, else adapter."""
    converter: str | None = None
    """`gguf`: path of llama.cpp's convert_hf_to_gguf.py; null: the one on the PATH."""
    gguf_type: GGUFType = "bf16"
    """`gguf`: number format of the weights."""
    rank: int | None = Field(None, ge=1)
    """`adapter`: compress to this rank by SVD; the error is printed."""
    baseline: str | None = None
    """`bundle`: run folder with the base's evals (over_refusal, capability) on the same prompts."""
    force_reason: str | None = None
    """`bundle`: export although the release gate is not met, for this reason, which the card prints."""
    bundle: BundleSettings | None = None
    """`bundle`: keys of the exported bundle; null: those of the run."""


def run_export(reference: str, config: ExportConfig) -> dict[str, Any]:
    """Export a run, adapter, model or bundle, or a run's evals; returns the folder and what was done.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: there is no adapter to export, or for `inspect` no eval or no package.
        UnsafeExpertAccess: it is quarantined, or sealed experts are asked for in the open, without the override.
        GateNotMet: a bundle was not shown to be fit for release.
    """
    sealed = next((p for p in (Path(reference), Path(reference) / "final") if is_bundle(p)), None)
    form = config.format or ("bundle" if sealed else "adapter")
    if sealed and form in ("adapter", "merged", "gguf"):
        require_override(f"exporting the sealed experts of {reference} as {form}")
    if Path(reference).exists():
        require_safe(Path(reference), "exporting")
        if is_quarantined(Path(reference)):
            config = config.model_copy(update={"out": unsafe_name(config.out)})
    if Path(config.out).exists() and (not Path(config.out).is_dir() or any(Path(config.out).iterdir())):
        raise FileExistsError(f"{config.out} exists; give another folder with out=DIR")
    if form == "bundle":
        if sealed is None or sealed == Path(reference):
            raise ValueError(f"{reference} is not a safemoe run; format=bundle exports the sealed experts of one")
        released = release(
            reference,
            Path(config.out),
            baseline=config.baseline,
            force_reason=config.force_reason,
            keys=config.bundle,
        )
        say(GATED)
        return released
    if form == "inspect":
        files = write_inspect_logs(Path(reference), Path(config.out))
        say(f"wrote {len(files)} logs: inspect view --log-dir {config.out}")
        return {"out": config.out, "format": form, "logs": [file.name for file in files]}
    converter = find_converter(config.converter) if form == "gguf" else None
    policy = Policy.load(reference, dtype="float32")
    if policy.source.unsafe and form in ("merged", "gguf"):
        raise ValueError(f"{reference} is exported as a quarantined adapter only; leave out format={form}")
    form = config.format or ("merged" if policy.originals else form)
    if form == "adapter" and (not policy.adapters or policy.originals):
        why = (
            "edits weights of its base, which no adapter holds"
            if policy.originals
            else "has no adapter (full weights)"
        )
        raise ValueError(f"{reference} {why}; use format=merged")
    facts: dict[str, Any] = {"out": config.out, "format": form}
    if is_calibration(reference):
        say(f"the model alone is exported: the calibration stays in {reference}, and so does choosing among answers")
    if config.rank is not None and policy.adapters:
        facts["relative_error"] = compress(policy, config.rank)
        say(f"rank {config.rank}: largest relative error of a layer's update {facts['relative_error']:.2e}")
    if form in ("merged", "gguf"):
        policy.merge()
    kept = {key: policy.lineage[key] for key in (THINK_TOKENS,) if key in policy.lineage}
    about = {"exported_from": reference, **kept}
    if converter is not None:
        facts["file"] = export_gguf(policy, Path(config.out), about, converter, config.gguf_type)
        return facts
    rank = policy.combined_adapter()[0].r if form == "adapter" else None
    policy.export(Path(config.out), about, unsafe=policy.source.unsafe)
    say(f"wrote {config.out}: " + ("full weights" if rank is None else f"a LoRA adapter of rank {rank}"))
    if not policy.source.unsafe:
        facts["vllm"] = write_card(policy, Path(config.out), reference, rank)
        readme = Path(config.out) / "README.md"
        say(f"serve it: {facts['vllm']}" if facts["vllm"] else f"vLLM takes no adapter of this rank; see {readme}")
        say(f"what a server and its clients need to know: {readme}")
    return facts


def export_gguf(policy: Policy, out: Path, about: dict[str, Any], converter: Path, kind: GGUFType) -> str:
    """Write full weights as one GGUF file into a folder; returns the file.

    Raises:
        RuntimeError: the converter failed; nothing is left.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        policy.export(temporary / "merged", about)
        (temporary / "made").mkdir()
        name = f"{out.name}-{kind}.gguf"
        write_gguf(converter, temporary / "merged", temporary / "made" / name, kind)
        replace_folder(temporary / "made", out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"wrote {out / name}: llama-server -m {out / name}")
    return str(out / name)


def compress(policy: Policy, rank: int) -> float:
    """Replace every layer's update by its best approximation of a rank; returns the largest relative error.

    Eckart-Young: the truncated SVD of s B A is the nearest matrix of its rank in Frobenius norm.
    """
    worst = 0.0
    (name,) = policy.adapters
    for _, layer in policy.lora_layers():
        update = layer.scaling[name] * (layer.lora_B[name].weight.detach() @ layer.lora_A[name].weight.detach())
        a, b, error = truncate(update, rank)
        worst = max(worst, error)
        padded_a = torch.zeros_like(layer.lora_A[name].weight)
        padded_b = torch.zeros_like(layer.lora_B[name].weight)
        kept = a.shape[0]
        padded_a[:kept], padded_b[:, :kept] = a, b / layer.scaling[name]
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = padded_a, padded_b
    policy.shrink(name, rank)
    return worst


def truncate(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best rank-r factors A (r, in), B (out, r) of a matrix, and the relative Frobenius error."""
    u, s, vh = torch.linalg.svd(update.float(), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    norm = float(s.norm())
    error = float(s[r:].norm()) / norm if norm else 0.0
    return root[:, None] * vh[:r], u[:, :r] * root, error
