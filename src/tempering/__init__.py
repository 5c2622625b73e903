"""Tempering: make open-weight language models safe without making them useless, and prove it.

run = tempering.train("staged_competence", {"data": {"train": "pairs.jsonl"}, "out": "runs/mine"})
tempering.evaluate("runs/mine", ["harm", "over_refusal", "capability"])
tempering.report(["runs/mine"])
model = tempering.load("runs/mine")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "train": "tempering.api",
    "evaluate": "tempering.api",
    "report": "tempering.api",
    "load": "tempering.api",
    "Policy": "tempering.core.policy",
    "Run": "tempering.core.run",
    "Prompt": "tempering.core.records",
    "Completion": "tempering.core.records",
    "PreferencePair": "tempering.core.records",
    "Verdict": "tempering.core.records",
    "load_judge": "tempering.judges",
}
"""Public names, imported when first used: `import tempering` does not load torch."""

__all__ = [
    "Completion",
    "Policy",
    "PreferencePair",
    "Prompt",
    "Run",
    "Verdict",
    "evaluate",
    "load",
    "load_judge",
    "report",
    "train",
]

if TYPE_CHECKING:
    from tempering.api import evaluate, load, report, train
    from tempering.core.policy import Policy
    from tempering.core.records import Completion, PreferencePair, Prompt, Verdict
    from tempering.core.run import Run
    from tempering.judges import load_judge


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tempering' has no attribute {name!r}")
