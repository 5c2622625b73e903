import json

import pytest

from tempering.judges.journal import Journal


def row(key, scores=(7.0, 3.0), **more):
    return {"key": key, "scores": None if scores is None else list(scores), "reason": None, **more}


def test_what_was_put_is_found_again_also_by_another_process(tmp_path):
    journal = Journal(tmp_path / "data" / "judgements.jsonl")
    journal.put(row("a"), row("b", None, reason="no <score> in the reply", raw="½ \ud800"))
    again = Journal(journal.path)
    assert again.get("a").scores == (7.0, 3.0) and again.get("b") == (None, "no <score> in the reply")
    assert again.get("c") is None and len(again) == 2 and again.size_bytes == journal.size_bytes > 0


def test_it_is_on_disk_before_put_returns(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.put(row("a"))
    assert json.loads(journal.path.read_text())["key"] == "a"


@pytest.mark.parametrize("torn", ['{"key": "b", "sco', '{"key": "b", "scores": [1.0], "reason": null}', "\x00\x00"])
def test_a_torn_last_line_is_cut_and_the_next_one_stands_alone(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    Journal(path).put(row("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    journal = Journal(path)
    assert path.read_bytes() == whole and journal.get("b") is None
    journal.put(row("b"))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a", "scores": [1], "reason": null}\n{"key"\n{}\n')
    with pytest.raises(ValueError, match="line 2: not a judgement"):
        Journal(path)


def test_a_question_without_a_reply_is_on_record_but_open(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.put(row("a", None, reason="judge did not answer: timeout", is_final=False))
    assert journal.get("a") is None and Journal(journal.path).get("a") is None
    journal.put(row("a"))
    assert Journal(journal.path).get("a").scores == (7.0, 3.0)
