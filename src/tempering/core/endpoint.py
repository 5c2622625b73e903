"""EndpointSampler: any OpenAI-compatible chat endpoint as a sampler, with retries, in threads.

Used by evals, attacks and the LLM judge; refuses to know which model or which server answers.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from tempering.core.records import Completion, Finish, Prompt, content_id
from tempering.core.run import redact

FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "max_tokens": "length", "eos": "stop"}
RETRIED = (408, 409, 425, 429)
MAX_REPLY = 32 * 2**20
"""Bytes of a reply that are read; no answer is longer."""


class Endpoint(NamedTuple):
    """A model name and the base URL it is served at, such as `http://host:8000/v1`."""

    model: str
    url: str

    @property
    def host(self) -> str:
        """Host and port, for identities."""
        return urlsplit(self.url).netloc


def parse_endpoint(spec: str) -> Endpoint:
    """Read `openai:MODEL@URL`.

    >>> parse_endpoint("openai:org/gpt-x@http://host:8000/v1/")
    Endpoint(model='org/gpt-x', url='http://host:8000/v1')

    Raises:
        ValueError: naming the part that is missing or not allowed.
    """
    example = "expected openai:MODEL@URL, for instance openai:my-model@http://localhost:8000/v1"
    kind, colon, rest = spec.partition(":")
    if kind != "openai" or not colon:
        raise ValueError(f"endpoint {_without_userinfo(spec)!r}: {example}")
    # The URL begins at the last "@http": a model name may hold an "@", and so may a URL's user part.
    at = max(rest.rfind("@http://"), rest.rfind("@https://"))
    if at < 0:
        raise ValueError(
            f"endpoint {_without_userinfo(spec)!r}: no '@http://...' or '@https://...' after it; {example}"
        )
    model, url = rest[:at], rest[at + 1 :].rstrip("/")
    if not model:
        raise ValueError(f"endpoint {_without_userinfo(spec)!r}: no model before '@'; {example}")
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"endpoint openai:{model}@...: the URL holds a user name or password; "
            "put the key in an environment variable and name it in api_key_env"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"endpoint openai:{model}@...: the URL must end without '?' or '#'; {example}")
    try:
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
    if not has_host:
        raise ValueError(f"endpoint {spec!r}: no host, or no valid port, in {url!r}; {example}")
    return Endpoint(model, url.removesuffix("/chat/completions"))


class Usage(NamedTuple):
    """Tokens, as an endpoint counts them."""

    prompt_tokens: int
    completion_tokens: int


class Reply(NamedTuple):
    """What came back from a POST."""

    status: int
    content: bytes
    retry_after: str | None

    @property
    def brief(self) -> str:
        """The content in one line."""
        return _brief(self.content.decode("utf-8", "replace"))


class EndpointSampler:
    """Answer prompts through `POST URL/chat/completions`; a `Sampler`.

    A failed sample is a completion with `finish == "error"` and the reason. Connection errors, timeouts, 429
    and 5xx are retried with exponential backoff (full jitter, or what `Retry-After` says); other statuses are
    final. Each sample is sent a seed of its own, derived from `seed`, prompt and index; whether the server
    honours it, and whether it continues a last turn by the assistant (a prefill) or answers it, is the
    server's decision. The key is read from the environment variable `api_key_env` at each call and is in no
    attribute, message or log. `usage` sums the tokens of all replies that report them; `None`: none has.
    """

    def __init__(
        self,
        spec: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        max_wait_s: float = 60.0,
    ) -> None:
        self.endpoint = parse_endpoint(spec)
        self.name = f"openai:{self.endpoint.model}@{self.endpoint.url}"
        self.api_key_env, self.concurrency, self.timeout_s = api_key_env, concurrency, timeout_s
        self.retries, self.backoff_s, self.max_wait_s = retries, backoff_s, max_wait_s
        self.usage: Usage | None = None
        self._counting = threading.Lock()
        self._is_reached = False

    def __repr__(self) -> str:
        return f"EndpointSampler({self.name!r})"

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in order; see `Sampler`.

        Raises:
            ConnectionError: nothing answers at the URL, found out with the first request ever made.
        """
        groups: list[list[Completion]] = [[] for _ in prompts]
        jobs = [(p, i) for p in range(len(prompts)) for i in range(n)]
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        stop = threading.Event()
        key = os.environ.get(self.api_key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}

        def ask(client: httpx.Client, prompt: Prompt, index: int, is_first: bool = False) -> Completion:
            own_seed = int(content_id(seed, prompt.id, index)[:7], 16)
            body = {
                "model": self.endpoint.model,
                "messages": list(prompt.messages),
                "seed": own_seed,
                **settings,
            }
            text, finish, error = self._ask(client, body, key, stop, is_first)
            return Completion(prompt.id, text, finish, index, seed=own_seed, error=error)

        def keep(p: int, completion: Completion) -> None:
            groups[p].append(completion)
            if on_done and len(groups[p]) == n:
                on_done(1)

        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        with httpx.Client(timeout=self.timeout_s, headers=headers, limits=limits) as client:
            if jobs and not self._is_reached:
                p, i = jobs.pop(0)
                keep(p, ask(client, prompts[p], i, is_first=True))
                self._is_reached = True
            with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
                futures = {pool.submit(ask, client, prompts[p], i): p for p, i in jobs}
                try:
                    for future in as_completed(futures):
                        keep(futures[future], future.result())
                except BaseException:
                    stop.set()  # ends the waits between retries, so that an interrupt is not held up by them
                    pool.shutdown(cancel_futures=True)
                    raise
        return [sorted(group, key=lambda c: c.index) for group in groups]

    def _ask(
        self, client: httpx.Client, body: dict[str, Any], key: str, stop: threading.Event, is_first: bool
    ) -> tuple[str, Finish, str | None]:
        """Ask once, with retries: text, finish, and the reason where there is no answer."""
        for attempt in range(self.retries + 1):
            wait_s = random.uniform(0, min(self.max_wait_s, self.backoff_s * 2**attempt))
            try:
                reply = _post(client, f"{self.endpoint.url}/chat/completions", body, self.timeout_s)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                if (
                    is_first
                    and attempt == self.retries
                    and isinstance(error, httpx.NetworkError | httpx.ConnectTimeout)
                ):
                    raise ConnectionError(
                        f"nothing answers at {self.endpoint.url} ({redact(reason, [key])}, {attempt + 1} tries); "
                        "start the server, or correct the URL after '@'"
                    ) from None
            except httpx.HTTPError as error:
                return "", "error", redact(f"{type(error).__name__}: {error}", [key])
            else:
                if reply.status == 200:
                    self._count(reply)
                    return _read(reply, key)
                reason = f"HTTP {reply.status}: {reply.brief}"
                if reply.status not in RETRIED and reply.status < 500:
                    return "", "error", redact(reason, [key])
                told_s = _retry_after_s(reply.retry_after)
                wait_s = wait_s if told_s is None else min(told_s, self.max_wait_s)
            if attempt == self.retries or stop.wait(wait_s):
                break
        return "", "error", redact(f"{reason} ({attempt + 1} tries)", [key])

    def _count(self, reply: Reply) -> None:
        used = _usage(reply)
        if used is not None:
            with self._counting:
                so_far = self.usage or Usage(0, 0)
                self.usage = Usage(*(a + b for a, b in zip(so_far, used, strict=True)))


