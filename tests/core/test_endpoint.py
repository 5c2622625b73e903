import gzip
import json
import time

import pytest

from tempering.core.endpoint import EndpointSampler, parse_endpoint
from tempering.core.records import Prompt

KEY = "sk-very-secret-123"


def reply(text, finish="stop"):
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}), {}


def sampler(server, **kw):
    settings = {"backoff_s": 0.001, "retries": 2, "timeout_s": 5} | kw
    return EndpointSampler(f"openai:m@{server.url}", **settings)


def prompts(n):
    return [Prompt(({"role": "user", "content": f"question {i}"},)) for i in range(n)]


def test_answers_come_in_the_order_of_the_prompts(loopback):
    def script(body, count):
        time.sleep(0.02 if "question 0" in body["messages"][0]["content"] else 0)
        return reply(body["messages"][0]["content"])

    told = []
    groups = sampler(loopback(script))(prompts(6), n=2, on_done=told.append)
    assert [[c.text for c in g] for g in groups] == [[f"question {i}"] * 2 for i in range(6)]
    assert [[c.index for c in g] for g in groups] == [[0, 1]] * 6
    assert sum(told) == 6


def test_reported_tokens_are_summed_and_nonsense_counts_as_none(loopback):
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    told = {1: usage, 2: None, 3: {"prompt_tokens": "10"}, 4: usage, 5: {**usage, "prompt_tokens": -1}}

    def script(body, count):
        answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
        return 200, json.dumps(answer | ({"usage": told[count]} if told[count] else {})), {}

    ask = sampler(loopback(script))
    assert ask.usage is None
    ask(prompts(5))
    assert ask.usage == (20, 6)


def test_reported_tokens_are_those_of_what_was_asked_here(loopback, tmp_path):
    """A bound that stands in for a count in the ledger is no report, and what the cache answers cost nothing."""
    server = loopback(lambda b, c: usage(10, 3) if c == 1 else reply("x"))
    first, again = (sampler(server, cache=tmp_path, concurrency=1) for _ in range(2))
    first(prompts(2))
    assert first.usage == (10, 3) and sum(first.ledger.spent) > 128
    again(prompts(2))
    assert again.usage is None and again.ledger.spent == first.ledger.spent


def test_requests_overlap_up_to_the_concurrency(loopback):
    server = loopback(lambda b, c: (time.sleep(0.05), reply("x"))[1])
    sampler(server, concurrency=3)(prompts(9))
    assert 1 < server.most_busy <= 3


