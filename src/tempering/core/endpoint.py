"""EndpointSampler: any OpenAI-compatible chat endpoint as a sampler, with retries, in threads.

Used by evals, attacks and the LLM judge; refuses to know which model or which server answers.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tempering.core.config import Config, build
from tempering.core.ledger import NONE, Answer, Ledger, Tokens, are_tokens, read_tokens, tokens_at_most
from tempering.core.meter import Meter
from tempering.core.records import Completion, Finish, Prompt, Thought, Usage, content_id
from tempering.core.run import redact

FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "max_tokens": "length", "eos": "stop"}
RETRIED = (408, 409, 425, 429)
MAX_REPLY = 32 * 2**20
"""Bytes of a reply that are read; no answer is longer."""
MIN_KEY = 8
"""Characters of a key that is redacted in answers: a shorter stand-in, such as EMPTY, may be an honest word."""
DONE = re.compile(rb"^data: ?\[DONE\]", re.M)


class Endpoint(NamedTuple):
    """A model name and the base URL it is served at, such as `http://host:8000/v1`."""

    model: str
    url: str

    @property
    def host(self) -> str:
        """Host and port, for identities."""
        return urlsplit(self.url).netloc

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, by how it is written: `localhost` or a loopback address.

        >>> [Endpoint("m", f"http://{host}/v1").is_loopback for host in ("127.0.0.1", "[::1]", "localhost", "a.org")]
        [True, True, True, False]
        """
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


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


