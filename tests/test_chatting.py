"""`temper chat`: what it prints where, two targets side by side, and what goes wrong without a traceback."""

import io
import sys

import pytest
import torch

from tempering import chatting
from tempering.chatting import ChatConfig, Side, harmless, routing_table, run_chat, scores_table
from tempering.cli import run
from tempering.core.records import Completion, Prompt, Thought
from tempering.core.sampling import LocalSampler, ScriptedSampler, ThinkSampler
from tempering.methods.attribution import AttributionSampler, SelectionConfig
from tempering.methods.safemoe.tracing import Traced


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def chat(monkeypatch):
    """A function: questions, samplers by target, settings -> nothing; what was printed is captured."""

    def call(questions, samplers, is_terminal=False, **settings):
        monkeypatch.setattr(sys, "stdin", (Terminal if is_terminal else io.StringIO)(questions))
        monkeypatch.setattr(chatting, "load", lambda target, **_: samplers[target])
        run_chat("one", ChatConfig(**settings))

    return call


def echo(prompt, index):
    return f"{len(prompt.messages)}: {prompt.text}"


def test_each_question_is_asked_with_the_conversation_so_far(chat, capsys):
    chat("hello\nagain\n\nnever asked\n", {"one": ScriptedSampler(echo)}, system="be brief")
    assert capsys.readouterr().out == "2: hello\n4: again\n"


def test_two_targets_answer_the_same_question_each_in_its_own_conversation(chat, capsys):
    seen = []

    def remember(prompt, index):
        seen.append([turn["content"] for turn in prompt.messages])
        return "from the second"

    samplers = {"one": ScriptedSampler(echo, "A"), "two": ScriptedSampler(remember, "B")}
    chat("hello\nagain\n", samplers, against="two")
    assert capsys.readouterr().out == (
        "== A\n1: hello\n== B\nfrom the second\n== A\n3: again\n== B\nfrom the second\n"
    )
    assert seen[1] == ["hello", "from the second", "again"]


def test_on_a_terminal_two_answers_stand_in_columns(chat, capsys, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "60")
    chat("hello\n", {"one": ScriptedSampler(["left"], "A"), "two": ScriptedSampler(["right"], "B")}, against="two")
    line = [line for line in out.getvalue().splitlines() if "left" in line][-1]
    assert line.index("left") < line.index("right")


def test_a_failed_answer_ends_piped_questions_and_not_a_conversation(chat, capsys):
    answers = iter(["fine", None, "fine again"])

    def some(prompts, **_):
        text = next(answers)
        [prompt] = prompts
        seen.append(len(prompt.messages))
        return [[Completion(prompt.id, text or "", "stop" if text else "error", error=None if text else "HTTP 500")]]

    seen = []
    some.name = "m"
    with pytest.raises(RuntimeError, match="m: HTTP 500"):
        chat("a\nb\nc\n", {"one": some})
    answers = iter(["fine", None, "fine again"])
    seen.clear()
    chat("a\nb\nc\n", {"one": some}, is_terminal=True)
    printed = capsys.readouterr()
    assert printed.out.endswith("fine\nfine again\n") and "error: m: HTTP 500" in printed.err
    assert seen == [1, 3, 3]  # the question that was not answered is forgotten


def test_what_a_terminal_would_obey_is_replaced_there_and_kept_in_a_file(chat, capsys, monkeypatch):
    text = "red \x1b[31m \u202e tab\t"
    assert harmless(text) == "red \ufffd[31m \ufffd tab\t"
    chat("a\n", {"one": ScriptedSampler([text])})
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    chat("a\n", {"one": ScriptedSampler([text])})
    assert out.getvalue() == harmless(text) + "\n"


@pytest.mark.parametrize("what", ["scores", "routing", "reasoning"])
def test_what_no_target_has_cannot_be_shown(chat, what):
    with pytest.raises(ValueError, match=f"show={what}: scripted"):
        chat("a\n", {"one": ScriptedSampler(["yes"])}, show=what)


def test_scores_of_all_candidates_are_shown_and_the_chosen_one_is_marked(chat, capsys):
    config = SelectionConfig(n=3, scorer="length")
    sampler = AttributionSampler(ScriptedSampler(["a b c", "a", "a b"]), None, config)
    chat("q\n", {"one": sampler}, show="scores")
    printed = capsys.readouterr()
    assert printed.out == "a\n"
    rows = [line for line in printed.err.splitlines() if ".000000" in line]
    assert len(rows) == 3 and ["*" in row for row in rows] == [False, True, False]
    side = Side(sampler, [])
    side.ask({"role": "user", "content": "q"}, ChatConfig())
    side.ask({"role": "user", "content": "r"}, ChatConfig())
    assert len(side.candidates) == 1  # of the newest answer
    assert scores_table(side.candidates[0] | {"fallback": "refuse"}).caption


