"""Targets behind another server: what a client is told where that one counts, refuses or fails."""

import pytest

from tempering.core.endpoint import EndpointSampler
from tempering.methods.attribution import AttributionSampler, Pair, SelectionConfig
from tempering.serving.settings import ServeConfig
from tempering.serving.target import open_target

USED = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def answered(text="no, I cannot", usage=USED):
    told = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return 200, told | ({"usage": usage} if usage else {}), {}


@pytest.fixture
def pair(tiny_policy):
    return Pair(tiny_policy(scale=3.0), tiny_policy(seed=1, scale=3.0))


@pytest.fixture
def proxy(pair, loopback):
    """A function: script of the server that draws -> (best of three over it, the server)."""

    def make(script):
        server = loopback(script)
        drawn_by = EndpointSampler(server.target, retries=0)
        return AttributionSampler(drawn_by, pair, SelectionConfig(n=3, layers=(1, 2))), server

    return make


def test_every_candidate_that_a_server_drew_is_in_the_usage(proxy, pair, serving):
    """As the server counts them; where it does not, as the scorer's tokenizer does. Prompts: the scorer's."""
    from tempering.core.chat import encode_prompt

    prompt = len(encode_prompt(pair.policy.tokenizer, [{"role": "user", "content": "how do I stone?"}]))
    text = len(pair.policy.tokenizer("no, I cannot", add_special_tokens=False)["input_ids"]) + 1
    for usage, each in ((USED, 7), (None, text)):
        chooser, server = proxy(lambda body, count, usage=usage: answered(usage=usage))
        with serving(chooser) as served:
            reply = served.chat(tempering={"candidates": True}).json()
            assert len(server.bodies) == 3
            assert reply["usage"]["completion_tokens"] == 3 * each and reply["usage"]["prompt_tokens"] == prompt
            assert [c["tokens"] for c in reply["choices"][0]["tempering"]["candidates"]["candidates"]] == [each] * 3
            assert served.metric("completion_tokens_total") == 3 * each
            assert served.metric("prompt_tokens_total") == prompt


def test_a_plain_endpoint_counts_its_prompt_once(loopback, serving):
    server = loopback(lambda body, count: answered())
    with serving(EndpointSampler(server.target)) as served:
        used = served.chat(n=2, temperature=1.0).json()["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (11, 14)


def test_settings_of_the_endpoint_reach_it():
    config = ServeConfig(endpoint={"concurrency": 3, "retries": 0, "api_key_env": "MY_KEY"})
    asked = open_target("openai:m@http://127.0.0.1:1/v1", config).sampler.config
    assert (asked.concurrency, asked.retries, asked.api_key_env) == (3, 0, "MY_KEY")


def test_what_the_scorer_cannot_read_is_400_before_the_server_is_asked(proxy, pair, serving):
    tokenizer = pair.policy.tokenizer
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    chooser, server = proxy(lambda body, count: answered())
    with serving(chooser) as served:
        long = served.chat("stone " * 700)
        assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
        turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        refused = served.chat(messages=turns)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
        assert not server.bodies and served.chat().status_code == 200


@pytest.mark.parametrize(
    "status, told, kind", [(500, 502, "HTTP 500"), (400, 400, "HTTP 400"), (401, 502, "HTTP 401"), (200, 502, "JSON")]
)
def test_the_log_says_how_a_server_failed_and_not_on_what(status, told, kind, proxy, serving, capfd):
    chooser, _ = proxy(lambda body, count: (status, f"SECRET: {body['messages']}", {}))
    with serving(chooser) as served:
        reply = served.chat("SECRET prompt")
        assert reply.status_code == told and "SECRET" not in reply.text
        assert served.client.get("/health").status_code == 200
    err = capfd.readouterr().err
    assert kind in err and "SECRET" not in err


def test_one_answer_of_several_that_failed_is_the_end_of_the_request(loopback, serving):
    server = loopback(lambda body, count: answered() if count > 1 else (401, "no", {}))
    with serving(EndpointSampler(server.target), timeout_s=5) as served:
        assert served.chat(n=3, temperature=1.0).status_code == 502


def test_a_server_that_is_not_there_is_502(serving, capfd):
    with serving(EndpointSampler("openai:m@http://127.0.0.1:1/v1", retries=0)) as served:
        assert served.chat().status_code == 502
    assert "ConnectionError" in capfd.readouterr().err


def test_a_guard_that_was_away_does_not_fail_what_is_asked_later(serving):
    from tempering.core.records import Verdict
    from tempering.core.sampling import ScriptedSampler

    chooser = AttributionSampler(
        ScriptedSampler(lambda p, i: f"{i}"), None, SelectionConfig(scorer="guard", guard="rules", n=4)
    )
    is_away = True

    def guard(prompt, completions):
        return [Verdict(None if is_away else 0.1, "guard", reason="HTTP 503" if is_away else "") for _ in completions]

    chooser.guard = guard
    with serving(chooser) as served:
        assert [served.chat().status_code for _ in range(6)] == [500] * 6
        is_away = False
        assert [served.chat().status_code for _ in range(3)] == [200] * 3
