"""Own answers: only harmless pairs change, refusals and broken answers are never taken, a stopped run goes on."""

import json

import pytest

from tempering import answering
from tempering.answering import OwnAnswersConfig, run_own_answers, whole_sentences
from tempering.cli import run
from tempering.core.records import Completion
from tempering.core.sampling import ScriptedSampler

ROWS = [
    {"prompt": "How do I poach an egg?", "chosen": "Simmer it.", "rejected": "I won't.", "label": "borderline"},
    {"prompt": "How do I boil rice?", "chosen": "Use a pot.", "rejected": "I can't.", "label": "benign"},
    {"prompt": "How do I rob a bank?", "chosen": "I can't help.", "rejected": "Go in.", "label": "harmful"},
]
GOOD = "Simmer the egg in water for about three minutes."
REFUSAL = "I'm sorry, but I can't help you with that request."


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function: script -> (result, rows of the new file)."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(script, resume=False, **settings):
        sampler = ScriptedSampler(script)
        monkeypatch.setattr(answering, "load", lambda target: sampler)
        config = OwnAnswersConfig(out=str(tmp_path / "own"), **settings)
        result = run_own_answers(str(file), config, resume=resume)
        return result, [json.loads(line) for line in (tmp_path / "own" / "pairs.jsonl").read_text().splitlines()]

    return call


def test_only_harmless_pairs_get_new_answers_and_the_rest_is_kept(own):
    result, rows = own(lambda prompt, index: GOOD)
    assert (result["asked"], result["replaced"], result["pairs"]) == (2, 2, 3)
    assert [row["chosen"] for row in rows] == [GOOD, GOOD, ROWS[2]["chosen"]]
    assert [row["chosen_by"] for row in rows] == ["model", "model", "file"]
    assert [{k: row[k] for k in ("prompt", "rejected", "label")} for row in rows] == [
        {k: row[k] for k in ("prompt", "rejected", "label")} for row in ROWS
    ]


@pytest.mark.parametrize("bad", [REFUSAL, "Yes.", "", ROWS[0]["rejected"]])
def test_a_refusal_or_a_scrap_is_never_taken(own, bad):
    _, rows = own(lambda prompt, index: bad)
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in ROWS]


def test_it_asks_again_until_an_answer_helps(own):
    # One batch: both prompts are asked, then what was refused is asked again.
    _, rows = own([REFUSAL, GOOD, "Simmer it gently until the white has set."])
    assert [row["chosen"] for row in rows[:2]] == ["Simmer it gently until the white has set.", GOOD]


def test_a_stopped_run_goes_on_and_asks_nobody_twice(own, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "BATCH", 1)
    asked = []

    def script(prompt, index):
        asked.append(prompt.text)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return GOOD

    with pytest.raises(KeyboardInterrupt):
        own(script)
    result, _ = own(script, resume=True)
    assert result["replaced"] == 2 and asked == [ROWS[0]["prompt"], ROWS[1]["prompt"], ROWS[1]["prompt"]]


@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        ("Mix it. Then bake", "length", "Mix it."),
        ("1. Mix the flour", "length", ""),
        ('He said "stop!" Then he', "length", 'He said "stop!"'),
        ("Mix it. Then bake", "stop", "Mix it. Then bake"),
    ],
)
def test_an_answer_that_was_cut_off_goes_back_to_its_last_sentence(text, finish, kept):
    assert whole_sentences(Completion("p", text, finish, 0)) == kept


def test_the_command_names_the_labels_it_found(tmp_path, capfd):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert run(["data", "own-answers", str(file), "labels=[safe]", f"out={tmp_path / 'own'}"]) == 2
    assert "no pair is labelled safe; found benign, borderline, harmful" in capfd.readouterr().err