def test_settings_and_a_seed_of_its_own_are_sent_with_each_sample(loopback):
    server = loopback(lambda b, c: reply("x"))
    ask = sampler(server)
    ask(prompts(2), n=2, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    assert all(
        (b["max_tokens"], b["temperature"], b["top_p"], b["model"]) == (7, 0.5, 0.9, "m") for b in server.bodies
    )
    first = {(b["messages"][0]["content"], b["seed"]) for b in server.bodies}
    assert len({seed for _, seed in first}) == 4
    server.bodies.clear()
    ask(prompts(2)[::-1], n=2, seed=3)
    assert {(b["messages"][0]["content"], b["seed"]) for b in server.bodies} == first


def test_further_samples_are_sent_with_the_seeds_of_one_call(loopback):
    server = loopback(lambda body, count: reply(str(body["seed"])))
    ask = EndpointSampler(f"openai:m@{server.url}")
    asked = [Prompt(({"role": "user", "content": "hi"},))]
    [whole], [part] = ask(asked, n=4, seed=7), ask(asked, n=2, first=2, seed=7)
    assert [(c.index, c.text) for c in whole[2:]] == [(c.index, c.text) for c in part]


def test_a_prefill_is_sent_as_the_last_turn(loopback):
    server = loopback(lambda b, c: reply("x"))
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure, "})
    sampler(server)([Prompt(turns)])
    assert server.bodies[0]["messages"] == list(turns)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
def test_a_passing_failure_is_retried(loopback, status):
    server = loopback(lambda b, c: (status, "busy", {}) if c <= 2 else reply("at last"))
    assert sampler(server)(prompts(1))[0][0].text == "at last"


def test_a_lasting_failure_is_an_error_with_the_number_of_tries(loopback):
    server = loopback(lambda b, c: (503, "overloaded", {}))
    (completion,) = sampler(server)(prompts(1))[0]
    assert completion.finish == "error"
    assert completion.error == "HTTP 503: overloaded (3 tries)"
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_other_client_errors_are_final(loopback, status):
    server = loopback(lambda b, c: (status, "no such thing", {}))
    (completion,) = sampler(server)(prompts(1))[0]
    assert completion.finish == "error"
    assert f"HTTP {status}" in completion.error
    assert len(server.bodies) == 1


def test_retry_after_is_obeyed(loopback):
    server = loopback(lambda b, c: (429, "", {"Retry-After": "0.2"}) if c == 1 else reply("x"))
    started = time.monotonic()
    assert sampler(server)(prompts(1))[0][0].text == "x"
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_senseless_retry_after_does_no_harm(loopback, value):
    server = loopback(lambda b, c: (429, "", {"Retry-After": value}) if c == 1 else reply("x"))
    assert sampler(server)(prompts(1))[0][0].text == "x"


@pytest.mark.parametrize(
    "text",
    [
        "<html>Bad gateway</html>", "", "{", "null", "[]", "3", '"text"', "{}", '{"choices": []}',
        '{"choices": [{}]}', '{"choices": [{"message": null}]}', '{"choices": {"0": 1}}',
        '{"error": {"message": "model not loaded"}}',
        '{"choices": [{"message": {"content": null}}]}', '{"choices": [{"message": {"content": [1]}}]}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_malformed_reply_is_an_error_not_an_answer(loopback, text):
    (completion,) = sampler(loopback(lambda b, c: (200, text, {})))(prompts(1))[0]
    assert completion.finish == "error"
    assert completion.error
    assert completion.text == ""


@pytest.mark.parametrize(
    ("told", "finish"), [("stop", "stop"), ("length", "length"), (None, "stop"), ("eos", "stop")]
)
def test_the_finish_reason_is_kept(loopback, told, finish):
    assert sampler(loopback(lambda b, c: reply("x", told)))(prompts(1))[0][0].finish == finish


def test_a_withheld_answer_is_an_error_and_a_stated_refusal_is_text(loopback):
    withheld = {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}
    refusal = {"choices": [{"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}]}
    script = lambda b, c: (200, json.dumps(withheld if c == 1 else refusal), {})  # noqa: E731
    ask = sampler(loopback(script))
    assert ask(prompts(1))[0][0].finish == "error"
    assert ask(prompts(1))[0][0].text == "I can't."


def test_nobody_there_is_a_connection_error_with_the_url_and_the_remedy(loopback):
    server = loopback(lambda b, c: reply("x"))
    url = server.url
    server.close()
    with pytest.raises(ConnectionError, match=rf"{url}.*start the server"):
        EndpointSampler(f"openai:m@{url}", retries=1, backoff_s=0.001)(prompts(3))


def test_a_server_that_goes_away_later_gives_error_completions(loopback):
    server = loopback(lambda b, c: reply("x"))
    ask = sampler(server, retries=1)
    assert ask(prompts(1))[0][0].finish == "stop"
    server.close()
    assert [g[0].finish for g in ask(prompts(3))] == ["error"] * 3


def test_a_slow_server_is_a_timeout_not_a_hang(loopback):
    server = loopback(lambda b, c: (time.sleep(0.4), reply("x"))[1])
    (completion,) = sampler(server, timeout_s=0.1, retries=0)(prompts(1))[0]
    assert completion.finish == "error"
    assert "Timeout" in completion.error


def test_the_timeout_is_for_the_whole_of_a_reply_that_trickles_in(loopback):
    start = time.monotonic()
    server = loopback(lambda b, c: reply("x" * 200), pause_s=0.01)
    (completion,) = sampler(server, timeout_s=0.2, retries=0)(prompts(1))[0]
    assert completion.finish == "error"
    assert "Timeout" in completion.error
    assert time.monotonic() - start < 1


def test_a_reply_without_end_is_not_read_to_its_end(loopback, monkeypatch):
    monkeypatch.setattr("tempering.core.endpoint.MAX_REPLY", 2**20)
    (completion,) = sampler(loopback(lambda b, c: reply("x" * 2**22)))(prompts(1))[0]
    assert completion.finish == "error"
    assert "longer than 1 MiB" in completion.error


def test_the_key_is_sent_and_appears_nowhere_else(loopback, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = loopback(lambda b, c: (401, f"bad key {KEY}", {}))
    ask = sampler(server, api_key_env="JUDGE_KEY")
    (completion,) = ask(prompts(1))[0]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in completion.error
    assert KEY not in repr(ask) + str(vars(ask)) + ask.name


def test_no_key_no_header(loopback):
    server = loopback(lambda b, c: reply("x"))
    sampler(server)(prompts(1))
    assert "Authorization" not in server.headers[0]


def test_no_prompts_no_requests(loopback):
    server = loopback(lambda b, c: reply("x"))
    assert sampler(server)([]) == []
    assert server.bodies == []


@pytest.mark.parametrize(
    ("spec", "model", "url"),
    [
        ("openai:gpt-x@http://host:8000/v1", "gpt-x", "http://host:8000/v1"),
        ("openai:org/m:latest@https://api.example.org/v1/", "org/m:latest", "https://api.example.org/v1"),
        ("openai:m@rev@http://[::1]:80/v1/chat/completions", "m@rev", "http://[::1]:80/v1"),
    ],
)
def test_an_endpoint_is_a_model_and_a_url(spec, model, url):
    assert parse_endpoint(spec) == (model, url)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-x", "expected openai:MODEL@URL"),
        ("openai:gpt-x", "no '@http"),
        ("openai:gpt-x@host:8000", "no '@http"),
        ("openai:@http://host/v1", "no model"),
        ("openai:m@http://", "no host"),
        ("openai:m@http://host:port/v1", "no valid port"),
        ("openai:m@http://host/v1?key=1", "without '\\?'"),
        ("openai:m@http://me:hunter2@host/v1", "environment variable"),
    ],
)
def test_a_wrong_endpoint_is_named_with_what_was_expected(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_endpoint(spec)
    assert "hunter2" not in str(caught.value)
    assert "key=1" not in str(caught.value)


# --- replies that lie --------------------------------------------------------------------------------


def usage(prompt, completion):
    content = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    return 200, json.dumps({**content, "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}), {}


DEEP = '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}"
BOMB = gzip.compress(gzip.compress(b"0" * 2**22))


@pytest.mark.parametrize(
    "lie",
    [
        (200, "<html>", {}), (200, DEEP, {}), (200, b'{"choices": "\xff"}', {}), (200, '{"choices": [{}]}', {}),
        (200, BOMB, {"Content-Encoding": "gzip, gzip"}), (200, gzip.compress(b"{}"), {"Content-Encoding": "gzip"}),
        (200, '{"choices": [{"message": {"content": NaN}, "finish_reason": NaN}]}', {}),
        (200, '{"choices": [{"message": {"content": ["x"]}, "finish_reason": ' + "[" * 500 + "]" * 500 + "}]}", {}),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_lie_of_a_server_that_has_told_the_truth_is_asked_again(loopback, lie):
    server = loopback(lambda b, c: lie if c in (2, 3) else reply(b["messages"][0]["content"]))
    ask = sampler(server, concurrency=1)
    assert [g[0].text for g in ask(prompts(3))] == [f"question {i}" for i in range(3)]
    assert len(server.bodies) == 5


def test_a_server_that_never_told_the_truth_is_asked_once(loopback):
    server = loopback(lambda b, c: (200, "<html>", {}))
    assert [g[0].finish for g in sampler(server)(prompts(5))] == ["error"] * 5
    assert len(server.bodies) == 5


@pytest.mark.parametrize("is_kept", [True, False])
def test_equal_questions_of_one_call_are_asked_once_and_answered_each(loopback, tmp_path, is_kept):
    """Three texts among six prompts; n=2 samples differ by their seed, so six requests."""
    server = loopback(lambda b, c: reply(b["messages"][0]["content"]))
    ask = sampler(server, cache=tmp_path if is_kept else None)
    six, done = prompts(3) * 2, []
    groups = ask(six, n=2, on_done=done.append)
    assert [[c.text for c in group] for group in groups] == [[f"question {i % 3}"] * 2 for i in range(6)]
    assert [[c.index for c in group] for group in groups] == [[0, 1]] * 6
    assert len(server.bodies) == 6 and sum(done) == 6


def test_a_failure_is_told_to_every_equal_question(loopback):
    server = loopback(lambda b, c: (404, "gone", {}))
    assert [g[0].error for g in sampler(server)(prompts(1) * 3)] == ["HTTP 404: gone"] * 3
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("sent", "want"), [("a\ud83d", "a\ufffd"), ("\ude00b", "\ufffdb"), ("\ud83d\ude00", "\U0001f600")]
)
def test_half_a_surrogate_pair_is_sent_and_comes_back_as_a_character_that_can_be_read(loopback, sent, want, tmp_path):
    server = loopback(lambda b, c: reply(b["messages"][0]["content"]))
    asked = [Prompt(({"role": "user", "content": sent},))]
    assert [sampler(server, cache=tmp_path)(asked)[0][0].text for _ in range(2)] == [want] * 2
    assert [body["messages"][0]["content"] for body in server.bodies] == [json.loads(json.dumps(sent))]


def test_half_a_surrogate_pair_is_sent_and_a_reply_with_one_is_made_whole(loopback):
    server = loopback(lambda b, c: reply(b["messages"][0]["content"] + "\U0001f600"))
    found = sampler(server)([Prompt(({"role": "user", "content": "a\ud83d"},))])[0][0]
    assert server.bodies[0]["messages"][0]["content"] == "a\ud83d" and found.text == "a\ufffd\U0001f600"
    assert found.text.encode()


@pytest.mark.parametrize(
    ("said", "prefill", "text", "thought", "status"),
    [
        ("<think>\nIt is hot.\n</think>\nUse a mitt.", "", "Use a mitt.", "It is hot.", "ok"),
        ("It is hot.</think>Use a mitt.", "", "Use a mitt.", "It is hot.", "ok"),
        ("<think>It is", "", "", "It is", "unclosed"),
        ("Use a mitt. </think> is a tag.", "Sure, ", "Use a mitt. </think> is a tag.", None, None),
        ("<think> is a tag", "Sure: ", "", "is a tag", "unclosed"),
        ("It is hot.</think>Use a mitt.", "<think>\n", "Use a mitt.", "It is hot.", "ok"),
        ("The tag <think> opens, </think> closes.", "", "The tag <think> opens, </think> closes.", None, None),
    ],
)
def test_reasoning_left_in_the_text_is_a_thought_and_no_part_of_the_answer(
    loopback, said, prefill, text, thought, status
):
    server = loopback(lambda b, c: reply(said))
    turns = ({"role": "user", "content": "q"}, *([{"role": "assistant", "content": prefill}] if prefill else []))
    found = sampler(server)([Prompt(turns)])[0][0]
    assert found.text == text
    assert (found.thought and found.thought.text, found.thought and found.thought.status) == (thought, status)


def test_a_key_in_an_answer_is_redacted_also_where_the_message_is_cut(loopback, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = loopback(lambda b, c: reply(f"you sent {KEY}") if c == 1 else (400, "x" * 190 + KEY, {}))
    ask = sampler(server)
    assert ask(prompts(1))[0][0].text == "you sent ***"
    assert KEY[:6] not in ask(prompts(1))[0][0].error


@pytest.mark.parametrize("key", [f"{KEY}\n", f"  {KEY}"])
def test_white_space_around_a_key_is_not_of_it(loopback, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = loopback(lambda b, c: reply("x"))
    assert sampler(server)(prompts(1))[0][0].text == "x"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}ü", f"{KEY}\n{KEY}"])
def test_a_key_that_no_header_can_carry_is_not_quoted(loopback, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as caught:
        sampler(loopback(lambda b, c: reply("x")))(prompts(1))
    assert KEY not in str(caught.value)


def test_a_key_given_as_the_name_of_its_variable_is_not_repeated():
    with pytest.raises(ValueError, match="name of an environment variable") as caught:
        EndpointSampler("openai:m@http://host/v1", api_key_env=KEY)
    assert KEY not in str(caught.value)


# --- streaming ---------------------------------------------------------------------------------------


def events(*chunks, end="data: [DONE]\n\n", eol="\n"):
    lines = [c if isinstance(c, str) else f"data: {json.dumps(c)}\n\n" for c in chunks]
    return 200, ("".join(lines) + end).replace("\n", eol), {"Content-Type": "text/event-stream; charset=utf-8"}


def delta(text=None, finish=None, **more):
    return {"choices": [{"delta": {} if text is None else {"content": text}, "finish_reason": finish}], **more}


WHOLE = (delta(""), delta("Hel"), ": keep-alive\n\n", delta("lo, wörld\n"), delta(finish="length"))


@pytest.mark.parametrize(
    "said",
    [
        events(*WHOLE), events(*WHOLE, eol="\r\n"), events(*WHOLE, eol="\r"), events(*WHOLE, end=""),
        events(*WHOLE, {"choices": [], "usage": {"prompt_tokens": 3}}), events("retry: 5\nevent: x\n\n", *WHOLE),
        events(": hi\n\n", *WHOLE, end="data:[DONE]"),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_stream_is_put_together(loopback, said):
    server = loopback(lambda b, c: said)
    (completion,) = sampler(server, stream=True)(prompts(1))[0]
    assert (completion.text, completion.finish, completion.error) == ("Hello, wörld\n", "length", None)
    assert server.bodies[0]["stream"] is True


@pytest.mark.parametrize(
    "said",
    [
        events(*WHOLE[:-1], end=""), events(*WHOLE[:-1], end='data: {"choices": [{"del'), events(end=""), events(),
        events(*WHOLE[:2], {"error": {"message": "out of memory"}}), events(*WHOLE[:2], "data: [1]\n\n"),
        events({"choices": [{"delta": {"content": 3}}]}), events({"choices": [{"delta": 1}]}),
        events({"choices": [3]}),
        (200, b"data: \xff\n\n", {"Content-Type": "text/event-stream"}),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_stream_that_breaks_off_is_asked_for_again(loopback, said):
    server = loopback(lambda b, c: said if c > 1 else events(*WHOLE))
    ask = sampler(server, stream=True, retries=1)
    ask(prompts(1))
    (completion,) = ask(prompts(1))[0]
    assert completion.finish == "error"
    assert completion.text == ""
    assert "(2 tries)" in completion.error


def test_a_server_that_does_not_stream_is_understood(loopback):
    assert sampler(loopback(lambda b, c: reply("x")), stream=True)(prompts(1))[0][0].text == "x"


def turn(**delta):
    return {"choices": [{"delta": {"role": "assistant", **delta}, "finish_reason": None}]}


@pytest.mark.parametrize("first", [turn(), turn(content=None), turn(content=""), turn(content=None, tool_calls=[])])
def test_an_empty_answer_is_an_answer_also_where_a_stream_has_no_content(loopback, first):
    """As `transformers loopback` and llama.cpp send it, where the model ends its turn at once."""
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    (completion,) = sampler(loopback(lambda b, c: events(first, end, end="")), stream=True)(prompts(1))[0]
    assert (completion.text, completion.finish, completion.error) == ("", "stop", None)


@pytest.mark.parametrize("more", [{"tool_calls": [{"index": 0}]}, {"reasoning_content": "Let me see"}])
@pytest.mark.parametrize("finish", ["stop", "tool_calls"])
def test_a_stream_of_something_else_is_no_empty_answer(loopback, more, finish):
    server = loopback(lambda b, c: events(turn(), turn(**more), delta(finish=finish)))
    (completion,) = sampler(server, stream=True)(prompts(1))[0]
    assert completion.finish == "error"


def test_after_done_nothing_needs_to_follow(loopback):
    status, text, headers = events(*WHOLE)
    server = loopback(lambda b, c: (status, text, {**headers, "Content-Length": "100000"}))
    assert sampler(server, stream=True, timeout_s=0.3)(prompts(1))[0][0].text == "Hello, wörld\n"


def test_an_answer_is_the_same_in_the_cache_whether_it_was_streamed(loopback, tmp_path):
    server = loopback(lambda b, c: events(*WHOLE))
    first = sampler(server, stream=True, cache=tmp_path)(prompts(1))
    assert sampler(server, cache=tmp_path)(prompts(1)) == first
    assert len(server.bodies) == 1


# --- the ledger: cache and cap -----------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again_and_failures_are(loopback, tmp_path):
    server = loopback(lambda b, c: (400, "no", {}) if c <= 2 else reply(f"answer {c}"))
    first = sampler(server, cache=tmp_path, concurrency=1)(prompts(5), n=2)
    assert [c.finish for g in first for c in g].count("error") == 2
    asked = len(server.bodies)
    second = sampler(server, cache=tmp_path, concurrency=1)(prompts(5)[::-1], n=2)[::-1]
    assert len(server.bodies) == asked + 2
    assert [c for g in second for c in g][2:] == [c for g in first for c in g][2:]
    assert all(c.finish == "stop" for g in second for c in g)


@pytest.mark.parametrize(
    "other", [{"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 9}, {"seed": 1}, {"n": 2}, {}]
)
def test_another_setting_is_another_question(loopback, tmp_path, other):
    server = loopback(lambda b, c: reply("x"))
    sampler(server, cache=tmp_path)(prompts(1))
    sampler(server, cache=tmp_path)(prompts(1), **other)
    assert len(server.bodies) == (2 if other else 1)


def test_on_done_counts_cached_answers_too(loopback, tmp_path):
    server = loopback(lambda b, c: reply("x"))
    sampler(server, cache=tmp_path)(prompts(2))
    told = []
    sampler(server, cache=tmp_path)(prompts(5), on_done=told.append)
    assert sum(told) == 5


def test_the_key_is_in_no_file(loopback, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = loopback(lambda b, c: reply(f"your key is {KEY}") if c < 3 else (500, KEY, {}))
    sampler(server, cache=tmp_path)(prompts(4))
    (file,) = tmp_path.iterdir()
    assert KEY not in file.read_text()


@pytest.mark.parametrize("told", [True, False])
def test_the_cap_is_never_exceeded_and_says_so(loopback, tmp_path, told):
    """10 + 6 tokens an answer at most 800: where the server tells usage, else the bound of each request counts."""
    server = loopback(lambda b, c: (time.sleep(0.005), usage(10, 6) if told else reply("x"))[1])
    ask = sampler(server, cache=tmp_path, max_tokens_total=800, concurrency=4)
    done = [g[0] for g in ask(prompts(80), max_new_tokens=6)]
    answered = [c for c in done if c.finish != "error"]
    assert sum(ask.ledger.spent) <= 800
    bound = 128 + len("question 10") + 6
    assert len(answered) == ((800 - bound) // 16 + 1 if told else 800 // bound)
    assert len(server.bodies) == len(answered)
    assert all("spending limit reached" in c.error for c in done if c.finish == "error")
    assert len(done) == 80


def test_tries_that_may_have_been_charged_count(loopback):
    def script(body, count):
        if count == 1:
            time.sleep(0.3)
        return usage(10, 6)

    ask = sampler(loopback(script), timeout_s=0.1)
    ask(prompts(1), max_new_tokens=6)
    assert ask.ledger.spent == (128 + len("question 0") + 10, 6 + 6)


def test_a_budget_without_prices_is_refused():
    with pytest.raises(ValueError, match="price_in and price_out"):
        EndpointSampler("openai:m@http://host/v1", budget=1)


@pytest.mark.parametrize("column", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_reasoning_told_apart_is_a_thought_and_is_kept_with_its_cost(loopback, tmp_path, column, is_stream):
    parts = {column: "It is hot.", "content": "Use a mitt."}
    usage = {"prompt_tokens": 10, "completion_tokens": 20}

    def script(body, count):
        if not is_stream:
            return 200, json.dumps({"choices": [{"message": parts, "finish_reason": "stop"}], "usage": usage}), {}
        deltas = [{"delta": {name: text}} for name, text in parts.items()]
        events = [{"choices": [d]} for d in deltas] + [{"choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
        return 200, text, {"Content-Type": "text/event-stream"}

    server = loopback(script)
    found = []
    for _ in range(2):
        one = sampler(server, cache=tmp_path, price_in=1.0, price_out=2.0, stream=is_stream)
        found += one([Prompt(({"role": "user", "content": "q"},))])[0]
    assert len(server.bodies) == 1 and found[0] == found[1]
    assert (found[0].text, found[0].thought.text) == ("Use a mitt.", "It is hot.")
    assert (found[0].usage.prompt_tokens, found[0].usage.completion_tokens) == (10, 20)
    assert found[0].usage.cost == pytest.approx(50e-6)
