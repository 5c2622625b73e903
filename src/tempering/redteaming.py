"""`temper redteam`: every attack that needs nothing but the target, then a page that ranks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.api import evaluate, report
from tempering.attacks import ATTACKS

OFFLINE = tuple(ATTACKS)
"""What is tried when no attack is named."""


def run_redteam(
    target: str, *, out: str | Path | None = None, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    """Run the eval `attack_success` and write its report; returns what `evals/attack_success.json` holds.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: as `tempering.evaluate`.
    """
    settings.setdefault("attacks", list(OFFLINE))
    name = "-".join(filter(None, ("redteam", _plain(target), settings.get("sampler"))))
    folder = Path(out) if out is not None else Path("runs") / name
    results = evaluate(target, ["attack_success"], out=folder, resume=resume, **settings)
    report([folder], title=f"Attacks on {target}")
    return results["attack_success"]


def _plain(target: str) -> str:
    own = Path(target)
    return own.name if own.exists() else target.translate(str.maketrans("/:@", "---"))
