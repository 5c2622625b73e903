"""The application: OpenAI's routes over an engine.

Refuses to know how answers are made; who may ask is `guard.py`'s business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tempering.serving.asking import prepare
from tempering.serving.engine import Engine
from tempering.serving.errors import ApiError, ErrorReply, of_validation
from tempering.serving.jobs import Ended, Job, Wrote
from tempering.serving.metrics import Metrics
from tempering.serving.replies import Replies, comment, dumped, event
from tempering.serving.schema import ChatRequest, CompletionRequest
from tempering.serving.settings import ServeConfig
from tempering.serving.target import Target

POLL_S = 0.5
"""A client that has gone is noticed so soon."""
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "A field that is missing, wrong, or beyond a limit.",
        401: "No valid token.",
        403: "Not under this name without a token.",
        404: "No such model.",
        408: "The body did not come in time.",
        413: "The body is too long.",
        415: "The body is not JSON.",
        429: "Too many requests wait.",
        503: "The server is going down.",
        504: "The answer took too long.",
    }.items()
}


def create_app(target: Target, config: ServeConfig, engine: Engine, metrics: Metrics) -> FastAPI:
    """Make the application; `engine` is started by whoever runs it."""
    # Its pages of documentation would load scripts of others; the description itself stays.
    app = FastAPI(
        title="tempering", description="A tempered model.", docs_url=None, redoc_url=None, redirect_slashes=False
    )  # fmt: skip
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    started = int(time.time())

    async def reply(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        ask = await asyncio.get_running_loop().run_in_executor(encoder, prepare, target, config, body)
        job = Job(ask, since=request.state.began, streams=bool(body.stream))
        engine.submit(job)
        replies = Replies(target, job.ask, is_chat=isinstance(body, ChatRequest))
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _events(job, replies, config, metrics, usage)
            return EventStream(job, events, metrics, target.buffers)
        return await _whole(job, replies, request, config, metrics)

    @app.post("/v1/chat/completions", responses=FAULTS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await reply(body, request)

    @app.post("/v1/completions", responses=FAULTS, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, without the chat template."""
        return await reply(body, request)

    def card() -> dict[str, Any]:
        about = {"id": target.name, "object": "model", "created": started, "owned_by": "tempering"}
        return about | {"tempering": target.card()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the model that is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}", responses={404: FAULTS[404]})
    async def model(model: str) -> dict[str, Any]:
        """Say what a model can be asked for."""
        if model != target.name:
            raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
        return card()

    @app.get("/health")
    async def health() -> Response:
        """Say that requests are taken; 503 while the server is going down, or where it cannot answer any more."""
        state = "ok" if engine.is_alive else "dead"
        if app.state.guard is not None and app.state.guard.is_draining:
            state = "draining"
        return _json({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        """Counters, in Prometheus' format."""
        metrics.under_way.set(engine.under_way)
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _json(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _json(of_validation(error.errors()).body(), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing at this path", 405: "this path does not take this method"}
        fault = ApiError(error.status_code, words.get(error.status_code, "the request cannot be read"))
        return _json(fault.body(), fault.status, dict(error.headers or {}))

    app.state.guard = None
    return app


class EventStream(Response):
    """Server-sent events, until they end, or the client goes away or is cut off."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[bytes], metrics: Metrics, buffers: str | None) -> None:
        self.status_code, self.background, self.charset = 200, None, "utf-8"
        self.job, self.events, self.metrics = job, events, metrics
        told = {"X-Tempering-Buffers": buffers} if buffers else {}
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **told})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events; what is left of the work is dropped where nobody takes them."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def all_events() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        writes, watches = asyncio.ensure_future(all_events()), asyncio.ensure_future(watch())
        try:
            done, _ = await asyncio.wait([writes, watches], return_when=asyncio.FIRST_COMPLETED)
            if writes in done:
                writes.result()
            elif not self.job.is_over:
                self.metrics.dropped.labels("disconnect").inc()
        finally:
            for task in (writes, watches):
                task.cancel()
            await asyncio.gather(writes, watches, return_exceptions=True)
            self.job.cancel()


async def _events(
    job: Job, replies: Replies, config: ServeConfig, metrics: Metrics, with_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream, with comments where nothing else is sent."""
    ended: list[Ended] = []
    if buffers := replies.target.buffers:
        yield comment(buffers)
    for piece in replies.begins():
        yield event(piece)
    while len(ended) < len(job.choices):
        found = await job.next(min(config.keepalive_s, max(0.0, _left(job, config))))
        if fault := _fault(job, config):
            job.cancel()
            yield event(fault.body())
            return
        if not found:
            yield comment("waiting")
        for one in found:
            if isinstance(one, ApiError):
                yield event(one.body())
                return
            if isinstance(one, Ended):
                ended.append(one)
            yield event(replies.ends(one) if isinstance(one, Ended) else replies.goes_on(one))
    if with_usage:
        yield event(replies.tells_usage(ended))
    metrics.count(replies.usage(ended), job.first_s)
    yield b"data: [DONE]\n\n"


async def _whole(job: Job, replies: Replies, request: Request, config: ServeConfig, metrics: Metrics) -> Response:
    """All of the answers in one reply.

    Raises:
        ApiError: the target failed, it took too long, or nobody waits any more.
    """
    wrote: list[Wrote] = []
    ended: list[Ended] = []
    try:
        while len(ended) < len(job.choices):
            found = await job.next(min(POLL_S, max(0.0, _left(job, config))))
            if fault := _fault(job, config):
                raise fault
            if not found and await request.is_disconnected():
                metrics.dropped.labels("disconnect").inc()
                raise ApiError(499, "the client has gone")
            for one in found:
                if isinstance(one, ApiError):
                    raise one
                if isinstance(one, Ended):
                    ended.append(one)
                else:
                    wrote.append(one)
    finally:
        job.cancel()
    metrics.count(replies.usage(ended), job.first_s)
    return _json(replies.whole(wrote, ended))


def _left(job: Job, config: ServeConfig) -> float:
    return job.since + config.timeout_s - time.monotonic()


def _fault(job: Job, config: ServeConfig) -> ApiError | None:
    """Why a job is not waited for any longer."""
    if job.is_cancelled:
        return ApiError(503, "the server is going down and did not finish this answer", code="shutting_down")
    if _left(job, config) <= 0:
        return ApiError(504, f"the answer took longer than {config.timeout_s:g} s", code="timeout")
    return None


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumped(content), status, headers, media_type="application/json")
