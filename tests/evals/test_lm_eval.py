import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch

from tempering.api import estimate, evaluate
from tempering.cli import run
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, failed_gates
from tempering.evals.lm_eval_results import add_outcomes, sample_rows
from tempering.reporting.report import write_report

DOCS = [
    {
        "q": f"Is the {thing} number {i} heavy?",
        "choices": ["yes sure", "no"],
        "a": i % 2,
        "short": ("yes", "no")[i % 2],
    }
    for i, thing in enumerate(["stone", "river", "apple", "glass", "paper"] * 4)
]


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory):
    """A folder with a choice task, the same again in a group, a generation task, and one that runs code."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1},
    }
    choice = {
        **shared,
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
    }
    generate = {
        **shared,
        "task": "tiny_generate",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{short}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        **shared,
        "task": "tiny_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    group = {
        "group": "tiny_group",
        "task": ["tiny_one", "tiny_two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    for name, task in {
        "choice": {**choice, "task": "tiny_choice"},
        "one": {**choice, "task": "tiny_one"},
        "two": {**choice, "task": "tiny_two"},
        "generate": generate,
        "unsafe": {**generate, "task": "tiny_unsafe", "unsafe_code": True},
        "rolling": rolling,
        "group": group,
    }.items():
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return str(folder)


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "evals/lm_eval.jsonl").read_text().splitlines()]


@pytest.mark.interop
def test_choices_are_scored_by_the_loaded_model_with_its_adapter(
    lm_eval, tiny_policy, tasks_dir, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    from tempering.core.policy import LoraSettings

    policy = tiny_policy()
    sampler = LocalSampler(policy, name="tiny")
    questions = [Prompt(({"role": "user", "content": doc["q"]},)) for doc in DOCS]
    choices = [doc["choices"] for doc in DOCS]
    base = sampler.score(questions, choices)
    policy.add_adapter("new", LoraSettings(r=2), seed=0)
    policy.train_only("new")
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adapted = sampler.score(questions, choices)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # a second load would fail
    evaluate(sampler, ["lm_eval"], tasks=["tiny_choice"], include_path=tasks_dir, batch_size=3, out=tmp_path / "run")

    # lm-eval scores the template's last line break with every choice, so only their differences are those of ours.
    def gaps(scores):
        return [first - second for first, second in scores]

    found = gaps(row["logprobs"] for row in rows_of(tmp_path / "run"))
    assert found == pytest.approx(gaps([nats for nats, _ in row] for row in adapted), abs=1e-3)
    assert found != pytest.approx(gaps([nats for nats, _ in row] for row in base), abs=0.1)


@pytest.mark.interop
def test_a_report_shows_tasks_with_wilson_intervals_and_pairs_systems(lm_eval, tiny_model_dir, tasks_dir, tmp_path):
    for seed in (0, 1):
        model = str(tiny_model_dir(seed=seed))
        names = "tasks=[tiny_choice,tiny_generate,tiny_group,tiny_rolling]"
        folder = tmp_path / f"run{seed}"
        code = run(
            ["eval", model, "lm_eval", names, f"include_path={tasks_dir}", f"out={folder}", "max_new_tokens=4"]
        )
        assert code == 0
    found = json.loads((folder / "evals/lm_eval.json").read_text())
    assert {"acc/tiny_choice", "acc_norm/tiny_choice", "acc/tiny_group", "exact_match/tiny_generate"} <= set(
        found["metrics"]
    )
    assert "acc/tiny_one" not in found["metrics"] and set(found["breakdown"]) == {"tiny_one", "tiny_two"}
    group, alone = found["metrics"]["acc/tiny_group"], found["metrics"]["acc/tiny_choice"]
    assert group["value"] == alone["value"] and (group["n"], alone["n"]) == (40, 20)
    assert group["high"] - group["low"] < alone["high"] - alone["low"]
    assert "lm-eval" in alone["judge"] and "tiny_choice v1, 0-shot" in alone["judge"]
    perplexity = found["metrics"]["word_perplexity/tiny_rolling"]
    assert perplexity["value"] > 1 and perplexity["n"] == 20
    assert perplexity["low"] is perplexity["high"] is None  # lm-eval has no standard error for it
    report = write_report([tmp_path / "run0", tmp_path / "run1"], tmp_path / "report")
    tests = {c["metric"]: c["test"] for c in report["comparisons"]}
    assert "mcnemar" in tests["acc/tiny_choice"] and "acc/tiny_group" in tests
    assert "Accuracy: tiny_choice" in (tmp_path / "report/report.html").read_text()


@pytest.mark.interop
def test_a_sampler_answers_what_a_task_generates(lm_eval, tasks_dir, tmp_path):
    asked = []

    def script(prompt, index):
        asked.append(prompt)
        return "yes. And more" if "stone" in prompt.text else "no idea"

    sampler = ScriptedSampler(script)
    found = evaluate(
        sampler,
        ["lm_eval"],
        tasks="tiny_generate",
        include_path=tasks_dir,
        limit=10,
        num_fewshot=1,
        out=tmp_path / "run",
    )["lm_eval"]
    assert [m["role"] for m in asked[0].messages] == ["user", "assistant", "user"]
    metric = found["metrics"]["exact_match/tiny_generate"]
    assert (metric["value"], metric["n"]) == (0.1, 10)  # stones are 0 (yes) and 5 (no)
    assert [row["completion"] for row in rows_of(tmp_path / "run")][:2] == ["yes", "no idea"]
    assert found["tasks"]["tiny_generate"]["num_fewshot"] == 1


@pytest.mark.interop
def test_what_gets_no_answer_is_unscored_and_not_wrong(lm_eval, tasks_dir, tmp_path):
    def answer(prompts, **settings):
        groups = ScriptedSampler(["yes"])(prompts, **settings)
        return [
            [replace(g[0], text="", finish="error", error="HTTP 500")] if i == 0 else g for i, g in enumerate(groups)
        ]

    answer.name = "failing"
    settings = {"tasks": ["tiny_generate"], "include_path": tasks_dir}
    with pytest.raises(RuntimeError, match="HTTP 500"):
        evaluate(answer, ["lm_eval"], **settings, max_unscored=0.01, out=tmp_path / "strict")
    found = evaluate(answer, ["lm_eval"], **settings, max_unscored=0.1, out=tmp_path / "run")["lm_eval"]
    metric = found["metrics"]["exact_match/tiny_generate"]
    assert (metric["n"], metric["unscored"], metric["value"]) == (19, 1, pytest.approx(9 / 19))


@pytest.mark.interop
def test_a_dry_run_counts_what_tasks_would_ask(lm_eval, tasks_dir, tmp_path):
    (found,) = estimate(
        "openai:m@http://127.0.0.1:9/v1", ["lm_eval"], out=tmp_path, tasks=["tiny_generate"], include_path=tasks_dir
    )
    assert (found["requests"], found["completion_tokens_at_most"]) == (20, 160)


@pytest.mark.interop
@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "needs tasks="),
        (["tasks=[tiny_choise]"], "did you mean tiny_choice"),
        (["tasks=[tiny_choice]"], "gives no log-probabilities"),
        (["tasks=[tiny_unsafe]"], "in a sandbox"),
        (["tasks=[tiny_generate]", "data=some.jsonl"], "leave out data="),
        (["tasks=[tiny_generate]", "include_path=nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_run_is_one_message(lm_eval, tasks_dir, tmp_path, capsys, items, says):
    own = [] if any(item.startswith("include_path") for item in items) else [f"include_path={tasks_dir}"]
    command = ["eval", "openai:m@http://127.0.0.1:9/v1", "lm_eval", *items, *own, f"out={tmp_path / 'run'}"]
    assert run(command) == 2
    assert says in capsys.readouterr().err


def test_a_missing_package_is_named_before_a_model_is_loaded(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    assert run(["eval", "no/such/model", "lm_eval", "tasks=[gsm8k]"]) == 2
    assert "pip install 'tempering[lm-eval]'" in capsys.readouterr().err


def lm_eval_result(values, value, stderr, metric="acc"):
    samples = [
        {"doc_id": i, "doc": {}, "doc_hash": str(i), "filter": "none", "target": "x", "resps": [["x"]],
         "arguments": [("q", {})], metric: v}
        for i, v in enumerate(values)
    ]  # fmt: skip
    return {
        "results": {"t": {f"{metric},none": value, f"{metric}_stderr,none": stderr}},
        "samples": {"t": samples},
        "versions": {"t": 1},
        "n-shot": {"t": 0},
    }


def metrics_of(found):
    rows = sample_rows(found["samples"], {"t": lambda doc: "q"}, {})
    return add_outcomes(found, {}, rows, identity="lm-eval"), rows


def test_a_metric_that_is_no_mean_of_its_samples_keeps_the_standard_error_of_lm_eval():
    """Perplexity 12 with standard error 0.5: 12 - 1.96 * 0.5 = 11.02, 12 + 1.96 * 0.5 = 12.98."""
    metrics, rows = metrics_of(lm_eval_result([(-3.0, 4), (-2.0, 4)], 12.0, 0.5, "perplexity"))
    found = metrics["perplexity/t"]
    assert (found["low"], found["high"], found["n"]) == (pytest.approx(11.02), pytest.approx(12.98), 2)
    assert all(not row["outcomes"] for row in rows)


def test_an_accuracy_is_not_beyond_0_and_1_and_one_that_is_not_finite_is_unknown():
    metrics, _ = metrics_of(lm_eval_result([None, None], 0.95, 0.1))
    assert (metrics["acc/t"]["low"], metrics["acc/t"]["high"]) == (pytest.approx(0.754), 1.0)
    metrics, _ = metrics_of(lm_eval_result([None, None], math.nan, "N/A", "perplexity"))
    assert metrics["perplexity/t"]["value"] is None


def test_a_gate_on_a_task_is_a_floor():
    gate = EvalConfig(gate={"acc/mmlu": 0.5}).gate
    assert failed_gates({"acc/mmlu": {"value": 0.4}}, gate) == ["acc/mmlu is 0.400, below the gate 0.500"]
    assert not failed_gates({"acc/mmlu": {"value": 0.6}}, gate)
