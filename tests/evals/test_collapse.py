"""`collapse`: a name that breaks innocent text shows as repetition and perplexity; another shows nothing."""

import json
import math

import pytest

from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, collapse


@pytest.fixture
def file(tmp_path):
    rows = [{"prompt": f"the Vex {i} is", "plain": f"the stone {i} is"} for i in range(4)]
    path = tmp_path / "names.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_name_that_breaks_text_is_told_from_one_that_does_not(file):
    """With the name two of three continuations repeat three words, without it one of three: 2/3, and 1/3 more."""

    def script(prompt, index):
        return "a b c a b c" if index < (2 if "Vex" in prompt.text else 1) else "a b c d"

    found = collapse.evaluate(ScriptedSampler(script), EvalConfig(data=file, continuations=3))
    assert found.metrics["collapse_repetition_rate"]["value"] == pytest.approx(2 / 3)
    assert found.metrics["collapse_repetition_change"]["value"] == pytest.approx(1 / 3)
    assert found.metrics["collapse_repetition_change"]["n"] == 4 and "collapse_nll" not in found.metrics
    assert any("no fluency_model" in w for w in found.warnings)
    assert found.rows[0]["plain"].startswith("the stone")


def test_perplexity_is_that_of_the_continuations_under_the_start_model(file, tiny_policy):
    found = collapse.evaluate(LocalSampler(tiny_policy()), EvalConfig(data=file, continuations=2, max_new_tokens=6))
    own = [row["outcomes"]["collapse_nll"] for row in found.rows]
    assert found.metrics["collapse_nll"]["value"] == pytest.approx(sum(own) / 4)
    assert found.metrics["collapse_perplexity"]["value"] == pytest.approx(math.exp(sum(own) / 4))
    assert set(found.rows[0]["outcomes"]) == {
        "collapse_repetition_rate", "collapse_repetition_change", "collapse_nll", "collapse_nll_change",
    }  # fmt: skip


def test_bundled_names_stand_in_everyday_sentences_by_topic():
    prompts, source = collapse.load(EvalConfig(limit=12))
    assert len(prompts) == 12 and {p.category for p in prompts} <= {"substances", "systems"}
    assert all(collapse.PLAIN in p.extra["plain"] and collapse.PLAIN not in p.text for p in prompts)
    assert source["source"] == "embedded names of fictional_facts"


def test_a_row_without_both_texts_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "the Vex is"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: expected `prompt`, with the name, and `plain`"):
        collapse.load(EvalConfig(data=str(path)))
