"""The seeds of the game: plain requests in two classes, each text once, split before anybody learns from them.

Used by the game that trains an attacker and by the evaluation of attackers; refuses to know what is done with them.

A source is whatever `files.read_rows` reads, with a `prompt` and a `category` of `harmful` or `benign` a row. Also
read: `demo`, the bundled mild training prompts (those that are held out for evaluation are never among them); rows
whose `label` says `harmful`, `borderline` or `benign`; and the rows of WildJailbreak's training split, of which the
request is `vanilla`, and the class the second half of `data_type`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tempering.core.progress import say
from tempering.core.records import as_messages, content_id
from tempering.data.attacker import CATEGORIES, Category
from tempering.data.files import as_published, bundled, read_rows
from tempering.data.formats import at
from tempering.data.origin import origin

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT = ("harmful_heldout", "borderline_heldout", "dev_harmful", "dev_borderline", "dev_unseen", "safemoe_eval")
"""Bundled prompts that measure; `demo` has none of them."""
_DEMO = "pairs"
_PLAIN = "wildjailbreak"
"""The data set of the catalogue whose rows, as ours, are no longer plain requests."""
_CLASSES: dict[str, Category] = {"harmful": "harmful", "benign": "benign", "borderline": "benign"}
_KIND = re.compile(r"^(?:vanilla|adversarial)_(?=harmful$|benign$)")


class Seed(NamedTuple):
    """A plain request that attacks start from."""

    id: str
    """Of the text, however it is spaced and capitalised."""
    prompt: str
    category: Category
    source: str
    split: Split


def load_seeds(
    reference: str | Path = "demo",
    *,
    classes: Sequence[Category] = CATEGORIES,
    limit: int | None = None,
    seed: int = 42,
    valid: int = 2048,
    test: int = 4096,
) -> list[Seed]:
    """Read seeds, each text once, in an order that depends on nothing but the texts and `seed`; class after class.

    Of each class the first `test` are held out for tests and the next `valid` for validation, but at most a tenth and
    a twentieth of it; a row that says its `split` keeps it, and its class is then not split further. `limit` keeps
    the first so many of each class in each split. A text that stands in both classes is in neither.

    Raises:
        FileNotFoundError: when there is no such file or folder.
        ValueError: a row without a request or a class, by file and line; or a class without any seed.
    """
    unknown = [name for name in classes if name not in CATEGORIES]
    if unknown or not classes:
        raise ValueError(f"classes={list(classes)}: expected one or both of {', '.join(CATEGORIES)}")
    held_out = _held_out() if str(reference) == "demo" else frozenset()
    found: dict[str, Seed] = {}
    given: dict[str, Split] = {}
    conflicts: set[str] = set()
    for where, row in _rows(reference):
        prompt, category, split = _read(where, row)
        key = normalised(prompt)
        if key in held_out:
            continue
        if key in found and found[key].category != category:
            conflicts.add(key)
        found.setdefault(key, Seed(content_id("seed", key), prompt, category, where, "train"))
        if split is not None:
            given.setdefault(key, split)
    if conflicts:
        say(f"{reference}: {len(conflicts)} texts stand in both classes and are left out")
    seeds: list[Seed] = []
    for category in classes:
        keys = [key for key in found if found[key].category == category and key not in conflicts]
        if not keys:
            others = [name for name in CATEGORIES if any(s.category == name for s in found.values())]
            remedy = f"give classes=[{', '.join(others)}], or add some" if others else "add some"
            raise ValueError(f"{reference}: no {category} seed in it; {remedy}")
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest())
        seeds += _first(_split([found[key] for key in keys], [given.get(key) for key in keys], valid, test), limit)
    return seeds


def seeds_hash(seeds: Sequence[Seed]) -> str:
    """Return the SHA-256 of a set of seeds, whatever their order: of their ids and classes."""
    rows = sorted(f"{seed.id} {seed.category}" for seed in seeds)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def normalised(text: str) -> str:
    r"""Return what texts are told apart by: NFKC, case folded, single spaces.

    >>> normalised("  How do\tI … ") == normalised("how DO I ...")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _rows(reference: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if str(reference) == "demo":
        return read_rows(bundled(_DEMO))
    found = origin(reference)
    return as_published(reference) if found and found.dataset.name == _PLAIN else read_rows(reference)


def _held_out() -> frozenset[str]:
    return frozenset(normalised(row["prompt"]) for name in HELD_OUT for _, row in read_rows(bundled(name)))


def _read(where: str, row: Mapping[str, Any]) -> tuple[str, Category, Split | None]:
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("vanilla")
    if prompt is None:
        raise ValueError(f"{at(where)}: no 'prompt'; found {', '.join(map(str, row)) or 'no columns'}")
    try:
        turns = as_messages(prompt)
    except ValueError as error:
        raise ValueError(f"{at(where)}: {error}") from None
    text = turns[0]["content"].strip()
    if len(turns) > 1 or not text:
        raise ValueError(f"{at(where)}: a seed is one request, got {len(turns)} turns; fix the row or take it out")
    split = row.get("split")
    return text, _class(where, row), split if split in SPLITS else None


def _class(where: str, row: Mapping[str, Any]) -> Category:
    told = [row.get(name) for name in ("category", "data_type", "label")]
    for value in told:
        if isinstance(value, str):
            found = _CLASSES.get(_KIND.sub("", value.strip().lower()))
            if found is not None:
                return found
    shown = next((value for value in told if value is not None), None)
    raise ValueError(f"{at(where)}: category {shown!r}; expected harmful (what a model should turn aside) or benign")


def _split(seeds: list[Seed], given: Sequence[Split | None], valid: int, test: int) -> list[Seed]:
    if any(given):
        return [seed._replace(split=split or "train") for seed, split in zip(seeds, given, strict=True)]
    n_test, n_valid = min(test, round(len(seeds) / 10)), min(valid, round(len(seeds) / 20))
    return [
        seed._replace(split="test" if place < n_test else "valid" if place < n_test + n_valid else "train")
        for place, seed in enumerate(seeds)
    ]


def _first(seeds: Sequence[Seed], limit: int | None) -> list[Seed]:
    taken: Counter[Split] = Counter()
    kept = []
    for seed in seeds:
        taken[seed.split] += 1
        if limit is None or taken[seed.split] <= limit:
            kept.append(seed)
    return kept
