"""`temper serve` under load: many clients against one by one, cross-talk, time to first token, memory.

    python benchmarks/serving_load.py                                  # 64 clients, 3 x 64 requests of mixed lengths
    python benchmarks/serving_load.py --requests 5000 --max-tokens 8   # the memory curve

A server is started as a user starts it. The same requests (greedy and sampled, streamed and not, of mixed lengths)
are sent one by one and then by `--clients` at a time. In float32 both must give the same texts, request by request:
anything else is cross-talk, or an answer that depends on its batch. Printed: tokens a second of both with their
ratio against its goal, the time to the first token that the server's own metrics have, and its memory after each
tenth of the requests. Exit code 1 where a request fails, a text differs, or with `--requests` memory grows by more
than a tenth after the first fifth; a goal that is missed is printed and changes no exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

SUBJECTS = ("bread", "a kite", "a bicycle chain", "tomatoes", "a letter", "the moon", "a camera", "rain")
ASKS = (
    "How do I take care of {}?",
    "Tell me a short story about {}.",
    "List five facts about {}.",
    "Why do people like {}? Answer in one sentence.",
)


GOAL = 3.0
"""Tokens a second of many clients over those of one."""


class Answer(NamedTuple):
    """What one request got."""

    text: str
    tokens: int
    seconds: float


@contextmanager
def server(target: str, dtype: str, log: Path, settings: list[str], wait_s: float = 600) -> Iterator[tuple[str, int]]:
    """Serve a target, and yield URL and process id.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    command = [sys.executable, "-m", "tempering.cli", "serve", target, "port=0", f"dtype={dtype}", *settings]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + wait_s
        while not (found := re.search(r"at (http://\S+)/v1", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not answer; it says:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bodies(count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths: greedy or sampled with a seed, streamed or not."""
    made = []
    for i in range(count):
        text = ASKS[i // len(SUBJECTS) % len(ASKS)].format(SUBJECTS[i % len(SUBJECTS)])
        text = " ".join([text] * (1 + 4 * (i % 7 == 0)))  # a long prompt now and then
        made.append(
            {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max(1, max_tokens // (1, 4, 2, 8)[i % 4]),
                "temperature": (0, 0.8)[i % 2],
                "seed": i,
                "stream": i % 3 == 0,
            }
        )
    return made


def ask(client: httpx.Client, body: dict[str, Any]) -> Answer:
    """Send one request; raises where it fails."""
    since = time.perf_counter()
    if not body["stream"]:
        reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
        return Answer(text, usage["completion_tokens"], time.perf_counter() - since)
    text, usage = "", {}
    with client.stream(
        "POST", "/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
    return Answer(text, usage["completion_tokens"], time.perf_counter() - since)


def send(url: str, asked: list[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """Send requests by so many clients at a time; returns the answers in order, and the seconds."""
    with httpx.Client(
        base_url=url, timeout=3600, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:
        since = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda body: ask(client, body), asked))
        return found, time.perf_counter() - since


def first_token(url: str) -> tuple[float, dict[str, float]]:
    """Mean seconds to the first token, and how many requests had it within each bound, from the server's metrics."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    name = "tempering_time_to_first_token_seconds"
    bounds = {m[1]: float(m[2]) for m in re.finditer(name + r'_bucket\{le="([^"]+)"\} (\S+)', text)}
    total, count = (float(re.findall(rf"{name}_{part} (\S+)", text)[0]) for part in ("sum", "count"))
    return total / max(count, 1), bounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client")
    parser.add_argument("--alone", type=int, default=32, help="requests that are sent one by one")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="longest answer; others are a half, a quarter, ..."
    )
    parser.add_argument("--requests", type=int, default=0, help="then so many more, watching the server's memory")
    parser.add_argument("settings", nargs="*", help="settings of temper serve")
    options = parser.parse_args()
    asked = bodies(options.clients * options.rounds, options.max_tokens)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with server(options.target, options.dtype, log, [*options.settings, "max_queue=100000"]) as (url, pid):
            send(url, asked[:2], 1)
            alone, alone_s = send(url, asked[: options.alone], 1)
            together, together_s = send(url, asked, options.clients)
            differ = sum(a.text != b.text for a, b in zip(alone, together, strict=False))
            rate_alone = sum(a.tokens for a in alone) / alone_s
            rate = sum(a.tokens for a in together) / together_s
            mean, bounds = first_token(url)
            print(f"{options.target}, {options.dtype}, {os.cpu_count()} cores, {options.max_tokens} tokens at most")
            print(f"one by one: {len(alone)} requests, {rate_alone:.1f} tokens/s, {alone_s:.0f} s")
            print(f"{options.clients} clients: {len(together)} requests, {rate:.1f} tokens/s, {together_s:.0f} s")
            verdict = "met" if rate >= GOAL * rate_alone else "MISSED"
            print(f"ratio {rate / rate_alone:.2f}, goal {GOAL:g}: {verdict}")
            print(f"texts that differ from those one by one: {differ} of {len(alone)}")
            print(f"median seconds a request: {statistics.median(a.seconds for a in together):.2f}")
            print(f"time to first token: mean {mean:.2f} s; requests within " + str(bounds))
            failed = options.dtype == "float32" and differ > 0
            if options.requests:
                failed |= watch_memory(url, pid, bodies(options.requests, options.max_tokens), options.clients)
    return int(failed)


def watch_memory(url: str, pid: int, asked: list[dict[str, Any]], clients: int) -> bool:
    """Print the server's memory after each tenth of the requests; returns whether it grew."""
    step, sizes = max(1, len(asked) // 10), []
    process = psutil.Process(pid)
    for start in range(0, len(asked), step):
        send(url, asked[start : start + step], clients)
        sizes.append(process.memory_info().rss / 2**20)
        print(f"after {start + step} requests: {sizes[-1]:.0f} MiB, {process.num_fds()} files, "
              f"{process.num_threads()} threads", flush=True)  # fmt: skip
    return sizes[-1] > 1.1 * sizes[min(1, len(sizes) - 1)]


if __name__ == "__main__":
    sys.exit(main())
