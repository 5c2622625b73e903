"""Rows of a data source, one at a time, each with the place it stands at: files, folders, public data sets.

A source is a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a folder of such files, a name in the catalogue
(`origin.py`), or a Hub dataset id (`org/name[@revision][:[config:]split]`). `read_rows` streams plain dicts;
`read_records` turns them into records and refuses, or counts, what it cannot read and what it has already seen.

>>> where, row = next(read_rows(bundled("pairs")))
>>> where
'pairs.jsonl:1'
>>> sorted(row)
['category', 'chosen', 'label', 'prompt', 'rejected']
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.markup import escape

from tempering.core.progress import say
from tempering.core.records import ParsedRows
from tempering.data.catalog_rows import LeftOut
from tempering.data.fetch import fetched
from tempering.data.formats import READERS, Scanned, at, without_nan
from tempering.data.origin import Origin, origin, suggestion

BUNDLED = (
    "pairs",
    "pairs_smollm2",
    "deliberation",
    "harmful_heldout",
    "borderline_heldout",
    "capability",
    "openings",
    "templates",
    "insults",
    "insult_continuations",
    "identity_mentions",
    "neutral",
    "dev_harmful",
    "dev_unseen",
    "dev_borderline",
    "safemoe_prompts",
    "safemoe_answers",
    "safemoe_answers_other",
    "safemoe_benign",
    "safemoe_eval",
    "dev_informative",
    "fictional_facts",
)
DEMO_FILES = {
    "demo": "pairs",
    "demo_smollm2": "pairs_smollm2",
    "demo_deliberation": "deliberation",
    "demo_safemoe_prompts": "safemoe_prompts",
    "demo_safemoe_answers": "safemoe_answers",
    "demo_safemoe_answers_other": "safemoe_answers_other",
    "demo_safemoe_benign": "safemoe_benign",
    "demo_safemoe_eval": "safemoe_eval",
    "demo_facts": "fictional_facts",
}
OnTrouble = Literal["error", "drop"]
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.:-]+))?")
SAID: set[str] = set()
"""The data sets of which this process has said terms and version already."""
SPLITS = re.compile(r"(?:^|[._/-])(train|test|validation|valid|val|dev|eval)(?=$|[._/-])")


class Repeat(NamedTuple):
    """Why a record is not new."""

    problem: str
    is_content: bool
    """Whether an earlier row says the same, rather than something else under the same id."""


def bundled(name: str) -> Path:
    """Return the path of an embedded demo file, `pairs` for instance.

    Raises:
        ValueError: when there is none of this name.
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled data called {name!r}; expected one of {', '.join(BUNDLED)}")
    return Path(str(importlib.resources.files("tempering.data") / "demo" / f"{name}.jsonl"))


def training_file(train: str) -> str | Path:
    """Where `data.train` leads: a bundled file for `demo`, `demo_smollm2` and their like, else what was given.

    `demo_deliberation` holds requests with reasoning that names a policy, and answers. `demo_smollm2` holds the same
    prompts as `demo`, with smollm2's own answers to the harmless ones. `demo_safemoe_*` are for `safemoe`: requests
    of six domains, safe-informative answers to those of two of them, and harmless exchanges.
    """
    return bundled(DEMO_FILES[train]) if train in DEMO_FILES else train


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream `("file.jsonl:17", row)`; the number counts lines of text files, rows of all others.

    Rows that the catalogue leaves out are not there.

    Raises:
        FileNotFoundError: when there is no such file or folder.
        ValueError: when the source is empty, is no data, or a row cannot be read (file and line are named).
    """
    for where, row, problem, is_left_out in scan_rows(source):
        if row is not None:
            yield where, row
        elif not is_left_out:
            raise ValueError(f"{at(where)}: {problem}")


def as_published(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream rows as `read_rows` does, but those of a data set of the catalogue with the columns of its authors.

    Raises:
        FileNotFoundError, ValueError: as for `read_rows`.
    """
    found = origin(source)
    if found is None:
        yield from read_rows(source)
        return
    _say_terms(found)
    for where, row, problem, _ in _plain_rows(found.copy) if found.copy is not None else _pinned_rows(found):
        if row is None:
            raise ValueError(f"{at(where)}: {problem}")
        yield where, row


