"""From the tokens of one answer to its text while they come: decoded, reasoning apart, ended at a stop text.

What goes out piece by piece is, put together, what the sampler gives as a whole. Refuses to know about requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tempering.core.think import CLOSE

Read = Callable[[Sequence[int]], str]
"""Token ids to text."""
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""


class Piece(NamedTuple):
    """Some text that nothing that follows can change."""

    content: str = ""
    reasoning: str = ""


class Incremental:
    """Decode tokens one by one: the pieces are the text of all of them, but for bytes that may yet become one."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self.ids: list[int] = []
        self._start = self._end = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        self.ids.append(token)
        # The tokens before the last piece are read again: some decoders write a token's space only behind another.
        before = self.read(self.ids[self._start : self._end])
        now = self.read(self.ids[self._start :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._start, self._end = self._end, len(self.ids)
        return now[len(before) :]


class Flow:
    """Text that goes out as it comes, up to the first of some marks; what may be the start of one waits.

    `strips`: without white space around it.

    >>> flow = Flow(["END"])
    >>> flow.push("to the E"), flow.push("NE"), flow.push("ND of it"), flow.cut
    ('to the ', 'EN', '', 9)
    """

    def __init__(self, marks: Sequence[str], *, strips: bool = False) -> None:
        self.marks, self.strips = tuple(marks), strips
        self.text, self.sent = "", 0
        self.cut: int | None = None
        """Where the first mark begins, once it is there."""

    def push(self, more: str) -> str:
        """Take some more text and return what can go out."""
        if self.cut is not None:
            return ""
        self.text += more
        if self.strips and not self.sent:
            self.text = self.text.lstrip()
        self.cut = first_of(self.marks, self.text, self.sent)
        upto = len(self.text) - self._waiting() if self.cut is None else self.cut
        if self.strips:
            upto = len(self.text[:upto].rstrip())
        out = self.text[self.sent : upto]
        self.sent = max(self.sent, upto)
        return out

    def finish(self, whole: str) -> str:
        """Return what is left of the text as the sampler has it, cut at the first mark.

        Where what went out is not how that begins, what came in pieces goes on to its own end.

        >>> flow = Flow(["END"])
        >>> flow.push("to  the E"), flow.finish("to the E")
        ('to  the ', 'E')
        """
        if not whole.startswith(self.text[: self.sent]):
            whole = self.text.rstrip() if self.strips else self.text
        at = first_of(self.marks, whole)
        whole = whole if at is None else whole[:at]
        self.cut = self.cut if at is None else at
        out = whole[self.sent :]
        self.text, self.sent = whole, len(whole)
        return out

    def _waiting(self) -> int:
        """Characters at the end that may begin a mark."""
        tail = self.text[self.sent :]
        return max(
            (k for mark in self.marks for k in range(1, min(len(mark), len(tail) + 1)) if tail.endswith(mark[:k])),
            default=0,
        )


class Writer:
    """Write one answer: tokens in, pieces out.

    `thinks`: what comes before `</think>` is reasoning, and `most` tokens behind it are the longest answer.
    `buffers`: nothing goes out before the end.
    """

    def __init__(
        self, read: Read, stops: Sequence[str], *, thinks: bool = False, most: int = 0, buffers: bool = False
    ) -> None:
        self.reader, self.buffers = Incremental(read), buffers
        self.reasoning = Flow([CLOSE], strips=True) if thinks else None
        self.answer = Flow(stops, strips=thinks)
        self.offsets: list[int] = []
        """Characters of the answer before each token."""
        self._left = most
        self.is_over = False
        """Nothing that comes can belong to the answer."""

    def push(self, token: int) -> Piece:
        """Take a token, one that ends the answer excepted."""
        self.offsets.append(len(self.answer.text))
        if self.buffers:
            return Piece()
        text, reasoning = self.reader.push(token), ""
        if self.reasoning is not None:
            if self.reasoning.cut is None:
                reasoning = self.reasoning.push(text)
                if self.reasoning.cut is None:
                    return Piece("", reasoning)
                text = self.reasoning.text[self.reasoning.cut + len(CLOSE) :]
            else:
                self._left -= 1
                self.is_over = self._left <= 0
        content = self.answer.push(text)
        self.is_over = self.is_over or self.answer.cut is not None
        return Piece(content, reasoning)

    def finish(self, text: str, thought: str = "") -> Piece:
        """Give what is left, now that the sampler has said what the answer is, and its reasoning."""
        reasoning = "" if not thought else (self.reasoning or Flow([])).finish(thought)
        return Piece(self.answer.finish(text), reasoning)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text ended the answer."""
        return self.answer.cut is not None


def first_of(marks: Sequence[str], text: str, start: int = 0) -> int | None:
    """Where the first of some marks begins; `None` where there is none."""
    return min((at for mark in marks if (at := text.find(mark, start)) >= 0), default=None)
