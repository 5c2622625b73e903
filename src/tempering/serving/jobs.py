"""One request at work: what it asks for, its answers under way, and the events that its client is told.

Made by the application, worked on by the engine's thread, read by the application again; refuses to know about both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tempering.core.decoding import Row, TokenScore
from tempering.core.records import Prompt
from tempering.serving.errors import ApiError
from tempering.serving.text import Writer


@dataclass(frozen=True)
class Ask:
    """What a request asks for, checked and complete."""

    prompts: tuple[Prompt, ...]
    ids: tuple[list[int], ...]
    """The tokens of each prompt; empty lists where they are not known here."""
    max_new_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    is_raw: bool = False
    """Continue texts, without the chat template."""
    candidates: bool = False
    routing: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.ids))

    @property
    def settings(self) -> tuple[Any, ...]:
        """What requests must share to be answered by one call of a sampler."""
        return (self.max_new_tokens, self.n, self.temperature, self.top_p, self.seed, self.is_raw, self.routing)


@dataclass
class Wrote:
    """Some more of an answer."""

    index: int
    content: str = ""
    reasoning: str = ""
    scores: list[TokenScore] = field(default_factory=list)


@dataclass
class Ended:
    """An answer is there in whole."""

    index: int
    finish: str
    tokens: int
    """All that were drawn for it: every candidate's, reasoning included."""
    reasoning_tokens: int = 0
    details: dict[str, Any] | None = None
    """What the method did, where that was asked for."""
    prompt_tokens: int = 0
    """Of its prompt, as an endpoint counted them."""


Event = Wrote | Ended | ApiError


@dataclass(eq=False)
class Choice:
    """One of a request's answers."""

    job: Job
    index: int
    prompt: Prompt
    ids: list[int]
    sample: int
    row: Row | None = None
    writer: Writer | None = None
    read: int = 0
    """Tokens of the row that the writer has taken."""
    scored: int = 0
    """Scores that were sent."""


class Job:
    """A request under way."""

    def __init__(self, ask: Ask, *, since: float, streams: bool = False) -> None:
        self.ask, self.streams = ask, streams
        self.choices = [
            Choice(self, p * ask.n + i, prompt, list(ids), i)
            for p, (prompt, ids) in enumerate(zip(ask.prompts, ask.ids, strict=True))
            for i in range(ask.n)
        ]
        self.open = len(self.choices)
        """Answers that have not ended."""
        self.is_cancelled = False
        """Nobody waits for it any more."""
        self.since = since
        """When the request came, by the monotonic clock."""
        self.first_s: float | None = None
        """Seconds to the first text."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._kept: list[Event] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.is_cancelled or not self.open

    def tell(self, events: Sequence[Event]) -> None:
        """Pass events on to whoever waits; from the engine's thread."""
        for event in events:
            if isinstance(event, Ended):
                self.open = max(0, self.open - 1)
            elif isinstance(event, ApiError):
                self.open = 0
            elif self.first_s is None:
                self.first_s = time.monotonic() - self.since
        self._kept += events
        if self.streams or not self.open:  # who waits for the whole is not woken for a part
            kept, self._kept = self._kept, []
            self._wake(kept)

    async def next(self, timeout_s: float) -> list[Event]:
        """Wait for events; an empty list where there are none within the time, or the job was cancelled."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout_s)
        except TimeoutError:
            return []

    def cancel(self) -> None:
        """Drop what is left of the work; from any thread."""
        self.is_cancelled = True
        self._wake([])

    def _wake(self, events: list[Event]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self.is_cancelled = True
