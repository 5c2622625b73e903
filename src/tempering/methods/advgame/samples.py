"""What players wrote, on disk before it is used, and found again by the weights that wrote it and its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tempering.core.records import Finish


class Sample(NamedTuple):
    """What a player wrote."""

    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[float, ...] = ()
    """In nats, where they are kept."""


class Request(NamedTuple):
    """What a player is asked, where in the game."""

    prompt: str
    rng_key: str
    facts: Mapping[str, Any]
    """What `data/rollouts.jsonl` says of it beside the sample."""


class RolloutLog:
    """Samples by (policy version, rng key), in an append-only file; a torn last line is cut on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[tuple[str, str], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
        for line in content[:end].splitlines():
            row = json.loads(line.decode("utf-8", "surrogatepass"))
            key = (row["policy_version"], row["rng_key"])
            logprobs = tuple(row.get("logprobs", ()))
            self._kept[key] = Sample(tuple(row["token_ids"]), row["text"], row["finish"], logprobs)

    def get(self, version: str, rng_key: str) -> Sample | None:
        """Return a sample that was written before."""
        return self._kept.get((version, rng_key))

    def put(self, version: str, samples: Sequence[tuple[Request, Sample]]) -> None:
        """Write samples in one piece, and return once they are on disk; those that are there stay as they are."""
        new = [(r, s) for r, s in samples if (version, r.rng_key) not in self._kept]
        rows = [
            {**r.facts, "policy_version": version, "rng_key": r.rng_key, "token_ids": list(s.token_ids),
             "text": s.text, "finish": s.finish, **({"logprobs": list(s.logprobs)} if s.logprobs else {})}
            for r, s in new
        ]  # fmt: skip
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(lines.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
        self._kept |= {(version, r.rng_key): s for r, s in new}
