"""Attacks: pure functions from prompts to harder prompts. What they reach is for an eval to judge.

Each returned prompt says in `extra` which `attack` made it and the `prompt_id` it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tempering.attacks.prefill import apply_prefill, opening
from tempering.attacks.templates import Template, apply_templates, load_templates, template_from_row
from tempering.core.records import Prompt


@dataclass(frozen=True)
class AttackOptions:
    """What attacks may need beside the prompts."""

    templates: Sequence[Template] = ()
    templates_per_prompt: int = 1
    seed: int = 0


def direct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Ask plainly: the request as it is."""
    return [replace(p, extra={**p.extra, "attack": "direct", "prompt_id": p.id}) for p in prompts]


ATTACKS: dict[str, Callable[[Sequence[Prompt], AttackOptions], list[Prompt]]] = {
    "direct": lambda prompts, options: direct(prompts),
    "prefill": lambda prompts, options: apply_prefill(prompts),
    "templates": lambda prompts, options: apply_templates(
        prompts, options.templates, per_prompt=options.templates_per_prompt, seed=options.seed
    ),
}

__all__ = [
    "ATTACKS",
    "AttackOptions",
    "Template",
    "apply_prefill",
    "apply_templates",
    "direct",
    "load_templates",
    "opening",
    "template_from_row",
]
