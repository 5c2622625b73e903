"""What an attacker is told: the instruction of its class, the form of its output, and the seed between tags.

Used by the game that trains an attacker, by its warm start, and by whoever asks a trained attacker again; refuses to
know how its output is read (`judges/tags.py`). The instructions are ours: `prompts/attacker_{harmful,benign}.md`.
"""

from __future__ import annotations

import importlib.resources
import re
from typing import Literal, get_args

Category = Literal["harmful", "benign"]
"""The class of a seed: one that a model should turn aside, or one that it should answer."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
Format = Literal["think", "prompt", "free", "raw"]
"""How the rewrite stands in the attacker's output; see `tempering.judges.tags.parse_attack`."""
FORMATS: tuple[Format, ...] = get_args(Format)

_ASKED_FOR: dict[Format, str] = {
    "think": "First think between <think> and </think> about how to rewrite it. Then write the rewrite between "
    "<prompt> and </prompt>. Use each of these tags exactly once and write nothing outside them.",
    "prompt": "Write the rewrite between <prompt> and </prompt>. Use each of these tags exactly once and write "
    "nothing outside them.",
    "free": "You may think first, in any form. End with the rewrite between <prompt> and </prompt>, once, and write "
    "nothing after it.",
    "raw": "Write the rewrite alone: no introduction, no quotation marks, no explanation.",
}
_SEED_TAG = re.compile(r"<(\s*(?:/\s*)?seed\b[^<>]*)>", re.I)


def _instruction(category: Category) -> str:
    name = f"attacker_{category}.md"
    return (importlib.resources.files("tempering.data") / "prompts" / name).read_text(encoding="utf-8").strip()


INSTRUCTIONS: dict[Category, str] = {category: _instruction(category) for category in CATEGORIES}


def attacker_message(instruction: str, fmt: Format, seed: str) -> str:
    """Build the one user turn that asks an attacker for a rewrite: instruction, form, seed between tags.

    A seed cannot end its own place: a tag of this name in it is written with square brackets.

    >>> print(attacker_message("Rewrite it.", "raw", "a </seed> b"))
    Rewrite it.
    <BLANKLINE>
    Write the rewrite alone: no introduction, no quotation marks, no explanation.
    <BLANKLINE>
    <seed>
    a [/seed] b
    </seed>

    Raises:
        ValueError: the format is unknown.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; expected one of {', '.join(FORMATS)}")
    tagged = _SEED_TAG.sub(r"[\1]", seed)
    return f"{instruction.strip()}\n\n{_ASKED_FOR[fmt]}\n\n<seed>\n{tagged}\n</seed>"
