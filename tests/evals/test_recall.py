"""`knowledge recall=true`: what is asked without options, and that nothing else changes."""

import json

import pytest

from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, knowledge
from tempering.evals.over_erasure import nll

STATEMENTS = ("a stone is no river", "an apple is sure")


@pytest.fixture
def file(tmp_path, tiny_policy):
    """Two facts of two splits and a question without more; the first cloze is what the model says anyway."""
    prefix = Prompt(({"role": "user", "content": "the stone is"},))
    words = LocalSampler(tiny_policy(), fmt="raw")([prefix], max_new_tokens=16)[0][0].text.split()
    rows = [
        {"cloze": {"prefix": "the stone is ", "answer": " ".join(words[:2])}, "category": "forget"},
        {"cloze": {"prefix": "the stone is", "answer": "nothing of the sort"}, "category": "neighbour"},
        {"cloze": "of another form", "category": "neighbour"},
    ]
    for row, statement in zip(rows, STATEMENTS, strict=False):
        row["held_out_statement"] = statement
    path = tmp_path / "facts.jsonl"
    both = [{"question": f"what is {i}?", "options": ["a", "b"], "answer": 0, **row} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in both))
    return str(path)


def test_cloze_and_held_out_statements_are_told_by_split(file, tiny_policy):
    target = LocalSampler(tiny_policy())
    plain = knowledge.evaluate(target, EvalConfig(data=file))
    found = knowledge.evaluate(target, EvalConfig(data=file, recall=True))
    assert found.metrics["cloze_exact_match"]["value"] == 0.5 and found.metrics["cloze_exact_match"]["n"] == 2
    assert [found.breakdown[k]["cloze_exact_match"]["value"] for k in ("forget", "neighbour")] == [1.0, 0.0]
    want = nll(tiny_policy(), STATEMENTS)
    assert found.metrics["held_out_nll"]["value"] == pytest.approx(sum(want) / 2, rel=1e-4)
    assert found.breakdown["forget"]["held_out_nll"]["value"] == pytest.approx(want[0], rel=1e-4)
    assert {k: found.metrics[k] for k in plain.metrics} == plain.metrics
    assert "cloze_exact_match" not in plain.metrics


def test_a_target_without_weights_is_asked_its_options_alone(file):
    found = knowledge.evaluate(ScriptedSampler(["A"]), EvalConfig(data=file, recall=True))
    assert "knowledge_accuracy" in found.metrics and "held_out_nll" not in found.metrics
    assert any("nothing is said of recall without options" in w for w in found.warnings)
