"""Meter: how many requests may be sent, how fast, and at what price together; asked before each one is sent.

Used by `EndpointSampler` and by evals that must stay within a cap; refuses to know what is asked, and of whom.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from tempering.core.ledger import SPENT


class Purse:
    """What several endpoints may cost together; the most that a request may cost is set aside before it is sent.

    What stands in a ledger's file when it joins counts as spent, once a file.
    """

    def __init__(self, max_cost: float | None = None) -> None:
        self.max_cost, self.spent = max_cost, 0.0
        self._reserved = 0.0
        self._under_way = 0
        self._joined: set[str] = set()
        self._refusal: str | None = None
        self._settled = threading.Condition()

    def join(self, name: str, spent: float) -> None:
        """Count what was spent before, by an earlier process for instance, under a name that counts once."""
        with self._settled:
            if name not in self._joined:
                self._joined.add(name)
                self.spent += spent

    def reserve(self, cost: float) -> str | None:
        """Set money aside for a request, or say why there is none left; waits where one under way may cost less."""
        with self._settled:
            while self._refusal is None and (reason := self._over(cost)):
                if not self._under_way:
                    self._refusal = reason
                else:
                    self._settled.wait()
            if self._refusal is None:
                self._reserved += cost
                self._under_way += 1
            return self._refusal

    def settle(self, reserved: float, used: float) -> None:
        """Put what a request did cost in place of what was set aside."""
        with self._settled:
            self._reserved -= reserved
            self._under_way -= 1
            self.spent += used
            self._settled.notify_all()

    def _over(self, cost: float) -> str | None:
        reserved = self._reserved if self._under_way else 0.0  # no dust of sums that should have come to nothing
        if self.max_cost is None or self.spent + reserved + cost <= self.max_cost:
            return None
        return (
            f"{SPENT}: {self.spent:.4g} of max_cost={self.max_cost:g} is spent, one more request may cost {cost:.4g}"
        )


class Meter:
    """Counts requests, retries among them, against a cap, and keeps them apart in time.

    With a file, each request has a line in it before it is sent: neither a kill nor `--resume` loses one, so the cap
    holds over all processes that ever asked, and so does the pace.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        max_requests: int | None = None,
        per_minute: float | None = None,
        purse: Purse | None = None,
    ) -> None:
        self.max_requests, self.per_minute, self.purse = max_requests, per_minute, purse or Purse()
        self._file = file
        self._lock = threading.Lock()
        self.count, self._next = _read(file)
        self._next += self._pause_s if self.count else 0.0

    @property
    def _pause_s(self) -> float:
        return 60.0 / self.per_minute if self.per_minute else 0.0

    def take(self, cost: float = 0.0, stop: threading.Event | None = None) -> str | None:
        """Count a request that is about to be sent, once it is its turn; or say why it must not be.

        `stop` ends the wait, and the request with it.
        """
        if refusal := self.purse.reserve(cost):
            return refusal
        with self._lock:
            if self.max_requests is not None and self.count >= self.max_requests:
                self.purse.settle(cost, 0.0)
                return f"{SPENT}: {self.count} of max_queries={self.max_requests} requests are made"
            self.count += 1
            now = time.time()
            # A clock that was set back must not hold requests up for longer than one pause.
            turn = max(now, min(self._next, now + self._pause_s * self.count))
            self._next = turn + self._pause_s
            self._write(turn)
        if turn > now and (stop or threading.Event()).wait(turn - now):
            self.purse.settle(cost, 0.0)
            return "interrupted"
        return None

    def _write(self, turn: float) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(json.dumps({"request": self.count, "at": round(turn, 3)}).encode() + b"\n")


def _read(file: Path | None) -> tuple[int, float]:
    """Return how many requests a file counts, and when the last one was; a torn last line is a request."""
    if file is None or not file.is_file():
        return 0, 0.0
    lines = file.read_bytes().split(b"\n")
    torn, whole = lines[-1], [line for line in lines[:-1] if line]
    if torn:  # its request may have been sent
        with file.open("ab") as end:
            end.write(b"\n")
        return len(whole) + 1, time.time()
    try:
        return len(whole), float(json.loads(whole[-1])["at"]) if whole else 0.0
    except (ValueError, KeyError, TypeError):
        return len(whole), time.time()
