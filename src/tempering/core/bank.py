"""A bank of probes: one per block, with their controls and the table of what they are worth; fitted once, used again.

Used by methods whose losses move states along probe directions; refuses to know what the attribute is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tempering.core.activations import blocks
from tempering.core.policy import Policy, load_tensors, save_tensors
from tempering.core.probes import (
    Array,
    Direction,
    Fit,
    Labelled,
    Worth,
    assess,
    candidates,
    difference_of_means,
    fit,
    mean_states,
    permuted,
    random_direction,
)
from tempering.core.progress import Advance, progress
from tempering.core.run import Run, atomic_write
from tempering.core.training import Processes, Stopwatch

TENSORS, TABLE = "probes.safetensors", "probes.json"
FOLDER = "probes"
"""Where a run keeps its bank."""


@dataclass(frozen=True)
class Bank:
    """The probes of all layers that were read, and the table of what they are worth."""

    fits: dict[int, Fit]
    controls: dict[str, dict[int, Fit]]
    """`shuffled` and `diff_of_means`, by layer."""
    worth: list[Worth]
    facts: dict[str, Any]
    """What the bank was fitted on and to: model, base fingerprint, texts, their hash, names of their corpora."""

    def direction(self, kind: Direction, layer: int, seed: int) -> Array:
        """The direction of a layer, or of a control there."""
        if kind == "random":
            return random_direction(len(self.fits[layer].direction), seed, layer)
        return (self.fits if kind == "probe" else self.controls[kind])[layer].direction

    def save(self, folder: Path) -> None:
        """Write tensors and table."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for kind, fits in {"probe": self.fits, **self.controls}.items():
            for layer, found in fits.items():
                tensors[f"{kind}.{layer}.direction"] = torch.tensor(found.direction)
                tensors[f"{kind}.{layer}.bias"] = torch.tensor(found.bias, dtype=torch.float64)
        save_tensors(folder / TENSORS, tensors)
        table = {"schema": 1, **self.facts, "layers": [asdict(w) for w in self.worth]}
        atomic_write(folder / TABLE, (json.dumps(table, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Bank:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
        """
        if not (folder / TABLE).is_file():
            raise FileNotFoundError(f"{folder}: no {TABLE}; name a run that fitted probes (probes_only=true)")
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        fits: dict[str, dict[int, Fit]] = {}
        tensors = load_tensors(folder / TENSORS)
        for name in tensors:
            kind, layer, what = name.split(".")
            if what == "direction":
                bias = float(tensors[f"{kind}.{layer}.bias"])
                fits.setdefault(kind, {})[int(layer)] = Fit(tensors[name].numpy(), bias)
        worth = [Worth(**row) for row in table.pop("layers")]
        table.pop("schema")
        return cls(dict(sorted(fits.pop("probe").items())), fits, worth, table)


def make_bank(
    policy: Policy,
    rows: Sequence[Labelled],
    folder: Path,
    *,
    seed: int,
    skip_first: int,
    batch_tokens: int,
    refits: int = 5,
    permutations: int = 20,
    facts: Mapping[str, Any] | None = None,
    on_read: Advance | None = None,
    on_fitted: Advance | None = None,
) -> Bank:
    """Read the states of all blocks in one pass, then fit layer by layer; `folder` is for what is mapped into
    memory.
    """
    count = len(blocks(policy.model))
    features = mean_states(
        policy, [row.tokens for row in rows], range(count), folder,
        skip_first=skip_first, batch_tokens=batch_tokens, on_done=on_read,
    )  # fmt: skip
    is_train = np.array([row.split == "train" for row in rows])
    y = np.array([row.has_attribute for row in rows])[is_train]
    shuffled_y = permuted(y, [r.tokens.record for r in rows if r.split == "train"], np.random.default_rng([seed, 3]))
    fits: dict[int, Fit] = {}
    controls: dict[str, dict[int, Fit]] = {"shuffled": {}, "diff_of_means": {}}
    worth = []
    may = set(candidates(count))
    for layer in range(count):
        x = np.asarray(features[layer], np.float64)
        fits[layer], found = assess(
            layer, x, rows, seed=seed, refits=refits, permutations=permutations, is_candidate=layer in may
        )
        worth.append(found)
        controls["shuffled"][layer] = fit(x[is_train], shuffled_y, found.strength)
        controls["diff_of_means"][layer] = difference_of_means(x[is_train], y)
        if on_fitted:
            on_fitted()
    return Bank(fits, controls, worth, dict(facts or {}))


def require_own(bank: Bank, policy: Policy, given: str) -> None:
    """Make sure that a bank is of these weights.

    Raises:
        ValueError: it is another model's.
    """
    if any(bank.facts.get(key) != value for key, value in _weights(policy).items()):
        raise ValueError(f"probes={given}: they were fitted to other weights than those of {policy.source.reference}")


def _weights(policy: Policy) -> dict[str, Any]:
    # Adapters too: what a model was taught is not in the fingerprint of its base.
    return {
        "base_fingerprint": policy.base_fingerprint(),
        "adapters": policy.adapter_hash(policy.adapters) if policy.adapters else None,
    }


def find_bank(
    run: Run,
    given: str | None,
    policy: Policy,
    rows: Sequence[Labelled],
    processes: Processes,
    watch: Stopwatch,
    *,
    seed: int,
    skip_first: int,
    batch_tokens: int,
    refits: int = 5,
    permutations: int = 20,
    facts: Mapping[str, Any] | None = None,
) -> Bank:
    """Read the bank of another run, or fit one; it is in the run then. The main process fits, all get the same.

    Raises:
        FileNotFoundError, ValueError: there is none in `given`, or it is another model's.
    """
    own = run.root / FOLDER
    weights = _weights(policy)
    if given:
        bank = Bank.load(Path(given) / FOLDER)
        require_own(bank, policy, given)
        if processes.is_main:
            bank.save(own)
        return bank
    if processes.is_main and not (own / TABLE).is_file():
        with watch.timed("probes"), tempfile.TemporaryDirectory(dir=run.root, prefix=".states-") as folder:
            counts = {s: sum(r.split == s for r in rows) for s in ("train", "validation", "test")}
            about = {**weights, "texts": counts, **(facts or {})}
            count = len(blocks(policy.model))
            with progress("reading states", len(rows)) as on_read, progress("probes", count) as on_fitted:
                bank = make_bank(
                    policy, rows, Path(folder), seed=seed, skip_first=skip_first, batch_tokens=batch_tokens,
                    refits=refits, permutations=permutations, facts=about, on_read=on_read, on_fitted=on_fitted,
                )  # fmt: skip
        bank.save(own)
    processes.wait()
    return Bank.load(own)
