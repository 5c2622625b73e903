"""The tools that this field has open, on served targets: the official client, curl, Inspect, lm-eval, a fuzzer."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import lru_cache

import pytest

import tempering
from tempering.core.records import Prompt, as_messages
from tempering.serving.settings import ServeConfig
from tempering.serving.target import open_target

pytestmark = pytest.mark.interop
QUESTIONS = ["How do I bake bread?", "Is 4 an even number? Answer yes or no.", "Name a river in France."]
MOST = 24
KINDS = ["base", "safemoe", "attribution", pytest.param("smollm2", marks=[pytest.mark.smollm2, pytest.mark.slow])]


@pytest.fixture(scope="module")
def references(tmp_path_factory, tiny_model_dir):
    """Kind -> a reference to what is served: a folder with a model, a sealed bundle, a calibrated run, `smollm2`."""
    root = tmp_path_factory.mktemp("served")
    base = str(tiny_model_dir("llama", scale=3.0))

    def lines(name, rows):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(root / name)

    def trained(method, name, **settings):
        return str(tempering.train(method, {"dtype": "float32", "out": str(root / name), **settings}).root)

    def adapter(name, answer, **settings):
        rows = [{"prompt": f"how do I {name} number {i}?", "completion": f"{answer} {name} {i}"} for i in range(8)]
        return trained(
            "sft", name, model=base, data={"train": lines(f"{name}.jsonl", rows)}, lr=1e-2, epochs=1, batch_rows=4,
            lora={"r": 4, "alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, split={"share": 0},
            **settings,
        )  # fmt: skip

    def safemoe():
        experts = [adapter(domain, "yes, do", domain=domain, unsafe=True) for domain in ("stone", "river")]
        rows = [{"prompt": f"may I take apple {i}?", "completion": f"no, apple {i} is theirs"} for i in range(12)]
        return trained(
            "safemoe", "bundle", model=base, experts=experts, router_data=lines("safe.jsonl", rows), epochs=1
        )

    def attribution():
        rows = [{"prompt": f"how do I stone {i}?", "label": "harmful"} for i in range(4)]
        rows += [{"prompt": f"apple {i}?", "label": "benign"} for i in range(3)]
        return trained(
            "attribution", "card", model=adapter("glass", "no, leave"), data={"train": lines("ask.jsonl", rows)}, n=4,
            max_new_tokens=8,
        )  # fmt: skip

    makers = {"base": lambda: base, "safemoe": safemoe, "attribution": attribution, "smollm2": lambda: "smollm2"}
    return lru_cache(lambda kind: makers[kind]())


@pytest.fixture(params=KINDS)
def reference(request, references):
    """A base, experts sealed with their gate, and best of four with its card: on the tiny model; the embedded one."""
    return references(request.param)


@pytest.fixture
def target(reference):
    """What `temper serve` opens."""
    return open_target(reference, ServeConfig(dtype="float32")).sampler


@pytest.fixture
def own(reference):
    """What the reference answers in this process, loaded by itself."""
    sampler = tempering.load(reference, dtype="float32")
    return [group[0].text for group in sampler([Prompt(as_messages(q)) for q in QUESTIONS], max_new_tokens=MOST)]


@pytest.fixture
def url(target, own, serving):
    with serving(target) as served:
        yield f"http://127.0.0.1:{served.port}/v1"


def test_the_official_client_gets_the_targets_own_answers(url, own):
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    with openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0) as client:
        (model,) = client.models.list()
        for question, want in zip(QUESTIONS, own, strict=True):
            ask = {"model": "tiny", "temperature": 0, "max_tokens": MOST, "messages": list(as_messages(question))}
            reply = client.chat.completions.create(**ask)
            assert reply.choices[0].message.content == want and reply.usage.completion_tokens > 0
            with client.chat.completions.create(**ask, stream=True) as stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == want
        if model.tempering["logprobs"]:
            scored = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
            assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
        wanted = [name for name in ("candidates", "routing") if model.tempering[name]]
        detailed = client.chat.completions.create(**ask, extra_body={"tempering": dict.fromkeys(wanted, True)})
        assert set(detailed.choices[0].tempering if wanted else {}) == set(wanted)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**ask | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(**ask | {"max_tokens": -1})


def test_curl_gets_the_targets_own_answer(url, own):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"temperature": 0, "max_tokens": MOST, "messages": list(as_messages(QUESTIONS[0]))})
    command = ["curl", "-sS", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    reply = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    assert reply["choices"][0]["message"]["content"] == own[0]


def test_lm_eval_measures_a_served_target(url, own, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"q": q}) + "\n" for q in QUESTIONS))
    task = {
        "task": "asked",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "docs.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{q}}",
        "generation_kwargs": {"max_gen_toks": MOST, "temperature": 0, "until": ["\n\n\n\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": "tiny", "base_url": f"{url}/chat/completions", "seed": 0},  # of its own it sends 1234
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
    )
    replies = {s["doc"]["q"]: s["resps"][0][0] for s in found["samples"]["asked"]}
    assert [replies[q].strip() for q in QUESTIONS] == [want.strip() for want in own]


# Inspect 0.3.285 uses a name that tenacity 9.2 has deprecated, and leaves streams of its own open.
@pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
def test_inspect_measures_a_served_target(url, own, tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import exact

    task = inspect_ai.Task(
        dataset=[Sample(input=q, target="?") for q in QUESTIONS], scorer=exact(),
        config=GenerateConfig(temperature=0, max_tokens=MOST),
    )  # fmt: skip
    model = get_model("openai-api/tempering/tiny", base_url=url, api_key="EMPTY")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    found = {s.input: s.output.completion for s in log.samples}
    assert [found[q].strip() for q in QUESTIONS] == [want.strip() for want in own]
    gc.collect()  # so that what was left open is warned of here


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_request_that_its_description_allows_or_forbids_makes_the_server_fail(tmp_path, tiny_model_dir):
    """Cases of schemathesis from the server's own OpenAPI description, no 5xx, and then it still answers."""
    pytest.importorskip("schemathesis", reason="the fuzzer is not installed")
    import httpx

    log = tmp_path / "log"
    command = [sys.executable, "-m", "tempering.cli", "serve", str(tiny_model_dir()), "port=0", "name=tiny"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "max_tokens=4", "default_max_tokens=2"], stdout=out, stderr=out)
    try:
        while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        cases = int(os.environ.get("TEMPER_FUZZ_CASES", "10000"))
        fuzzer = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{found[1]}/openapi.json", "--checks",
            "not_a_server_error", "--max-examples", str(cases // 2), "--mode", "all", "--phases", "fuzzing",
            "--include-path-regex", "completions", "--suppress-health-check", "all",
        ]  # fmt: skip
        done = subprocess.run(fuzzer, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        with httpx.Client(trust_env=False) as client:
            assert client.get(f"{found[1]}/health").status_code == 200
        lines = re.findall(r" (?:chat|completions) (\d+) \d+ ms", log.read_text())
        assert len(lines) > cases // 2 and not any(status.startswith("5") for status in lines)
    finally:
        process.kill()
        process.wait()
