"""Ledger: what one endpoint was asked, what it answered and what that cost; the cache and the cap on spending.

Used by `EndpointSampler`; refuses to know how an endpoint is asked.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tempering.core.records import Finish, content_id

SPENT = "spending limit reached"
"""Stands in the reason of every sample that was not asked because of a limit."""
TEMPLATE_TOKENS = 128
"""More than a chat template and its own system prompt add to a request."""
MOST_TOKENS = 10**9
"""A server that tells more than this has not counted."""


class Tokens(NamedTuple):
    """Tokens of a prompt and of its completion."""

    prompt: int
    completion: int

    def plus(self, other: Tokens, sign: int = 1) -> Tokens:
        """Add (or with sign -1 take away) field by field."""
        return Tokens(self.prompt + sign * other.prompt, self.completion + sign * other.completion)


NONE = Tokens(0, 0)


class Answer(NamedTuple):
    """What a request came to: a text and why it ended, or `error` and the reason."""

    text: str
    finish: Finish
    error: str | None = None
    tokens: int | None = None
    """Tokens of the text, as the endpoint counted them."""
    reasoning: str = ""
    """What the server told apart from the text as the model's reasoning."""
    used: Tokens | None = None
    """What the try that gave it took."""
    seconds: float | None = None


def tokens_at_most(messages: Sequence[Mapping[str, str]], max_tokens: int) -> Tokens:
    """Return a bound that holds for every byte-level tokenizer: no token is shorter than a byte."""
    return Tokens(sum(_size(turn) for turn in messages) + TEMPLATE_TOKENS, max_tokens)


def tokens_about(messages: Sequence[Mapping[str, str]], max_tokens: int) -> Tokens:
    """Return what to expect of a prompt, four bytes of UTF-8 a token and four tokens a turn; the longest answer."""
    return Tokens(sum(-(-_size(turn) // 4) + 4 for turn in messages), max_tokens)


def read_tokens(usage: Any, bound: Tokens) -> Tokens:
    """Read a reply's `usage`; a count that is missing or nonsense is taken at its bound.

    >>> read_tokens({"prompt_tokens": 7, "completion_tokens": float("nan")}, Tokens(100, 200))
    Tokens(prompt=7, completion=200)
    """
    return Tokens(*(b if count is None else count for count, b in zip(_counts(usage), bound, strict=True)))


def are_tokens(usage: Any) -> bool:
    """Say whether a reply's `usage` holds both counts, and no nonsense."""
    return None not in _counts(usage)


class Ledger:
    """One line per request that cost something, in `FOLDER/MODEL-HASH.jsonl`; those with `text` are the cache.

    A line is written in one piece as soon as its answer is there, so a kill loses at most what was under way;
    a torn line is skipped. Several processes and samplers may share a file: `read` takes in what others wrote.
    Limits hold over all that stands in the file; without a folder, over the life of this object.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: str,
        url: str,
        *,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget: float | None = None,
        max_tokens_total: int | None = None,
    ) -> None:
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model)[:60]}-{content_id(url, model)[:8]}.jsonl"
        self.path = None if folder is None else Path(folder) / name
        self.price_in, self.price_out = price_in, price_out
        self.budget, self.max_tokens_total = budget, max_tokens_total
        self.answers: dict[str, Answer] = {}
        self.spent = NONE
        self.reported: Tokens | None = None  # of what was settled here, what the endpoint itself counted
        self._filed, self._offset, self._begins = NONE, 0, True
        self._reserved = NONE
        self._refusal: str | None = None
        self._settled = threading.Condition()

    def cost(self, tokens: Tokens) -> float:
        """Return the price of tokens; prices are per million."""
        return (tokens.prompt * self.price_in + tokens.completion * self.price_out) / 1e6

    def summary(self) -> str:
        """Say what has been spent, in one line."""
        price = f", cost {self.cost(self.spent):.4g}" if self.price_in or self.price_out else ""
        return f"{self.spent.prompt:,} prompt tokens, {self.spent.completion:,} completion tokens{price}"

    def read(self) -> None:
        """Take in the whole lines that were added to the file since the last time, by whomever."""
        if self.path is None or not self.path.exists():
            return
        with self._settled, self.path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
            added = added[: added.rfind(b"\n") + 1]
            self._offset += len(added)
            for line in added.split(b"\n"):
                try:
                    row = json.loads(line)
                    self._filed = self._filed.plus(Tokens(*row["tokens"]))
                    if "text" in row:
                        used = Tokens(*row["tokens"])
                        self.answers[row["key"]] = Answer(
                            row["text"],
                            row["finish"],
                            tokens=used.completion if row.get("is_counted") else None,
                            reasoning=row.get("reasoning", ""),
                            used=used,
                            seconds=row.get("seconds"),
                        )
                except (ValueError, KeyError, TypeError):
                    continue  # blank, or torn by a kill
            self.spent = self._filed

    def reserve(self, tokens: Tokens) -> str | None:
        """Set tokens aside for a request, or say why there are none left; waits where one under way may cost less.

        Once refused, always refused: what is asked last must not depend on who happens to be cheap.
        """
        with self._settled:
            while self._refusal is None and (reason := self._over(tokens)):
                if self._reserved == NONE:
                    self._refusal = reason
                else:
                    self._settled.wait()
            if self._refusal is None:
                self._reserved = self._reserved.plus(tokens)
            return self._refusal

    def settle(
        self,
        reserved: Tokens,
        used: Tokens,
        row: Mapping[str, Any],
        answer: Answer | None,
        *,
        is_reported: bool = False,
    ) -> None:
        """Put what a request did cost in place of what was set aside, and keep its answer where it has one."""
        with self._settled:
            self._reserved = self._reserved.plus(reserved, -1)
            self.spent = self.spent.plus(used)
            if is_reported:
                self.reported = used.plus(self.reported or NONE)
            self._settled.notify_all()
            if self.path is None or (answer is None and used == NONE):
                return
            said: dict[str, Any] = {}
            if answer is not None:
                told = {"reasoning": answer.reasoning, "seconds": answer.seconds}
                said = {"text": answer.text, "finish": answer.finish, "is_counted": is_reported}
                said |= {key: value for key, value in told.items() if value}
            self._append({**row, **said, "tokens": list(used)})
            if answer is not None:
                self.answers[row["key"]] = answer

    def _over(self, tokens: Tokens) -> str | None:
        after = self.spent.plus(self._reserved).plus(tokens)
        if self.budget is not None and self.cost(after) > self.budget:
            spent, more = self.cost(self.spent), self.cost(tokens)
            return f"{SPENT}: {spent:.4g} of budget={self.budget:g} is spent, one more request may cost {more:.4g}"
        if self.max_tokens_total is not None and sum(after) > self.max_tokens_total:
            return (
                f"{SPENT}: {sum(self.spent)} of max_tokens_total={self.max_tokens_total} are used, and one more "
                f"request may take {sum(tokens)}"
            )
        return None

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The first line begins with an end of line: the last one of a killed process may lack its own.
        line = ("\n" if self._begins else "") + json.dumps(row) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
        self._begins = False


def _counts(usage: Any) -> list[int | None]:
    told = usage if isinstance(usage, Mapping) else {}
    counts = (told.get("prompt_tokens"), told.get("completion_tokens"))
    return [count if type(count) is int and 0 <= count <= MOST_TOKENS else None for count in counts]


def _size(turn: Mapping[str, str]) -> int:
    return len(turn["content"].encode("utf-8", "surrogatepass"))
