"""Where the name of a public data set leads: to the user's own copy, else to the pinned version on the Hub.

`NAME` reads a file or folder `NAME` (`.jsonl`, `.csv`, ...) in the folder that the environment variable
`TEMPERING_DATA` names, where there is one, and else the Hub; `NAME:PATH` reads that copy; `NAME@REVISION` another
version than the pinned one. A path, which has a suffix or a slash, is never such a name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tempering.data.catalog import CATALOG, Dataset, nearest
from tempering.data.formats import READERS

VARIABLE = "TEMPERING_DATA"
SPELLING = re.compile(r"(?P<name>[A-Za-z][\w-]*)(@(?P<revision>[\w./-]+))?(:(?P<copy>.+))?")


class Origin(NamedTuple):
    """A data set of the catalogue, and which of its copies is read."""

    dataset: Dataset
    revision: str | None
    """Of the Hub's copy; `None`: the newest."""
    copy: str | None
    """Path of the user's own copy, which is read instead."""

    @property
    def is_unpinned(self) -> bool:
        """Whether what is read may be another version tomorrow."""
        return self.copy is None and self.revision is None and not self.dataset.own_copy_only

    @property
    def where(self) -> str:
        """What is read, for people and provenance."""
        d = self.dataset
        if self.copy is not None:
            return self.copy
        if d.own_copy_only:
            return "a copy of your own, which is not here"
        if d.files:
            return ", ".join(self.addresses)
        return f"{d.hub}@{self.revision}" if self.revision else f"{d.hub} (not pinned)"

    @property
    def addresses(self) -> list[str]:
        """The authors' own files at this revision."""
        return [address.format(revision=self.revision) for address in self.dataset.files]

    @property
    def remedy(self) -> str:
        """What to do where it cannot be loaded."""
        name = self.dataset.name
        own = f"give your own copy as {name}:PATH, or as {name}.jsonl (.csv, .parquet, ...) in the folder {VARIABLE}"
        if self.dataset.is_gated:
            own = f"it is gated: accept its terms at {self.dataset.page} and log in with `hf auth login`, or {own}"
        return own


def origin(source: str | Path) -> Origin | None:
    """Find out whether a source names a data set of the catalogue, and which copy it leads to.

    Raises:
        FileNotFoundError: the copy, or the folder of copies, is not there.
        ValueError: the name is that of a file or folder here too, or there are several copies.
    """
    match = SPELLING.fullmatch(str(source)) if isinstance(source, str) else None
    if match is None or match["name"] not in CATALOG:
        return None
    dataset, name, copy = CATALOG[match["name"]], match["name"], match["copy"]
    if copy is not None:
        if match["revision"]:
            raise ValueError(f"{source}: a copy of your own has no revision; give {name}:PATH or {name}@REVISION")
        if _exists(copy):
            return Origin(dataset, None, copy)
        raise FileNotFoundError(
            f"{source}: no such file or folder: {copy}; {name}:PATH gives your own copy of {name}"
        )
    if Path(name).exists():
        what = "folder" if Path(name).is_dir() else "file"
        raise ValueError(
            f"{name} is a data set of the catalogue, and a {what} here has that name too; "
            f"write ./{name} for the {what}, or {name}:PATH for your own copy of the data set"
        )
    found = None if match["revision"] else own_copy(name)
    if found is not None:
        return Origin(dataset, None, str(found))
    return Origin(dataset, match["revision"] or dataset.revision, None)


def own_copy(name: str) -> Path | None:
    """Find the user's copy of a data set in the folder that `TEMPERING_DATA` names.

    Raises:
        FileNotFoundError: the variable names no folder.
        ValueError: the folder holds more than one copy.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{VARIABLE}={named}: no such folder; it should hold your copies of public data sets")
    copies = [path for path in (folder / f"{name}{suffix}" for suffix in READERS) if path.is_file()]
    copies += [folder / name] if (folder / name).is_dir() else []
    if len(copies) > 1:
        found = " and ".join(path.name for path in copies)
        raise ValueError(f"{VARIABLE}={named} holds {found}; keep one, or name it as {name}:PATH")
    return copies[0] if copies else None


def lookup(source: str) -> Origin:
    """Return what a name leads to.

    Raises:
        ValueError: no data set has this name; the nearest is suggested.
    """
    found = origin(source)
    if found is None:
        raise ValueError(f"no data set called {source!r} (`temper data list` names all){suggestion(source)}")
    return found


def suggestion(source: str | Path) -> str:
    """Say which data set was probably meant; empty where none comes near.

    >>> suggestion("advbnech")
    "; did you mean the data set 'advbench'?"
    """
    match = SPELLING.fullmatch(str(source))
    near = nearest(match["name"]) if match else None
    return f"; did you mean the data set {near!r}?" if near else ""


def _exists(copy: str) -> bool:
    """Whether there is such a file or folder; `FOLDER:SPLIT` names a folder."""
    path = Path(copy).expanduser()
    return path.exists() or Path(str(path).rpartition(":")[0] or "-").is_dir()