class EndpointConfig(Config):
    """How an endpoint is asked, and what it may cost."""

    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = Field(default=16, ge=1)
    """Requests under way at a time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds for the whole of a reply, after which it is asked for again."""
    retries: int = Field(default=4, ge=0)
    """Further tries after a failure that may pass (no connection, timeout, 429, 5xx, a reply that is none)."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Longest wait before the first further try, in seconds; doubled each time, drawn between 0 and that."""
    max_wait_s: float = Field(default=60.0, ge=0)
    """Longest wait before any try, in seconds, also where `Retry-After` says more."""
    stream: bool = False
    """Have replies streamed (server-sent events): for servers behind a proxy that cuts long silences."""
    price_in: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens, in any currency."""
    price_out: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens, in the same currency."""
    budget: float | None = Field(default=None, ge=0)
    """Most to spend on this endpoint within one cache folder, in the currency of the prices; needs a price."""
    max_tokens_total: int | None = Field(default=None, ge=0)
    """Most tokens, prompts and completions together, within one cache folder."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PydanticCustomError(
                "secret", "expected the name of an environment variable, such as OPENAI_API_KEY, not the key itself"
            )
        return name

    @model_validator(mode="after")
    def _can_count(self) -> EndpointConfig:
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ValueError("a budget needs price_in and price_out, per million tokens")
        return self


class Reply(NamedTuple):
    """What came back from a POST."""

    status: int
    content: bytes
    retry_after: str | None = None
    is_stream: bool = False

    @property
    def brief(self) -> str:
        """The content in one line."""
        return _brief(self.content.decode("utf-8", "replace"))


class Request(NamedTuple):
    """One sample to ask for: of which prompt (its place in the call and its id), which of its n, what is sent."""

    place: int
    prompt_id: str
    sample: int
    body: dict[str, Any]
    key: str
    """Hash of URL, model, messages, sampling settings, seed and index: where its answer is in the ledger."""


class Outcome(NamedTuple):
    """What one try came to, what it cost at most, and whether another may do better."""

    answer: Answer
    used: Tokens = NONE
    is_reported: bool = False
    """Whether the reply said what was used."""
    may_pass: bool = False
    wait_s: float | None = None
    """What `Retry-After` said."""
    is_unreached: bool = False


class EndpointSampler:
    """Answer prompts through `POST URL/chat/completions`; a `Sampler`. `settings`: see `EndpointConfig`.

    A failed sample is a completion with `finish == "error"` and the reason. Connection errors, timeouts, 429,
    5xx and, from a server that has answered before, replies that hold no answer are retried with exponential
    backoff (full jitter, or what `Retry-After` says); other statuses are final. With `cache`, a folder, what is
    answered there is not asked again; equal requests of one call are one request. Each sample is sent a seed of its
    own, derived from `seed`, prompt and index; whether the server honours it, and whether it continues a last turn
    by the assistant (a prefill) or answers it, is the server's decision. The key is read at each call and is in no
    attribute, message or file. `meter`: is asked before each request, retries among them, whether it may be sent.
    """

    def __init__(
        self, spec: str, *, cache: str | Path | None = None, meter: Meter | None = None, **settings: Any
    ) -> None:
        self.endpoint, self.meter = parse_endpoint(spec), meter or Meter()
        self.name = f"openai:{self.endpoint.model}@{self.endpoint.url}"
        self.config = config = build(EndpointConfig, settings, f"endpoint {self.name}")
        self.ledger = Ledger(
            cache,
            *self.endpoint,
            price_in=config.price_in,
            price_out=config.price_out,
            budget=config.budget,
            max_tokens_total=config.max_tokens_total,
        )
        if meter is not None and self.ledger.path is not None:
            self.ledger.read()
            meter.purse.join(str(self.ledger.path), self.ledger.cost(self.ledger.spent))
        self._is_reached = self._has_answered = False

    def __repr__(self) -> str:
        return f"EndpointSampler({self.name!r})"

    @property
    def usage(self) -> Tokens | None:
        """Tokens of all replies so far that reported them; `None`: none has. Answers from the cache cost none."""
        return self.ledger.reported

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        first: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, samples `first` to first + n - 1, in order; see `Sampler`.

        Raises:
            ConnectionError: nothing answers at the URL, found out with the first request ever made.
            ValueError: the key cannot be sent.
        """
        groups: list[list[Completion]] = [[] for _ in prompts]
        stop = threading.Event()
        key = _key(self.config.api_key_env)

        def keep(requests: Sequence[Request], answer: Answer) -> None:
            for request in requests:
                group = groups[request.place]
                group.append(completion(request, answer, self.ledger.cost))
                if on_done and len(group) == n:
                    on_done(1)

        equal: dict[str, list[Request]] = {}  # two prompts may be one question: it is asked once
        self.ledger.read()
        self._has_answered |= bool(self.ledger.answers)
        for request in self.requests(prompts, n, max_new_tokens, temperature, top_p, seed, first):
            known = self.ledger.answers.get(request.key)
            if known is None:
                equal.setdefault(request.key, []).append(request)
            else:
                keep([request], known)
        todo = list(equal.values())
        with self._client(key) as client:
            if todo and not self._is_reached:
                same = todo.pop(0)
                keep(same, self._ask(client, same[0], key, stop, is_first=True))
                self._is_reached = True
            with ThreadPoolExecutor(max_workers=self.config.concurrency) as pool:
                futures = {pool.submit(self._ask, client, same[0], key, stop): same for same in todo}
                try:
                    for future in as_completed(futures):
                        keep(futures[future], future.result())
                except BaseException:
                    stop.set()  # ends the waits between retries, so that an interrupt is not held up by them
                    pool.shutdown(cancel_futures=True)
                    raise
        return [sorted(group, key=lambda c: c.index) for group in groups]

    def requests(
        self,
        prompts: Sequence[Prompt],
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        first: int = 0,
    ) -> list[Request]:
        """Return what a call with these arguments asks for, the cached answers included."""
        found = []
        for place, prompt in enumerate(prompts):
            for index in range(first, first + n):
                body = {
                    "model": self.endpoint.model,
                    "messages": list(prompt.messages),
                    "seed": int(content_id(seed, prompt.id, index)[:7], 16),
                    "max_tokens": max_new_tokens,
                    "temperature": float(temperature),
                    "top_p": float(top_p),
                }
                key = content_id(self.endpoint.url, body, index)
                found.append(Request(place, prompt.id, index, body, key))
        return found

    def _client(self, key: str) -> httpx.Client:
        # Compressed replies are not asked for: a few bytes of one can grow to fill the memory.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        count = self.config.concurrency
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
        return httpx.Client(timeout=self.config.timeout_s, headers=headers, limits=limits)

    def _ask(
        self, client: httpx.Client, request: Request, key: str, stop: threading.Event, is_first: bool = False
    ) -> Answer:
        """Ask for one sample, with retries; every try goes through the ledger."""
        row = {"key": request.key, "id": request.prompt_id, "index": request.sample}
        bound = tokens_at_most(request.body["messages"], request.body["max_tokens"])
        began = time.monotonic()
        for attempt in range(self.config.retries + 1):
            if refusal := self.ledger.reserve(bound):
                return Answer("", "error", refusal)
            if refusal := self.meter.take(self.ledger.cost(bound), stop):
                self.ledger.settle(bound, NONE, row, None)
                return Answer("", "error", refusal)
            outcome = Outcome(Answer("", "error", "interrupted"), used=bound)
            try:
                outcome = self._try(client, request.body, bound, key)
            finally:
                error = outcome.answer.error
                answer = outcome.answer._replace(
                    text=_without_key(outcome.answer.text, key),
                    error=redact(error, [key]) if error else None,
                    reasoning=_without_key(outcome.answer.reasoning, key),
                    used=outcome.used,
                    seconds=round(time.monotonic() - began, 3),
                )
                self.ledger.settle(
                    bound, outcome.used, row, None if error else answer, is_reported=outcome.is_reported
                )
                self.meter.purse.settle(self.ledger.cost(bound), self.ledger.cost(outcome.used))
            if error is None:
                self._has_answered = True
                return answer
            if not outcome.may_pass:
                return answer
            told_s, longest_s = outcome.wait_s, self.config.max_wait_s
            wait_s = random.uniform(0, self.config.backoff_s * 2**attempt) if told_s is None else told_s
            if attempt == self.config.retries or stop.wait(min(wait_s, longest_s)):
                break
        if is_first and outcome.is_unreached:
            raise ConnectionError(
                f"nothing answers at {self.endpoint.url} ({answer.error}, {attempt + 1} tries); "
                "start the server, or correct the URL after '@'"
            )
        return answer._replace(error=f"{answer.error} ({attempt + 1} tries)")

    def _try(self, client: httpx.Client, body: Mapping[str, Any], bound: Tokens, key: str) -> Outcome:
        """Ask once. A reply that was lost on the way may have been charged: it counts with all its tokens."""
        if self.config.stream:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            reply = _post(client, f"{self.endpoint.url}/chat/completions", body, self.config.timeout_s)
        except httpx.TransportError as error:
            never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            return Outcome(
                Answer("", "error", f"{type(error).__name__}: {error}"),
                used=NONE if never_sent else bound,
                may_pass=True,
                is_unreached=isinstance(error, httpx.NetworkError | httpx.ConnectTimeout),
            )
        except httpx.HTTPError as error:
            failed = Answer("", "error", f"{type(error).__name__}: {error}")
            return Outcome(failed, bound, may_pass=self._has_answered)
        if len(key) >= MIN_KEY:  # before anything is cut out of it, where half a key might stay
            reply = reply._replace(content=reply.content.replace(key.encode(), b"***"))
        if reply.status != 200:
            may_pass = reply.status in RETRIED or reply.status >= 500
            wait_s = _retry_after_s(reply.retry_after)
            failed = Answer("", "error", f"HTTP {reply.status}: {reply.brief}")
            return Outcome(failed, NONE, may_pass=may_pass, wait_s=wait_s)
        outcome = _read(reply, bound)
        # A server that never answered well is more likely misconfigured than having a bad moment.
        return outcome._replace(may_pass=outcome.may_pass and self._has_answered)


