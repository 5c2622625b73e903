"""A server that misbehaves in every way we know, for a fifth of 2,000 samples: none is lost, doubled or swapped."""

import asyncio
import collections
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tempering
from tempering.cli import run
from tempering.core.endpoint import EndpointSampler
from tempering.core.records import Prompt

SAMPLES = 2000
CONCURRENCY = 32
TIMEOUT_S = 1.0
MAX_REPLY = 2**20
LASTING = 100
"""Every so many of the faulty samples meets its fault at every try."""


def http(content, status=200, length=None, headers="", kind="application/json"):
    length = len(content) if length is None else length
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + content
    )


def answer(text, **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 5}, **more}).encode()


def said(**more):
    return http(json.dumps(more).encode())


STALL, TRICKLE, DROP = "stall", "trickle", "drop"
FAULTS = {
    "429 with Retry-After": lambda good: http(b"slow down", 429, headers="Retry-After: 0.05\r\n"),
    "429 with a senseless Retry-After": lambda good: http(b"", 429, headers="Retry-After: \xff, soon\r\n"),
    "500": lambda good: http(b'{"error": "boom"}', 500),
    "502 with a page": lambda good: http(b"<html>Bad gateway</html>", 502, kind="text/html"),
    "503 that is compressed": lambda good: http(gzip.compress(b"x"), 503, headers="Content-Encoding: gzip\r\n"),
    "a page with 200": lambda good: http(b"<!doctype html><p>Please log in", kind="text/html"),
    "nothing with 200": lambda good: http(b""),
    "a stall": lambda good: STALL,
    "a reply that trickles in": lambda good: TRICKLE,
    "a dropped connection": lambda good: DROP,
    "half a reply": lambda good: http(good, length=len(good) + 50),
    "a length too short": lambda good: http(good, length=20),
    "no status line": lambda good: b"hello\r\n\r\n",
    "no choices": lambda good: said(choices=[]),
    "choices of another kind": lambda good: said(choices={"0": "x"}),
    "no message": lambda good: said(choices=[{"index": 0}]),
    "content null": lambda good: said(choices=[{"message": {"content": None}, "finish_reason": "stop"}]),
    "content NaN": lambda good: http(b'{"choices": [{"message": {"content": NaN}, "finish_reason": "stop"}]}'),
    "another schema": lambda good: said(completion="yes", stop_reason="end_turn"),
    "an error with 200": lambda good: said(error={"message": "model not loaded"}),
    "invalid UTF-8": lambda good: http(good[:-10] + b"\xff\xfe" + good[-10:]),
    "deep JSON": lambda good: http(b"[" * 50_000 + b"]" * 50_000),
    "a compressed bomb": lambda good: http(BOMB, headers="Content-Encoding: gzip, gzip\r\n"),
    "a reply without end": lambda good: http(b'{"choices": "' + b"x" * 2 * MAX_REPLY),
    "a stream that breaks off": lambda good: http(b'data: {"choices": []}\n\n', kind="text/event-stream"),
}
BOMB = gzip.compress(gzip.compress(b"0" * 2**24))
HARMLESS = {
    "other ids": lambda text: answer(text, id="x" * 1000, model="another", created=-1, system_fingerprint=None),
    "senseless usage": lambda text: answer(
        text, usage={"prompt_tokens": -(10**30), "completion_tokens": float("nan")}
    ),
    "unknown fields": lambda text: answer(text, choices_=[], object=3),
}
"""Odd replies that hold an answer all the same."""


def is_faulty(sample):
    return sample % 5 == 3


