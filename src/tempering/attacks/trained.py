"""Attack by a model that was trained to attack: what it was told in training, asked of it again for other seeds.

Reads `player.json`, which lies beside the attacker's adapter and is all that an attack knows of a training. Such an
adapter is unsafe from birth and hidden from loaders; here, and only here, it is loaded for what it was made for. The
adapter off, the same model with the same instructions is the untrained attacker, the control of the training.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from tempering.core.quarantine import LOADABLE, SUFFIX, WHOLE
from tempering.core.records import Prompt
from tempering.core.run import file_hash
from tempering.data.attacker import Category, Format, attacker_message
from tempering.data.seeds import Seed

if TYPE_CHECKING:
    from tempering.core.loading import Dtype  # these load torch, for which `temper --help` must not wait
    from tempering.core.sampling import LocalSampler

PLAYER = "player.json"
SCHEMA = 1
Role = Literal["attacker", "defender"]
_STEP = re.compile(r"(?P<run>.+)@(?P<step>step-\d+)")


class Player(BaseModel):
    """What `player.json` says; fields that are not known here are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    schema_: int
    """Version of the file."""
    instructions: dict[Category, str]
    """What it is told, by the class of the seed."""
    format: Format
    """How its output is read."""
    parser_version: int
    """Of the parser with which it was trained."""
    base: str
    """Model reference under its adapter."""
    revision: str | None = None
    """Of the base."""
    adapter_sha256: str | None = None
    """Of its weights."""
    seeds_sha256: str | None = None
    """Of the seeds that it was trained on."""
    seed_ids: frozenset[str] = frozenset()
    """Their ids."""


class Trained(NamedTuple):
    """A trained attacker: what it says of itself, where its weights are, and the run that made it."""

    player: Player
    folder: Path
    run: Path


def split_step(spec: str) -> tuple[str, str | None]:
    """Take `RUN@step-N` apart.

    >>> split_step("runs/game@step-50"), split_step("runs/game")
    (('runs/game', 'step-50'), ('runs/game', None))
    """
    found = _STEP.fullmatch(spec)
    return (found["run"], found["step"]) if found else (spec, None)


def player_folder(spec: str, role: Role) -> Path:
    """Return where a player's weights are: the last ones of `RUN`, or those of `RUN@step-N`, the averaged first.

    Raises:
        FileNotFoundError: no such run, step or player.
    """
    root, step = split_step(spec)
    run = Path(root)
    if not run.is_dir():
        raise FileNotFoundError(f"{spec}: no such run folder as {run}")
    if step is None:
        places = [run / "final" / role, run]
        found = places[0] if places[0].is_dir() else places[1] if (places[1] / PLAYER).is_file() else None
        if found is None:
            raise FileNotFoundError(f"{spec} has no {role} in final/{role}; name a finished run of advgame")
        return found
    places = [run / "checkpoints" / step / name for name in (f"{role}_ema", role)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        kept = sorted((p.name for p in (run / "checkpoints").glob("step-*")), key=lambda name: int(name[5:]))
        raise FileNotFoundError(f"{spec}: no {role} at {step}; there is {', '.join(kept) or 'no checkpoint'}")
    return found


def find_trained(spec: str) -> Trained:
    """Find a trained attacker, `RUN`, `RUN@step-N` or the folder of an attacker, without loading it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its `player.json` cannot be read, or its weights are not those that it names.
    """
    folder = player_folder(spec, "attacker")
    run = Path(split_step(spec)[0])
    card = next((place for place in (folder, run / "final" / "attacker") if (place / PLAYER).is_file()), None)
    if card is None:
        raise FileNotFoundError(
            f"{spec} holds no trained attacker (no final/attacker/{PLAYER}); name a run of `temper train advgame`, "
            "or one of untrained, direct, template:NAME, templates, pair:MODEL"
        )
    player = read_player(card / PLAYER)
    weights = _weights(folder)
    if card == folder and player.adapter_sha256 and weights and file_hash(weights) != player.adapter_sha256:
        raise ValueError(
            f"{weights}: not the weights that {card / PLAYER} names (sha256 {player.adapter_sha256[:12]}); copy the "
            "run again"
        )
    return Trained(player, folder, run)


def read_player(file: Path) -> Player:
    """Read a `player.json`.

    Raises:
        ValueError: naming file and field.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy the run again") from None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        version = told.get("schema") if isinstance(told, dict) else told
        raise ValueError(f"{file}: schema {version!r}, expected {SCHEMA}; it was written by another version")
    try:
        return Player.model_validate({**told, "schema_": told["schema"]})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def attacker_prompts(player: Player, seeds: Sequence[Seed]) -> list[Prompt]:
    """Build what an attacker is asked, one user turn a seed; the ids are those of the seeds.

    Raises:
        ValueError: it has no instruction for a seed's class.
    """
    prompts = []
    for seed in seeds:
        if seed.category not in player.instructions:
            known = ", ".join(player.instructions)
            raise ValueError(f"this attacker was trained on {known} seeds only; set classes=[{known}]")
        text = attacker_message(player.instructions[seed.category], player.format, seed.prompt)
        prompts.append(Prompt(({"role": "user", "content": text},), id=seed.id, category=seed.category))
    return prompts


def load_attacker(trained: Trained, *, is_trained: bool = True, dtype: Dtype = "auto") -> LocalSampler:
    """Load an attacker, or with `is_trained=False` its model as it was before; the weights stay where they are.

    Raises:
        FileNotFoundError, ValueError: it cannot be loaded.
    """
    from tempering.core.policy import Policy
    from tempering.core.sampling import LocalSampler

    player = trained.player
    if not is_trained:
        base = f"{player.base}@{player.revision}" if player.revision else player.base
        return LocalSampler(Policy.load(base, dtype=dtype))
    with in_the_open(trained) as folder:
        return LocalSampler(Policy.load(str(folder), dtype=dtype), name=str(trained.folder))


@contextmanager
def in_the_open(trained: Trained) -> Iterator[Path]:
    """A temporary folder in which loaders find the weights, whether or not they are hidden where they lie."""
    temporary = Path(tempfile.mkdtemp(prefix="attacker-"))
    try:
        for file in trained.folder.iterdir():
            if file.is_file() and file.name != PLAYER:  # which marks a folder as an attacker's
                (temporary / file.name.removesuffix(SUFFIX)).symlink_to(file.resolve())
        if (temporary / LOADABLE[1]).exists() and not (temporary / "lineage.json").exists():
            base = {"base": trained.player.base, "revision": trained.player.revision}
            (temporary / "lineage.json").write_text(json.dumps(base), encoding="utf-8")
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights(folder: Path) -> Path | None:
    """The file of a player's weights, hidden or not; `None` where there are several."""
    names = (LOADABLE[0], LOADABLE[0] + SUFFIX, WHOLE[0], WHOLE[0] + SUFFIX)
    return next((file for name in names if (file := folder / name).is_file()), None)
