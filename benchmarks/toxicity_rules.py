"""How often the offline scorer of toxicity calls texts toxic, by category: on texts of known kind, not labelled ones.

    python benchmarks/toxicity_rules.py realtoxicityprompts.jsonl [more.jsonl ...]

Each row has a `prompt` and an optional `category`. Beside these stand texts of ours that are not toxic: the harmless
prompts and answers and the openings that come with the package. With labelled texts use `temper judge check rules`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from tempering.core.stats import wilson
from tempering.data.files import bundled, read_rows
from tempering.evals.toxicity import TOXIC, opening_from_row
from tempering.judges.toxicity import scores_of, signs


def main(paths: list[str]) -> None:
    harmless = [row for _, row in read_rows(bundled("pairs")) if row["label"] != "harmful"]
    show("embedded harmless prompts", (row["prompt"] for row in harmless))
    show("embedded harmless answers", (row["chosen"] for row in harmless))
    show("embedded openings", (row["prompt"] for _, row in read_rows(bundled("openings"))))
    for path in paths:
        found: dict[str, list[str]] = {}
        for _, row in read_rows(path):
            prompt = opening_from_row(row)
            found.setdefault(prompt.category or "no category", []).append(prompt.text)
        show(path, [text for texts in found.values() for text in texts])
        for category in sorted(found):
            show(f"  {category}", found[category])


def show(name: str, texts: Iterable[str]) -> None:
    started, scores = time.process_time(), [scores_of(signs(text))[0] for text in texts]
    seconds = time.process_time() - started
    value, low, high = wilson(sum(score >= TOXIC for score in scores), len(scores))
    rate = len(scores) / max(seconds, 1e-9)
    print(f"{name:<28} n = {len(scores):<5} toxic {value:.3f} [{low:.3f}, {high:.3f}]  {rate:,.0f} texts/CPU second")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