def _post(client: httpx.Client, url: str, body: dict[str, Any], timeout_s: float) -> Reply:
    """Post once. httpx limits the wait for each part of a reply; here the whole of it, however it trickles in.

    Raises:
        httpx.HTTPError: no reply in time, or one longer than `MAX_REPLY`.
    """
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    with client.stream("POST", url, json=body) as response:
        for part in response.iter_bytes():
            content += part
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"the reply was not complete after {timeout_s:g} s")
            if len(content) > MAX_REPLY:
                raise httpx.DecodingError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
        return Reply(response.status_code, bytes(content), response.headers.get("Retry-After"))


def _read(reply: Reply, key: str) -> tuple[str, Finish, str | None]:
    """Take the answer out of a reply, or say what is wrong with it."""
    try:
        told = json.loads(reply.content)
    except (ValueError, RecursionError):
        return "", "error", redact(f"the reply is not JSON: {reply.brief}", [key])
    try:
        choice = told["choices"][0]
        message = choice["message"]
        text = message.get("refusal") if message.get("content") is None else message["content"]
        reason = choice.get("finish_reason") or "stop"
    except (AttributeError, IndexError, KeyError, TypeError):
        said = told.get("error", told) if isinstance(told, dict) else told
        return "", "error", redact(f"no choices[0].message in the reply: {_brief(json.dumps(said))}", [key])
    if reason == "content_filter" and not text:
        return "", "error", "the endpoint's content filter withheld the answer"
    if text is None and reason == "length":
        text = ""  # a reasoning model that used up its tokens before it answered
    if not isinstance(text, str):
        return (
            "",
            "error",
            f"the reply's content is {type(text).__name__}, not text (finish_reason {reason!r})",
        )
    return text, FINISH.get(str(reason), "stop"), None


def _usage(reply: Reply) -> Usage | None:
    """Read the tokens of a reply; what is no count is absent."""
    try:
        told = json.loads(reply.content)["usage"]
        used = Usage(told["prompt_tokens"], told["completion_tokens"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return used if all(type(count) is int and count >= 0 for count in used) else None


def _retry_after_s(value: str | None) -> float | None:
    """Read seconds or an HTTP date; nonsense counts as absent."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if value.strip().lower() not in ("nan", "inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _brief(text: str) -> str:
    """One line of at most 200 characters."""
    line = " ".join(text.split())
    return (line[:200] + "...") if len(line) > 200 else line or "(empty)"


def _without_userinfo(spec: str) -> str:
    """Drop what stands between `//` and a last `@`: it may be a password."""
    head, slashes, tail = spec.rpartition("://")
    return head + slashes + tail.rpartition("@")[2] if slashes else spec
