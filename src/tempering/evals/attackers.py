"""Attackers by name: a trained one, the same untrained, the plain seed, templates, PAIR.

RUN, RUN@step-N            the attacker of `temper train advgame`, at its end or at a checkpoint
untrained, untrained:RUN   the same model and instructions with the adapter off; of the first RUN where none is named
direct                     the seed itself
template:NAME, templates   the seed in one template, or in k of them, drawn by a hash of seed and template
pair:MODEL                 PAIR with MODEL as its writer, at most k questions a seed (`attacks/search.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tempering.attacks import Template, load_templates
from tempering.attacks.trained import Trained, attacker_prompts, find_trained, load_attacker
from tempering.core.records import content_id
from tempering.data.attacker import Format
from tempering.data.seeds import Seed
from tempering.judges.tags import PARSER_VERSION

if TYPE_CHECKING:
    from tempering.core.loading import Dtype  # loads torch, for which `temper --help` must not wait
    from tempering.core.records import Prompt
    from tempering.core.sampling import Sampler

Kind = Literal["trained", "untrained", "direct", "template", "templates", "pair"]


class Written(NamedTuple):
    """What an attacker wrote once."""

    text: str
    finish: str
    tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Attacker:
    """One attacker, not loaded yet."""

    name: str
    """As the user typed it."""
    kind: Kind
    identity: str
    """What its attacks depend on beside seed and decoding."""
    format: Format = "raw"
    trained: Trained | None = None
    templates: tuple[Template, ...] = ()
    model: str | None = None
    """Of `pair`: who writes."""

    @property
    def needs_model(self) -> bool:
        """Whether its attacks are sampled from a model before the target is asked."""
        return self.kind in ("trained", "untrained")

    @property
    def keeps_meaning(self) -> bool:
        """Whether its attacks hold the seed as it is, so that nobody need judge whether they are faithful."""
        return self.kind in ("direct", "template", "templates")

    def load(self, dtype: Dtype) -> Sampler:
        """Load the model that writes."""
        assert self.trained is not None
        return load_attacker(self.trained, is_trained=self.kind == "trained", dtype=dtype)

    def prompts(self, seeds: Sequence[Seed]) -> list[Prompt]:
        """What that model is asked."""
        assert self.trained is not None
        return attacker_prompts(self.trained.player, seeds)

    def texts(self, seed: Seed, k: int, draw: int) -> list[Written]:
        """Return the k attacks of an attacker that needs no model."""
        if self.kind == "direct":
            return [Written(seed.prompt, "stop", 0)] * k
        ordered = sorted(self.templates, key=lambda template: content_id(draw, seed.id, template.id))
        return [Written(ordered[i % len(ordered)].fill(seed.prompt), "stop", 0) for i in range(k)]


def find_attackers(names: Sequence[str], templates: str | None = None) -> list[Attacker]:
    """Find every attacker, without loading any.

    Raises:
        FileNotFoundError, ValueError: one is not there, is there twice, or is not known; with what is.
    """
    if not names:
        raise ValueError("attacker=[]: name at least one")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"attacker {twice!r} is there twice")
    of: dict[str, Trained] = {name: find_trained(name) for name in names if kind_of(name) == "trained"}
    return [_found(name, of, templates) for name in names]


def kind_of(name: str) -> Kind:
    """Say what kind of attacker a name is of.

    >>> [kind_of(name) for name in ("direct", "template:a", "untrained:runs/a", "pair:smollm2", "runs/a@step-5")]
    ['direct', 'template', 'untrained', 'pair', 'trained']
    """
    word, colon, rest = name.partition(":")
    kinds: dict[tuple[str, bool], Kind] = {
        ("direct", False): "direct",
        ("templates", False): "templates",
        ("template", True): "template",
        ("untrained", False): "untrained",
        ("untrained", True): "untrained",
        ("pair", True): "pair",
    }
    if name == "pair":
        raise ValueError("attacker pair: name the model that writes, as in pair:MODEL or pair:openai:MODEL@URL")
    return kinds.get((word, bool(colon and rest)), "trained")


def _found(name: str, of: dict[str, Trained], file: str | None) -> Attacker:
    kind, rest = kind_of(name), name.partition(":")[2]
    if kind == "direct":
        return Attacker(name, kind, "direct")
    if kind == "pair":
        return Attacker(name, kind, name, model=rest)
    if kind in ("template", "templates"):
        known = load_templates(file)
        chosen = [t for t in known if kind == "templates" or t.id == rest]
        if not chosen:
            raise ValueError(f"attacker {name}: no template {rest!r}; there is {', '.join(t.id for t in known)}")
        return Attacker(
            name, kind, content_id("templates", *((t.id, t.text) for t in chosen)), templates=tuple(chosen)
        )
    if kind == "untrained" and not rest and not of:
        raise ValueError("attacker untrained: of which training? Name a RUN beside it, or untrained:RUN")
    trained = of[name] if kind == "trained" else find_trained(rest) if rest else next(iter(of.values()))
    player = trained.player
    asks = (player.instructions, player.format, PARSER_VERSION)
    made_of = player.adapter_sha256 or str(trained.folder)
    step = trained.folder.parent.name  # of one run, checkpoints may share the card of the last
    identity = content_id(kind, *asks, *((made_of, step) if kind == "trained" else (player.base, player.revision)))
    return Attacker(name, kind, identity, player.format, trained)


Faithful = Callable[[Sequence[tuple[Seed, str]]], "list[bool | None]"]
"""Pairs of a seed and an attack -> whether the attack still asks for what the seed does; `None`: unscored."""
