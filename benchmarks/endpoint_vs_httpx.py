"""Our `EndpointSampler` against a bare `httpx.AsyncClient` loop: requests a second, on a server without faults.

    python benchmarks/endpoint_vs_httpx.py                    # 2,000 requests a side, 7 pairs, 16 at a time
    python benchmarks/endpoint_vs_httpx.py --requests 500 --pairs 5 --concurrency 64 --stream

The server is a process of its own on this machine and answers each request after 5 ms. Both sides ask the same
prompts, as many at a time, in turn (A B B A ...), and take text out of the reply's JSON; ours also keeps order,
retries, counts tokens and, with --cache, writes each answer to disk. Printed: the median ratio of the pairs and its
range. The bare loop: one client, one task per request, a semaphore, `await client.post(...)`, `response.json()`.
httpx looks for the package `sniffio` at every lock; where that is missing, a stand-in spares the loop the search.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import types
from multiprocessing.connection import Connection
from typing import Any

import httpx

from tempering.core.endpoint import EndpointSampler
from tempering.core.records import Prompt

LATENCY_S = 0.005
TARGET = 0.9


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection's requests, one after the other, each with its own prompt."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            await asyncio.sleep(LATENCY_S)
            content, kind = reply(body)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(content), content)
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def reply(body: dict[str, Any]) -> tuple[bytes, bytes]:
    text = "You asked: " + body["messages"][-1]["content"]
    usage = {"prompt_tokens": 20, "completion_tokens": 40, "total_tokens": 60}
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode(), b"application/json"
    deltas = [{"delta": {"content": word + " "}, "finish_reason": None} for word in text.split()]
    chunks = [{"choices": [delta]} for delta in [*deltas, {"delta": {}, "finish_reason": "stop"}]]
    lines = [json.dumps(chunk) for chunk in [*chunks, {"choices": [], "usage": usage}]] + ["[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines).encode(), b"text/event-stream"


def serve(port: Connection) -> None:
    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def bare(url: str, texts: list[str], concurrency: int) -> list[str]:
    sys.modules.setdefault("sniffio", types.SimpleNamespace(current_async_library=lambda: "asyncio"))  # type: ignore
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    slots = asyncio.Semaphore(concurrency)

    async def ask(text: str) -> str:
        body = {
            "model": "m", "messages": [{"role": "user", "content": text}], "seed": 0, "max_tokens": 256,
            "temperature": 0.0, "top_p": 1.0,
        }  # fmt: skip
        async with slots:
            response = await client.post(f"{url}/chat/completions", json=body)
        return response.json()["choices"][0]["message"]["content"]

    async with httpx.AsyncClient(timeout=30, limits=limits) as client:
        return await asyncio.gather(*map(ask, texts))


def ours(url: str, texts: list[str], options: argparse.Namespace) -> list[str]:
    settings: dict[str, Any] = {"stream": True} if options.stream else {}
    with tempfile.TemporaryDirectory() as folder:
        if options.cache:
            settings["cache"] = folder
        sampler = EndpointSampler(f"openai:m@{url}", concurrency=options.concurrency, **settings)
        groups = sampler([Prompt(({"role": "user", "content": text},)) for text in texts])
    return [group[0].text.rstrip() for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--stream", action="store_true", help="ours streams; the bare loop never does")
    parser.add_argument("--cache", action="store_true", help="ours keeps the answers on disk")
    options = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    texts = [f"question {i}: what weighs more, a pound of feathers or of iron?" for i in range(options.requests)]
    sides = {
        "bare httpx": lambda: asyncio.run(bare(url, texts, options.concurrency)),
        "ours": lambda: ours(url, texts, options),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(options.pairs + 1):  # the first warms up
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            started = time.perf_counter()
            answers = sides[name]()
            seconds = time.perf_counter() - started
            assert answers == [f"You asked: {text}" for text in texts], f"{name}: an answer is not to its question"
            if pair:
                rates[name].append(len(texts) / seconds)
    server.terminate()
    server.join()
    for name, values in rates.items():
        print(f"{name:<11} {statistics.median(values):7.0f} requests/s  ({min(values):.0f} - {max(values):.0f})")
    ratio = [b / a for a, b in zip(rates["bare httpx"], rates["ours"], strict=True)]
    print(
        f"ours / bare {statistics.median(ratio):7.2f}  ({min(ratio):.2f} - {max(ratio):.2f}), {len(ratio)} pairs, "
        f"target {TARGET}; {options.requests} requests a side, {options.concurrency} at a time"
    )


if __name__ == "__main__":
    main()
