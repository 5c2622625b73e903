import json

import pytest

from tempering.data.check import SHOWN, check_file
from tempering.data.files import bundled


class WordTokenizer:
    """One token a word; the template adds one word per turn and one for the answer's start."""

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return " ".join(f"<{t['role']}> {t['content']}" for t in turns) + " <assistant>"

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": text.split()}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"),
        ({"prompt": "a", "completion": "b", "label": True}, "labelled"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompts"),
        ({"prompt": "a"}, "prompts"),
    ],
)
def test_the_format_is_detected(tmp_path, row, kind):
    report = check_file(write(tmp_path / "d.jsonl", row))
    assert (report["kind"], report["rows"], report["valid"], report["ok"]) == (kind, 1, 1, True)
    assert report["example"] == row


def test_bundled_pairs_are_in_order():
    report = check_file(bundled("pairs"))
    assert report["ok"], report["problems"]
    assert report["kind"] == "pairs"
    assert report["lengths"]["unit"] == "characters"
    assert report["columns"]["chosen"] == report["rows"]
    json.dumps(report, allow_nan=False)


def test_every_problem_is_counted_and_the_first_are_shown(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    bad = [{"prompt": f"p{i}", "chosen": "b", "rejected": "b"} for i in range(SHOWN + 10)]
    report = check_file(write(tmp_path / "d.jsonl", good, good, '{"cut', *bad))
    assert report["problem_count"] == SHOWN + 12
    assert len(report["problems"]) == SHOWN
    assert report["problems"][0] == {
        "where": "d.jsonl line 2",
        "problem": "has the same content as d.jsonl line 1",
    }
    assert report["problems"][1]["where"] == "d.jsonl line 3"
    assert report["duplicates"] == 1
    assert report["problem_counts"]["'chosen' equals 'rejected'"] == SHOWN + 10
    assert (report["rows"], report["valid"], report["ok"]) == (SHOWN + 13, 1, False)


def test_lengths_are_counted_in_tokens_with_the_template(tmp_path):
    """Prompt `<user> a b <assistant>` is 4 tokens; with the longer answer (3 words) 7."""
    rows = [
        {"prompt": "a b", "chosen": "x y z", "rejected": "x"},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    ]
    path = write(tmp_path / "d.jsonl", *rows)
    report = check_file(path, tokenizer=WordTokenizer(), max_length=6, max_prompt_length=3)
    assert report["lengths"]["unit"] == "tokens"
    assert report["lengths"]["prompt"]["max"] == 4
    assert report["lengths"]["total"]["max"] == 7
    assert report["too_long"] == {"prompt": 1, "total": 1}
    assert report["ok"]


@pytest.mark.parametrize("content", [None, "", "\xff\xfe", "[1, 2", '{"text": "wrong column"}'])
def test_nothing_is_a_traceback(tmp_path, content):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    report = check_file(path)
    assert not report["ok"]
    assert report["problem_count"] == 1
    assert report["problems"][0]["problem"]


def test_an_unknown_kind_is_a_problem(tmp_path):
    report = check_file(write(tmp_path / "d.jsonl", {"prompt": "a"}), kind="pear")
    assert report["problems"][0]["problem"] == (
        "unknown kind 'pear'; expected auto or one of pairs, labelled, messages, prompts, texts"
    )
