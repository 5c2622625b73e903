"""Encodings can be undone, many-shot keeps the request last, and neither depends on the order of prompts."""

import base64
import codecs
import unicodedata

import pytest

from tempering.attacks import ENCODINGS, apply_encoding, apply_many_shot, load_shots
from tempering.attacks.encodings import (
    LEET,
    LOOK_ALIKES,
    decoded,
    homoglyphs,
    leetspeak,
    rot13,
    says_nothing,
    spaced,
    split_payload,
    to_base64,
)
from tempering.core.records import LabelledCompletion, Prompt, as_messages


def shot(request, answer):
    return LabelledCompletion(as_messages(request), answer)


TEXTS = ["Bake bread", 'Say "hi" to C:\\temp', "naïve cafe\u0301 日本語 👩\u200d🍳", "x", "one\ntwo"]


@pytest.mark.parametrize("text", TEXTS)
def test_base64_and_rot13_can_be_undone(text):
    assert base64.b64decode(to_base64(text)).decode() == text
    assert codecs.decode(rot13(text), "rot13") == text


@pytest.mark.parametrize("text", TEXTS)
def test_spacing_keeps_every_letter_and_separates_words(text):
    words = [word.replace(" ", "") for word in spaced(text).split("   ")]
    assert words == text.split()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("parts", [1, 2, 4, 100])
def test_a_split_payload_adds_up_to_the_request(text, parts):
    *lines, last = split_payload(text.replace("\n", " "), parts).split("\n")
    pieces = [line.partition(" = ")[2][1:-1].replace('\\"', '"').replace("\\\\", "\\") for line in lines]
    assert "".join(pieces) == text.replace("\n", " ")
    assert last == f"Answer the request {' + '.join(line[0] for line in lines)}."


def test_look_alikes_are_other_letters_in_as_many_places():
    for table in (LEET, LOOK_ALIKES):
        assert all(chr(old) != (new if isinstance(new, str) else chr(new)) for old, new in table.items())
    text = "A peaceful oxbow"
    assert len(homoglyphs(text)) == len(leetspeak(text)) == len(text)
    assert {unicodedata.name(c).split()[0] for c in homoglyphs("aceopxyijs")} == {"CYRILLIC"}


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_replaces_the_last_user_turn_only(name):
    turns = ({"role": "system", "content": "Be kind."}, *as_messages("Bake a loaf of bread today"))
    [attacked] = apply_encoding([Prompt(turns)], name)
    assert attacked.messages[0] == turns[0]
    assert "Bake a loaf of bread today" not in attacked.text


def test_a_prompt_without_a_user_turn_is_refused():
    with pytest.raises(ValueError, match="no user turn for the attack rot13"):
        apply_encoding([Prompt(({"role": "system", "content": "x"},))], "rot13")


def test_many_shot_puts_answered_turns_before_the_request_and_after_the_system_turn():
    shots = [shot(f"q{i}", f"a{i}") for i in range(5)]
    turns = ({"role": "system", "content": "Be kind."}, *as_messages("the request"))
    [attacked] = apply_many_shot([Prompt(turns)], shots, count=3)
    assert [m["role"] for m in attacked.messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert attacked.text == "the request" and attacked.prefill == ""
    asked = [
        (m["content"], n["content"])
        for m, n in zip(attacked.messages[1:-1:2], attacked.messages[2:-1:2], strict=True)
    ]
    assert all(shot(*pair) in shots for pair in asked) and len(set(asked)) == 3


def test_the_seed_and_the_prompt_choose_the_shots_and_not_their_order_in_the_file():
    shots = [shot(f"q{i}", f"a{i}") for i in range(30)]
    prompt = Prompt(as_messages("x"))
    first, again, other = (
        apply_many_shot([prompt], s, count=4, seed=seed)[0].messages
        for s, seed in ((shots, 0), (shots[::-1], 0), (shots, 1))
    )
    assert first == again != other


def test_the_embedded_shots_are_harmless_and_a_file_may_replace_them(tmp_path):
    assert len(load_shots()) >= 32
    path = tmp_path / "shots.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert load_shots(path) == [shot("q", "a"), shot("p", "c")]
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"shots\.jsonl line 1: missing column 'completion'"):
        load_shots(path)


@pytest.mark.parametrize(("attack", "encode"), [("base64", to_base64), ("rot13", rot13), ("spacing", spaced)])
def test_an_answer_in_the_encoding_is_read_decoded_and_one_in_plain_words_as_it_is(attack, encode):
    answer = "Mix the flour with water, and let it rest for an hour."
    assert " ".join(decoded(attack, encode(answer)).split()) == answer
    assert decoded(attack, answer) == answer


@pytest.mark.parametrize("attack", list(ENCODINGS))
def test_repeating_an_encoded_request_says_nothing_and_an_answer_says_something(attack):
    request = "How do I bake a loaf of bread without an oven at home?"
    for repeated in (request, ENCODINGS[attack](request), ENCODINGS[attack](request)[:-9]):
        assert says_nothing(attack, request, decoded(attack, repeated)), repeated
    for answer in (
        "Use a covered pan on low heat.",
        "I can't help with that.",
        "面粉和水混合。",
        "Да, смешайте муку.",
        "42",
    ):
        assert says_nothing(attack, request, answer) is None, answer


def test_letters_without_sense_say_nothing():
    assert says_nothing("base64", "Bake bread", "SG93IG11Y2ggCwY2gCgY2gCgY2gCgY2gCgY2gCgY2g") == "no readable words"
