"""What every request passes first: who may ask, how much they may send, and whether requests are taken at all.

Plain ASGI around the application, so that nothing is parsed before it was admitted; refuses to know what is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from tempering.serving.errors import ApiError
from tempering.serving.log import log
from tempering.serving.settings import ServeConfig, is_loopback

if TYPE_CHECKING:
    from tempering.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/models": "models",
    "/health": "health",
    "/metrics": "metrics",
    "/openapi.json": "openapi",
}
"""Routes by path, as metrics and log name them; any other is `other`."""
PART = 1 << 16
"""Bytes of a reply that a client has `read_timeout_s` to take."""
OPEN = ("health",)
"""What is answered without a token, and while the server is going down."""


class Guard:
    """Admit requests to an application."""

    def __init__(self, app: Any, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.token = None if token is None else _digest(token.encode())
        self.is_draining = False
        """The server is going down: what is under way may end, nothing new begins."""
        self.running = 0
        """Requests that were admitted, and whose replies were not taken yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a request and pass it on, or answer why not."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        route = ROUTES.get(path) or ("models" if path.startswith("/v1/models/") else "other")
        state = scope.setdefault("state", {})
        state["began"] = began = time.monotonic()
        reply = Reply(send, state.get("connection"), self.config.read_timeout_s)
        try:
            await self._answer(scope, receive, reply, route)
        except SlowReader:
            self.metrics.dropped.labels("slow_reader").inc()
            reply.abort()
        finally:
            took = time.monotonic() - began
            self.metrics.requests.labels(route, str(reply.status)).inc()
            self.metrics.seconds.labels(route).observe(took)
            if route not in ("health", "metrics"):
                log(f"{reply.name} {route} {reply.status} {1000 * took:.0f} ms")

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply, route: str) -> None:
        try:
            self._require(scope, route)
            self.running += 1
            try:
                body = await self._body(scope, receive) if scope["method"] == "POST" else b""
                await self.app(scope, _replay(body, receive), reply)
                await reply.taken()
            finally:
                self.running -= 1
        except SlowReader:
            raise
        except ApiError as error:
            await reply.refuse(error)
        except Exception as error:  # a boundary: the server lives on, and no message repeats what was sent
            frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
            log(f"error: {reply.name} {route} {type(error).__name__}; {' < '.join(reversed(frames))}")
            await reply.refuse(ApiError(500, "the server failed; its log says where"))

    def _require(self, scope: Scope, route: str) -> None:
        """Refuse what may not be asked here.

        Raises:
            ApiError: 401, 403, 429 or 503.
        """
        headers = dict(scope["headers"])
        if self.is_draining and route not in OPEN:
            raise ApiError(
                503, "the server is going down and takes no new requests", code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )  # fmt: skip
        if self.token is None:
            # Without a token nothing but its address guards the server, and a page in a browser on this machine could
            # reach it under a name of its own.
            host = headers.get(b"host", b"").decode("latin-1")
            if not _is_own(host, self.config.hosts):
                raise ApiError(
                    403, "this server answers without a token only under the names of the loopback interface; ask "
                    "for http://127.0.0.1, set hosts=[NAME], or give the server a token",
                )  # fmt: skip
        elif route not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self.token):
                raise ApiError(
                    401, "no valid token: send the header Authorization: Bearer TOKEN", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] == "POST" and self.running >= self.config.max_queue:  # before its body takes memory
            raise ApiError(
                429, f"{self.config.max_queue} requests are waiting or being answered; try again later",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body, no more than is allowed and for no longer.

        Raises:
            ApiError: 408, 413 or 415.
        """
        headers, most = dict(scope["headers"]), self.config.max_body_bytes
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(
                415, "send the body as JSON, with the header Content-Type: application/json", code="not_json",
                headers={"Connection": "close"},
            )  # fmt: skip
        too_long = ApiError(
            413, f"the body is longer than {most} bytes; shorten it", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and int(told[:20]) > most:
            raise too_long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.config.read_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "the body broke off", code="incomplete_body")
                    size += len(message.get("body", b""))
                    if size > most:
                        raise too_long
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body was not there within {self.config.read_timeout_s:g} s", code="body_too_slow",
                headers={"Connection": "close"},
            ) from None  # fmt: skip


class SlowReader(Exception):  # noqa: N818  (what a client does)
    """A client took nothing of its reply for too long."""


class Reply:
    """What goes back to one client: each part of it within the time."""

    def __init__(self, send: Send, connection: Any, timeout_s: float) -> None:
        self.send, self.connection, self.timeout_s = send, connection, timeout_s
        self.name = uuid.uuid4().hex[:16]
        """An id that the log has too."""
        self.status, self.has_begun = 500, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send a message of ASGI.

        Raises:
            SlowReader: the client did not take what was sent before.
        """
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.name.encode())]
        body = message.get("body", b"")
        while len(body) > PART:
            await self._in_time(self.send({**message, "body": bytes(body[:PART]), "more_body": True}))
            body = memoryview(body)[PART:]
        await self._in_time(self.send({**message, "body": bytes(body)} if body else message))

    async def taken(self) -> None:
        """Wait until all of it has left this process.

        Raises:
            SlowReader: the client did not take it.
        """
        if self.connection is not None:  # of `protocol.py`; another server has none
            await self._in_time(self.connection.flow.drain())

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, where nothing was answered yet."""
        if self.has_begun:  # a reply has one status: what was begun breaks off
            return
        body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    def abort(self) -> None:
        """Close the connection, whatever is left to send."""
        if self.connection is not None:
            self.connection.transport.abort()

    async def _in_time(self, work: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await work
        except TimeoutError:
            raise SlowReader from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the application the body that was read, and then whatever the connection says."""
    is_given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _digest(secret: bytes) -> bytes:
    """A digest, so that comparing takes the same time whatever the lengths."""
    return hashlib.sha256(secret).digest()


def _is_own(host: str, known: list[str]) -> bool:
    """Whether a Host header names this machine.

    >>> [_is_own(host, ["box"]) for host in ("127.0.0.1:80", "localhost", "[::1]:80", "box:1", "evil.example", "")]
    [True, True, True, True, False, False]
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name.lower()) or name.lower() in known
