"""A tiny random model behind a real server on the loopback interface, in a thread of the test process."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from tempering.core.policy import Policy
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.serving.running import assemble, connected, listening
from tempering.serving.settings import ServeConfig
from tempering.serving.target import describe


@pytest.fixture(autouse=True)
def needs_the_extra():
    pytest.importorskip("fastapi", reason="the extra serve is not installed")


class Served:
    """A running server: where it is, and its parts."""

    def __init__(self, port, guard, engine, client):
        self.port, self.guard, self.engine, self.client = port, guard, engine, client

    def chat(self, text="how do I stone?", **body):
        return self.client.post("/v1/chat/completions", json=asked(text, **body))

    @property
    def is_answering(self):
        """Whether an answer is under way; one that its asker has already may be listed for a moment more."""
        return any(not choice.job.is_over for choice in self.engine._stepping.live)

    def until_answering(self):
        while not self.is_answering:
            time.sleep(0.002)

    def metric(self, name, **labels):
        return self.engine.metrics.registry.get_sample_value(f"tempering_{name}", labels) or 0.0


def asked(text, **body):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **body}


@contextmanager
def _serving(sampler, token=None, name="tiny", send_buffer=None, **settings):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    import uvicorn

    config = ServeConfig(name=name, **settings)
    listener = listening("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    guard, engine = assemble(describe(name, sampler, config), config, token)
    server = uvicorn.Server(connected(guard))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    engine.start()
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = listener.getsockname()[1]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False
        ) as client:
            yield Served(port, guard, engine, client)
    finally:
        server.should_exit = True
        thread.join()
        assert engine.close()


@pytest.fixture(scope="session")
def serving():
    """A function: sampler (and settings) -> a context with a running server."""
    return _serving


@pytest.fixture(scope="session")
def tiny_sampler(tiny_model_dir):
    policy = Policy.load(str(tiny_model_dir("llama", scale=3.0)), dtype="float32", device="cpu")
    policy.base.generation_config.eos_token_id = [2, *range(5, 9)]
    return LocalSampler(policy)


@pytest.fixture(scope="session")
def server(tiny_sampler):
    with _serving(tiny_sampler, max_body_bytes=100_000, max_tokens=64, default_max_tokens=12) as served:
        yield served


class Held(ScriptedSampler):
    """Answers when it is told to."""

    def __init__(self):
        super().__init__(lambda p, i: "done")
        self.gate, self.entered = threading.Event(), threading.Event()

    def __call__(self, prompts, **settings):
        self.entered.set()
        assert self.gate.wait(20)
        return super().__call__(prompts, **settings)


@pytest.fixture
def held():
    """A sampler whose calls wait until its `gate` is set."""
    return Held()
