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
        """Requests to the model that were admitted and have not ended."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a request and pass it on, or answer why not."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        route = ROUTES.get(path) or ("models" if path.startswith("/v1/models/") else "other")
        began, status = time.monotonic(), 500
        scope.setdefault("state", {})["request_id"] = name = uuid.uuid4().hex[:16]
        has_begun = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            self._require(scope, route)
            body = await self._body(scope, receive) if scope["method"] == "POST" else b""
            self.running += 1
            try:
                await self.app(scope, _replay(body, receive), sending)
            finally:
                self.running -= 1
        except ApiError as error:
            await _refuse(sending, error, has_begun)
        except Exception as error:  # a boundary: the server lives on, and no message repeats what was sent
            frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
            log(f"error: {name} {route} {type(error).__name__}; {' < '.join(reversed(frames))}")
            await _refuse(sending, ApiError(500, "the server failed; its log says where"), has_begun)
        finally:
            took = time.monotonic() - began
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(took)
            if route not in ("health", "metrics"):
                log(f"{name} {route} {status} {1000 * took:.0f} ms")

    def _require(self, scope: Scope, route: str) -> None:
        """Refuse what may not be asked here.

        Raises:
            ApiError: 401, 403 or 503.
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


async def _refuse(send: Send, error: ApiError, has_begun: bool) -> None:
    if has_begun:  # a reply has one status: what was begun breaks off
        return
    body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


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
