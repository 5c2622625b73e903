"""What a game is given, read and checked before anything is loaded or written: its seeds, and who judges."""

from __future__ import annotations

from collections.abc import Sequence

from tempering.core.chat import encode_prompt
from tempering.core.endpoint import parse_endpoint
from tempering.data.attacker import INSTRUCTIONS, Category, attacker_message
from tempering.data.seeds import Seed, load_seeds
from tempering.methods.advgame.players import Seats
from tempering.methods.advgame.settings import AdvGameConfig


def read_seeds(config: AdvGameConfig) -> list[Seed]:
    """Read the seeds of the classes that are played, split already.

    Raises:
        FileNotFoundError, ValueError: wrong input, naming file and row.
    """
    return load_seeds(
        config.data.train, classes=config.data.classes, limit=config.limit, seed=config.seed, valid=config.data.valid
    )


def by_class(
    config: AdvGameConfig, seats: Seats, seeds: Sequence[Seed], split: str
) -> tuple[dict[Category, list[Seed]], int]:
    """The seeds of a split by class, and how many were left out because their instruction is too long."""
    found: dict[Category, list[Seed]] = {category: [] for category in config.data.classes}
    dropped = 0
    for seed in seeds:
        if seed.split != split:
            continue
        text = attacker_message(INSTRUCTIONS[seed.category], config.rollout.format, seed.prompt)
        turns = [{"role": "user", "content": text}]
        if len(encode_prompt(seats.attacker.policy.tokenizer, turns)) > config.max_prompt_length:
            dropped += 1
            continue
        found[seed.category].append(seed)
    return found, dropped


def require_judges(config: AdvGameConfig) -> None:
    """Refuse a judge that cannot be one, before anything is loaded or written.

    Raises:
        ValueError: naming it.
    """
    own = config.judges
    for field in ("default", "faithfulness", "defender", "attacker"):
        spec = getattr(own, field)
        if spec in (None, "default", "rules", "rules:words") or spec.startswith("local:"):
            continue
        if not spec.startswith("openai:"):
            raise ValueError(
                f"judges.{field}={spec!r}: expected rules, rules:words, openai:MODEL@URL or local:REFERENCE"
            )
        parse_endpoint(spec)
