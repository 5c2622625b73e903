"""The command itself, in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def process(tiny_model_dir, tmp_path):
    """A function: settings -> (process, its URL, its log)."""
    started = []

    def start(*settings, env=None):
        log = tmp_path / f"log{len(started)}"
        command = [sys.executable, "-m", "tempering.cli", "serve", str(tiny_model_dir("llama", scale=3.0)), "port=0"]
        with log.open("wb") as out:
            one = subprocess.Popen(
                [*command, "dtype=float32", "name=tiny", *settings],
                stdout=out,
                stderr=out,
                env=os.environ | (env or {}),
            )
        started.append(one)
        while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
            assert one.poll() is None, log.read_text()
            time.sleep(0.05)
        return one, found[1], log

    yield start
    for one in started:
        one.kill()
        one.wait()


def ask(url, replies, **body):
    with httpx.Client(trust_env=False, timeout=60) as client:
        try:
            reply = client.post(
                f"{url}/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "how do I stone?"}], "temperature": 1.0, **body},
            )
            replies.append(reply)
        except httpx.TransportError as error:  # the listener is closed once nothing runs any more
            replies.append(error)


def under_load(url, **body):
    replies = []
    threads = [threading.Thread(target=ask, args=(url, replies), kwargs={"seed": i, **body}) for i in range(16)]
    for thread in threads:
        thread.start()
    with httpx.Client(trust_env=False) as client:
        while admitted(client.get(f"{url}/metrics").text) < len(threads):
            time.sleep(0.005)
    return replies, threads


def admitted(metrics):
    """Requests that are under way or were answered: whoever comes later is refused by a server that goes down."""
    counts = re.findall(r"\ntempering_requests_(?:under_way|total{route=\"chat\",[^}]*}) (\S+)", metrics)
    return sum(map(float, counts))


def test_sigterm_under_load_lets_running_requests_end_and_refuses_new_ones(process):
    one, url, log = process("grace_s=60")
    replies, threads = under_load(url, max_tokens=450)
    one.send_signal(signal.SIGTERM)
    while "going down" not in log.read_text():
        time.sleep(0.005)
    late = []
    ask(url, late, max_tokens=1)
    for thread in threads:
        thread.join()
    assert one.wait(30) == 0
    assert [reply.status_code for reply in replies] == [200] * 16
    assert late[0].status_code == 503 and late[0].json()["error"]["code"] == "shutting_down"
    assert "Traceback" not in log.read_text()


def test_a_long_reply_is_sent_to_its_end_before_the_server_is_gone(process):
    """Several MiB to a client that does not read for a while: more than the system keeps for it."""
    one, url, log = process("grace_s=60")
    body = {"messages": [{"role": "user", "content": "how do I stone?"}], "temperature": 1.0, "seed": 1}
    content = json.dumps(body | {"n": 16, "max_tokens": 450, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        wire.settimeout(60)
        wire.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        wire.sendall(head.encode() + b"Connection: close\r\nContent-Type: application/json\r\n\r\n" + content)
        found = wire.recv(100)
        one.send_signal(signal.SIGTERM)
        time.sleep(4)
        assert one.poll() is None
        while part := wire.recv(1 << 16):
            found += part
    reply = json.loads(found.partition(b"\r\n\r\n")[2])
    assert len(reply["choices"]) == 16 and len(found) > 4 << 20
    assert one.wait(30) == 0 and "Traceback" not in log.read_text()


def test_what_does_not_end_within_the_grace_period_is_dropped(process):
    one, url, log = process("grace_s=3", "max_tokens=480")
    replies, threads = under_load(url, max_tokens=450)
    since = time.monotonic()
    one.send_signal(signal.SIGTERM)
    assert one.wait(30) == 0 and time.monotonic() - since < 6
    for thread in threads:
        thread.join()
    assert {getattr(reply, "status_code", 503) for reply in replies} <= {200, 503}
    assert "Traceback" not in log.read_text()


def test_the_answers_of_the_command_are_those_of_the_target_and_its_token_is_asked_for(process, tiny_model_dir):
    from tempering.api import load
    from tempering.core.records import Prompt, as_messages

    token = "a-token-of-some-length"
    _, url, log = process(env={"TEMPER_SERVE_TOKEN": token})
    replies = []
    ask(url, replies)
    assert replies[0].status_code == 401
    text = "how do I stone?"
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        reply = client.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20},
        ).json()
    target = load(str(tiny_model_dir("llama", scale=3.0)), dtype="float32")
    [[own]] = target([Prompt(as_messages(text))], max_new_tokens=20)
    assert reply["choices"][0]["message"]["content"] == own.text and reply["model"] == "tiny"
    assert token not in log.read_text() and json.dumps(text)[1:-1] not in log.read_text()
