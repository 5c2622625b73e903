import copy

import pytest

from tempering.core.records import Completion, Prompt, as_messages
from tempering.core.sampling import LocalSampler, ThinkSampler
from tempering.core.think import (
    CLOSE,
    OPEN,
    Spans,
    decode,
    find_spans,
    joined,
    parse_think,
    think_prompt,
    think_row,
    think_text,
)

QUESTION = ({"role": "user", "content": "Is ice cold?"},)
LIMITS = {"max_length": 400, "max_prompt_length": 200}

QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = QWEN[:-11] + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
DELETES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = QWEN[:-11] + "<think>\n{% endif %}"
TEMPLATES = {
    "qwen2.5": QWEN,
    "qwen3": QWEN_3,
    "llama3.2": LLAMA,
    "gemma3": GEMMA,
    "smollm2": None,
    "deletes reasoning": DELETES,
    "opens the tag": OPENS,
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, tiny_tokenizer):
    found = copy.deepcopy(tiny_tokenizer)
    if isinstance(TEMPLATES[request.param], str):
        found.chat_template = TEMPLATES[request.param]
    return found


@pytest.mark.parametrize(
    ("text", "finish", "want"),
    [
        ("<think>a</think>b", "length", ("a", "b", "truncated")),
        ("<think>a", "length", ("a", "", "truncated")),
        ("b", "stop", ("", "b", "no_open")),
        ("a</think>b", "stop", ("", "a</think>b", "no_open")),
        ("So <think>a</think>b", "stop", ("", "So <think>a</think>b", "no_open")),
        ("<think>a<think>c</think>b", "stop", ("a<think>c", "b", "multiple")),
        ("<think>a</think>b</think>c", "stop", ("a", "b</think>c", "multiple")),
        ("<think>a", "stop", ("a", "", "unclosed")),
        ("<think> \n</think>b", "stop", ("", "b", "empty_cot")),
        ("<think></think>", "stop", ("", "", "empty_cot")),
        ("<think>a</think>  \n", "stop", ("a", "", "empty_answer")),
        ("", "stop", ("", "", "no_open")),
        (" \n<think>\n a \n</think>\n\n b \n", "stop", ("a", "b", "ok")),
        ("<think>é🙂 ≠ <b></think>日本 \u202e!", "stop", ("é🙂 ≠ <b>", "日本 \u202e!", "ok")),
    ],
)
def test_a_reply_has_the_first_status_that_applies(text, finish, want):
    assert parse_think(text, finish) == want


def test_what_is_joined_is_parsed_back():
    assert parse_think(OPEN + "\n" + joined(" hot\n", "\nUse a mitt."), "stop") == ("hot", "Use a mitt.", "ok")


def test_every_template_gives_one_opening_tag_at_the_end_and_no_closed_one(tokenizer):
    text = think_text(tokenizer, QUESTION)
    assert text.count(OPEN) == 1 and text.rstrip().endswith(OPEN) and CLOSE not in text
    assert text.count("<bos>") + text.count("<|begin|>") <= 1


def test_reasoning_survives_every_template(tokenizer):
    row = think_row(tokenizer, QUESTION, "ice is frozen", "Yes.", end_id=2, **LIMITS)
    prompt = think_prompt(tokenizer, QUESTION)
    assert row.ids[: row.prompt_tokens] == prompt and row.ids[-1] == 2
    assert decode(tokenizer, row.ids[row.prompt_tokens : -1]) == "ice is frozen\n</think>\n\nYes."


