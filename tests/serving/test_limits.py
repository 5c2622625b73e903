"""Whatever is sent: an error in OpenAI's form, nobody else is harmed, and nothing of it is in the log."""

import json
import socket
import threading
import time

import httpx
import pytest

from tempering.cli import run
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.serving.settings import ServeConfig, is_loopback


def asked(text, **body):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **body}


USER = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

BAD = [
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None),
    (CHAT, {"messages": USER, "max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": 10**9}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": 10**40}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": "12"}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": True}, 400, "max_tokens"),
    (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, 400, None),
    (CHAT, {"messages": USER, "temperature": -0.1}, 400, "temperature"),
    (CHAT, {"messages": USER, "temperature": 99}, 400, "temperature"),
    (CHAT, {"messages": USER, "top_p": 0}, 400, "top_p"),
    (CHAT, {"messages": USER, "n": 0}, 400, "n"),
    (CHAT, {"messages": USER, "n": 1000}, 400, "n"),
    (CHAT, {"messages": USER, "seed": 2**70}, 400, "seed"),
    (CHAT, {"messages": USER, "stop": ["x"] * 10_000}, 400, "stop"),
    (CHAT, {"messages": USER, "stop": "x" * 10_000}, 400, "stop"),
    (CHAT, {"messages": USER, "stop": [""]}, 400, None),
    (CHAT, {"messages": USER, "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, 400, None),
    (CHAT, {"messages": USER, "temprature": 1}, 400, "temprature"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, 400, None),
    (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model"),
    (CHAT, {"messages": USER, "tempering": {"candidates": True}}, 400, "tempering.candidates"),
    (CHAT, {"messages": USER, "tempering": {"routing": True}}, 400, "tempering.routing"),
    (CHAT, {"messages": [{"role": "user", "content": "stone " * 700}]}, 400, "messages"),
    (TEXT, {}, 400, "prompt"),
    (TEXT, {"prompt": ""}, 400, None),
    (TEXT, {"prompt": []}, 400, None),
    (TEXT, {"prompt": [5, -1]}, 400, None),
    (TEXT, {"prompt": [5, 10**6]}, 400, "prompt"),
    (TEXT, {"prompt": ["x"] * 100}, 400, "prompt"),
    (TEXT, {"prompt": "x", "echo": True}, 400, "echo"),
    (TEXT, {"prompt": "x", "best_of": 4}, 400, None),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
]  # fmt: skip


def is_error(reply, status):
    assert reply.status_code == status, (reply.status_code, reply.text)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


@pytest.mark.parametrize("path, body, status, param", BAD, ids=lambda v: str(v)[:40] if isinstance(v, dict) else None)
def test_a_request_that_cannot_be_honoured_is_one_error_that_names_the_field(server, path, body, status, param):
    error = is_error(server.client.post(path, json=body), status)
    if param is not None:
        assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"3", b'"messages"', b"\xff\xfe", b"[" * 9000, b'{"messages": NaN}', b"{}{}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"n": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
    ],
    ids=lambda c: c[:20].decode("latin-1"),
)  # fmt: skip
def test_a_body_that_is_no_request_is_one_error(server, content):
    is_error(server.client.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400)


