import numpy as np
import pytest

from tempering.core.records import Completion, Prompt, as_messages
from tempering.core.sampling import LocalSampler, ThinkSampler
from tempering.core.think import decode
from tempering.serving.text import Flow, Incremental, Writer

STOPS = [[], ["a"], ["st", "stone"], ["\ufffd"], ["on", "n "]]


@pytest.fixture(scope="module")
def read(tiny_tokenizer):
    return lambda ids: tiny_tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_text_of_all_tokens_but_for_an_unfinished_end(read, seed):
    """Random tokens of single bytes: most of them are no character, or not yet."""
    ids = np.random.default_rng(seed).integers(0, 320, 60).tolist()
    reader = Incremental(read)
    whole, text = "", read(ids)
    for token in ids:
        whole += reader.push(token)
    assert text.startswith(whole) and set(text[len(whole) :]) <= {"\ufffd", *text[-4:]}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("seed", range(8))
def test_a_streamed_answer_is_the_whole_one_up_to_its_first_stop(read, stops, seed):
    generator = np.random.default_rng(seed)
    ids = generator.choice([*range(200, 320), *range(100, 110)], 50).tolist()
    text = read(ids)
    at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    writer = Writer(read, stops)
    out = ""
    for token in ids:
        out += writer.push(token).content
        if writer.is_over:
            break
    out += writer.finish(read(writer.reader.ids)).content
    assert out == text[:at] and writer.is_stopped == (at < len(text))


def test_what_may_begin_a_stop_waits():
    flow = Flow(["\n\nUser:", "STOP"])
    assert flow.push("yes\n\nUs") == "yes"
    assert flow.push("eful") == "\n\nUseful"
    assert flow.push(" STO") == " " and flow.finish("yes\n\nUseful STO") == "STO"


def test_where_the_sampler_reads_otherwise_no_text_that_came_is_lost():
    flow = Flow(["STOP"])
    assert flow.push("yes , sure: ST") == "yes , sure: "
    assert flow.finish("yes, sure: ST") == "ST" and not flow.cut
    flow = Flow(["STOP"], strips=True)
    assert flow.push(" yes , sure ") + flow.finish("yes, sure") == "yes , sure"


THOUGHTS = [
    "hot\n</think>\n\nUse a mitt.",
    "\n\n  hot </think>mitt  ",
    "never closed, and </thin not either",
    "</think>no thought",
    "thought only</think>",
    "one</think> two</think> three",
    "x</think>" + "stone river " * 9,
]


@pytest.mark.parametrize("text", THOUGHTS)
@pytest.mark.parametrize("most", [1, 4, 200])
def test_reasoning_and_answer_stream_as_they_are_split(text, most, tiny_policy):
    """Against `ThinkSampler.split` of what was drawn until the writer had enough."""
    policy = tiny_policy()
    tokenizer = policy.tokenizer
    think = ThinkSampler(LocalSampler(policy, thinks=True), 100)
    prompt = Prompt(as_messages("is it hot?"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = Writer(lambda some: decode(tokenizer, some), [], thinks=True, most=most)
    content = reasoning = ""
    taken = []
    for token in ids:
        taken.append(token)
        piece = writer.push(token)
        content, reasoning = content + piece.content, reasoning + piece.reasoning
        if writer.is_over:
            break
    whole = think.split(prompt, think.inner.completion_of(prompt, 0, [*ids, 2], 0), most)
    got = think.split(prompt, think.inner.completion_of(prompt, 0, taken if writer.is_over else [*ids, 2], 0), most)
    last = writer.finish(got.text, got.thought.text)
    assert (content + last.content, reasoning + last.reasoning) == (whole.text, whole.thought.text)
    assert isinstance(whole, Completion) and (whole.text or most < 200 or text.startswith(("never", "thought")))