def completion(request: Request, answer: Answer, price: Callable[[Tokens], float] | None = None) -> Completion:
    """Put an answer to its sample; reasoning, which some servers tell apart and some leave in, is its thought."""
    answer = answer._replace(text=_whole(answer.text), reasoning=_whole(answer.reasoning))  # a cache may hold others
    text, thought = (answer.text, Thought(answer.reasoning)) if answer.reasoning else _apart(request, answer)
    return Completion(
        request.prompt_id,
        text,
        answer.finish,
        request.sample,
        seed=request.body["seed"],
        error=answer.error,
        counted_tokens=answer.tokens,
        thought=thought,
        usage=Usage(*answer.used, price(answer.used) if price else 0.0, answer.seconds) if answer.used else None,
    )


def _apart(request: Request, answer: Answer) -> tuple[str, Thought | None]:
    """Split reasoning between think tags from the answer behind it, as `ThinkSampler` does.

    A reply that only closes the tag was opened by the server's template, unless it continues another beginning.
    """
    if answer.finish == "error" or "think>" not in answer.text:
        return answer.text, None
    from tempering.core.think import CLOSE, OPEN, parse_think  # loads torch, for which a command must not wait

    last = request.body["messages"][-1]
    begun = last["content"] if last["role"] == "assistant" else OPEN
    before, closing, _ = answer.text.partition(CLOSE)
    if answer.text.lstrip().startswith(OPEN):
        whole = answer.text
    elif closing and OPEN not in before and OPEN in begun:
        whole = OPEN + answer.text
    else:
        return answer.text, None
    cot, text, status = parse_think(whole, answer.finish)
    return text, Thought(cot, status)


