"""The card of a judge on disk: how often it errs, counted on labelled answers, for others to correct by.

Used by `temper judge check`, which writes it, and by evals, which read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tempering.core.records import content_id
from tempering.core.run import atomic_write, file_hash
from tempering.judges import PAIRWISE, Asks

SCHEMA = 1
FOLDER = Path("runs") / "judge-cards"
"""Where cards go unless they are told otherwise."""
COUNTS = ("true_positives", "false_negatives", "false_positives", "true_negatives")
CORRECTS: tuple[Asks, ...] = ("refused", "harmful")
"""The questions whose rates are corrected."""
_EFFORT = ("seconds", "seconds_per_answer", "seconds_per_pair", "tokens")
"""What a check took, which is less where a cache answers: no part of what the card says of its judge."""


class JudgeCard(NamedTuple):
    """What a correction needs of a card."""

    file: str
    sha256: str
    judge: str
    asks: Asks
    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int
    unscored: int
    prompts: frozenset[str]
    """Marks of the labelled prompts; see `prompt_mark`."""

    @property
    def positives(self) -> int:
        """Scored answers that are labelled true."""
        return self.true_positives + self.false_negatives

    @property
    def negatives(self) -> int:
        """Scored answers that are labelled false."""
        return self.false_positives + self.true_negatives


def read_card(file: str | Path) -> JudgeCard:
    """Read a card.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no card, or an incomplete one.
    """
    path = Path(file)
    remedy = "make one with: temper judge check JUDGE data=FILE out=CARD"
    if not path.is_file():
        raise FileNotFoundError(f"judge card {file}: no such file; {remedy}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"judge card {file}: not JSON ({error}); {remedy}") from None
    if isinstance(told, dict) and told.get("kind") == PAIRWISE:
        raise ValueError(f"judge card {file}: a pairwise judge's card, which corrects no rate; {remedy}")
    if not isinstance(told, dict) or not isinstance(told.get("judge"), str) or told.get("asks") not in CORRECTS:
        raise ValueError(f"judge card {file}: expected 'judge' and 'asks' ({' or '.join(CORRECTS)}); {remedy}")
    counts = told["counts"] if isinstance(told.get("counts"), dict) else {}
    numbers: dict[str, Any] = {"unscored": told.get("unscored"), **{name: counts.get(name) for name in COUNTS}}
    if not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise ValueError(f"judge card {file}: expected 'unscored' and 'counts' of {', '.join(COUNTS)}; {remedy}")
    data = told.get("data")
    prompts = data.get("prompts") if isinstance(data, dict) else None
    marks = frozenset(map(str, prompts)) if isinstance(prompts, list) else frozenset()
    return JudgeCard(str(file), file_hash(path), told["judge"], told["asks"], prompts=marks, **numbers)


def require_free(out: str | Path | None) -> None:
    """Refuse to overwrite, before a judge is asked.

    Raises:
        FileExistsError: there is a file of this name.
    """
    if out is not None and Path(out).exists():
        raise FileExistsError(f"{out} exists; give another file with out=FILE")


def save_card(card: Mapping[str, Any], out: str | Path | None = None) -> Path:
    """Write a card; without `out` to a file named by judge and content, so that equal cards share one.

    Raises:
        FileExistsError: `out` exists.
    """
    require_free(out)
    if out is None:
        stamp = content_id({key: value for key, value in card.items() if key not in _EFFORT})
        name = re.sub(r"[^A-Za-z0-9._@+-]+", "-", str(card["judge"]))[:80]
        out = FOLDER / f"{name}-{stamp[:8]}.json"
        if out.exists():
            return out
    text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return atomic_write(Path(out), text.encode("utf-8"))


def prompt_mark(text: str) -> str:
    """Return 8 hex digits for the text of a prompt: enough to see whether two sets share prompts."""
    return content_id(text)[:8]
