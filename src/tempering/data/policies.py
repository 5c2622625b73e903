"""The policy registry: what a model is to recall when it deliberates, by category; read, checked, and put into words.

Used by `deliberative` and by whoever asks whether a model names the right policy; refuses to know any model.

>>> registry = load_registry()
>>> registry.resolve(["copyright", "privacy", "gardening"])
(('privacy', 'intellectual_property'), ('gardening',))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tempering.core.config import Config, build, read_yaml
from tempering.core.records import content_id

BENIGN = "benign"
"""The category of requests that break no rule; it has no summary."""
MAX_CATEGORY_WORDS, MAX_RULE_WORDS, MAX_SUMMARY_WORDS = 160, 30, 300
Mode = Literal["summary_detail", "detail"]


class Style(Config):
    """How an answer of each kind is written."""

    comply: str
    """Of an answer that helps."""
    refuse: str = ""
    """Of a refusal."""
    safe_complete: str = ""
    """Of an answer that helps in part."""


class Category(Config):
    """One policy. A rule has at most 30 words, all texts of a category together at most 160."""

    title: str
    """What the reasoning calls it: unlike anything that a request would hold by chance, two words or more."""
    cite_as: list[str] = Field(min_length=1)
    """Strings that count as naming this policy, in any case."""
    summary: str = ""
    """One sentence; empty for `benign` only."""
    objective: str
    """One sentence: what the policy is for."""
    allowed: list[str] = Field(min_length=2, max_length=4)
    """Rules: what to help with."""
    disallowed: list[str] = Field(default=[], max_length=4)
    """Rules: what to refuse."""
    safe_complete: list[str] = Field(default=[], max_length=4)
    """Rules: how to help in part."""
    style: Style
    """How to write it."""

    @property
    def rules(self) -> list[str]:
        """All its rules."""
        return [*self.allowed, *self.disallowed, *self.safe_complete]

    @property
    def texts(self) -> list[str]:
        """Everything that it says."""
        style = [self.style.comply, self.style.refuse, self.style.safe_complete]
        return [text for text in (self.title, self.summary, self.objective, *self.rules, *style) if text]

    @model_validator(mode="after")
    def _is_short(self) -> Category:
        if len(self.title.split()) < 2:
            raise ValueError(f"title {self.title!r}: expected two words or more, that no request holds by chance")
        for rule in self.rules:
            if words(rule) > MAX_RULE_WORDS:
                raise ValueError(f"a rule has {words(rule)} words, more than {MAX_RULE_WORDS}: {rule[:60]!r}")
        if (count := sum(map(words, self.texts))) > MAX_CATEGORY_WORDS:
            raise ValueError(f"{self.title!r} has {count} words, more than {MAX_CATEGORY_WORDS}; shorten it")
        return self


class Registry(Config):
    """All policies, what the teacher is told to do with them, and what a trace must not say."""

    version: int
    """Of the wording."""
    instructions: list[str] = Field(min_length=1)
    """What the teacher is asked to do, sentence by sentence."""
    leak_phrases: list[str] = Field(default=[])
    """Wordings that betray a policy in the prompt."""
    aliases: dict[str, str] = Field(default={})
    """Label of a data set -> category."""
    categories: dict[str, Category] = Field(min_length=1)
    """Name -> policy, in the order in which they are shown."""

    @field_validator("categories")
    @classmethod
    def _are_complete(cls, categories: dict[str, Category], info: ValidationInfo) -> dict[str, Category]:
        for name, category in categories.items():
            lacks = [key for key in ("summary", "disallowed", "safe_complete") if not getattr(category, key)]
            lacks += [f"style.{key}" for key in ("refuse", "safe_complete") if not getattr(category.style, key)]
            if name != BENIGN and lacks:
                raise ValueError(f"{name}: {lacks[0]} is missing or empty; only {BENIGN!r} may lack it")
            if name == BENIGN and len(lacks) < 5:
                raise ValueError(f"{name}: has only objective, allowed and style.comply")
        titles = [category.title.casefold() for category in categories.values()]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two categories share the title {max(titles, key=titles.count)!r}; make them differ")
        if (count := sum(words(c.summary) for c in categories.values())) > MAX_SUMMARY_WORDS:
            raise ValueError(f"the summaries have {count} words, more than {MAX_SUMMARY_WORDS}; shorten them")
        return categories

    @model_validator(mode="after")
    def _aliases_lead_somewhere(self) -> Registry:
        for label, name in self.aliases.items():
            if name not in self.categories:
                raise ValueError(f"aliases: {label!r} leads to {name!r}, which is no category; add it or correct it")
        return self

    @property
    def digest(self) -> str:
        """Hash of the content."""
        return content_id(self.model_dump(mode="json"))

    @property
    def harms(self) -> list[str]:
        """All categories but `benign`."""
        return [name for name in self.categories if name != BENIGN]

    def resolve(self, labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the categories that some labels name, in the registry's order, and the labels that name none."""
        plain = {name.casefold(): name for name in self.categories}
        plain |= {label.casefold(): name for label, name in self.aliases.items()}
        found = {label: plain.get(label.strip().casefold()) for label in labels}
        known = set(found.values())
        return tuple(n for n in self.categories if n in known), tuple(
            label for label, n in found.items() if n is None
        )

    def secrets(self) -> Iterator[str]:
        """Every rule, title and instruction: what a student must never be shown."""
        yield from self.instructions
        for category in self.categories.values():
            yield category.title
            yield from category.rules

    def found_in(self, text: str) -> str | None:
        """Return the first rule, title or instruction that occurs in a text, in any case and spacing."""
        plain = _plain(text)
        return next((secret for secret in self.secrets() if _plain(secret) in plain), None)

    def cited(self, text: str) -> tuple[str, ...]:
        """Return the categories that a text names, by title or by `cite_as`."""
        plain = _plain(text)

        def named(words: str) -> bool:
            return re.search(rf"(?<!\w){re.escape(_plain(words))}(?!\w)", plain) is not None

        return tuple(name for name, c in self.categories.items() if any(map(named, (c.title, *c.cite_as))))


