"""Answer many requests in one decoding: each joins when there is room and leaves when it has ended.

Requests of any settings share every pass. Used by the engine; refuses to know about threads and clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from tempering.core.decoding import Decoding, Row, TokenScore
from tempering.core.think import CLOSE, OPEN, decode
from tempering.serving.jobs import Choice, Ended, Event, Job, Wrote
from tempering.serving.target import Target
from tempering.serving.text import Writer

PREFILL_TOKENS = 4096
"""Tokens of prompts, padding included, that are read at a time: meanwhile no one else's answer goes on."""


class Stepping:
    """The answers of a target that are under way, token by token."""

    def __init__(self, target: Target, batch_rows: int, batch_tokens: int) -> None:
        assert target.local is not None
        self.target, self.batch_rows, self.batch_tokens = target, batch_rows, batch_tokens
        self.local = target.local
        self.decoding = Decoding(target.local)
        self.waiting: deque[Choice] = deque()
        self.live: list[Choice] = []
        self._joining: list[Choice] = []
        """Those whose prompts are being read."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.live

    def take(self, job: Job) -> None:
        """Let the answers of a job wait for room."""
        self.waiting += job.choices

    def turn(self) -> None:
        """Draw one token of every answer under way; those that wait join where there is room."""
        for choice in self.live:
            if choice.job.is_over and choice.row is not None:
                choice.row.is_done = True
        self.live = _unfinished(self.live)
        if any(choice.job.is_over for choice in self.waiting):
            self.waiting = deque(choice for choice in self.waiting if not choice.job.is_over)
        if self.live:
            self.decoding.step()
            self._tell(self.live)
            self.live = _unfinished(self.live)
        self.decoding.drop(at_once=bool(self.waiting))
        if fresh := self._admitted():
            self._joining = fresh
            self.decoding.add([choice.row for choice in fresh if choice.row is not None])
            self._tell(fresh)
            self._joining = []
            self.live += _unfinished(fresh)
        if not self.live:
            self.decoding.drop()

    def abandon(self) -> list[Job]:
        """Forget what failed: those whose prompts were being read, or else everything.

        Returns the jobs that this leaves without an answer; they have to be told, which ends the rest of them.
        """
        lost, self._joining = self._joining, []
        for choice in lost:
            if choice.row is not None:
                choice.row.is_done = True
        if not lost or not self.decoding.is_whole:
            lost = [*lost, *self.live, *self.waiting]
            self.live, self.waiting = [], deque()
            self.decoding = Decoding(self.local)
        return list({id(choice.job): choice.job for choice in lost}.values())

    def _admitted(self) -> list[Choice]:
        """Take those of the waiting, the first first, that there is room for."""
        fresh: list[Choice] = []
        if not self.decoding.can_join:
            return fresh
        longest = max((_room(row) for row in self.decoding.rows), default=0)
        width = 0
        while self.waiting and len(self.decoding.rows) + len(fresh) < self.batch_rows:
            choice = self.waiting[0]
            row = self._row(choice)
            longest, width = max(longest, _room(row)), max(width, len(row.ids))
            rows = len(self.decoding.rows) + len(fresh) + 1
            if rows > 1 and rows * longest > self.batch_tokens:
                break
            if fresh and (len(fresh) + 1) * width > PREFILL_TOKENS:
                break
            choice.row, choice.writer = row, self._writer(choice)
            fresh.append(self.waiting.popleft())
        return fresh

    def _row(self, choice: Choice) -> Row:
        ask = choice.job.ask
        return Row(
            ids=choice.ids, key=(ask.seed, choice.prompt.id, choice.sample), temperature=ask.temperature,
            max_new_tokens=ask.max_new_tokens + self.target.think_tokens, top_p=ask.top_p,
            top_logprobs=ask.top_logprobs,
        )  # fmt: skip

    def _writer(self, choice: Choice) -> Writer:
        ask, tokenizer = choice.job.ask, self.local.policy.tokenizer
        if self.target.think is None:
            return Writer(lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)), ask.stops)
        begun = choice.prompt.prefill
        opened = OPEN in begun and CLOSE not in begun
        return Writer(
            lambda ids: decode(tokenizer, ids), ask.stops, thinks=not begun, most=ask.max_new_tokens, buffers=opened
        )

    def _tell(self, choices: Sequence[Choice]) -> None:
        """Read the newest token of each answer, and tell the clients what it brought."""
        told: dict[int, tuple[Job, list[Event]]] = {}
        for choice in choices:
            events = self._events(choice)
            if events:
                told.setdefault(id(choice.job), (choice.job, []))[1].extend(events)
        for job, events in told.values():
            job.tell(events)

    def _events(self, choice: Choice) -> list[Event]:
        row, writer = choice.row, choice.writer
        assert row is not None and writer is not None
        content = reasoning = ""
        while choice.read < len(row.tokens) and not writer.is_over:
            token = row.tokens[choice.read]
            choice.read += 1
            if token in self.decoding.ends:
                break
            piece = writer.push(token)
            content, reasoning = content + piece.content, reasoning + piece.reasoning
        row.is_done = row.is_done or writer.is_over
        if not row.is_done:
            wrote = Wrote(choice.index, content, reasoning, self._scores(choice, writer.answer.sent))
            return [wrote] if content or reasoning else []
        completion = self.local.completion_of(choice.prompt, choice.sample, row.tokens, choice.job.ask.seed)
        if self.target.think is not None:
            completion = self.target.think.split(choice.prompt, completion, choice.job.ask.max_new_tokens)
        thought = completion.thought
        last = writer.finish(completion.text, thought.text if thought else "")
        upto = writer.answer.sent if writer.is_stopped else None
        wrote = Wrote(
            choice.index, content + last.content, reasoning + last.reasoning, self._scores(choice, upto)
        )  # fmt: skip
        tokens = len(completion.token_ids) if not writer.is_stopped else len(row.tokens)
        ended = Ended(
            choice.index, "stop" if writer.is_stopped else completion.finish, tokens,
            _reasoning_tokens(tokens, thought.spans) if thought else 0,
        )  # fmt: skip
        return [wrote, ended] if wrote.content or wrote.reasoning or wrote.scores else [ended]

    def _scores(self, choice: Choice, upto: int | None) -> list[TokenScore]:
        """Scores that were not sent yet of tokens that begin before `upto` characters of the answer, or of all."""
        row, writer = choice.row, choice.writer
        assert row is not None and writer is not None
        if row.top_logprobs is None:
            return []
        offsets = writer.offsets  # a token that ends the answer has none
        end = len(offsets) if upto is None else sum(offset < upto for offset in offsets)
        found = row.scores[choice.scored : end]
        choice.scored = max(choice.scored, end)
        return found


def _unfinished(choices: Sequence[Choice]) -> list[Choice]:
    return [choice for choice in choices if choice.row is not None and not choice.row.is_done]


def _room(row: Row) -> int:
    return len(row.ids) + row.max_new_tokens


def _reasoning_tokens(tokens: int, spans: Mapping[str, tuple[int, int]]) -> int:
    """Tokens before the answer, the closing tag among them."""
    return spans["tag"][1] if "tag" in spans else tokens
