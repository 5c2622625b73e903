"""What is held out from training: one rule for every method, so that their held-out numbers compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def hold_out_prompts(prompts: Mapping[str, str], share: float, seed: int) -> set[str]:
    """Choose the ids whose prompt is held out: by hash of (seed, prompt), all answers to a prompt together.

    `prompts` maps id -> prompt text; prompts that differ in white space or case are one prompt.
    """
    plain = {i: " ".join(text.split()).casefold() for i, text in prompts.items()}
    order = sorted(set(plain.values()), key=lambda text: _sha(f"{seed}:{text}"))
    held = set(order[: round(share * len(order))])
    return {i for i, text in plain.items() if text in held}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