def test_the_weight_of_each_expert_is_told_of_prompt_and_answer():
    """Prompt: (0.75, 0.25) and (0.5, 0.5) over experts 0, 1 and 0, null: 0.625, 0.125, 0.25. Answer: all expert 1."""
    idx = torch.tensor([[[0, 1]], [[0, 2]], [[1, 0]]], dtype=torch.uint8)
    w = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]], [[1.0, 0.0]]], dtype=torch.float16)
    table = routing_table(["stone", "river"], Traced([5, 6, 7], idx, w), 2)
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell) for cell in cells[0]] == ["stone", "river", "none of them"]
    assert cells[1:] == [["62%", "12%", "25%"], ["0%", "100%", "0%"]]


def test_reasoning_goes_to_stderr_where_it_is_wanted(chat, capsys):
    def thinking(prompts, **_):
        return [[Completion(prompts[0].id, "mitt", "stop", thought=Thought("it is [hot]"))]]

    thinking.name, thinking.think_tokens = "t", 8
    chat("a\n", {"one": thinking})
    assert "hot" not in capsys.readouterr().err
    chat("a\n", {"one": thinking}, show=["reasoning"], think_tokens=4)
    printed = capsys.readouterr()
    assert printed.out == "mitt\n" and "it is [hot]" in printed.err and thinking.think_tokens == 4


def test_the_command_answers_and_tells_its_settings(tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    model = str(tiny_model_dir())
    assert run(["chat", model, f"against={model}", "max_new_tokens=3"]) == 0
    lines = capsys.readouterr().out.split(f"== {model}\n")
    assert len(lines) == 3 and lines[1] == lines[2]
    assert run(["chat", model, "show=scores"]) == 2
    assert "sampler=attribution" in capsys.readouterr().err
    assert run(["chat", "--keys"]) == 0
    assert "against = " in capsys.readouterr().out


class Slow(io.StringIO):
    """A terminal or file that keeps each piece that is written."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 4}])
def test_a_streamed_answer_is_what_the_sampler_answers(chat, tiny_policy, monkeypatch, settings):
    sampler = LocalSampler(tiny_policy(scale=3.0))
    prompt = Prompt(({"role": "user", "content": "hello"},))
    ask = {"temperature": settings.get("temperature", 0.0), "seed": settings.get("seed", 0)}
    [[whole]] = sampler([prompt], max_new_tokens=12, **ask)
    monkeypatch.setattr(sys, "stdout", out := Slow())
    chat("hello\n", {"one": sampler}, max_new_tokens=12, **settings)
    assert out.getvalue() == whole.text + "\n"
    assert sum(bool(piece.strip()) for piece in out.pieces) > 1


def test_reasoning_and_answer_of_a_local_thinker_are_told_apart_while_they_come(
    chat, tiny_policy, monkeypatch, capsys
):
    """The model is made to write a reply: each step takes its next token, whatever the logits."""
    policy = tiny_policy()
    ids = policy.tokenizer("it is hot\n</think>\n\nUse a mitt.", add_special_tokens=False)["input_ids"]
    forward = policy.base.forward

    def told(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[:] = 0.0
        out.logits[:, -1, [*ids, policy.end_id][told.step]] = 9.0
        told.step += 1
        return out

    told.step = 0
    monkeypatch.setattr(policy.base, "forward", told)
    sampler = ThinkSampler(LocalSampler(policy, thinks=True), 60)
    monkeypatch.setattr(sys, "stdout", out := Slow())
    chat("how?\n", {"one": sampler}, max_new_tokens=20, show="reasoning")
    assert out.getvalue() == "Use a mitt.\n" and sum(bool(piece.strip()) for piece in out.pieces) > 2
    assert "it is hot" in capsys.readouterr().err


def test_a_conversation_beyond_the_context_is_said(chat, tiny_policy):
    with pytest.raises(ValueError, match="tokens too long for the context"):
        chat("stone river " * 100 + "\n", {"one": LocalSampler(tiny_policy())}, max_new_tokens=400)