def test_past_turns_and_system_messages_are_kept(tiny_tokenizer):
    turns = as_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "Is ice cold?"},
        ]
    )
    assert think_text(tiny_tokenizer, turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nIs ice cold?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_a_prefill_takes_the_place_of_the_opening_tag(tokenizer):
    text = think_text(tokenizer, (*QUESTION, {"role": "assistant", "content": "Sure,"}))
    assert text.endswith("Sure,") and OPEN not in text


@pytest.mark.parametrize(
    ("cot", "answer", "limits", "message"),
    [
        ("a </think> b", "c", LIMITS, "do not read as"),
        ("a", "", LIMITS, "do not read as"),
        ("a", "b", {**LIMITS, "max_length": 20}, "max_length is 20"),
        ("a", "b", {**LIMITS, "max_prompt_length": 5}, "max_prompt_length is 5"),
    ],
)
def test_an_unusable_row_is_refused(tiny_tokenizer, cot, answer, limits, message):
    with pytest.raises(ValueError, match=message):
        think_row(tiny_tokenizer, QUESTION, cot, answer, end_id=2, **limits)


@pytest.mark.parametrize(
    "pieces",
    [
        ["ice", " is", "</think>", " yes"],
        ["ice", "<", "/", "th", "ink", ">", "yes"],  # a tag split over tokens
        ["ice.<", "/think", ">\n", "yes"],  # tokens that hold part of the tag and something else
        ["é🙂", "</think>", "日本"],
        ["", "</think>", ""],
    ],
)
def test_spans_are_those_of_the_tokens_that_hold_the_parts(tiny_tokenizer, pieces):
    """Each piece is encoded alone; where a piece is one token or several, its tokens stay together."""
    parts = [tiny_tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    ids = [token for part in parts for token in part] + [2]
    spans = find_spans(lambda some: decode(tiny_tokenizer, some), ids[:-1], opened=True)
    first, last = spans.tag
    assert CLOSE in decode(tiny_tokenizer, ids[first:last])
    assert CLOSE not in decode(tiny_tokenizer, ids[first + 1 : last])
    assert CLOSE not in decode(tiny_tokenizer, ids[first : last - 1])
    assert spans.cot == ((0, first) if first else None)
    assert spans.answer == ((last, len(ids) - 1) if last < len(ids) - 1 else None)


def test_a_token_that_holds_part_of_the_tag_belongs_to_it():
    table = ("It is hot.<", "/thi", "nk>\nUse", " a mitt", ".")
    spans = find_spans(lambda ids: "".join(table[i] for i in ids), range(5), opened=True)
    assert spans == Spans((3, 5), None, (0, 3), True) and spans.present == {"tag": (0, 3), "answer": (3, 5)}


def test_an_unclosed_thought_has_no_answer(tiny_tokenizer):
    ids = tiny_tokenizer("still thinking", add_special_tokens=False)["input_ids"]
    spans = find_spans(lambda some: decode(tiny_tokenizer, some), ids, opened=True)
    assert spans.present == {"cot": (0, len(ids))} and not spans.is_well_formed


PIECES = [
    "hm",
    " ok",
    "</",
    "think",
    ">",
    "\n",
    "yes",
    "</think>",
    ">no",
    "a</th",
    "ink>b",
    "<think>",
    "<thi",
    "nk>x",
]


def pieces(ids):
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "opened", "want"),
    [
        ([0, 1, 7, 6], True, Spans((3, 4), (0, 2), (2, 3), True)),
        ([0, 2, 3, 4, 5, 6], True, Spans((4, 6), (0, 1), (1, 4), True)),
        (
            [0, 2, 3, 8, 6],
            True,
            Spans((4, 5), (0, 1), (1, 4), True),
        ),  # the token that shares a character is the tag's
        ([0, 9, 10, 6], True, Spans((3, 4), (0, 1), (1, 3), True)),
        ([0, 1], True, Spans(None, (0, 2), None, True)),
        ([0, 7, 5], True, Spans(None, (0, 1), (1, 2), True)),  # an answer of white space is none
        ([7, 6], True, Spans((1, 2), None, (0, 1), True)),
        ([11, 0, 7, 6], False, Spans((3, 4), (1, 2), (2, 3), True)),
        ([12, 13, 7, 6], False, Spans((3, 4), None, (2, 3), True)),
        ([0, 6], False, Spans((0, 2))),
        ([], False, Spans(None)),
    ],
)
def test_spans_are_found_whatever_tokens_the_tag_is_spread_over(ids, opened, want):
    assert find_spans(pieces, ids, opened=opened) == want


