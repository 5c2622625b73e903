import json

import pytest

from tempering.core.records import Verdict
from tempering.core.sampling import ScriptedSampler
from tempering.evals import EvalConfig, over_refusal

SCORES = {"refusal": 1.0, "partial": 0.4, "compliance": 0.0}


class LabelJudge:
    """The answer is the label; `?!` is none."""

    identity = "label"

    def __call__(self, prompt, completions):
        return [
            Verdict(SCORES[c.text], "label", c.text)
            if c.text in SCORES
            else Verdict(None, "label", reason="unreadable")
            for c in completions
        ]


def data(tmp_path, n, **columns):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"good thing {i}", "category": f"c{i % 2}", **columns} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def planted(prompt, index):
    """One in ten is refused, two in ten in part."""
    number = int(prompt.text.split()[-1]) % 10
    return "refusal" if number == 0 else "partial" if number < 3 else "compliance"


def test_full_and_partial_refusals_count_and_partial_ones_are_also_told_apart(tmp_path):
    result = over_refusal.evaluate(
        ScriptedSampler(planted), EvalConfig(data=data(tmp_path, 100)), refusal_judge=LabelJudge()
    )
    rate, partial = result.metrics["over_refusal_rate"], result.metrics["partial_refusal_rate"]
    assert (rate["value"], partial["value"]) == (0.3, 0.2)
    assert rate["low"] < 0.3 < rate["high"]
    assert rate["judge"] == "label"
    assert len(result.rows) == 100 == len({row["id"] for row in result.rows})
    assert sum(row["outcome"] for row in result.rows) == 30
    assert set(result.breakdown) == {"c0", "c1"}


def test_unscored_answers_are_neither_refused_nor_answered(tmp_path):
    result = over_refusal.evaluate(
        ScriptedSampler(lambda p, i: "?!" if p.text.endswith(" 7") else "refusal"),
        EvalConfig(data=data(tmp_path, 40)),
        refusal_judge=LabelJudge(),
    )
    rate = result.metrics["over_refusal_rate"]
    assert (rate["value"], rate["n"], rate["unscored"]) == (1.0, 39, 1)
    [row] = [row for row in result.rows if row["outcome"] is None]
    assert row["outcomes"] == {"over_refusal_rate": None, "partial_refusal_rate": None}


def test_too_many_unscored_fail(tmp_path):
    with pytest.raises(ValueError, match=r"over_refusal_rate: 10 of 10 answers unscored"):
        over_refusal.evaluate(
            ScriptedSampler(["?!"]), EvalConfig(data=data(tmp_path, 10)), refusal_judge=LabelJudge()
        )


def test_harmful_prompts_of_a_mixed_file_are_skipped(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": f"thing {i}", "label": "unsafe" if i < 4 else "safe"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = over_refusal.evaluate(
        ScriptedSampler(["compliance"]), EvalConfig(data=str(path)), refusal_judge=LabelJudge()
    )
    assert len(result.rows) == 6
    assert result.warnings[0].startswith("skipped 4 of 10 prompts")


def test_only_harmful_prompts_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no prompt is left, all 3 were skipped by label"):
        over_refusal.evaluate(
            ScriptedSampler(["x"]),
            EvalConfig(data=data(tmp_path, 3, label="harmful")),
            refusal_judge=LabelJudge(),
        )


def test_bundled_prompts_serve_by_default():
    result = over_refusal.evaluate(ScriptedSampler(["compliance"]), EvalConfig(limit=7), refusal_judge=LabelJudge())
    assert len(result.rows) == 7
    assert result.metrics["over_refusal_rate"]["value"] == 0.0


def test_another_column_may_hold_the_prompt(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("goal,target\nbake bread,Sure\n")
    result = over_refusal.evaluate(
        ScriptedSampler(["compliance"]),
        EvalConfig(data=str(path), prompt_column="goal"),
        refusal_judge=LabelJudge(),
    )
    assert [row["prompt"] for row in result.rows] == ["bake bread"]
