"""`temper data check`: everything that is wrong with a file, before anything is trained on it."""

from __future__ import annotations

from typing import Any, Literal

from tempering.core.config import Config
from tempering.core.loading import load_tokenizer, resolve
from tempering.data.check import check_file


class CheckConfig(Config):
    """Settings of `temper data check`."""

    kind: Literal["auto", "pairs", "labelled", "messages", "prompts", "texts"] = "auto"
    """What the rows are."""
    model: str | None = None
    """Count lengths in this model's tokens."""
    max_length: int | None = None
    """Longest prompt + completion, in tokens of `model`."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens of `model`."""


def run_check(file: str, config: CheckConfig) -> dict[str, Any]:
    """Check a file; lengths are tokens where a model is named, else characters."""
    tokenizer = load_tokenizer(resolve(config.model)) if config.model else None
    return check_file(
        file,
        config.kind,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
    )
