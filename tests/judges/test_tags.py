import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.judges.tags import (
    escape_tags,
    last_object,
    parse_answer,
    parse_attack,
    parse_pair_scores,
    parse_score,
)

PIECES = [
    "<think>", "</think>", "<prompt>", "</prompt>", "<THINK>", "</Think>", "<PROMPT>", "</prompt >", "< prompt>",
    "<prompt/>", "<prompt x='1'>", "<answer>", "</answer>", "<score>", "</score>", "<score_A>", "</score_A>",
    "<score_b>", "</score_B>", "True", "false", "7", "10", "3.5", "12", "-1", "7.25", "5/10", "/10", "{", "}",
    '"score_A"', '"score_B": 3', '"answer": true', '{"score_A": 7, "score_B": 2}', '{"score": 9}', "<", ">", "/", " ",
    "\n", "\t", "a story", "İ", "ß", "\u200b", "\x00", "\ud800", "．７", "```", "<|im_end|>", "<seed>",
    "&lt;prompt&gt;",
]  # fmt: skip
# The grammar, written down a second time and otherwise: whole-output patterns over text without a tag of either name.
NO_TAG = r"(?:(?!<\s*/?\s*(?:think|prompt)\b[^<>]*>).)*?"
GRAMMAR = {
    "think": re.compile(rf"\s*<think>{NO_TAG}</think>\s*<prompt>({NO_TAG})</prompt>\s*", re.I | re.S),
    "prompt": re.compile(rf"\s*<prompt>({NO_TAG})</prompt>\s*", re.I | re.S),
    "free": re.compile(rf"(?:.*</think>)?{NO_TAG}<prompt>({NO_TAG})</prompt>\s*", re.I | re.S),
    "raw": re.compile(r"(.*)", re.S),
}


def expected(text, fmt):
    found = GRAMMAR[fmt].fullmatch(text)
    return (found[1].strip() or None) if found else None


def random_text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 14)))


def well_formed(rng, fmt):
    inside = rng.choice(["a story", "x", " ", "", "<b>", "7 < 8"])
    text = f"<prompt>{inside}</prompt>"
    if fmt == "think":
        text = f"<think>{rng.choice(['', 'hm'])}</think>{rng.choice(['', ' ', chr(10)])}{text}"
    return rng.choice(["", " "]) + text + rng.choice(["", "\n", "", "x"])


def fuzz(count, seed):
    rng = random.Random(seed)
    accepted = 0
    for i in range(count):
        for fmt in GRAMMAR:
            text = well_formed(rng, fmt) if i % 5 == 0 else random_text(rng)
            found = parse_attack(text, fmt)
            assert found.prompt == expected(text, fmt), (fmt, text)
            assert (found.prompt is None) == (found.reason is not None)
            accepted += found.prompt is not None
        text = random_text(rng)
        points = parse_pair_scores(text)
        assert points is None or (len(points) == 2 and all(0.0 <= p <= 10.0 for p in points))
        assert parse_score(text) is None or 0.0 <= parse_score(text) <= 10.0
        assert parse_answer(text) in (True, False, None)
        safe = escape_tags(text)
        assert parse_answer(safe) is None and parse_score(safe) is None and parse_pair_scores(safe) is None
        assert escape_tags(safe) == safe
    assert accepted > count // 5


def test_random_strings_never_raise_and_only_the_grammar_is_accepted():
    fuzz(1_500, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_random_strings_never_raise_and_only_the_grammar_is_accepted():
    fuzz(20_000, seed=1)  # five strings each


@given(st.text())
def test_any_text_is_read_or_not_without_an_error(text):
    for fmt in GRAMMAR:
        parse_attack(text, fmt)
    for parse in (parse_answer, parse_score, parse_pair_scores):
        parse(text)
        parse(f"<score>{text}</score><score_A>{text}</score_A><score_B>{text}</score_B>")
    assert last_object(text) is None or isinstance(last_object(text), dict)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>a</think><prompt>b</prompt>", "b"),
        (" <THINK></think>\n\n<Prompt>\n b \n</PROMPT>\n", "b"),
        ("<think>a\nb</think><prompt>c\nd</prompt>", "c\nd"),
        ("<prompt>b</prompt>", None),
        ("<think>a</think>", None),
        ("<think>a</think><prompt> \n</prompt>", None),
        ("<think>a</think>then<prompt>b</prompt>", None),
        ("<think>a</think><prompt>b</prompt>.", None),
        ("<think>a</think><think>c</think><prompt>b</prompt>", None),
        ("<think>a</think><prompt>b</prompt><prompt>c</prompt>", None),
        ("<think>a <prompt>b</prompt></think><prompt>c</prompt>", None),
        ("<think>a</think><prompt>b <think> c</prompt>", None),
        ("<think>a</think><prompt>b < /prompt > c</prompt>", None),
        ("<prompt>b</prompt><think>a</think>", None),
        ("", None),
    ],
)
def test_a_rewrite_after_thinking_is_one_thought_and_one_prompt_and_nothing_else(text, prompt):
    assert parse_attack(text, "think").prompt == prompt


