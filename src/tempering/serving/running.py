"""`temper serve`: load a target, listen, answer, and go down without dropping anyone who can still be answered.

The door of the package: what it needs beyond the ordinary installation is imported here, and missed here in words.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from tempering.core.progress import say
from tempering.serving.log import log
from tempering.serving.settings import ServeConfig

if TYPE_CHECKING:
    import uvicorn

    from tempering.serving.engine import Engine
    from tempering.serving.guard import Guard

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
LAST_S = 2.0
"""What is left of the grace period for telling those whose answers did not end, and for closing."""


def require_installed() -> None:
    """Make sure that the server's libraries are there.

    Raises:
        ValueError: one is not, with the command that installs them.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"temper serve needs {', '.join(missing)}: pip install 'tempering[serve]'")


def serve(reference: str, config: ServeConfig) -> None:
    """Serve a target until SIGTERM or Ctrl-C.

    Raises:
        ValueError, FileNotFoundError: wrong input, a port that is taken, other machines without a token.
        UnsafeExpertAccess: an attacker or another unsafe artefact, without its flag.
    """
    require_installed()
    token = config.token()
    config.require_guarded(token)
    from tempering.serving.target import open_target

    with listening(config.host, config.port) as listener:
        target = open_target(reference, config)
        run(listener, *assemble(target, config, token), config)


def assemble(target: Any, config: ServeConfig, token: str | None) -> tuple[Guard, Engine]:
    """Put the parts of a server together; nothing runs yet."""
    from tempering.serving.app import create_app
    from tempering.serving.engine import Engine
    from tempering.serving.guard import Guard
    from tempering.serving.metrics import Metrics

    metrics = Metrics()
    engine = Engine(target, config, metrics)
    app = create_app(target, config, engine, metrics)
    guard = app.state.guard = Guard(app, config, token, metrics)
    return guard, engine


def listening(host: str, port: int) -> socket.socket:
    """Take an address; connections wait until the server runs.

    Raises:
        ValueError: it is taken, or none of this machine's.
    """
    listener = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ValueError(
            f"host={host} port={port}: cannot listen there ({error.strerror or error}); give another port, or port=0 "
            "for any that is free"
        ) from None
    return listener


def connected(guard: Guard) -> uvicorn.Config:
    """How uvicorn listens for a guard."""
    import uvicorn

    from tempering.serving.protocol import Protocol

    return uvicorn.Config(
        guard, http=Protocol, ws="none", lifespan="off", access_log=False, log_level="error", server_header=False,
        timeout_keep_alive=5, timeout_graceful_shutdown=1, loop="asyncio",
    )  # fmt: skip


def run(listener: socket.socket, guard: Guard, engine: Engine, config: ServeConfig) -> None:
    """Answer on a socket until a signal ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        """Goes down in two steps: new requests get 503 while those under way end, then it stops."""

        loop: asyncio.AbstractEventLoop | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            say(f"serving {engine.target.name} at http://{name}:{port}/v1")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if guard.is_draining or self.loop is None:
                self.should_exit = self.force_exit = True
                return
            guard.is_draining = True
            asyncio.run_coroutine_threadsafe(self.drain(), self.loop)

        async def drain(self) -> None:
            since = time.monotonic()
            log(f"going down: {guard.running} requests have {config.grace_s:g} s to end")
            while guard.running and time.monotonic() - since < config.grace_s - LAST_S:
                await asyncio.sleep(0.02)
            if guard.running:
                log(f"{guard.running} requests did not end in time and are dropped")
            await asyncio.to_thread(engine.close, LAST_S / 2)
            self.should_exit = True
            await asyncio.sleep(LAST_S / 4)
            self.force_exit = True

    engine.start()
    try:
        asyncio.run(Server(connected(guard)).serve(sockets=[listener]))
    finally:
        if not engine.close():  # it is in a pass that nothing can end: no one waits for what it computes
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(0)
    log("gone")
