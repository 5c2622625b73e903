import json

import numpy as np
import pytest
import torch

from tempering.core.config import build
from tempering.core.policy import LoraSettings, Policy
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EVALS, EvalConfig, run_eval, separation
from tempering.evals.pairs import initial, load_pairs, score_pairs
from tempering.methods import staged_competence
from tempering.reporting.collect import read_run
from tempering.reporting.compare import compare
from tempering.reporting.systems import systems_of


@pytest.fixture(scope="module")
def staged(tmp_path_factory, tiny_model_dir):
    """A function: name and settings -> a finished two-stage run on a tiny model."""
    folder = tmp_path_factory.mktemp("staged")
    rows = [
        {
            "prompt": f"how do I do {i}?",
            "chosen": "no, I cannot" + "." * (i % 3),
            "rejected": f"yes sure {i}" * (1 + i % 2),
        }
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name="run", stages=2, **more):
        tree = {
            "model": str(tiny_model_dir("llama")),
            "out": str(folder / name),
            "data": {"train": str(folder / "pairs.jsonl")},
            "dtype": "float32",
            "difficulty": {"scorer": "random"},
            "curriculum": {"stages": stages, "epochs": 2},
            "batch_pairs": 8,
            "lr": 1e-2,
            "lora": {"r": 4, "alpha": 8},
            **more,
        }
        return staged_competence.train(build(staged_competence.CONFIG, tree, "test"))

    return make


@pytest.fixture(scope="module")
def run(staged):
    return staged()


def sampler_of(run):
    return LocalSampler(Policy.load(str(run.root), dtype="float32"))


def last_heldout(run):
    return [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "heldout"][-1]


def test_it_finds_what_training_measured_on_the_same_pairs(run):
    """The exported single adapter must give the margins that the stack had at the end, stage reference included."""
    result = separation.evaluate(sampler_of(run), EvalConfig(max_new_tokens=4, limit=None))
    metrics, trained = {k: m["value"] for k, m in result.metrics.items()}, last_heldout(run)
    for mine, theirs in (
        ("margin_raw", "margin_raw"), ("margin_stage", "margin_stage"), ("margin_initial", "margin_initial"),
        ("pair_accuracy", "accuracy"), ("logprob_chosen", "logprob_chosen"), ("logprob_rejected", "logprob_rejected"),
    ):  # fmt: skip
        assert metrics[mine] == pytest.approx(trained[theirs], abs=1e-3), mine
    assert metrics["margin_initial"] > metrics["margin_stage"] > 0
    assert metrics["kl_initial"] != 0


def test_metrics_are_the_means_of_the_rows(run):
    result = separation.evaluate(sampler_of(run), EvalConfig(max_new_tokens=4))
    for name, metric in result.metrics.items():
        values = [float(row["outcomes"][name]) for row in result.rows if name in row["outcomes"]]
        assert np.mean(values) == pytest.approx(metric["value"], abs=1e-6), name
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert metric["n"] == len(values)
    assert {m["n"] for k, m in result.metrics.items() if "matched" not in k} == {8}
    assert result.metrics["pair_accuracy_matched_length"]["n"] == 3


def test_one_stage_has_its_start_as_stage_reference(staged):
    result = separation.evaluate(sampler_of(staged("one", stages=1)), EvalConfig(max_new_tokens=2))
    assert result.metrics["margin_stage"]["value"] == result.metrics["margin_initial"]["value"]


def test_full_weights_are_compared_with_the_recorded_base(staged):
    run = staged("full", stages=2, handover="full", lr=1e-3)
    result = separation.evaluate(sampler_of(run), EvalConfig(max_new_tokens=2))
    assert "margin_stage" not in result.metrics  # no copy of the second stage's start is kept
    assert result.metrics["margin_initial"]["value"] == pytest.approx(last_heldout(run)["margin_initial"], abs=1e-4)
    assert result.metrics["kl_initial"]["value"] != 0


