"""What is told about a data source: to people by `temper data list` and `show`, and to provenance and model cards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tempering.core.run import file_hash
from tempering.data.catalog import DATASETS, PURPOSES, Dataset
from tempering.data.files import DEMO_FILES, read_rows, training_file
from tempering.data.origin import Origin, lookup, origin

EXAMPLES = 2


def listed() -> list[dict[str, Any]]:
    """Return the catalogue as rows, grouped by purpose."""
    return [_facts(d) for purpose in PURPOSES for d in DATASETS if d.purpose == purpose]


def described(source: str) -> dict[str, Any]:
    """Return all that is known about one data set; with the user's own copy, its first rows as they are used.

    Raises:
        ValueError: no data set has this name, or its copy cannot be read.
        FileNotFoundError: the copy is not there.
    """
    found = lookup(source)
    dataset = found.dataset
    facts = _facts(dataset) | {
        "page": dataset.page,
        "config": dataset.config,
        "split": dataset.split,
        "revision": found.revision,
        "version": _version(found),
        "load_options": dict(dataset.options),
        "reads": found.where,
        "own_copy": found.copy,
        "own_copy_only": dataset.own_copy_only or None,
        "note": dataset.note or None,
    }
    if found.copy is not None:
        facts["examples"] = [row for _, row in islice(read_rows(source), EXAMPLES)]
    return facts


def _version(found: Origin) -> str:
    if found.copy is not None or found.dataset.own_copy_only:
        return "your own copy"
    name = found.dataset.name
    return found.revision or f"not pinned: the newest version is read; name one with {name}@REVISION"


def _facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "purpose": dataset.purpose,
        "what": dataset.what,
        "kind": dataset.kind,
        "hub": dataset.hub,
        "rows": dataset.rows,
        "licence": dataset.licence,
        "non_commercial": dataset.is_non_commercial,
        "gated": dataset.is_gated,
    }


def sha256_of(source: str | Path) -> str | None:
    """Hash the file that a source leads to, if it is one."""
    found = origin(source)
    path = Path(found.copy or "") if found else Path(source)
    return file_hash(path) if path.is_file() else None


def inputs_of(train: str) -> dict[str, str]:
    """Say what `data.train` read, for provenance: a file with its SHA-256, or a data set's place and version."""
    source = training_file(train)
    found = origin(source)
    sha256 = sha256_of(source)
    if found is None:
        return {str(source): sha256} if sha256 else {}
    return {found.where: sha256 or (f"revision {found.revision}" if found.revision else "not pinned")}


def licences_of(source: str | Path, start: str | None = None) -> dict[str, str]:
    """Return data set -> licence, as far as they are known, of a source and of what the start model was trained on.

    A file in a run folder or in its `data/`, such as what `temper data safe-set` writes, has the run's licences.
    """
    licences = _licences_of_run(Path(start)) if start else {}
    found = origin(source)
    if found is not None:
        return {**licences, found.dataset.name: found.dataset.terms}
    if source in DEMO_FILES:
        return {**licences, str(source): "Apache-2.0"}
    folder = Path(source).parent
    return {**licences, **(_licences_of_run(folder) or _licences_of_run(folder.parent))}


def _licences_of_run(root: Path) -> dict[str, str]:
    """Read the licences that a run recorded; anything else that is in the folder is not ours to interpret."""
    file = root / "provenance.json"
    if not (root / "config.yaml").is_file() or not file.is_file():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8")).get("data_licences")
    if isinstance(recorded, Mapping):
        return {str(name): str(terms) for name, terms in recorded.items()}
    return {f"training data of {root.name}": ", ".join(map(str, recorded))} if recorded else {}