def test_spans_with_characters_of_several_tokens(tiny_tokenizer):
    """Bytes of a snowman are three tokens: until the third, the text ends in replacement characters."""
    text = f"\u2603 cold{CLOSE}warm \u2600"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    def read(some):
        return tiny_tokenizer.decode(some, clean_up_tokenization_spaces=False)

    spans = find_spans(read, ids, opened=True)
    assert read(ids[slice(*spans.cot)]) == "\u2603 cold" and read(ids[slice(*spans.tag)]) == CLOSE
    assert read(ids[slice(*spans.answer)]) == "warm \u2600"
    whole = tiny_tokenizer(OPEN + text, add_special_tokens=False)["input_ids"]
    assert find_spans(read, whole, opened=False).is_well_formed


def test_a_sampler_that_thinks_shows_tags_that_are_special_tokens(tiny_policy):
    """A teacher whose tokenizer has the tags as special tokens: they are read, the end of the turn is not."""
    policy = tiny_policy()
    policy.tokenizer = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    ids = policy.tokenizer(f"hm{CLOSE}yes", add_special_tokens=False)["input_ids"]
    found = LocalSampler(policy, thinks=True).completion_of(Prompt(QUESTION), 0, [*ids, 2], 0)
    assert CLOSE in found.text and found.finish == "stop"


@pytest.fixture
def sampler(tiny_policy):
    return ThinkSampler(LocalSampler(tiny_policy(), thinks=True), 8)


def generated(sampler, text, end=True, finish="stop"):
    ids = sampler.policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * end
    return Completion("p", text, finish, token_ids=tuple(ids))


def test_users_see_the_answer_and_the_thought_on_request(sampler):
    whole = generated(sampler, "ice is frozen</think>Yes.")
    found = sampler.split(Prompt(QUESTION), whole)
    assert (found.text, found.thought.text, found.thought.status) == ("Yes.", "ice is frozen", "ok")
    assert found.token_ids == whole.token_ids
    start, end = found.thought.spans["answer"]
    assert decode(sampler.policy.tokenizer, found.token_ids[start:end]) == "Yes."


def test_an_answer_is_cut_at_its_own_length_and_the_thought_is_not_counted(sampler):
    found = sampler.split(Prompt(QUESTION), generated(sampler, "ice is frozen</think>yes yes yes yes yes"), 2)
    start, end = found.thought.spans["answer"]
    assert end - start == 2 and end == len(found.token_ids)
    assert found.finish == "length" and found.thought.status == "ok" and "yes yes yes yes yes".startswith(found.text)


def test_an_unclosed_thought_is_no_answer(sampler):
    found = sampler.split(Prompt(QUESTION), generated(sampler, "here is how", end=False, finish="length"))
    assert (found.text, found.thought.status, found.finish) == ("", "truncated", "length")


def test_after_a_prefill_all_is_answer(sampler):
    begun = Prompt((*QUESTION, {"role": "assistant", "content": "Sure,"}))
    found = sampler.split(begun, generated(sampler, " here it is"))
    assert found.text == " here it is" and found.thought is None
    thinking = Prompt((*QUESTION, {"role": "assistant", "content": "<think>\nIt is fine."}))
    found = sampler.split(thinking, generated(sampler, " Yes.</think>Here"))
    assert (found.text, found.thought.text) == ("Here", "It is fine. Yes.")


def test_the_sampler_asks_with_the_think_prefix_and_keeps_its_budget(sampler):
    [group] = sampler([Prompt(QUESTION)], n=2, max_new_tokens=4, temperature=1.0, seed=1)
    assert all(len(c.token_ids) <= 12 and c.thought for c in group)
    inner = sampler.inner([Prompt(QUESTION)], n=2, max_new_tokens=12, temperature=1.0, seed=1)[0]
    assert [c.token_ids for c in inner] == [c.token_ids for c in group]