def _post(client: httpx.Client, url: str, body: Mapping[str, Any], timeout_s: float) -> Reply:
    """Post once. httpx limits the wait for each part of a reply; here the whole of it, however it trickles in.

    Raises:
        httpx.HTTPError: no reply in time, or one longer than `MAX_REPLY`, or compressed.
    """
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    # ASCII, so that half of a surrogate pair in a prompt, which UTF-8 cannot encode, is sent as what it is.
    with client.stream("POST", url, content=json.dumps(body).encode()) as response:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_ok, length = response.status_code == 200, response.headers.get("Content-Length")
        is_stream = is_ok and kind == "text/event-stream"
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity" and is_ok:
            raise httpx.DecodingError("the reply is compressed, which was not asked for")
        try:
            for part in response.iter_raw():
                content += part
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the reply was not complete after {timeout_s:g} s")
                if len(content) > MAX_REPLY:
                    raise httpx.DecodingError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
                # A length that is too short cuts the reply, and the next one on this connection would begin with
                # its rest: what is left before its end is closed.
                if is_ok and str(len(content)) == length and not is_stream and not content.rstrip().endswith(b"}"):
                    break
        except httpx.TransportError:
            if not (is_stream and DONE.search(content)):  # after [DONE] all is said, whatever becomes of the line
                raise
        return Reply(response.status_code, bytes(content), response.headers.get("Retry-After"), is_stream)


def _read(reply: Reply, bound: Tokens) -> Outcome:
    """Take the answer out of a reply, or say what is wrong with it."""

    def failed(reason: str, may_pass: bool = True) -> Outcome:
        return Outcome(Answer("", "error", reason), used, is_reported, may_pass)

    used, is_reported = bound, False
    try:
        told = _joined(reply.content) if reply.is_stream else json.loads(reply.content)
        usage = told.get("usage") if isinstance(told, dict) else None
        used, is_reported = read_tokens(usage, bound), are_tokens(usage)
    except EOFError:
        return failed(f"the stream broke off: {reply.brief}")
    except (ValueError, RecursionError):
        return failed(f"the reply is not JSON: {reply.brief}")
    try:
        choice = told["choices"][0]
        message = choice["message"]
        text = message.get("refusal") if message.get("content") is None else message["content"]
        reason = choice.get("finish_reason")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        text, reason, reasoning = map(_whole, (text, reason, reasoning))
    except (AttributeError, IndexError, KeyError, TypeError):
        return failed(f"no choices[0].message in the reply: {reply.brief}")
    if not isinstance(reason, str):
        reason = "stop"
    if reason == "content_filter" and not text:
        return failed("the endpoint's content filter withheld the answer", may_pass=False)
    if text is None and reason == "length":
        text = ""  # a reasoning model that used up its tokens before it answered
    if not isinstance(text, str):
        return failed(f"the reply's content is {type(text).__name__}, not text (finish_reason {_brief(reason)!r})")
    counted = used.completion if is_reported else None
    told = reasoning if isinstance(reasoning, str) else ""
    return Outcome(Answer(text, FINISH.get(reason, "stop"), tokens=counted, reasoning=told), used, is_reported)


