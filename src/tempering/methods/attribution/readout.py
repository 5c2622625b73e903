"""Where in a response the states are read: spans of reasoning and answer, and read-out positions; pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from tempering.core.think import CLOSE, OPEN
from tempering.methods.attribution.settings import ReadOut

READ_OUTS: tuple[ReadOut, ...] = get_args(ReadOut)
Span = tuple[int, int]
"""Tokens [first, last), counted from the start of the response."""


class Spans(NamedTuple):
    """The parts of a response. Empty parts are None; the end-of-turn token belongs to none."""

    answer: Span | None
    cot: Span | None = None
    tag: Span | None = None
    """The closing tag."""
    is_open: bool = False
    """Whether reasoning was opened, by the prompt or by the response."""

    @property
    def is_well_formed(self) -> bool:
        """An answer is there, and reasoning that was opened is closed."""
        return self.answer is not None and (self.tag is not None or not self.is_open)


def find_spans(decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, opened: bool) -> Spans:
    """Find reasoning, closing tag and answer in the token ids of a response, its end-of-turn token left off.

    `decode` turns ids into text, special tokens included; `opened`: the prompt ends inside the opening tag. Ids
    are never encoded again: they are decoded once, and the ends of a tag are found by bisection on the lengths of
    decoded prefixes. A token that holds part of a tag belongs to the tag. An answer of white space is none.
    """
    text = decode(ids)

    def length(k: int) -> int:  # characters that the first k tokens have completed
        return len(decode(ids[:k]).rstrip("\ufffd"))

    def tokens_of(start: int, tag: str) -> Span:
        first = bisect_right(range(len(ids) + 1), start, key=length) - 1
        return first, bisect_left(range(len(ids) + 1), start + len(tag), key=length)

    opens_itself = not opened and text.lstrip().startswith(OPEN)
    start = tokens_of(text.index(OPEN), OPEN)[1] if opens_itself else 0
    if not (opened or opens_itself):
        return Spans(_full((0, len(ids)), bool(text.strip())))
    at = text.find(CLOSE)
    if at < 0:
        return Spans(None, _full((start, len(ids)), True), None, True)
    tag = tokens_of(at, CLOSE)
    return Spans(
        _full((tag[1], len(ids)), bool(text[at + len(CLOSE) :].strip())), _full((start, tag[0]), True), tag, True
    )


def readout_positions(prompt: int, spans: Spans, length: int, kind: ReadOut) -> list[int]:
    """Return the positions in prompt + response whose states are averaged; a missing span falls back to `eos`.

    `length` counts the response with its end-of-turn token, which is its last.

    >>> spans = Spans(answer=(4, 6), cot=(0, 3), tag=(3, 4), is_open=True)  # c c c tag a a eos
    >>> [readout_positions(3, spans, 7, kind) for kind in READ_OUTS]
    [[9], [8], [7, 8], [3, 4, 5], [6]]
    """
    end = prompt + length - 1
    if kind == "last_content":
        return [max(end - 1, prompt)]
    found = {"answer_mean": spans.answer, "cot_mean": spans.cot, "think_end": spans.tag}.get(kind)
    if found is None:
        return [end]
    first, last = found
    return [prompt + last - 1] if kind == "think_end" else list(range(prompt + first, prompt + last))


def falls_back(spans: Spans, kind: ReadOut) -> bool:
    """Whether the span that a read-out asks for is missing, so that `eos` stands in."""
    missing = {"answer_mean": spans.answer, "cot_mean": spans.cot, "think_end": spans.tag}
    return kind in missing and missing[kind] is None


def _full(span: Span, has_text: bool) -> Span | None:
    return span if has_text and span[0] < span[1] else None
