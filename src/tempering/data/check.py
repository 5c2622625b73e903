"""What `temper data check FILE` finds out: the format of a data source, its problems, and its lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempering.core.records import (
    LabelledCompletion,
    PreferencePair,
    Prompt,
    labelled_from_row,
    pair_from_row,
    prompt_from_row,
)
from tempering.data.files import repeated, scan_rows
from tempering.data.formats import at
from tempering.data.origin import origin

Record = PreferencePair | LabelledCompletion | Prompt


def text_from_row(row: Mapping[str, Any]) -> Prompt:
    """Read a `text` row, as a corpus has them, for its length.

    Raises:
        ValueError: there is no text, or it is empty.
    """
    return prompt_from_row({"prompt": row.get("text")} if "text" in row else row)


PARSERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "pairs": pair_from_row,
    "labelled": labelled_from_row,
    "messages": labelled_from_row,
    "prompts": prompt_from_row,
    "texts": text_from_row,
}
SHOWN = 20


def check_file(
    source: str | Path,
    kind: str = "auto",
    tokenizer: Any = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> dict[str, Any]:
    """Read a whole source and report on it; a problem is a finding here, never an exception.

    Lengths are in tokens with a `tokenizer` (its chat template included), else in characters. A row longer
    than `max_length` or `max_prompt_length`, in tokens, is counted under `too_long`. Rows that the catalogue
    leaves out are counted under `left_out`, repeated ones of a public data set too, and are no problem; nor is
    a number of rows other than `expected_rows`, since a copy may be a part.
    """
    report: dict[str, Any] = {"source": str(source), "kind": kind, "rows": 0, "valid": 0, "ok": False}
    left_out: Counter[str] = Counter()
    problems: list[dict[str, str]] = []
    reasons: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    too_long: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {}
    seen: dict[str, str] = {}
    example: dict[str, Any] | None = None

    def add(where: str, problem: str, reason: str | None = None) -> None:
        reasons[reason or problem] += 1
        if len(problems) < SHOWN:
            problems.append({"where": at(where), "problem": problem})

    parser = PARSERS.get(kind)
    if parser is None and kind != "auto":
        add(str(source), f"unknown kind {kind!r}; expected auto or one of {', '.join(PARSERS)}")
    try:
        found = origin(source)
        if found is not None:
            report["expected_rows"] = found.dataset.rows
            if kind == "auto":
                report["kind"] = {"choices": "prompts"}.get(found.dataset.kind, found.dataset.kind)
                parser = PARSERS[report["kind"]]
        for where, row, problem, is_left_out in scan_rows(source) if not problems else ():
            report["rows"] += 1
            if is_left_out:
                left_out[str(problem)] += 1
                continue
            if row is None:
                add(where, problem or "unreadable")
                continue
            columns.update(key for key, value in row.items() if value is not None)
            if parser is None:
                report["kind"] = detect(row)
                parser = PARSERS[report["kind"]]
            try:
                record = parser(row)
            except ValueError as error:
                add(where, str(error))
                continue
            example = row if example is None else example
            duplicate = repeated(record, where, seen)
            if duplicate and duplicate.is_content and found is not None:
                left_out["repeats an earlier row"] += 1
                continue
            if duplicate:
                add(where, duplicate.problem, "duplicate")
                continue
            report["valid"] += 1
            sizes = _sizes(record, tokenizer)
            for name, size in sizes.items():
                lengths.setdefault(name, []).append(size)
            if tokenizer is not None:
                too_long["prompt"] += max_prompt_length is not None and sizes["prompt"] > max_prompt_length
                too_long["total"] += max_length is not None and sizes["total"] > max_length
    except (ValueError, OSError) as error:
        add(str(source), str(error).removeprefix(f"{source}: "))
    return report | {
        "ok": not reasons,
        "problems": problems,
        "problem_count": reasons.total(),
        "problem_counts": dict(reasons.most_common()),
        "duplicates": reasons["duplicate"],
        "left_out": dict(left_out.most_common()),
        "columns": dict(columns),
        "lengths": {
            "unit": "characters" if tokenizer is None else "tokens",
            **{name: _summary(sizes) for name, sizes in lengths.items()},
        },
        "too_long": dict(too_long),
        "example": example,
    }


def detect(row: Mapping[str, Any]) -> str:
    """Tell the format of a row by its columns.

    >>> detect({"prompt": "a", "chosen": "b", "rejected": "c"}), detect({"prompt": "a", "category": "d"})
    ('pairs', 'prompts')
    """
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return "pairs"
    if row.get("completion") is not None:
        return "labelled"
    turns = row.get("messages")
    last = turns[-1] if isinstance(turns, Sequence) and turns else None
    is_answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    return "messages" if is_answered else "prompts"


def _sizes(record: Record, tokenizer: Any) -> dict[str, int]:
    """Return the lengths of the prompt, of each answer, and of the prompt with its longest answer."""
    if isinstance(record, PreferencePair):
        answers = {"chosen": record.chosen, "rejected": record.rejected}
    else:
        answers = {"completion": record.completion} if isinstance(record, LabelledCompletion) else {}
    if tokenizer is None:
        prompt = sum(len(turn["content"]) for turn in record.messages)
        sizes = {name: len(text) for name, text in answers.items()}
    else:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in record.messages], tokenize=False, add_generation_prompt=True
        )
        prompt = _tokens(tokenizer, text)
        sizes = {name: _tokens(tokenizer, text) for name, text in answers.items()}
    return {"prompt": prompt, **sizes, "total": prompt + max(sizes.values(), default=0)}


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _summary(sizes: Sequence[int]) -> dict[str, float]:
    quantiles = np.quantile(np.asarray(sizes), [0.0, 0.5, 0.9, 0.99, 1.0])
    names = ("min", "median", "p90", "p99", "max")
    return {"mean": round(float(np.mean(sizes)), 1)} | {
        name: round(float(q), 1) for name, q in zip(names, quantiles, strict=True)
    }