def _joined(content: bytes) -> dict[str, Any]:
    r"""Join the events of a stream to the reply that they are parts of; one that tells an error is that error.

    Comments (keep-alives) and fields other than `data` are skipped.

    >>> _joined(b': hi\n\ndata: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n')["choices"]
    [{'message': {'content': 'a'}, 'finish_reason': None}]

    Raises:
        EOFError: it has no end, neither a `finish_reason` nor `[DONE]`, or stops within an event.
        ValueError: it is not UTF-8.
    """
    parts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning_content": [], "reasoning": []}
    finish = usage = None
    is_done = is_other = False
    for event in re.sub(r"\r\n?", "\n", content.decode()).split("\n\n"):
        data = "\n".join(line[5:] for line in event.split("\n") if line.startswith("data:"))
        if is_done := data.strip() == "[DONE]":
            break
        if not data.strip():
            continue
        try:
            chunk = json.loads(data)
        except ValueError:
            raise EOFError from None
        if not isinstance(chunk, dict) or chunk.get("error"):
            return {"error": chunk}
        usage = chunk.get("usage") or usage
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}  # the chunk with the usage has none
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict | None) or not isinstance(choice, dict):
            return {"error": chunk}
        is_other |= any(value for name, value in (delta or {}).items() if name not in ("role", *parts))
        for name, found in parts.items():
            if (text := (delta or {}).get(name)) is not None:
                if not isinstance(text, str):
                    return {"error": chunk}
                found.append(text)
        finish = choice.get("finish_reason") or finish
    if not is_done and finish is None:
        raise EOFError
    if finish is None and not any(parts.values()):
        return {"usage": usage}
    message = {name: "".join(found) for name, found in parts.items() if found}
    if not message and finish == "stop" and not is_other:
        message = {"content": ""}  # some servers send no content where there is none
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def _key(name: str) -> str:
    """Read the key from the environment.

    Raises:
        ValueError: it holds what no header may, and the reason must not quote it.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {name} holds characters that no key has; set it again")
    return key


def _without_key(text: str, key: str) -> str:
    """Redact a key that a server has put, in pieces, into its answer."""
    return redact(text, [key]) if len(key) >= MIN_KEY else text


def _whole(told: Any) -> Any:
    r"""Put U+FFFD for half a surrogate pair in a text: no file, and no tokenizer, takes one.

    >>> [ascii(_whole(told)) for told in ("a\ud83d", "\ud83d\ude00", None)]
    ["'a\\ufffd'", "'\\U0001f600'", 'None']
    """
    if not isinstance(told, str):
        return told
    return told.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
    except (TypeError, ValueError, IndexError, OverflowError, OSError):
        return None


def _brief(text: str) -> str:
    """One line of at most 200 characters."""
    line = " ".join(text.split())
    return (line[:200] + "...") if len(line) > 200 else line or "(empty)"


def _without_userinfo(spec: str) -> str:
    """Drop what stands between `//` and a last `@`: it may be a password."""
    head, slashes, tail = spec.rpartition("://")
    return head + slashes + tail.rpartition("@")[2] if slashes else spec
