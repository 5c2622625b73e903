"""What clients get is what the target gives anywhere else, whatever else is asked at the time."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tempering.core import adapted_layers
from tempering.core.decoding import TokenScore
from tempering.core.policy import LoraSettings
from tempering.core.records import Prompt, as_messages
from tempering.core.sampling import LocalSampler, ScriptedSampler, ThinkSampler
from tempering.serving.jobs import Ask, Wrote
from tempering.serving.replies import Replies, dumped
from tempering.serving.settings import ServeConfig
from tempering.serving.target import describe


def asked(text, **body):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **body}


TEXTS = [f"how do I {'stone ' * (i % 4)}number {i}?" for i in range(12)]


def here(sampler, text, n=1, **settings):
    ask = {"max_new_tokens": 12} | settings
    return sampler([Prompt(as_messages(text))], n=n, **ask)[0]


def streamed(served, text, path="/v1/chat/completions", **body):
    """Return the texts of all answers of a stream, its chunks, and its comments."""
    ask = asked(text, stream=True, **body) if "chat" in path else {"prompt": text, "stream": True, **body}
    chunks, comments, texts = [], [], {}
    with served.client.stream("POST", path, json=ask) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        if line.startswith(":"):
            comments.append(line)
            continue
        chunks.append(json.loads(line.removeprefix("data: ")))
        for choice in chunks[-1]["choices"]:
            said = choice.get("delta", {"content": choice.get("text")}).get("content")
            texts[choice["index"]] = texts.get(choice["index"], "") + (said or "")
    return texts, chunks, comments


def test_greedy_answers_are_the_targets_own(server, tiny_sampler):
    for text in TEXTS[:4]:
        [own] = here(tiny_sampler, text)
        reply = server.chat(text).json()
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == own.text and choice["finish_reason"] == own.finish
        assert reply["object"] == "chat.completion" and reply["model"] == "tiny"
        prompt = len(tiny_sampler.prompt_ids(Prompt(as_messages(text))))
        assert reply["usage"]["prompt_tokens"] == prompt
        assert reply["usage"]["completion_tokens"] == len(own.token_ids)
        assert reply["usage"]["total_tokens"] == prompt + len(own.token_ids)


def test_answers_do_not_depend_on_who_else_asks(server, tiny_sampler):
    """Forty at a time, of mixed lengths, temperatures and seeds, streamed or not: none gets another's answer."""
    asks = [
        (text, {"temperature": (0, 1.0, 0.7)[i % 3], "max_tokens": 3 + 5 * (i % 4), "seed": i % 5}, i % 2)
        for i, text in enumerate(TEXTS * 3 + TEXTS[:4])
    ]

    def ask(one):
        text, settings, streams = one
        if streams:
            return streamed(server, text, **settings)[0][0]
        return server.chat(text, **settings).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(len(asks)) as pool:
        got = list(pool.map(ask, asks))
    for (text, s, _), found in zip(asks, got, strict=True):
        [own] = here(tiny_sampler, text, temperature=s["temperature"], max_new_tokens=s["max_tokens"], seed=s["seed"])
        assert found == own.text
    assert len(set(got)) > 20


