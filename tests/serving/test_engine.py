"""What fails takes nobody with it who could still be answered."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tempering.core import decoding
from tempering.core.decoding import Decoding
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.serving.log import log

LONG = {"max_tokens": 100, "temperature": 1.0, "seed": 3, "n": 8}


@pytest.fixture
def served(tiny_sampler, serving):
    """A model that takes 10 ms for every pass."""
    slow = LocalSampler(tiny_sampler.policy)
    computing = slow.computing
    slow.computing = lambda: time.sleep(0.01) or computing()
    with serving(slow, max_tokens=400) as found:
        yield found


def texts(reply):
    return [choice["message"]["content"] for choice in reply.json()["choices"]]


def test_a_prompt_that_cannot_be_read_fails_alone(served, monkeypatch):
    alone, add = texts(served.chat(**LONG)), Decoding.add

    def reading(self, rows):
        if any(len(row.ids) > 60 for row in rows):
            raise RuntimeError("out of memory")
        add(self, rows)

    monkeypatch.setattr(Decoding, "add", reading)
    with ThreadPoolExecutor(1) as pool:
        live = pool.submit(served.chat, **LONG)
        served.until_answering()
        assert served.chat("stone " * 60).status_code == 500
        assert served.is_answering and not live.done()
        assert texts(live.result()) == alone
    assert not served.engine.under_way and served.chat().status_code == 200


def test_answers_that_were_half_joined_are_given_up_and_the_next_are_given(served, monkeypatch):
    alone, widened = texts(served.chat(**LONG)), decoding._widened
    faults = [RuntimeError("out of memory")]

    def failing(states, width):
        if faults and width:
            raise faults.pop()
        return widened(states, width)

    monkeypatch.setattr(decoding, "_widened", failing)
    with ThreadPoolExecutor(1) as pool:
        live = pool.submit(served.chat, **LONG)
        served.until_answering()
        assert served.chat().status_code == 500 and live.result().status_code == 500
    assert texts(served.chat(**LONG)) == alone


def test_where_no_thread_works_health_says_so(serving, monkeypatch, capfd):
    def fails(jobs):
        raise KeyError("SECRET")

    with serving(ScriptedSampler(["done"])) as served:
        assert served.client.get("/health").status_code == 200
        monkeypatch.setattr(served.engine, "_sort", fails)
        assert served.chat().status_code == 500
        health = served.client.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "dead"}
        late = served.chat()
        assert late.status_code == 503 and late.json()["error"]["code"] == "engine_dead"
    err = capfd.readouterr().err
    assert "KeyError" in err and "SECRET" not in err


def test_a_log_that_nobody_reads_stops_nothing(serving, monkeypatch):
    class Broken:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    def answers(prompt, index):
        if "fail" in prompt.text:
            raise KeyError(prompt.text)
        return "done"

    with serving(ScriptedSampler(answers)) as served:
        monkeypatch.setattr(sys, "stderr", Broken())
        log("x")
        assert [served.chat(text).status_code for text in ("hi", "fail", "hi")] == [200, 500, 200]
        assert served.client.get("/health").status_code == 200
        monkeypatch.undo()