def load_registry(file: str | Path | None = None) -> Registry:
    """Read a registry, the bundled one where no file is named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file, field and what is wrong.
    """
    path = Path(__file__).with_name("policies.yaml") if file is None else Path(file).expanduser()
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"policies {file}: no such file; leave `policies` out for the bundled ones") from None
    except ValueError as error:
        raise ValueError(str(error).replace("recipe", "policies", 1)) from None
    return build(Registry, tree, f"policies {path.name if file is None else file}")


def policy_text(registry: Registry, categories: Sequence[str], mode: Mode = "summary_detail") -> str:
    """Put policies into words, in the registry's order, each once.

    `detail`: the full text of these categories (arXiv:2604.09665). `summary_detail`: the summaries of all others, and
    the full text of these (arXiv:2412.16339). Without a category: all summaries.
    """
    wanted = set(categories) & set(registry.categories)
    with_summaries = mode == "summary_detail" or not wanted
    parts = []
    for name, category in registry.categories.items():
        if name in wanted:
            parts.append(_detail(category))
        elif with_summaries and category.summary:
            parts.append(f"{category.title}. {category.summary}")
    return "\n\n".join(parts)


def words(text: str) -> int:
    """Count words."""
    return len(text.split())


def _detail(category: Category) -> str:
    style = category.style
    lines = [f"{category.title}. {category.summary}".rstrip(), f"Objective: {category.objective}"]
    for head, rules in (
        ("Allowed", category.allowed),
        ("Not allowed", category.disallowed),
        ("Answer in part", category.safe_complete),
    ):
        lines += [f"{head}:", *(f"- {rule}" for rule in rules)] if rules else []
    styles = (
        ("When helping", style.comply),
        ("When refusing", style.refuse),
        ("When helping in part", style.safe_complete),
    )
    return "\n".join([*lines, *(f"{head}: {text}" for head, text in styles if text)])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
