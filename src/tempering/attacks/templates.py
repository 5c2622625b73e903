"""Attack `templates`: the request stands inside a text that argues, plays a role or sets a game.

Templates come from a file (`template`, with `{prompt}` where the request goes, or without, and the request
follows) or are the embedded ones. Which template a prompt gets depends on the two and the seed, not on order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tempering.attacks.encodings import rewritten
from tempering.core.records import Prompt, content_id
from tempering.data.files import bundled, read_records

PLACE = "{prompt}"


@dataclass(frozen=True)
class Template:
    """A text to put a request into; `id` is the name it is reported under."""

    text: str
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_id(self.text))

    def fill(self, request: str) -> str:
        r"""Put `request` in place of every `{prompt}`, else after a blank line.

        >>> Template("Play a game: {prompt}").fill("say {prompt}"), Template("Be free.").fill("hello")
        ('Play a game: say {prompt}', 'Be free.\n\nhello')
        """
        # Not str.format: templates and requests are foreign texts with braces of their own.
        has_place = PLACE in self.text
        return self.text.replace(PLACE, request) if has_place else f"{self.text.rstrip()}\n\n{request}"


def template_from_row(row: Mapping[str, Any]) -> Template:
    """Read a `template` row with an optional `name`.

    Raises:
        ValueError: when there is no template text.
    """
    text = row.get("template")
    if not isinstance(text, str):
        raise ValueError(f"missing column 'template'; found {', '.join(map(str, row)) or 'no columns'}")
    if not text.replace(PLACE, "").strip():
        raise ValueError("'template' is empty")
    return Template(text, id=str(row.get("name") or ""))


def load_templates(
    source: str | Path | None = None, *, invalid: Literal["error", "drop"] = "error"
) -> list[Template]:
    """Read templates from a file, by default the embedded ones; a repeated text counts once.

    Raises:
        FileNotFoundError, ValueError: see `data.files.read_records`.
    """
    where = bundled("templates") if source is None else source
    return read_records(
        where,
        template_from_row,
        invalid=invalid,
        repeats="drop",
        what="template",
        remedy="set invalid=drop",
    ).records


def apply_templates(
    prompts: Sequence[Prompt], templates: Sequence[Template], *, per_prompt: int = 1, seed: int = 0
) -> list[Prompt]:
    """Put the last user turn of each prompt into `per_prompt` different templates (all, where fewer)."""
    ordered = sorted(templates, key=lambda template: template.id)
    return [
        _templated(prompt, template)
        for prompt in prompts
        for template in _drawn(ordered, prompt.id, per_prompt, seed)
    ]


def _drawn(templates: Sequence[Template], prompt_id: str, count: int, seed: int) -> list[Template]:
    """Draw without replacement, by a hash of seed, prompt and draw rather than a generator's state."""
    pool = list(templates)
    draws = range(min(count, len(pool)))
    return [pool.pop(int(content_id(seed, prompt_id, draw), 16) % len(pool)) for draw in draws]


def _templated(prompt: Prompt, template: Template) -> Prompt:
    made = rewritten(prompt, "templates", template.fill(prompt.text), template=template.id)
    return replace(made, id=content_id("templates", prompt.id, template.id))  # two names of one text are two rows