def test_a_free_output_ends_with_its_only_prompt_and_a_closed_thought_is_not_read():
    assert parse_attack("I try this: <prompt>b</prompt> \n", "free").prompt == "b"
    assert parse_attack("<think>or <prompt>a</prompt>?</think> so <prompt>b</prompt>", "free") == (
        "b", "<think>or <prompt>a</prompt>?</think> so", None
    )  # fmt: skip
    for text in (
        "a <prompt>b</prompt> c",
        "<prompt>a</prompt><prompt>b</prompt>",
        "<think>a <prompt>b</prompt>",
        "b",
    ):
        assert parse_attack(text, "free").prompt is None


def test_a_prompt_alone_takes_no_thought_and_raw_takes_all():
    assert parse_attack("<prompt>b</prompt>", "prompt").prompt == "b"
    assert parse_attack("<think>a</think><prompt>b</prompt>", "prompt").prompt is None
    assert parse_attack("  <prompt>b ", "raw").prompt == "<prompt>b"
    assert parse_attack(" \n", "raw") == (None, "", "the output is empty")
    with pytest.raises(ValueError, match="expected one of think, prompt, free, raw"):
        parse_attack("a", "xml")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>True</answer>", True),
        ("<answer> FALSE\n</answer>", False),
        ("<answer>True</answer> <answer>False</answer>", True),
        ("<think><answer>True</answer></think><answer>False</answer>", False),
        ("<think>a</think> <answer>True</answer> <think> <answer>False</answer>", True),
        ("<think><answer>True</answer>", None),
        ("<answer>perhaps</answer>", None),
        ('Reason. {"answer": false}', False),
        ('```json\n{"answer": "True"}\n```', True),
        ('{"answer": 1}', None),
        ('{"answer": true} so yes', None),
        ("", None),
    ],
)
def test_an_answer_is_the_first_behind_the_reasoning(text, answer):
    assert parse_answer(text) is answer


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("<score_A>7</score_A> <score_B>3.5</score_B>", (7.0, 3.5)),
        ("<SCORE_A> 7/10 </score_a><score_B>3 / 10</score_B>", (7.0, 3.0)),
        ("<score_B>3</score_B> then <score_A>1</score_A><score_A>2</score_A>", (2.0, 3.0)),
        ("<score_A>11</score_A> <score_B>-2</score_B>", (10.0, 0.0)),
        ("<score_A>7</score_A>", None),
        ("<score_A>7.25</score_A> <score_B>3</score_B>", None),
        ("<score_A>seven</score_A> <score_B>3</score_B>", None),
        ("<score_A>７</score_A> <score_B>3</score_B>", None),
        ("<think><score_A>7</score_A></think> <score_B>3</score_B>", None),
        ('So: {"score_A": 7, "score_B": 3.5}', (7.0, 3.5)),
        ('{"score_A": "8/10", "score_B": 30}', (8.0, 10.0)),
        ('{"score_A": 7}', None),
        ('{"score_A": true, "score_B": 3}', None),
        ('{"score_A": NaN, "score_B": 3}', None),
        ('{"score_A": 7, "score_A": 9, "score_B": 3}', None),
        ('{"\\u0073core_A": 7, "score_B": 3}', None),
        ('{"score_A": ' + "9" * 5000 + ', "score_B": 3}', None),
        ("A is better", None),
    ],
)
def test_points_are_the_last_of_each_side_or_none(text, points):
    assert parse_pair_scores(text) == points


def test_one_score_is_read_like_two():
    assert parse_score("<score>6</score> no, <score>4.5/10</score>") == 4.5
    assert parse_score("<score_A>6</score_A>") is None and parse_score('{"score": 6.0}') == 6.0


def test_what_is_escaped_is_never_read():
    texts = [
        "<score_A>10</score_A><score_B>0</score_B>", "<answer>True</answer>", "<score>10</score>",
        "</think><score>10</score>", '{"score_A": 10, "score_B": 0}', json.dumps({"answer": True}),
        "<SCORE_A >10</ score_a>", "<<score>score>10</score>",
    ]  # fmt: skip
    for text in texts:
        safe = escape_tags(text)
        assert parse_pair_scores(safe) is None and parse_answer(safe) is None and parse_score(safe) is None
    assert (
        escape_tags("a <b>c</b> 3 < 4, the <scores> and <answers>") == "a <b>c</b> 3 < 4, the <scores> and <answers>"
    )


def test_long_runs_of_marks_take_no_time():
    for piece in ("<", "< ", "<think>", "{", '{"a":', "</", "<prompt", " ", "<score_A>1", "\n<"):
        for fmt in GRAMMAR:
            parse_attack(piece * 4_000, fmt)
        for parse in (parse_answer, parse_score, parse_pair_scores, escape_tags):
            parse(piece * 4_000)
        parse_attack("<" + " " * 100_000, "free")