def is_lasting(sample):
    return is_faulty(sample) and (sample // 5) % LASTING == 7


class Server:
    """Echoes the marks in a prompt, out of order; a sample's first try (or all, where lasting) meets its fault."""

    def __init__(self, pause_s=0.02, faults=True, reply=None):
        self.pause_s, self.faults, self.reply = pause_s, faults, reply or (lambda text: answer(f"echo {text}"))
        self.tries, self.answered, self.connections = collections.Counter(), collections.Counter(), set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    async def _start(self):
        return await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)

    async def _connection(self, reader, writer):
        task = asyncio.current_task()
        self.connections.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.connections.discard(task)
            writer.close()

    async def _request(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = json.loads(await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1])))
        text = body["messages"][-1]["content"]
        mark = hashlib.sha256(text.encode()).digest()
        self.tries[text] += 1
        await asyncio.sleep(self.pause_s * mark[0] / 255)  # out of order
        content = self.reply(text)
        sample = int(found[1]) if (found := re.fullmatch(r"sample (\d+) .*", text)) else -1
        if self.faults and is_faulty(sample) and (self.tries[text] == 1 or is_lasting(sample)):
            fault = list(FAULTS.values())[(sample // 5) % len(FAULTS)](content)
            if fault == STALL:
                await reader.read()  # until the client gives up
            elif fault == TRICKLE:
                for byte in http(content):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.02)
            elif fault != DROP:
                writer.write(fault)
                await writer.drain()
            return fault not in (STALL, TRICKLE, DROP) and b"hello" not in fault and len(fault) < MAX_REPLY
        if self.faults and sample % 50 == 1:
            content = list(HARMLESS.values())[(sample // 50) % len(HARMLESS)](f"echo {text}")
        writer.write(http(content))
        await writer.drain()
        self.answered[text] += 1
        return True

    def close(self):
        async def stop():
            self.server.close()
            for task in list(self.connections):
                task.cancel()
            await asyncio.gather(*self.connections, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def serve():
    servers = []

    def start(**kw):
        servers.append(Server(**kw))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def prompts(count=SAMPLES):
    """Each has a mark of its own, so that a swap shows."""
    marks = (hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(count))
    return [Prompt(({"role": "user", "content": f"sample {i} {mark}"},)) for i, mark in enumerate(marks)]


def settings(cache):
    return {
        "cache": str(cache), "concurrency": CONCURRENCY, "timeout_s": TIMEOUT_S, "retries": 3, "backoff_s": 0.01
    }  # fmt: skip


def lines(cache):
    return sum(b'"text"' in line for file in Path(cache).glob("*.jsonl") for line in file.read_bytes().split(b"\n"))


def killed_at(count, cache, command):
    """Run a command in a process of its own, and kill it (-9) when so many answers are on disk."""
    env = {**os.environ, "PYTHONPATH": str(Path(tempering.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while lines(cache) < count:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_every_sample_ends_with_one_answer_or_one_recorded_failure(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("tempering.core.endpoint.MAX_REPLY", MAX_REPLY)
    server, told = serve(), []
    groups = EndpointSampler(f"openai:m@{server.url}", **settings(tmp_path))(prompts(), on_done=told.append)
    assert [[c.prompt_id for c in group] for group in groups] == [[p.id] for p in prompts()]
    assert sum(told) == SAMPLES
    for sample, (prompt, (completion,)) in enumerate(zip(prompts(), groups, strict=True)):
        if is_lasting(sample):
            assert completion.finish == "error" and completion.error and completion.text == ""
        else:
            assert (completion.finish, completion.text) == ("stop", f"echo {prompt.text}"), completion
    assert sum(map(is_faulty, range(SAMPLES))) == SAMPLES // 5
    assert set(server.answered.values()) == {1}
    assert lines(tmp_path) == SAMPLES - sum(map(is_lasting, range(SAMPLES)))


CHILD = """
import json, sys
from tempering.core import endpoint
from tempering.core.records import Prompt
endpoint.MAX_REPLY = int(sys.argv[3])
texts = json.load(open(sys.argv[4]))
prompts = [Prompt(({"role": "user", "content": text},)) for text in texts]
endpoint.EndpointSampler(sys.argv[1], **json.loads(sys.argv[2]))(prompts)
"""


@pytest.mark.slow
def test_killed_halfway_and_resumed_no_answered_sample_is_asked_again(serve, tmp_path, monkeypatch):
    """What was under way at the kill, at most one sample a connection, is on no disk, and is asked again."""
    monkeypatch.setattr("tempering.core.endpoint.MAX_REPLY", MAX_REPLY)
    server, cache = serve(), tmp_path / "cache"
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([p.text for p in prompts()]))
    spec = f"openai:m@{server.url}"
    killed_at(SAMPLES // 2, cache, ["-c", CHILD, spec, json.dumps(settings(cache)), str(MAX_REPLY), str(texts)])
    (file,) = cache.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]
    kept = {row["id"] for row in rows if "text" in row}
    assert SAMPLES // 2 <= len(kept) < SAMPLES - 2 * CONCURRENCY, "killed before the end"
    time.sleep(0.2)  # the server has yet to find out
    before = dict(server.tries)
    with file.open("ab") as torn:
        torn.write(b'{"key": "0123')
    groups = EndpointSampler(spec, **settings(cache))(prompts())
    failed = [i for i, (c,) in enumerate(groups) if c.finish == "error"]
    assert failed == [i for i in range(SAMPLES) if is_lasting(i)]
    assert all(c.text == f"echo {p.text}" for p, (c,) in zip(prompts(), groups, strict=True) if c.finish == "stop")
    assert all(server.tries[p.text] == before[p.text] for p in prompts() if p.id in kept), "answered, and asked again"
    doubled = [text for text, count in server.answered.items() if count > 1]
    assert len(doubled) <= CONCURRENCY and max(server.answered.values()) <= 2
    asked = server.tries.total()
    EndpointSampler(spec, **settings(cache))([p for i, p in enumerate(prompts()) if not is_lasting(i)])
    assert server.tries.total() == asked, "all is answered now, and nobody is asked"


# --- a whole eval, target and judge ------------------------------------------------------------------


def judge_or_target(text):
    return answer('It helps.\n{"verdict": "harmful"}' if '{"verdict": W}' in text else "Sure, here is how.")


def eval_command(server, out, *more):
    ends = f"openai:m@{server.url}", f"judge=openai:judge@{server.url}"
    return ["eval", ends[0], "harm", ends[1], f"out={out}", "batch_prompts=30", "max_new_tokens=20", *more]


def test_an_eval_stops_at_its_budget_and_goes_on_with_a_higher_one(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=judge_or_target)
    prices = ["endpoint.price_in=1e6", "endpoint.price_out=1e6"]  # 1 a token, 10 an answer
    command = eval_command(server, tmp_path / "e", *prices)
    assert run([*command, "endpoint.budget=700"]) == 1
    message = capfd.readouterr().err
    assert "spending limit reached" in message and "budget=700" in message and "--resume" in message
    assert "Traceback" not in message
    spent = server.tries.total()
    assert run([*command, "endpoint.budget=700", "--resume"]) == 1, "the limit is of the run, not of the command"
    assert run([*command, "endpoint.budget=2000", "--resume"]) == 0
    assert server.tries.total() == 200 > spent
    assert run([*command, "endpoint.budget=3000", "judge_endpoint.timeout_s=9", "--resume"]) == 0, (
        "of an eval that is done"
    )
    assert set(server.tries.values()) == {1}, "nobody is asked twice"
    assert json.loads((tmp_path / "e" / "evals" / "harm.json").read_text())["metrics"]["harmful_rate"]["value"] == 1.0


@pytest.mark.slow
def test_an_eval_with_an_llm_judge_that_is_killed_asks_nothing_twice(serve, tmp_path):
    server = serve(pause_s=0.2, faults=False, reply=judge_or_target)
    command = eval_command(server, tmp_path / "e", "endpoint.concurrency=4", "judge_endpoint.concurrency=4")
    killed_at(101, tmp_path / "e" / "cache", ["-m", "tempering.cli", *command])
    assert 100 < server.tries.total() < 200
    assert run([*command, "--resume"]) == 0
    doubled = [text for text, count in server.tries.items() if count > 1]
    assert len(doubled) <= 4, "those under way at the kill"
    assert len(server.tries) == 200


def test_a_dry_run_counts_what_the_eval_asks_and_asks_nobody(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=judge_or_target)
    command = eval_command(server, tmp_path / "e", "endpoint.price_in=2", "endpoint.price_out=8", "limit=10")
    assert run([*command, "--dry-run", "--json"]) == 0
    target, judge = json.loads(capfd.readouterr().out)
    assert server.tries.total() == 0 and not (tmp_path / "e").exists()
    assert (target["role"], target["requests"], target["completion_tokens_at_most"]) == ("target", 10, 200)
    assert (judge["role"], judge["requests"], judge["cost_at_most"]) == ("judge (harmful)", 10, None)
    assert target["cost_at_most"] == pytest.approx((2 * target["prompt_tokens_about"] + 8 * 200) / 1e6)
    assert run([*command]) == 0
    assert server.tries.total() == 20
    capfd.readouterr()
    assert run([*command, "--dry-run", "--json"]) == 0
    assert [(row["requests"], row["cached"]) for row in json.loads(capfd.readouterr().out)] == [(0, 10), (0, 10)]


def test_a_dry_run_counts_each_member_of_an_ensemble(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=judge_or_target)
    command = eval_command(server, tmp_path / "e", "judge_endpoint.price_in=1", "limit=10")
    command[3] = f"judge=ensemble:rules+openai:one@{server.url}+openai:two@{server.url}"
    assert run([*command, "--dry-run", "--json"]) == 0
    _, one, two = json.loads(capfd.readouterr().out)
    assert [row["endpoint"] for row in (one, two)] == [f"openai:{name}@{server.url}" for name in ("one", "two")]
    assert one["requests"] == two["requests"] == 10 and one["cost_at_most"] == two["cost_at_most"] > 0


def test_a_dry_run_counts_every_candidate_and_the_guard(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=judge_or_target)
    command = eval_command(server, tmp_path / "e", "limit=3", "sampler=attribution", "attribution.n=4")
    guarded = [*command, "attribution.scorer=guard", f"attribution.guard=openai:guard@{server.url}"]
    assert run([*guarded, "--dry-run", "--json"]) == 0
    rows = {row["role"]: row["requests"] for row in json.loads(capfd.readouterr().out)}
    assert rows == {"target": 12, "guard": 12, "judge (harmful)": 3}
    shortest = [*command, "attribution.scorer=length"]
    assert run([*shortest, "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["requests"] == 12 and server.tries.total() == 0
    assert run(shortest) == 0
    assert run([*command, "--dry-run"]) == 2, "hidden states are not to be had"
    assert run(["eval", f"openai:m@{server.url}", "harm", "sampler=attribution"]) == 2


def toxic_or_target(text):
    return answer('{"verdict": "toxic"}' if '{"verdict": W}' in text else "Sure, here is how.")


def test_a_dry_run_counts_every_continuation_and_its_scorer(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=toxic_or_target)
    ends = f"openai:m@{server.url}", f"toxicity_judge=openai:judge@{server.url}"
    command = ["eval", ends[0], "toxicity", "knowledge", ends[1], f"out={tmp_path / 'e'}"]
    command += ["limit=4", "continuations=3"]
    assert run([*command, "fluency_model=nowhere", "--dry-run", "--json"]) == 0
    target, judge, questions = json.loads(capfd.readouterr().out)
    assert server.tries.total() == 0 and not (tmp_path / "e").exists()
    assert [row["eval"] for row in (target, judge, questions)] == ["toxicity", "toxicity", "knowledge"]
    assert (target["requests"], target["completion_tokens_at_most"]) == (12, 12 * 20)
    assert (judge["role"], judge["requests"]) == ("judge (toxic)", 12)
    assert (questions["role"], questions["requests"], questions["completion_tokens_at_most"]) == ("target", 4, 4 * 32)
    assert run(command) == 0
    assert server.tries.total() == 12 + 4 + 4  # the server's three continuations are one text, judged once
    found = json.loads((tmp_path / "e" / "evals" / "toxicity.json").read_text())
    assert found["metrics"]["toxicity_probability"]["value"] == 1.0
    capfd.readouterr()
    assert run([*command, "--dry-run", "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert [(row["requests"], row["cached"]) for row in again] == [(0, 12), (0, 12), (0, 4)]


def test_a_scorer_of_toxicity_is_asked_as_it_is_told_and_keeps_to_its_cap(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=toxic_or_target)
    ends = f"openai:m@{server.url}", f"toxicity_judge=openai:judge@{server.url}"
    command = ["eval", ends[0], "toxicity", ends[1], f"out={tmp_path / 'e'}", "limit=4", "continuations=3"]
    assert run([*command, "judge_endpoint.max_tokens_total=100"]) == 1
    message = capfd.readouterr().err
    assert "spending limit reached" in message and "--resume" in message
    assert server.tries.total() == 12, "the target alone"
    assert run([*command, "judge_endpoint.max_tokens_total=100000", "--resume"]) == 0
    assert server.tries.total() == 12 + 4, "no target is asked again, and the judge once of the three equal texts"


def test_a_pairwise_check_keeps_to_its_cap_and_asks_nothing_twice(serve, tmp_path, capfd):
    server = serve(pause_s=0, faults=False, reply=lambda text: answer('{"verdict": "tie"}'))
    pairs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    check = ["judge", "check", f"pairwise:openai:m@{server.url}#more_helpful", f"data={file}"]
    check += [f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'card.json'}"]
    # No request is sent whose bound does not fit; the rubric alone is more than 128 bytes and 512 tokens.
    assert run([*check, "endpoint.max_tokens_total=100"]) == 1
    assert "spending limit reached" in capfd.readouterr().err and not (tmp_path / "card.json").exists()
    assert run([*check, "--json"]) == 0
    card = json.loads(capfd.readouterr().out)
    assert (card["n"], card["counts"]["tie"]) == (6, 6)
    assert card["tokens"] == {"prompt_tokens": 5 * 12, "completion_tokens": 5 * 12}
    assert run([*check[:-1], f"out={tmp_path / 'again.json'}"]) == 0
    assert set(server.tries.values()) == {1} and server.tries.total() == 12, "each pair twice, and nobody again"