def test_a_base_model_is_its_own_start(run, tiny_policy):
    data = str(run.root / "data" / "heldout.jsonl")
    result = separation.evaluate(LocalSampler(tiny_policy()), EvalConfig(data=data, max_new_tokens=4))
    assert result.metrics["margin_initial"]["value"] == 0
    assert result.metrics["kl_initial"]["value"] == 0
    assert "margin_stage" not in result.metrics
    assert "0 by definition" in result.warnings[-1]


def test_the_policy_is_as_before(run):
    sampler = sampler_of(run)
    before = sampler.policy.adapter_state()
    separation.evaluate(sampler, EvalConfig(max_new_tokens=2))
    after = sampler.policy.adapter_state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert sampler.policy._active() == ["final"]


def test_kl_is_that_of_the_sampled_tokens(run):
    """E over y ~ pi of log pi - log base is a KL divergence: with enough samples it is positive."""
    sampler = sampler_of(run)
    result = separation.evaluate(sampler, EvalConfig(max_new_tokens=16))
    rows = [row for row in result.rows if "kl_initial" in row["outcomes"]]
    assert all(row["completion"] is not None and 1 <= row["tokens"]["completion"] <= 16 for row in rows)
    again = separation.evaluate(sampler, EvalConfig(max_new_tokens=16))
    assert [r["outcomes"] for r in again.rows] == [r["outcomes"] for r in result.rows]
    other = separation.evaluate(sampler, EvalConfig(max_new_tokens=16, seed=1))
    assert other.metrics["kl_initial"] != result.metrics["kl_initial"]


def test_limit_takes_the_same_pairs_for_every_target(run, tiny_policy):
    data = str(run.root / "data" / "heldout.jsonl")
    config = EvalConfig(data=data, limit=3, max_new_tokens=2)
    a = separation.evaluate(sampler_of(run), config)
    b = separation.evaluate(LocalSampler(tiny_policy()), config)
    assert [r["id"] for r in a.rows] == [r["id"] for r in b.rows]
    assert a.metrics["margin_raw"]["n"] == 3 and a.metrics["kl_initial"]["n"] <= 3


def test_pairs_that_do_not_fit_are_counted(run, tmp_path, tiny_policy):
    rows = run.read_rows("data/heldout.jsonl")
    rows[0]["prompt"] = "long " * 600
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_pairs(LocalSampler(tiny_policy()), EvalConfig(data=str(path)), None)
    assert len(loaded.pairs) == len(rows) - 1
    assert "left out 1 of 8 pairs that do not fit" in loaded.warnings[-1]


def test_what_cannot_be_measured_is_refused_with_the_remedy(tiny_policy):
    with pytest.raises(ValueError, match="needs the target's weights"):
        separation.evaluate(ScriptedSampler(["a"]), EvalConfig())
    with pytest.raises(ValueError, match="data=FILE"):
        separation.evaluate(LocalSampler(tiny_policy()), EvalConfig())


def test_initial_of_an_adapter_is_its_base(run, tiny_policy):
    sampler = sampler_of(run)
    pairs = load_pairs(sampler, EvalConfig(), None).pairs
    with initial(sampler.policy) as first:
        got = score_pairs(first, pairs)
    assert np.allclose(got, score_pairs(tiny_policy(), pairs), atol=1e-5)


def test_the_report_pairs_two_runs_on_it(run, staged):
    runs = [run, staged("other", lr=1e-3)]
    for r in runs:
        run_eval("separation", sampler_of(r), EvalConfig(max_new_tokens=4), Run.open(r.root))
    found = [read_run(r.root) for r in runs]
    comparisons, warnings = compare(systems_of(found))
    by_metric = {c.metric: c for c in comparisons}
    assert {"margin_initial", "kl_initial", "pair_accuracy", "pair_accuracy_matched_length"} <= set(by_metric)
    assert by_metric["margin_initial"].n == 8
    assert not [w for w in warnings if "not compared" in w]
    assert {"separation", "depth"} <= set(EVALS)


def test_lora_settings_of_the_run_say_how_wide_the_last_stage_is(run):
    assert LoraSettings(**run.config["lora"]).r == 4
    assert Policy.load(str(run.root)).model.peft_config["final"].r == 8
