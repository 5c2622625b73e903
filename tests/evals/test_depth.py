import json

import numpy as np
import pytest

from tempering.core.policy import LoraSettings
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.evals import EvalConfig, depth, run_eval
from tempering.evals.pairs import load_pairs, score_pairs

NAN = float("nan")


def test_means_are_over_the_answers_that_are_long_enough():
    """delta(0) = (4 + 2) / 2 = 3, delta(1) = -1 over the first answer alone; C = 3, 2."""
    mean, count = depth.mean_delta(np.array([[4.0, -1.0, NAN], [2.0, NAN, NAN]]))
    assert mean.tolist() == [3.0, -1.0]
    assert count.tolist() == [2, 1]


def test_depth_counts_only_what_was_pushed_down():
    """Positive part 3, 0, 1: half (2) is reached at t = 0, nine tenths (3.6) at t = 2."""
    mean = np.array([3.0, -1.0, 1.0])
    assert depth.depth_at(mean, 0.5) == 0
    assert depth.depth_at(mean, 0.75) == 0
    assert depth.depth_at(mean, 0.9) == 2
    assert depth.depth_at(np.array([-1.0, 0.0]), 0.5) is None


def test_intervals_resample_whole_prompts():
    rng = np.random.default_rng(0)
    delta = rng.normal(1, 0.5, (40, 20))
    by_pair = depth.depth_metrics(delta, [str(i) for i in range(40)])
    repeated = depth.depth_metrics(np.repeat(delta, 2, axis=0), [str(i // 2) for i in range(80)])
    for name in ("depth_0.5", "depth_0.9", "cumulative_delta"):
        assert by_pair[name]["low"] <= by_pair[name]["value"] <= by_pair[name]["high"]
        assert by_pair[name]["low"] == pytest.approx(repeated[name]["low"])
    assert by_pair["cumulative_delta"]["value"] == pytest.approx(delta.mean(axis=0).sum())
    nothing = depth.depth_metrics(-np.abs(delta), [str(i) for i in range(40)])
    assert nothing["depth_0.5"]["value"] is None


@pytest.fixture
def target(tiny_policy):
    policy = tiny_policy()
    policy.add_adapter("final", LoraSettings(r=2, alpha=4), seed=0)
    for name, parameter in policy.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.3)
    return LocalSampler(policy)


def test_token_deltas_add_up_to_the_change_of_the_answer(target, pairs_file):
    config = EvalConfig(data=pairs_file)
    result = depth.evaluate(target, config)
    pairs = load_pairs(target, config, None).pairs
    now = score_pairs(target.policy, pairs)
    with target.policy.reference(initial=True):
        start = score_pairs(target.policy, pairs)
    want = {p.pair.id: s[1] - n[1] for p, s, n in zip(pairs, start, now, strict=True)}
    assert {r["id"]: pytest.approx(r["outcomes"]["rejected_suppression"], abs=1e-3) for r in result.rows} == want
    for row in result.rows:
        assert sum(row["delta"]) == pytest.approx(row["outcomes"]["rejected_suppression"], abs=1e-3)
    curves = result.details["curves"]
    assert curves["count"][0] == len(pairs)
    assert curves["cumulative"][-1] == pytest.approx(sum(curves["delta"]))
    assert result.metrics["cumulative_delta"]["value"] == pytest.approx(curves["cumulative"][-1])


def test_padding_and_batches_do_not_change_the_deltas(target, pairs_file, monkeypatch):
    together = depth.evaluate(target, EvalConfig(data=pairs_file))
    monkeypatch.setattr(depth, "BATCH_TOKENS", 1)
    alone = depth.evaluate(target, EvalConfig(data=pairs_file))
    assert np.allclose(together.details["curves"]["delta"], alone.details["curves"]["delta"], atol=1e-4)


def test_a_long_answer_is_cut_at_128_tokens(target, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"how {i}?", "chosen": "no", "rejected": f"stone {i} " * 60} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = depth.evaluate(target, EvalConfig(data=str(path)))
    assert len(result.details["curves"]["delta"]) == depth.POSITIONS
    assert result.details["curves"]["count"] == [3] * depth.POSITIONS


def test_a_base_model_has_no_depth(tiny_policy, pairs_file, tmp_path):
    run = Run(tmp_path / "run")
    document = run_eval("depth", LocalSampler(tiny_policy()), EvalConfig(data=pairs_file), run)
    assert document["metrics"]["depth_0.5"]["value"] is None
    assert document["metrics"]["rejected_suppression"]["value"] == 0
    assert set(run.read_json("evals/depth.json")["curves"]) == {"delta", "count", "cumulative"}
