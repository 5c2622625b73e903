"""From events to replies: OpenAI's objects for chat completions and completions, whole or in pieces.

Refuses to know about the connection.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tempering.core.decoding import TokenScore
from tempering.serving.jobs import Ask, Ended, Wrote
from tempering.serving.target import Target

LEAST = -9999.0
"""Stands for the log-probability of what cannot be, which JSON has no number for."""


class Replies:
    """The replies to one request."""

    def __init__(self, target: Target, ask: Ask, *, is_chat: bool) -> None:
        self.target, self.ask, self.is_chat = target, ask, is_chat
        self.name = ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self._offsets = [0] * (len(ask.prompts) * ask.n)

    def whole(self, wrote: Sequence[Wrote], ended: Sequence[Ended]) -> dict[str, Any]:
        """One reply with all answers."""
        choices = []
        for end in sorted(ended, key=lambda e: e.index):
            parts = [w for w in wrote if w.index == end.index]
            content, reasoning = "".join(w.content for w in parts), "".join(w.reasoning for w in parts)
            choice: dict[str, Any] = {"index": end.index}
            if self.is_chat:
                message = {"role": "assistant", "content": content, "refusal": None}
                choice["message"] = message | ({"reasoning_content": reasoning} if reasoning else {})
            else:
                choice["text"] = content
            choice["logprobs"] = self._logprobs([score for w in parts for score in w.scores], end.index)
            choices.append(choice | self._ending(end))
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(ended)}

    def begins(self) -> list[dict[str, Any]]:
        """The first pieces: who speaks."""
        if not self.is_chat:
            return []
        return [
            self._piece({"index": i, "delta": {"role": "assistant", "content": ""}})
            for i in range(len(self._offsets))
        ]

    def goes_on(self, wrote: Wrote) -> dict[str, Any]:
        """Some more of an answer."""
        if self.is_chat:
            delta = {"content": wrote.content} if wrote.content or not wrote.reasoning else {}
            delta |= {"reasoning_content": wrote.reasoning} if wrote.reasoning else {}
            choice: dict[str, Any] = {"index": wrote.index, "delta": delta}
        else:
            choice = {"index": wrote.index, "text": wrote.content}
        return self._piece(choice | {"logprobs": self._logprobs(wrote.scores, wrote.index)})

    def ends(self, ended: Ended) -> dict[str, Any]:
        """The last piece of an answer."""
        said: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        return self._piece({"index": ended.index, **said, **self._ending(ended)})

    def tells_usage(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """The last piece of a stream whose client asked for the usage."""
        return self._piece(None) | {"usage": self.usage(ended)}

    def usage(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """Tokens read and drawn: of every candidate, and of reasoning. Each prompt counts once, not each of its n."""
        drawn = sum(end.tokens for end in ended)
        prompt = self.ask.prompt_tokens or sum(e.prompt_tokens for e in ended if e.index % self.ask.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ended)},
        }

    def _ending(self, ended: Ended) -> dict[str, Any]:
        details = {"tempering": ended.details} if ended.details is not None else {}
        return {"finish_reason": ended.finish, **details}

    def _piece(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        full = [] if choice is None else [{"logprobs": None, "finish_reason": None} | choice]
        return self._frame(kind, full)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name, "object": kind, "created": self.created, "model": self.target.name, "choices": choices,
        }  # fmt: skip

    def _logprobs(self, scores: Sequence[TokenScore], index: int) -> dict[str, Any] | None:
        if self.ask.top_logprobs is None:
            return None
        if self.is_chat:
            content = [
                {**self._token(s.token, s.logprob), "top_logprobs": [self._token(*pair) for pair in s.top]}
                for s in scores
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(s.token) for s in scores]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        top = [{self._text(token): _finite(logprob) for token, logprob in s.top} for s in scores]
        return {
            "tokens": texts, "token_logprobs": [_finite(s.logprob) for s in scores], "top_logprobs": top,
            "text_offset": offsets,
        }  # fmt: skip

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        is_part = "\ufffd" in text  # of a character: its bytes are not known
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": None if is_part else list(text.encode("utf-8", "replace")),
        }

    def _text(self, token: int) -> str:
        assert self.target.local is not None
        return str(self.target.local.policy.tokenizer.decode([token]))


def _finite(logprob: float) -> float:
    return max(LEAST, logprob)  # this way round a NaN becomes `LEAST` too


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(data) + b"\n\n"


def comment(text: str) -> bytes:
    """A line that keeps a connection alive, and that clients pass over."""
    return f": {text}\n\n".encode()


def dumped(data: dict[str, Any]) -> bytes:
    """JSON in bytes; half a surrogate pair becomes a question mark."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
