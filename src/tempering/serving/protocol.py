"""The connection: uvicorn's protocol over h11, whose errors have OpenAI's form and which says when all was sent.

Used by `running.py`; refuses to know what is asked.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from tempering.serving.errors import ApiError
from tempering.serving.replies import dumped


class Connection(NamedTuple):
    """What a request finds as `connection` in its state."""

    flow: FlowControl
    """`drain()` waits until all that was written has left this process, or the connection is lost."""
    transport: asyncio.Transport


class Protocol(H11Protocol):
    """The server's end of a connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin; from here on writing is paused while anything is left to send, however little."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self.app_state = {**self.app_state, "connection": Connection(self.flow, transport)}

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a reply has begun, and has one status
            self.transport.close()
            return
        body = dumped(ApiError(400, "the request is not valid HTTP", code="invalid_http").body())
        kind = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for part in (h11.Response(status_code=400, headers=kind), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()
