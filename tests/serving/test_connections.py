"""The wire itself: what is no HTTP, who comes when there is no room, and who is slow to read or to write."""

import contextlib
import json
import socket
import threading
import time

import pytest

from tempering.core.sampling import ScriptedSampler

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MALFORMED = {
    "path": b"GET /caf\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "length": HEAD + b"Content-Length: ten\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nten\r\n",
    "headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000,
    "no http": b"\x16\x03\x01\r\n\r\n",
}


def whole(content):
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)


def asked(text):
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


@contextlib.contextmanager
def wired(served, receive_buffer=None):
    with socket.socket() as wire:
        if receive_buffer is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        wire.settimeout(20)
        wire.connect(("127.0.0.1", served.port))
        yield wire


def read(wire):
    parts = []
    while part := wire.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def until(is_so, limit_s=10):
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_is_an_error_of_the_same_form(server, raw):
    with wired(server) as wire:
        wire.sendall(raw)
        head, _, body = read(wire).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "invalid_http"
    assert server.chat().status_code == 200


def test_a_second_request_on_a_connection_may_be_no_http(server):
    with wired(server) as wire:
        wire.sendall(whole(asked("hi")) + MALFORMED["length"])
        found = read(wire)
    assert found.startswith(b"HTTP/1.1 200") and found.count(b"HTTP/1.1 400") == 1
    assert b"invalid_http" in found


def test_where_there_is_no_room_no_body_is_read(serving, held):
    with serving(held, max_queue=1) as served:
        thread = threading.Thread(target=served.chat)
        thread.start()
        assert held.entered.wait(10)
        with wired(served) as wire:
            wire.sendall(HEAD + b"Content-Length: 90\r\n\r\n")
            assert wire.recv(1000).startswith(b"HTTP/1.1 429")
        held.gate.set()
        thread.join()
        assert served.chat().status_code == 200


def test_bodies_that_are_being_sent_take_room_too(serving):
    with serving(ScriptedSampler(["done"]), max_queue=1) as served:
        body = asked("hi")
        with wired(served) as wire:
            wire.sendall(whole(body)[: -len(body)])
            until(lambda: served.guard.running == 1)
            assert served.chat().status_code == 429
            wire.sendall(body)
            assert wire.recv(1000).startswith(b"HTTP/1.1 200")
        until(lambda: not served.guard.running)
        assert served.chat().status_code == 200


def test_the_time_of_a_request_begins_before_its_body(serving, held):
    with serving(held, timeout_s=1.5) as served, wired(served) as wire:
        body, began = asked("hi"), time.monotonic()
        wire.sendall(whole(body)[: -len(body)])
        time.sleep(1)
        wire.sendall(body)
        assert wire.recv(1000).startswith(b"HTTP/1.1 504") and time.monotonic() - began < 2.2
        held.gate.set()


def long(characters):
    return ScriptedSampler(lambda p, i: "x" * characters if "long" in p.text else "done")


def test_a_whole_reply_that_nobody_takes_is_cut_off(serving):
    with serving(long(3_000_000), read_timeout_s=0.3, send_buffer=4096) as served:
        with wired(served, receive_buffer=2048) as wire:
            wire.sendall(whole(asked("long")))
            until(lambda: served.metric("dropped_total", why="slow_reader") == 1)
            assert not served.guard.running
            found = 0
            with contextlib.suppress(ConnectionError):
                while part := wire.recv(1 << 16):
                    found += len(part)
            assert found < 3_000_000
        assert served.chat().json()["choices"][0]["message"]["content"] == "done"


def test_a_request_is_under_way_until_its_reply_was_taken(serving):
    """So that a server which goes down waits for it."""
    with serving(long(3_000_000), send_buffer=1 << 16) as served, wired(served, receive_buffer=1 << 15) as wire:
        wire.sendall(whole(asked("long")).replace(b"Host", b"Connection: close\r\nHost"))
        begun = wire.recv(100)
        until(lambda: not served.engine.under_way)
        time.sleep(0.2)
        assert served.guard.running == 1
        body = (begun + read(wire)).partition(b"\r\n\r\n")[2]
        assert len(json.loads(body)["choices"][0]["message"]["content"]) == 3_000_000
        until(lambda: not served.guard.running)
    assert not served.metric("dropped_total", why="slow_reader")