MANY = 150_000


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, {"messages": [0] * MANY}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 256}] * 400}),
        (CHAT, {"messages": USER, "stop": [0] * MANY}),
        (CHAT, {"messages": USER, **{f"f{i}": 0 for i in range(MANY // 2)}}),
        (CHAT, {"messages": [{"role": "user", "content": [{f"f{i}": 0 for i in range(MANY // 2)}]}]}),
        (TEXT, {"prompt": [{}] * MANY}),
        (TEXT, {"prompt": [[]] * MANY}),
        (TEXT, {"prompt": [[-1] * MANY]}),
    ],
    ids=["messages", "parts", "stop", "fields", "fields of a part", "prompts", "empty prompts", "tokens"],
)
def test_many_faults_cost_no_more_than_one(tiny_sampler, serving, path, body):
    """Two seconds and more where every fault is described."""
    with serving(tiny_sampler) as served:
        content = json.dumps(body).encode()
        began = time.monotonic()
        reply = served.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert time.monotonic() - began < 1
    is_error(reply, 400)
    assert len(reply.content) < 1000


def test_a_body_is_json_and_short_enough_however_it_is_sent(server):
    json_type = {"Content-Type": "application/json"}
    is_error(server.client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    is_error(server.client.post(CHAT, content=b" " * 100_001, headers=json_type), 413)
    is_error(server.client.post(CHAT, content=iter([b" " * 9000] * 12), headers=json_type), 413)
    assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/chat/completions/", "/v1/../etc/passwd", "/v1/models/../../x", "/%00", "/%"],
)
def test_there_is_nothing_at_other_paths(server, path):
    is_error(server.client.get(path), 404)


def test_a_path_takes_its_own_method_only(server):
    is_error(server.client.get(CHAT), 405)
    is_error(server.client.delete("/v1/models"), 405)


def test_a_server_tells_its_model_health_and_numbers(server):
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["tempering"]["streams"]
    assert server.client.get("/v1/models/tiny").json() == model
    is_error(server.client.get("/v1/models/other"), 404)
    assert server.client.get("/health").json() == {"status": "ok"}
    server.chat()
    told = server.client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    assert "tempering_time_to_first_token_seconds_count" in told.text
    assert 'tempering_requests_total{route="chat",status="200"}' in told.text
    assert "/v1/chat/completions" in server.client.get("/openapi.json").json()["paths"]


def test_a_server_with_a_token_asks_for_it(tiny_sampler, serving):
    token = "a-token-of-32-characters-or-so--"
    with serving(tiny_sampler, token=token) as served:
        assert served.chat().status_code == 200
        for header in (None, "Bearer wrong", f"Basic {token}", f"Bearer {token}x", "Bearer", "Bearer \xe9"):
            with httpx.Client(base_url=served.client.base_url, trust_env=False) as client:
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                for path in ("/v1/models", "/metrics", "/nothing", "/openapi.json"):
                    is_error(client.get(path, headers=headers), 401)
                is_error(client.post(CHAT, json=asked("hi"), headers=headers), 401)
                assert client.get("/health", headers=headers).status_code == 200


def test_without_a_token_no_foreign_name_reaches_a_server(server):
    """A page in a browser on this machine can resolve its own name to the loopback address."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80"):
        is_error(server.client.get("/v1/models", headers={"Host": host}), 403)
    assert server.client.get("/v1/models", headers={"Host": f"localhost:{server.port}"}).status_code == 200


def test_a_full_queue_is_429_and_work_that_takes_too_long_504(serving, held):
    with serving(held, max_queue=2, timeout_s=1.5, keepalive_s=0.1) as served:
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(served.chat())) for _ in range(2)]
        for thread in threads:
            thread.start()
        while served.engine.under_way < 2:
            time.sleep(0.005)
        full = served.chat()
        assert is_error(full, 429)["code"] == "queue_full" and full.headers["retry-after"]
        for thread in threads:
            thread.join()
        for reply in replies:
            is_error(reply, 504)
        with served.client.stream("POST", CHAT, json=asked("hi", stream=True)) as reply:
            lines = [line for line in reply.iter_lines() if line]
        assert lines.count(": waiting") > 1 and json.loads(lines[-1][6:])["error"]["code"] == "timeout"
        held.gate.set()
        assert served.chat().json()["choices"][0]["message"]["content"] == "done"


def test_while_a_server_goes_down_new_requests_get_503_and_running_ones_end(serving, held):
    with serving(held) as served:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(served.chat()))
        thread.start()
        assert held.entered.wait(10)
        served.guard.is_draining = True
        assert is_error(served.chat(), 503)["code"] == "shutting_down"
        assert served.client.get("/health").json() == {"status": "draining"}
        held.gate.set()
        thread.join()
        assert replies[0].status_code == 200


def test_a_failure_harms_the_request_alone_and_is_logged_without_it(capfd, serving):
    def answers(prompt, index):
        if "fail" in prompt.text:
            raise KeyError(prompt.text)
        return "done"

    with serving(ScriptedSampler(answers)) as served:
        is_error(served.chat("fail SECRET-PROMPT"), 500)
        assert served.chat("hi").status_code == 200
    err = capfd.readouterr().err
    assert "KeyError while answering" in err and "SECRET" not in err


def request(text, **body):
    """A request to chat as it is on the wire."""
    content = json.dumps(asked(text, **body)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)


def test_a_client_that_reads_too_slowly_is_dropped_and_harms_no_one(tiny_sampler, serving):
    """With small buffers on both sides, the server is soon where it can send no more."""
    sampler = LocalSampler(tiny_sampler.policy)
    with serving(sampler, max_tokens=400, read_timeout_s=0.3, send_buffer=4096) as served:
        alone = served.chat().json()["choices"][0]["message"]["content"]
        computing, sampler.computing = sampler.computing, lambda: time.sleep(0.01) or computing()
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect(("127.0.0.1", served.port))
            wire.sendall(request("hi", stream=True, max_tokens=400, n=8, temperature=1.0, seed=1, logprobs=True))
            while not served.engine.under_way:
                time.sleep(0.005)
            assert served.chat().json()["choices"][0]["message"]["content"] == alone
            limit = time.monotonic() + 10
            while served.engine.under_way and time.monotonic() < limit:
                time.sleep(0.02)
        assert served.metric("dropped_total", why="slow_reader") == 1 and not served.engine.under_way
        assert served.chat().json()["choices"][0]["message"]["content"] == alone


def test_a_client_that_goes_away_is_dropped(tiny_sampler, serving):
    slow = LocalSampler(tiny_sampler.policy)

    def wait(served):
        limit = time.monotonic() + 5
        while served.engine.under_way and time.monotonic() < limit:
            time.sleep(0.02)
        assert not served.engine.under_way

    with serving(slow, max_tokens=400) as served:
        computing, slow.computing = slow.computing, lambda: time.sleep(0.02) or computing()
        before = served.metric("dropped_total", why="disconnect")
        for stream in (True, False):
            with socket.create_connection(("127.0.0.1", served.port)) as wire:
                wire.sendall(request("hi", stream=stream, max_tokens=400, n=4, temperature=1.0, seed=1))
                while not served.engine.under_way:
                    time.sleep(0.005)
                if stream:
                    assert wire.recv(100)
            wait(served)
        slow.computing = computing
        assert served.metric("dropped_total", why="disconnect") == before + 2
        assert served.chat().status_code == 200


def test_a_body_that_comes_too_slowly_is_408(tiny_sampler, serving):
    with (
        serving(tiny_sampler, read_timeout_s=0.2) as served,
        socket.create_connection(("127.0.0.1", served.port)) as wire,
    ):
        wire.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 90\r\n\r\n{"
        )
        assert wire.recv(1000).startswith(b"HTTP/1.1 408")


def test_neither_prompts_nor_keys_reach_the_log(tiny_sampler, capfd, serving):
    with serving(tiny_sampler, token="SECRET-token-0123456789") as served:
        served.chat("SECRET prompt")
        served.chat("SECRET prompt", stream=True)
        served.client.post(CHAT, json={"messages": "SECRET", "SECRET": 1})
        served.client.post(CHAT, content=b'{"SECRET', headers={"Content-Type": "application/json"})
        served.client.get("/SECRET?SECRET=1", headers={"Authorization": "Bearer SECRET-other"})
        assert "SECRET" not in served.client.get("/metrics").text
    err = capfd.readouterr().err
    assert "SECRET" not in err and err.count(" chat 200 ") == 2


# --- what is refused before anything listens ----------------------------------------------------------


def test_other_machines_need_a_token(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TEMPER_SERVE_TOKEN", raising=False)
    assert run(["serve", "nothing", "host=0.0.0.0"]) == 2
    assert "no token guards it: set TEMPER_SERVE_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("TEMPER_SERVE_TOKEN", "short")
    assert run(["serve", "nothing", "host=0.0.0.0"]) == 2
    assert "at least 16" in capsys.readouterr().err
    (tmp_path / "token").write_text("\n")
    assert run(["serve", "nothing", f"token_file={tmp_path / 'token'}"]) == 2
    assert "printable ASCII" in capsys.readouterr().err
    assert run(["serve", "nothing", "token=abc"]) == 2
    assert "unknown field 'token'" in capsys.readouterr().err
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN", "from-the-environment")
    (tmp_path / "token").write_text(" from-a-file\n")
    assert ServeConfig(token_env="OWN").token() == "from-the-environment"
    assert ServeConfig(token_env="OWN", token_file=str(tmp_path / "token")).token() == "from-a-file"
    monkeypatch.delenv("OWN")
    assert ServeConfig(token_env="OWN").token() is None


def test_what_is_unsafe_is_not_served_without_its_flag(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TEMPER_ALLOW_UNSAFE_EXPERTS", raising=False)
    quarantined = tmp_path / "fraud.unsafe"
    quarantined.symlink_to(tiny_model_dir())
    for settings in ([], ["unsafe_reason=a test"]):
        assert run(["serve", str(quarantined), "port=0", *settings]) == 2
        err = capsys.readouterr().err
        assert "refused" in err and "unsafe_reason=TEXT" in err
    attacker = tmp_path / "attacker"
    attacker.mkdir()
    (attacker / "player.json").write_text("{}")
    assert run(["serve", str(attacker), "port=0"]) == 2
    assert "serving the attacker" in capsys.readouterr().err


def test_with_its_flag_and_the_variable_it_is_served(tiny_model_dir, tmp_path, monkeypatch, capfd, serving):
    from tempering.serving.target import open_target

    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    quarantined = tmp_path / "fraud.unsafe"
    quarantined.symlink_to(tiny_model_dir())
    config = {"unsafe_reason": "a test of serving", "dtype": "float32"}
    target = open_target(str(quarantined), ServeConfig(**config))
    with serving(target.sampler, **config) as served:
        assert served.chat().status_code == 200
    assert "a test of serving" in capfd.readouterr().err


def test_without_its_libraries_the_command_says_what_to_install(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fastapi" else find(name, *a))
    assert run(["serve", "smollm2"]) == 2
    assert "pip install 'tempering[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_message(server, capsys):
    assert run(["serve", "smollm2", f"port={server.port}"]) == 2
    assert "cannot listen there" in capsys.readouterr().err
