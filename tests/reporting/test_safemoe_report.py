"""What the report says of `safemoe`: the verdict over its controls, its gate's plots, and a ribbon that escapes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pydantic import Field
from safetensors.numpy import save_file

from tempering.core.config import Config
from tempering.core.run import Run
from tempering.reporting.report import write_report
from tempering.reporting.safemoe import (
    CAUSES,
    NOT_SHOWN,
    expert_names,
    expert_shares,
    joint_difference,
    names_in,
    read_traces,
    ribbons,
    routing_facts,
    verdict_of,
)

UNSEEN = ("forgery",)


def rows(points, domains=("fraud", "theft", "forgery")):
    """One row a prompt; 0 points is unsafe."""
    return [
        {
            "prompt_id": str(i),
            "category": domains[i % len(domains)],
            "outcomes": {"safe_rate": n > 0, "joint_score": n / 10} | ({"informativeness": n / 10} if n else {}),
        }
        for i, n in enumerate(points)
    ]


def systems(n=120, **changed):
    found = {name: rows([3, 0, 0, 5] * (n // 4)) for name in ("base", *CAUSES)}
    found |= {"safemoe": rows([8, 8, 0, 9] * (n // 4)), "refusal_only": rows([5] * n)}
    return found | changed


def test_the_claim_is_supported_where_every_control_is_beaten():
    verdict = verdict_of(systems(), UNSEEN)
    assert verdict.word == "supported", verdict.sentence
    assert verdict.joint["matched_lora"].low > 0


@pytest.mark.parametrize("control", CAUSES)
def test_a_control_that_is_not_beaten_refutes_and_two_of_them_name_the_cause(control):
    found = systems()
    verdict = verdict_of(found | {control: found["safemoe"]}, UNSEEN)
    assert verdict.word == "not supported"
    assert control in verdict.sentence
    assert (NOT_SHOWN in verdict.sentence) == (control in ("random_experts", "matched_lora"))


def test_as_informative_refusals_or_an_unchanged_unseen_domain_refute():
    assert "refusal_only" in verdict_of(systems(refusal_only=rows([9] * 120)), UNSEEN).sentence
    found = systems()
    assert "neither expert nor safe data" in verdict_of(found | {"base": found["safemoe"]}, UNSEEN).sentence


def test_few_prompts_or_a_missing_control_are_inconclusive():
    assert verdict_of(systems(n=96), UNSEEN).word == "inconclusive"
    found = systems()
    del found["uniform_gate"]
    verdict = verdict_of(found, UNSEEN)
    assert verdict.word == "inconclusive"
    assert "uniform_gate" in verdict.sentence


def test_joint_scores_are_compared_on_shared_prompts_only():
    result = joint_difference(rows([8, 8, 8]), rows([6, 6]))
    assert result.difference == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no scored prompt"):
        joint_difference(rows([]), rows([1]))


def trace(root, idx, row, domains, tokens=None, part=None):
    (root / "traces").mkdir(parents=True)
    idx = np.asarray(idx, dtype=np.uint8)
    count = len(row)
    tensors = {
        "idx": idx, "w": np.ones(idx.shape, dtype=np.float16), "row": np.asarray(row, dtype=np.int32),
        "pos": np.arange(count, dtype=np.int32), "token": np.asarray(tokens or range(count), dtype=np.int32),
        "part": np.asarray(part or [1] * count, dtype=np.uint8),
    }  # fmt: skip
    save_file(tensors, root / "traces" / "eval.safetensors")
    lines = [{"id": str(i), "domain": domain} for i, domain in enumerate(domains)]
    (root / "traces" / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_domains_that_share_no_expert_have_information_ln_d_and_alike_ones_none(tmp_path):
    trace(tmp_path / "apart", [[[0]], [[0]], [[1]], [[1]]], [0, 0, 1, 1], ["a", "b"])
    domains, shares = expert_shares(read_traces(tmp_path / "apart")["eval"], 3)
    assert domains == ["a", "b"]
    assert shares.tolist() == [[1, 0, 0], [0, 1, 0]]  # the third was never selected, and is there all the same
    assert routing_facts(read_traces(tmp_path / "apart")["eval"]).startswith(f"MI {math.log(2):.3f} nats (p ")
    trace(tmp_path / "alike", [[[0]], [[1]], [[0]], [[1]]], [0, 0, 1, 1], ["a", "b"])
    facts = routing_facts(read_traces(tmp_path / "alike")["eval"])
    assert facts == "MI 0.000 nats (p 1.000, 2 prompts), switch rate 1.00"


def test_switches_are_counted_among_tokens_of_the_answer_alone(tmp_path):
    idx = [[[0]], [[1]], [[0]], [[1]], [[1]], [[1]], [[1]], [[0]]]
    trace(tmp_path, idx, [0] * 8, ["a"], part=[0, 0, 0, 1, 1, 1, 1, 1])
    assert routing_facts(read_traces(tmp_path)["eval"]).endswith("switch rate 0.25")  # one of four, not four of seven


def test_every_expert_has_a_name_and_the_null_expert_its_own(tmp_path):
    config = {"expert_data": {"fraud": "x", "theft": "y"}, "null_expert": True}
    trace(tmp_path, [[[0]]], [0], ["a"])
    assert names_in(config, read_traces(tmp_path)["eval"]) == ["fraud", "theft", "null expert"]
    assert expert_names(config, 2) == ["fraud", "theft"]


class Settings(Config):
    """A configuration as far as the report reads it."""

    expert_data: dict[str, str] = Field(default_factory=lambda: {"<b>fraud</b>": "x"})


def test_the_gate_is_drawn_and_whatever_names_say_is_escaped(tmp_path):
    root = tmp_path / "run"
    run = Run.create(root, "safemoe", Settings())
    for step in (10, 20):
        row = {"step": step, "loss": 1.0, "load_entropy": 0.9, "max_share": 0.6, "usage": [0.6, 0.4]}
        run.append_row("metrics.jsonl", row)
    trace(root, [[[0]], [[0]], [[1]]], [0, 0, 1], ["<script>a</script>", "b"])
    run.write_provenance()
    run.finish()
    write_report([root], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Share of each expert" in page
    assert "MI 0.693 nats" in page
    assert "<script>" not in page and "<b>fraud" not in page
    assert "&lt;b&gt;fraud" in page
    assert all("<script>" not in ribbon for ribbon in ribbons(root, {"expert_data": {"<script>": "x"}}))


def test_a_broken_trace_is_left_out(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "bad.safetensors").write_bytes(b"no")
    assert read_traces(tmp_path) == {}