def test_a_stream_is_the_whole_answer_and_tells_its_usage(server):
    body = {"temperature": 0.8, "seed": 4, "n": 3, "stop": ["e"], "max_tokens": 20}
    whole = server.chat(**body).json()
    texts, chunks, _ = streamed(server, "how do I stone?", **body, stream_options={"include_usage": True})
    assert texts == {c["index"]: c["message"]["content"] for c in whole["choices"]}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    ends = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
    assert ends == {c["index"]: c["finish_reason"] for c in whole["choices"]}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_an_answer_ends_before_a_stop_text(server, tiny_sampler):
    [own] = here(tiny_sampler, TEXTS[1], max_new_tokens=30)
    stop = own.text[5:7]
    reply = server.chat(TEXTS[1], max_tokens=30, stop=[stop, "never to be seen"]).json()
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == own.text[: own.text.index(stop)] and choice["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < len(own.token_ids)  # nothing is drawn beyond it
    assert server.chat(TEXTS[1], max_tokens=30, stop=stop).json()["choices"] == reply["choices"]


def test_n_answers_are_the_first_n_samples(server, tiny_sampler):
    reply = server.chat(TEXTS[2], n=4, temperature=1.0, seed=7).json()
    own = here(tiny_sampler, TEXTS[2], n=4, temperature=1.0, seed=7)
    assert [c["message"]["content"] for c in reply["choices"]] == [c.text for c in own]
    assert reply["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in own)


def test_without_a_seed_each_request_is_another_draw(server):
    def draw(**body):
        return server.chat(temperature=1.5, max_tokens=20, **body).json()["choices"][0]["message"]["content"]

    assert len({draw() for _ in range(4)}) > 1
    assert len({draw(seed=0) for _ in range(2)}) == 1


def test_log_probabilities_are_the_models(server, tiny_sampler):
    [own] = here(tiny_sampler, TEXTS[0], max_new_tokens=4)
    (choice,) = server.chat(TEXTS[0], max_tokens=4, logprobs=True, top_logprobs=2).json()["choices"]
    found = choice["logprobs"]["content"]
    assert len(found) == len(own.token_ids) - (own.finish == "stop")
    start = tiny_sampler.prompt_ids(Prompt(as_messages(TEXTS[0])))
    with torch.no_grad():
        table = tiny_sampler.policy.model(input_ids=torch.tensor([start])).logits[0, -1].log_softmax(-1)
    best = table.topk(2)
    assert found[0]["logprob"] == pytest.approx(best.values[0].item(), abs=1e-4)
    assert [t["logprob"] for t in found[0]["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    chunks = streamed(server, TEXTS[0], max_tokens=4, logprobs=True, top_logprobs=2)[1]
    assert [one for c in chunks for x in c["choices"] if x["logprobs"] for one in x["logprobs"]["content"]] == found


@pytest.mark.parametrize("is_chat", [True, False])
def test_what_cannot_be_has_a_log_probability_that_json_knows(tiny_sampler, is_chat):
    ask = Ask((Prompt(as_messages("hi")),), ([5],), 3, top_logprobs=1)
    replies = Replies(describe("tiny", tiny_sampler, ServeConfig()), ask, is_chat=is_chat)
    scores = [TokenScore(300, value, [(300, value)]) for value in (float("-inf"), float("nan"), -1.5)]
    found = json.loads(dumped(replies.goes_on(Wrote(0, "a", scores=scores))))["choices"][0]["logprobs"]
    got = [s["logprob"] for s in found["content"]] if is_chat else found["token_logprobs"]
    assert got == [-9999.0, -9999.0, -1.5]


def test_completions_continue_texts_and_tokens(server, tiny_sampler):
    raw = LocalSampler(tiny_sampler.policy, fmt="raw")
    own = [here(raw, text)[0] for text in TEXTS[:3]]

    def ask(prompt, **body):
        reply = server.client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **body}).json()
        assert reply["object"] == "text_completion"
        return [c["text"] for c in reply["choices"]]

    assert ask(TEXTS[0]) == [own[0].text]
    assert ask(TEXTS[:3]) == [c.text for c in own]
    ids = [raw.prompt_ids(Prompt(as_messages(text))) for text in TEXTS[:3]]
    assert ask(ids[0]) == [own[0].text] and ask(ids) == [c.text for c in own]
    assert ask(TEXTS[:2], n=2) == [own[0].text] * 2 + [own[1].text] * 2
    assert streamed(server, TEXTS[0], "/v1/completions", temperature=0)[0] == {0: own[0].text}
    reply = server.client.post("/v1/completions", json={"prompt": "stone", "logprobs": 1, "max_tokens": 3}).json()
    found = reply["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"])


def test_a_begun_answer_is_continued(server, tiny_sampler):
    turns = [*as_messages(TEXTS[0]), {"role": "assistant", "content": "yes sure"}]
    [[own]] = tiny_sampler([Prompt(tuple(turns))], max_new_tokens=12)
    body = asked("", messages=turns)
    reply = server.client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == own.text


def test_text_may_come_in_parts_and_system_is_called_developer(server):
    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how do I stone?"}]
    parts = [{"type": "text", "text": "how do I "}, {"type": "text", "text": "stone?"}]
    other = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    replies = [server.client.post("/v1/chat/completions", json=asked("", messages=m)).json() for m in (plain, other)]
    assert replies[0]["choices"] == replies[1]["choices"]


def test_a_model_that_thinks_first_gives_its_reasoning_apart(tiny_sampler, serving):
    think = ThinkSampler(LocalSampler(tiny_sampler.policy, thinks=True), 9)
    with serving(think) as served:
        [own] = here(think, TEXTS[0])
        (choice,) = served.chat(TEXTS[0]).json()["choices"]
        assert choice["message"]["content"] == own.text == ""
        assert choice["message"]["reasoning_content"] == own.thought.text
        _, chunks, _ = streamed(served, TEXTS[0], stream_options={"include_usage": True})
        parts = [c["delta"].get("reasoning_content", "") for chunk in chunks for c in chunk["choices"]]
        assert "".join(parts) == own.thought.text and sum(map(bool, parts)) > 1
        used = chunks[-1]["usage"]
        assert used["completion_tokens"] == used["completion_tokens_details"]["reasoning_tokens"] > 0
        assert served.chat(logprobs=True).status_code == 400


def test_best_of_n_tells_its_candidates_counts_them_and_buffers(tiny_sampler, serving):
    from tempering.methods import attribution

    chosen = attribution.around(tiny_sampler, {"scorer": "length", "n": 4, "temperature": 1.0})
    rows = []
    chosen.keep = rows.append
    [[own]] = chosen([Prompt(as_messages(TEXTS[0]))], max_new_tokens=12)
    with serving(chosen) as served:
        reply = served.chat(TEXTS[0], tempering={"candidates": True}).json()
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == own.text
        told = choice["tempering"]["candidates"]
        assert told["winner"] == rows[0]["winner"] and [c["risk"] for c in told["candidates"]] == [
            c["risk"] for c in rows[0]["candidates"]
        ]
        drawn = sum(len(c["token_ids"]) for c in rows[0]["candidates"])
        assert reply["usage"]["completion_tokens"] == drawn > len(own.token_ids)
        texts, chunks, comments = streamed(served, TEXTS[0], tempering={"candidates": True})
        assert texts == {0: own.text} and "best of 4" in comments[0]
        assert chunks[-1]["choices"][0]["tempering"] == choice["tempering"]
        bad = served.client.post("/v1/completions", json={"prompt": "x"})
        assert bad.status_code == 400 and bad.json()["error"]["code"] == "chat_only"
        assert served.metric("completion_tokens_total") == 2 * drawn


def test_requests_of_equal_settings_are_one_call_of_a_sampler_that_answers_in_whole(serving):
    calls = []

    class Whole(ScriptedSampler):
        def __call__(self, prompts, **settings):
            calls.append(len(prompts))
            threading_gate.wait(5)
            return super().__call__(prompts, **settings)

    import threading
    import time

    threading_gate = threading.Event()
    with serving(Whole(lambda p, i: f"to {p.text}")) as served, ThreadPoolExecutor(9) as pool:
        first = pool.submit(served.chat, "first")
        while not calls:
            time.sleep(0.005)
        rest = [pool.submit(served.chat, f"number {i}") for i in range(6)]
        other = pool.submit(served.chat, "hot", temperature=1.0, seed=1)
        while served.engine.under_way < 8:
            time.sleep(0.005)
        threading_gate.set()
        said = [f.result().json()["choices"][0]["message"]["content"] for f in (first, *rest, other)]
    assert said == ["to first", *(f"to number {i}" for i in range(6)), "to hot"]
    assert sum(calls) == 8 and len(calls) <= 4


def test_adapters_are_joined_once_a_layer_however_much_is_answered(tiny_policy, serving, monkeypatch):
    policy, joined, calls = tiny_policy(), adapted_layers._joined, []
    policy.add_adapter("player", LoraSettings(r=4), seed=7)
    for name, weight in policy.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(1))
    sampler = LocalSampler(policy)
    want = [here(sampler, text)[0].text for text in TEXTS]
    with policy.reference():
        assert want != [here(sampler, text)[0].text for text in TEXTS]
    monkeypatch.setattr(adapted_layers, "_joined", lambda *args: calls.append(args) or joined(*args))
    with serving(sampler) as served:
        replies = [served.chat(text).json() for text in TEXTS]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == want
    assert len(calls) == sum(1 for _ in policy.lora_layers())
