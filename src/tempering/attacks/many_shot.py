"""Attack `many_shot`: a long conversation in which the assistant has already complied many times.

Anil et al. 2024: compliance grows with the number of such turns as a power law. The turns come from a file of
`prompt`, `completion` rows, or are the embedded ones: everyday questions with full answers, so they teach the
form (ask, get an answer at once) and nothing harmful. That makes it weaker than the paper's; with a file of
your own it is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempering.core.records import LabelledCompletion, Prompt, content_id, labelled_from_row
from tempering.data.files import bundled, read_records, read_rows


def shot_from_row(row: Mapping[str, Any]) -> LabelledCompletion:
    """Read a `prompt/completion` or `messages` row, or the chosen side of a pair.

    Raises:
        ValueError: when a column is missing or empty.
    """
    if row.get("completion") is None and row.get("chosen") is not None:
        row = {**row, "completion": row["chosen"]}
    return labelled_from_row({key: row[key] for key in ("prompt", "messages", "completion") if key in row})


def load_shots(source: str | Path | None = None) -> list[LabelledCompletion]:
    """Read shots from a file, by default the answers to the embedded benign prompts.

    Raises:
        FileNotFoundError, ValueError: see `data.files.read_records`.
    """
    if source is None:
        return [shot_from_row(row) for _, row in read_rows(bundled("pairs")) if row["label"] == "benign"]
    remedy = "give prompt and completion"
    return read_records(source, shot_from_row, repeats="drop", what="shot", remedy=remedy).records


def apply_many_shot(
    prompts: Sequence[Prompt], shots: Sequence[LabelledCompletion], *, count: int = 32, seed: int = 0
) -> list[Prompt]:
    """Put `count` answered turns (all, where fewer) before the request; which, by a hash of seed and prompt."""
    return [_many(prompt, shots, count, seed) for prompt in prompts]


def _many(prompt: Prompt, shots: Sequence[LabelledCompletion], count: int, seed: int) -> Prompt:
    drawn = sorted(shots, key=lambda shot: content_id(seed, prompt.id, shot.id))[:count]
    turns = [turn for shot in drawn for turn in (*shot.messages, {"role": "assistant", "content": shot.completion})]
    system = [m for m in prompt.messages[:1] if m["role"] == "system"]
    messages = (*system, *turns, *prompt.messages[len(system) :])
    return replace(
        prompt,
        messages=messages,
        id=content_id("many_shot", prompt.id, messages),
        extra={**prompt.extra, "attack": "many_shot", "prompt_id": prompt.id},
    )