def read_records(
    source: str | Path,
    parse: Callable[[dict[str, Any]], Any],
    *,
    limit: int | None = None,
    invalid: OnTrouble = "error",
    repeats: OnTrouble | None = None,
    what: str = "row",
    remedy: str = "set data.invalid=drop",
) -> ParsedRows:
    """Parse a source into records with `parse` (`records.pair_from_row`, for instance).

    A row that cannot be read, and one whose id or whose content an earlier row has, is an error, or with
    `invalid="drop"` left out and counted by reason. `repeats` is the same for repeated content alone (by
    default what `invalid` is, and for a data set of the catalogue, which nobody can mend, "drop"). An id that
    stands for two contents is never merely a repeat. What the catalogue leaves out is counted too. `limit`
    keeps the first records and reads no further.

    Raises:
        FileNotFoundError: when there is no such file or folder.
        ValueError: naming file and line of the first bad row; or that no usable row is left.
    """
    records: list[Any] = []
    dropped: dict[str, int] = {}
    seen: dict[str, str] = {}
    repeats = repeats or ("drop" if origin(source) else invalid)
    for where, row, found, is_left_out in scan_rows(source):
        if limit is not None and len(records) >= limit:
            break
        problem, reason, policy = found, found, "drop" if is_left_out else invalid
        if row is not None:
            try:
                record = parse(row)
            except ValueError as error:
                problem = reason = str(error)
            else:
                repeat = repeated(record, where, seen)
                if repeat is None:
                    records.append(record)
                    continue
                problem, reason = repeat.problem, f"repeats an earlier {what}"
                policy = repeats if repeat.is_content else invalid
        if policy == "error":
            raise ValueError(f"{at(where)}: {problem}; fix the {what} or {remedy}")
        dropped[str(reason)] = dropped.get(str(reason), 0) + 1
    if not records and limit != 0:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise ValueError(f"{source}: no usable {what} ({reasons}); fix the file or name another")
    return ParsedRows(records, dropped)


def repeated(record: Any, where: str, seen: dict[str, str]) -> Repeat | None:
    """Say which earlier row has this record's id or its content, and remember the record in `seen`."""
    content = dataclasses.replace(record, id="").id  # the id that the record would have by its content alone
    repeat = None
    if content in seen:
        repeat = Repeat(f"has the same content as {at(seen[content])}", is_content=True)
    elif record.id in seen:
        repeat = Repeat(f"has the same id {record.id!r} as {at(seen[record.id])}", is_content=False)
    seen.setdefault(content, where)
    seen.setdefault(record.id, where)
    return repeat


def scan_rows(source: str | Path) -> Iterator[Scanned]:
    """Stream every row, readable or not.

    Raises:
        FileNotFoundError, ValueError: when the source as a whole cannot be read, or holds no row.
    """
    found = origin(source)
    stream = _catalogued_rows(found) if found else _plain_rows(source)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{source}: no rows in it; expected one JSON object per line, or one of {_kinds()}")
    yield first
    yield from stream


def _plain_rows(source: str | Path) -> Iterator[Scanned]:
    """Stream the rows of a file, a folder or a Hub dataset as they are."""
    rows = itertools.chain.from_iterable(READERS[p.suffix.lower()](p, n) for p, n in _files(source) or ())
    return rows if _is_local(source) else _hub_rows(str(source))


def _catalogued_rows(found: Origin) -> Iterator[Scanned]:
    """Stream the rows of a public data set as ours, those that are left out among them, and say its terms once."""
    dataset = found.dataset
    _say_terms(found)
    for scanned in _plain_rows(found.copy) if found.copy is not None else _pinned_rows(found):
        if scanned.row is None:
            yield scanned
            continue
        try:
            row = dataset.to_row(scanned.row)
        except (ValueError, TypeError) as error:
            yield Scanned(scanned.where, None, f"not a row of {dataset.name}: {error}")
            continue
        if isinstance(row, LeftOut):
            yield Scanned(scanned.where, None, row.reason, is_left_out=True)
        else:
            for one in row if isinstance(row, list) else [row]:
                yield Scanned(scanned.where, one)


def _say_terms(found: Origin) -> None:
    """Say the terms of a data set of the catalogue, once in a process."""
    dataset = found.dataset
    if dataset.name in SAID:
        return
    SAID.add(dataset.name)
    if dataset.is_restricted:
        say(f"{dataset.name}: {escape(dataset.terms)}; see {dataset.page}")
    if found.is_unpinned:
        say(
            f"{dataset.name}: no version is pinned, so the newest is read, which may change between two runs; "
            f"name one with {dataset.name}@REVISION"
        )


