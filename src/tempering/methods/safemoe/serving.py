"""Answers of a sealed bundle, behind its gate: what `temper chat`, `temper eval` and the server load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tempering.core.chat import format_of
from tempering.core.loading import Dtype
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.methods.safemoe.attaching import attach
from tempering.methods.safemoe.bundle import BundleError, is_bundle, read_manifest
from tempering.methods.safemoe.guards import beside_the_mixture
from tempering.methods.safemoe.identity import base_identity
from tempering.methods.safemoe.keys import BundleSettings, open_configured
from tempering.methods.safemoe.layers import Gating
from tempering.methods.safemoe.preparation import load_base
from tempering.methods.safemoe.release import IN_PLACE
from tempering.methods.safemoe.settings import SafeMoEConfig
from tempering.methods.safemoe.tracing import TracingSampler


def sampler(target: str | Path, *, dtype: Dtype = "auto", trace: bool = False) -> LocalSampler | TracingSampler:
    """Open the bundle of a run, or one by itself, behind its gate and return the ordinary sampler.

    Nothing is visible before all is verified.

    `trace`: keep every decision; see `TracingSampler`.

    Raises:
        BundleError: the bundle or its base is not what was sealed; nothing was loaded.
        UnsafeExpertAccess: a control, or k_inference=1, without the override.
    """
    folder, model, trained_dtype, keys = located(Path(target))
    policy = load_base(SafeMoEConfig(model=model, dtype=trained_dtype if dtype == "auto" else dtype))
    bundle = open_configured(folder, base_identity(policy), keys)
    if bundle is None:
        fmt = format_of(policy.tokenizer, "auto")
        return LocalSampler(policy, fmt=fmt, name=f"{model}{IN_PLACE}{target}, which was refused)")
    settings = bundle.manifest["settings"]
    attach(
        policy, bundle.experts, serving(bundle.manifest, len(bundle.experts.domains)), bundle.routers,
        backend=settings["backend"],
    )  # fmt: skip
    # What needed the override to be opened needs it for every answer too, also after the override has ended.
    policy.source = replace(policy.source, reference=str(target), unsafe=bool(beside_the_mixture(bundle.manifest)))
    inner = LocalSampler(policy, fmt=settings["prompt_format"])
    return TracingSampler(inner) if trace else inner


def located(target: Path) -> tuple[Path, str, Dtype, BundleSettings]:
    """Where the bundle of a run is, or one by itself; its base, the dtype that it was trained in, and its keys.

    Raises:
        ValueError: the run has not ended.
        BundleError: a bundle by itself does not say what its base is.
    """
    if is_bundle(target):
        settings = read_manifest(target).get("settings")
        if not isinstance(settings, dict) or not all(isinstance(settings.get(k), str) for k in ("model", "dtype")):
            raise BundleError("manifest", "its settings do not name a base")
        return target, settings["model"], cast(Dtype, settings["dtype"]), BundleSettings()
    run = Run.open(target)
    if not run.is_done:
        raise ValueError(f"run {target} has not ended; finish its training with --resume first")
    config = run.config
    return target / "final", config["model"], config["dtype"], BundleSettings.model_validate(config.get("bundle", {}))


def serving(manifest: dict[str, Any], experts: int) -> Gating:
    """How a bundle decides when it answers: as it was trained, but for `k_inference` and `first_tokens`."""
    settings = manifest["settings"]
    keys = SafeMoEConfig.model_fields.keys() & settings.keys() - {"prompt_format"}
    config = SafeMoEConfig.model_validate({key: settings[key] for key in keys} | {"control": _served(manifest)})
    gating = config.gating(experts)
    return replace(gating, k=config.k_inference or gating.k, first_tokens=config.first_tokens)


def _served(manifest: dict[str, Any]) -> str | None:
    """The control, where it is one of how tokens are routed."""
    return manifest["control"] if manifest["control"] == "last_token" else None
