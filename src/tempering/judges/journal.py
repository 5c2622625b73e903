"""The journal of judgements: one line of JSON each, on disk before it is used, never asked for twice.

Used by `judges.game`; refuses to know what is judged. A run that is resumed finds in it what the run before was told.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """What a judgement came to: its scores, or why there are none."""

    scores: tuple[float, ...] | None
    reason: str | None


class Journal:
    """Judgements by key, in an append-only file.

    A last line that a killed process left half-written is cut off on opening. A row with `is_final` false (no reply
    came: the judge could not be reached, or took too long) is on record, but is not found again.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the journal, or begin it.

        Raises:
            ValueError: a line, other than a last one without its end, is not one of ours.
        """
        self.path = Path(path)
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()
        if self.path.exists():
            self._read()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """How long the file is."""
        return self.path.stat().st_size if self.path.exists() else 0

    def get(self, key: str) -> Kept | None:
        """Return what was judged under a key, or nothing."""
        return self._kept.get(key)

    def put(self, *rows: Mapping[str, Any]) -> None:
        """Write judgements, and return once they are on disk; each has `key`, `scores` and `reason`."""
        if not rows:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self._lock:
            with self.path.open("ab") as file:
                file.write(lines.encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
            for row in rows:
                self._keep(row)

    def _read(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
        for number, line in enumerate(content[:end].split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                self._keep(json.loads(line.decode("utf-8", "surrogatepass")))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} line {number}: not a judgement ({type(error).__name__}); take the line out, "
                    "and it is asked for again"
                ) from None

    def _keep(self, row: Mapping[str, Any]) -> None:
        if row.get("is_final", True):
            scores = row["scores"]
            self._kept[row["key"]] = Kept(None if scores is None else tuple(map(float, scores)), row["reason"])