def _files(source: str | Path) -> list[tuple[Path, str]]:
    """Find the data files of a local source, each with the name to show for it."""
    path, split = _local(source)
    if not _is_local(source):
        return []
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {_kinds()}")
        return [(path, path.name)]
    files = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file()
        and p.suffix.lower() in READERS
        and not any(part.startswith((".", "_")) for part in p.relative_to(path).parts)
    ]
    # Dataset folders carry their metadata as .json beside the data.
    files = [p for p in files if p.suffix.lower() != ".json"] or files
    names = {p: p.relative_to(path).as_posix() for p in files}
    splits = {p: match[1] if (match := SPLITS.search(names[p].lower())) else None for p in files}
    if split:
        files = [p for p in files if splits[p] == split]
    if not files:
        wanted = f" of split {split!r}" if split else ""
        raise ValueError(f"{path}: no data file{wanted} in this folder; expected one of {_kinds()}")
    kinds = sorted({p.suffix.lower() for p in files})
    if len(kinds) > 1:
        raise ValueError(f"{path}: holds {' and '.join(kinds)} files; name one file, or a folder of one kind")
    found = sorted({str(splits[p]) for p in files if splits[p]})
    if len(found) > 1:
        raise ValueError(f"{path}: holds the splits {', '.join(found)}; choose one, as in {path}:{found[-1]}")
    return [(p, names[p]) for p in files]


def _local(source: str | Path) -> tuple[Path, str | None]:
    path = Path(source).expanduser()
    folder, _, split = str(path).rpartition(":")
    return (Path(folder), split) if not path.exists() and Path(folder).is_dir() and folder else (path, None)


def _is_local(source: str | Path) -> bool:
    """Whether `source` names a file or folder; a text that can only be a Hub id is not.

    Raises:
        FileNotFoundError: when it is neither.
    """
    path, text = _local(source)[0], str(source)
    if path.exists():
        return True
    is_path = isinstance(source, Path) or text.startswith(("/", ".", "~")) or path.suffix.lower() in READERS
    # `data/pear` beside an existing `data/` is a slip of the pen, not a dataset by the user `data`.
    is_path = is_path or (path.parent.is_dir() and ":" not in text)
    if is_path or not HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"{source}: no such file or folder; give a path to {_kinds()}, a data set that `temper data list` names, "
            f"or a Hub dataset id such as org/name:train{suggestion(source)}"
        )
    return False


def _kinds() -> str:
    return ", ".join(READERS)


def _hub_rows(source: str) -> Iterator[Scanned]:
    """Stream a Hub dataset that the user named by its id."""
    match = HUB_ID.fullmatch(source)
    assert match is not None
    name = match["name"]
    config, _, split = (match["split"] or "").rpartition(":")
    data = _explained(
        lambda: _load_dataset(name, config or None, split=split or None, revision=match["revision"]),
        f"{source}: no such file or folder here, and Hub dataset {name!r} could not be loaded",
        "check the spelling and the split, for a gated dataset log in with `hf auth login`, "
        "and without a network give the path of a file you downloaded",
    )
    if not split and len(data) > 1:
        splits = list(data)
        raise ValueError(f"{source}: choose one of its splits {', '.join(splits)}, as in {name}:{splits[0]}")
    rows = data if split else next(iter(data.values()))
    for number, row in enumerate(rows, 1):
        yield Scanned(f"{source}:{number}", without_nan(row))


def _pinned_rows(found: Origin) -> Iterator[Scanned]:
    """Stream the source of a data set of the catalogue, at its revision, as it is."""
    d = found.dataset
    failed = f"{d.name}: {found.where} could not be loaded"
    if d.own_copy_only:
        raise ValueError(f"{d.name}: {d.own_copy_only}; {found.remedy}")
    if d.files:
        for path in _explained(lambda: [fetched(address) for address in found.addresses], failed, found.remedy):
            yield from READERS[path.suffix](path, path.name)
        return
    data = _explained(
        lambda: _load_dataset(d.hub, d.config, split=d.split, revision=found.revision, **d.options),
        failed,
        found.remedy,
    )
    splits = data if isinstance(data, Mapping) else {"": data}
    rows = ({**row, "split": split} if split else row for split, table in splits.items() for row in table)
    for number, row in enumerate(rows, 1):
        yield Scanned(f"{d.name}:{number}", without_nan(row))


def _load_dataset(name: str, config: str | None, **settings: Any) -> Any:
    """Load tables through `datasets`, which keeps them in its cache on disk."""
    import datasets

    return datasets.load_dataset(name, config, **settings)


def _explained(load: Callable[[], Any], failed: str, remedy: str) -> Any:
    """Load something; where that fails, whatever the reason, say so in one line, with the remedy.

    Raises:
        ValueError: it failed.
    """
    try:
        return load()
    except Exception as error:  # a boundary: the libraries and their network layers raise anything
        first_line = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(f"{failed} ({type(error).__name__}: {first_line}); {remedy}") from None
