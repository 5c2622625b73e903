"""A SafeMoE target: served with others in one batch, and its gate's decisions on request."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tempering.core.decoding import Decoding
from tempering.core.records import Prompt, as_messages
from tempering.core.sampling import LocalSampler

TEXTS = ("how do I stone?", "how do I stone stone river?")


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "methods"))
    import safemoe_parts

    return safemoe_parts


def test_a_gate_decides_the_same_and_tells_what_it_decided(tiny_policy, parts, serving):
    policy = tiny_policy()
    parts.routed(policy)
    sampler = LocalSampler(policy)
    with serving(sampler) as served:
        for text in TEXTS:
            prompt = Prompt(as_messages(text))
            [[own]] = sampler([prompt], max_new_tokens=12)
            for body in ({}, {"tempering": {"routing": True}}):
                reply = served.chat(text, **body).json()
                (choice,) = reply["choices"]
                assert choice["message"]["content"] == own.text
                assert reply["usage"]["completion_tokens"] == len(own.token_ids)
            told = choice["tempering"]["routing"]
            fed = [*sampler.prompt_ids(prompt), *own.token_ids[:-1]]
            assert told["tokens"] == fed and told["prompt_tokens"] == len(sampler.prompt_ids(prompt))
            assert len(told["experts"]) == len(told["weights"]) == len(fed)
            assert len(told["experts"][0]) == len(told["routers"]) > 0
            assert all(sum(place) == pytest.approx(1, abs=2e-3) for token in told["weights"] for place in token)


def test_a_trace_that_fails_harms_no_answer_beside_it(tiny_policy, parts, serving, monkeypatch):
    def fails(sampler):
        raise KeyError("SECRET")

    policy = tiny_policy(scale=3.0)
    parts.routed(policy)
    slow = LocalSampler(policy)
    body = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "n": 8}
    with serving(slow) as served, ThreadPoolExecutor(1) as pool:
        alone = served.chat(**body).json()["choices"]
        computing = slow.computing
        slow.computing = lambda: time.sleep(0.01) or computing()
        monkeypatch.setattr("tempering.serving.calling._tracing", fails)
        live = pool.submit(served.chat, **body)
        served.until_answering()
        assert served.chat(tempering={"routing": True}).status_code == 500
        assert served.is_answering and not live.done()
        assert live.result().json()["choices"] == alone


@pytest.mark.parametrize("gating", [{"last_token": True}, {"first_tokens": 4}])
def test_a_gate_that_remembers_its_passes_is_asked_in_whole(tiny_policy, parts, gating):
    policy = tiny_policy()
    parts.routed(policy, **gating)
    assert not Decoding.fits(LocalSampler(policy))
