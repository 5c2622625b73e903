"""The formats of data files: each reader streams rows with their place, and says what it cannot read.

JSON lines (`.jsonl`, `.ndjson`), one JSON list (`.json`), CSV or tab-separated with a header, Parquet. A row
that cannot be read is a value with its reason; a file that cannot be read is an exception.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_LINE_BYTES = 64 << 20
LIST_CELLS = ("prompt", "messages", "chosen", "rejected", "completion", "choices", "answers")
BOOLEAN_CELLS = ("label", "refused", "harmful")


class Scanned(NamedTuple):
    """One row as found: its place, and either the row or why it could not be read."""

    where: str
    row: dict[str, Any] | None
    problem: str | None = None
    is_left_out: bool = False
    """Whether the row is left out on purpose, for the reason in `problem`: counted, never an error."""


def at(where: str) -> str:
    """Say a place in words.

    >>> at("pairs.jsonl:17"), at("pairs.parquet:17"), at("pairs.jsonl")
    ('pairs.jsonl line 17', 'pairs.parquet row 17', 'pairs.jsonl')
    """
    name, _, number = where.rpartition(":")
    if not name or not number.isdigit():
        return where
    unit = "line" if name.endswith((".jsonl", ".ndjson", ".csv", ".tsv")) else "row"
    return f"{name} {unit} {number}"


def _jsonl_rows(path: Path, name: str) -> Iterator[Scanned]:
    with path.open("rb") as file:
        for number, text, problem in _lines(file):
            where = f"{name}:{number}"
            if problem is not None:
                yield Scanned(where, None, problem)
            elif text.strip():
                yield _json_row(where, text)


def _json_row(where: str, text: str) -> Scanned:
    try:
        value = parse_json(text)
    except ValueError as error:
        return Scanned(where, None, str(error))
    if isinstance(value, dict):
        return Scanned(where, value)
    hint = "; a file that is one JSON list must be called .json" if isinstance(value, list) else ""
    return Scanned(where, None, f"expected a JSON object, got {type(value).__name__}{hint}")


def parse_json(text: str) -> Any:
    """Read one JSON value, more strictly than Python does.

    Raises:
        ValueError: when it is cut off or no JSON, holds NaN or an infinity, or half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        problem = "it is cut off" if end else error.msg
        raise ValueError(f"not valid JSON: {problem} ({place})") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair (such as \\ud800), which is no text") from None
    return value


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON; use null, or leave the field out")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _json_rows(path: Path, name: str) -> Iterator[Scanned]:
    """Read one JSON list of objects; what does not begin with `[` is read as JSON lines."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path, name)
        return
    try:
        rows = parse_json(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {_not_utf8(error)}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for number, row in enumerate(rows, 1):
        where = f"{name}:{number}"
        is_object = isinstance(row, dict)
        problem = None if is_object else f"expected a JSON object, got {type(row).__name__}"
        yield Scanned(where, row if is_object else None, problem)


def _csv_rows(path: Path, name: str) -> Iterator[Scanned]:
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("rb") as file:
        reader = csv.reader(_csv_lines(file, name), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{name} line 1: a column name occurs twice in {', '.join(header)}")
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{at(where)}: not valid CSV ({error})") from None
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                yield Scanned(where, None, f"{len(cells)} cells, but the header has {len(header)}")
            else:
                yield Scanned(where, {k: _cell(k, v) for k, v in zip(header, cells, strict=True)})


def _csv_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, text, problem in _lines(file):
        if problem is not None:
            raise ValueError(f"{name} line {number}: {problem}")
        yield text


def _cell(column: str, text: str) -> Any:
    """Read a CSV cell: empty is missing; conversational columns may hold JSON lists."""
    if not text:
        return None
    if column in LIST_CELLS and text.lstrip().startswith("["):
        try:
            value = parse_json(text)
        except ValueError:
            return text  # a text may begin with a bracket
        is_turns = value and all(isinstance(turn, dict) and "role" in turn for turn in value)
        return value if is_turns or column in ("choices", "answers") else text
    if column in BOOLEAN_CELLS and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _lines(file: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
    """Stream (number, text, problem) of a binary file, no line longer than `MAX_LINE_BYTES` held at once."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield number, "", f"longer than {MAX_LINE_BYTES >> 20} MiB; expected one record per line"
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), None
        except UnicodeDecodeError as error:
            yield number, "", _not_utf8(error)
            if _is_utf16(line):
                return  # no other line could be read either


def _not_utf8(error: UnicodeDecodeError) -> str:
    utf16 = "; it looks like UTF-16" if _is_utf16(error.object) else ""
    return f"not UTF-8 (byte {error.start + 1}){utf16}; save it as UTF-8"


def _is_utf16(start: bytes) -> bool:
    return start[:2] in (b"\xff\xfe", b"\xfe\xff")


def _parquet_rows(path: Path, name: str) -> Iterator[Scanned]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(batches, 1):
                yield Scanned(f"{name}:{number}", without_nan(row))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Read NaN, which is how tables say "missing", as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


READERS: dict[str, Callable[[Path, str], Iterator[Scanned]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
