"""`temper chat`: talk to a target in the terminal, to two side by side, or pipe questions in.

Answers go to stdout, as they come where the target is drawn from in this process, and what is shown beside them to
stderr. What is printed piece by piece is, put together, what the sampler answers. On a terminal the control
characters of an answer are replaced: a model's text is not trusted, and some sequences make a terminal do things.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, field_validator
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tempering.api import load
from tempering.core.config import Config
from tempering.core.decoding import Decoding, Row
from tempering.core.progress import console, progress, say
from tempering.core.records import Completion, Prompt
from tempering.core.sampling import LocalSampler, ThinkSampler
from tempering.core.think import CLOSE

Shown = Literal["scores", "routing", "reasoning"]
Write = Callable[[Completion], None]
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""
EXCERPT = 60
"""Characters of a candidate that its row of scores has."""
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class ChatConfig(Config):
    """Settings of `temper chat`."""

    against: str | None = None
    """Another target, which is asked the same beside the first and keeps its own conversation. `sampler` is for the
    first alone, all else for both."""
    show: tuple[Shown, ...] = ()
    """What to print of an answer beside its text, one or a list: `scores` of all candidates (attribution), `routing`
    (the experts of safemoe), `reasoning` (of a target that thinks before it answers); on stderr."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens; where the target thinks first, its reasoning not counted."""
    think_tokens: int | None = Field(None, ge=1)
    """Longest reasoning of a target that thinks first, in tokens; null: what it was trained with."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of sampling."""
    seed: int = 0
    """Of sampling."""
    system: str | None = None
    """System prompt."""
    sampler: Literal["attribution"] | None = None
    """`attribution`: answer with the best of several candidates."""
    attribution: dict[str, Any] = Field(default_factory=dict)
    """Settings of that choice (docs/attribution.md)."""

    @field_validator("show", mode="before")
    @classmethod
    def _one_or_several(cls, named: Any) -> Any:
        return (named,) if isinstance(named, str) else named


@dataclass
class Side:
    """One target, and the conversation with it."""

    sampler: Any
    turns: list[dict[str, str]]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """Of the newest answer, a row a choice, where the sampler chooses."""

    def __post_init__(self) -> None:
        if hasattr(self.sampler, "keep"):
            self.sampler.keep = self.candidates.append

    @property
    def thinker(self) -> Any:
        """The sampler inside that thinks before it answers; `None` where none does."""
        inner = self.sampler
        while not hasattr(inner, "think_tokens") and hasattr(inner, "inner"):
            inner = inner.inner
        return inner if hasattr(inner, "think_tokens") else None

    @property
    def shows(self) -> set[Shown]:
        """What there is to show of its answers."""
        found: dict[Shown, bool] = {
            "scores": hasattr(self.sampler, "keep"),
            "routing": hasattr(self.sampler, "traced"),
            "reasoning": self.thinker is not None or self.sampler.name.startswith("openai:"),
        }
        return {what for what, is_there in found.items() if is_there}

    @property
    def local(self) -> LocalSampler | None:
        """The sampler whose tokens can be printed as they are drawn; `None` where answers come in whole."""
        outer, inner = self.sampler, getattr(self.sampler, "inner", self.sampler)
        local = outer if isinstance(outer, LocalSampler) else inner if isinstance(outer, ThinkSampler) else None
        return local if local is not None and Decoding.fits(local) else None

    def ask(self, question: Mapping[str, str], config: ChatConfig, write: Write | None = None) -> Completion:
        """Answer, with the conversation so far, which is left as it was.

        `write` is told the answer so far after each token, where this target is drawn from token by token.

        Raises:
            RuntimeError: the target did not answer.
            ValueError: the prompt is longer than the model's context.
        """
        self.candidates.clear()
        prompt = Prompt((*self.turns, dict(question)))
        if write is not None and self.local is not None:
            return self._stream(self.local, prompt, config, write)
        [[answer]] = self.sampler(
            [prompt], max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            seed=config.seed,
        )  # fmt: skip
        if answer.finish == "error":
            raise RuntimeError(f"{self.sampler.name}: {answer.error}")
        return answer

    def _stream(self, local: LocalSampler, prompt: Prompt, config: ChatConfig, write: Write) -> Completion:
        thinker = self.thinker
        most = config.max_new_tokens + (thinker.think_tokens if thinker is not None else 0)
        if over := local.tokens_over(prompt, most):
            raise ValueError(
                f"the conversation is {over} tokens too long for the context of {self.sampler.name}; lower "
                "max_new_tokens, or start again"
            )
        decoding = Decoding(local)
        row = Row(
            ids=local.prompt_ids(prompt), key=(config.seed, prompt.id, 0), max_new_tokens=most,
            temperature=config.temperature, top_p=config.top_p,
        )  # fmt: skip
        decoding.add([row])
        while True:
            answer = local.completion_of(prompt, 0, row.tokens, config.seed)
            if thinker is not None:
                answer = thinker.split(prompt, answer, config.max_new_tokens)
            if row.is_done:
                return answer
            thought = answer.thought
            write(
                answer if thought is None else replace(answer, thought=replace(thought, text=_settled(thought.text)))
            )
            decoding.step()


class Typing:
    """Print an answer as it comes: its reasoning, where that is wanted, on stderr, then its text on stdout."""

    def __init__(self, with_reasoning: bool) -> None:
        self.with_reasoning = with_reasoning
        self.thought = self.text = ""

    def __call__(self, so_far: Completion) -> None:
        """Print what is new in an answer that may go on."""
        if self.with_reasoning and so_far.thought is not None:
            if more := _more(self.thought, so_far.thought.text):
                console.print(Text(harmless(more), style="dim"), end="", soft_wrap=True)
            self.thought += more
        more = _more(self.text, so_far.text)
        if more and not self.text and self.thought:
            console.print()
        self.text += more
        print(_for_stdout(more), end="", flush=True)

    def finish(self, answer: Completion) -> None:
        """Print the rest; all of it, where the whole answer begins otherwise than its first tokens did."""
        self(answer)
        if self.thought and not self.text:
            console.print()
        if answer.text != self.text:
            rest = answer.text[len(self.text) :] if answer.text.startswith(self.text) else f"\n{answer.text}"
            print(_for_stdout(rest), end="")
        print(flush=True)


def _more(before: str, now: str) -> str:
    r"""What was added to a text, but for the last characters where their bytes may not be there yet.

    >>> _more("to be", "to be or\ufffd"), _more("to", "not")
    (' or', '')
    """
    kept = now.rstrip(UNFINISHED)
    return kept[len(before) :] if kept.startswith(before) else ""


def _settled(reasoning: str) -> str:
    r"""Reasoning without what may be the start of its closing tag.

    >>> _settled("it is hot\n</thi"), _settled("2 < 3")
    ('it is hot', '2 < 3')
    """
    begun = max((k for k in range(1, len(CLOSE)) if reasoning.endswith(CLOSE[:k])), default=0)
    return reasoning[: len(reasoning) - begun].rstrip()


def run_chat(target: str, config: ChatConfig) -> None:
    """Answer line by line, with the conversation so far, until an empty line or the end of input.

    In a terminal an error is told and the question forgotten; with piped questions it ends the chat.

    Raises:
        ConnectionError, RuntimeError: the target did not answer.
        ValueError: `think_tokens` or `show` for targets that have no such thing, or a prompt that is too long.
    """
    sides = open_sides(target, config)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text
    if interactive:
        say(escape(f"{' against '.join(side.sampler.name for side in sides)}; an empty line ends"))
    while True:
        if interactive:
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line.strip():
            return
        try:
            exchange(sides, {"role": "user", "content": line.strip()}, config)
        except (ValueError, RuntimeError, OSError) as error:
            if not interactive:
                raise
            say(f"[red]error:[/] {escape(str(error))}")


def open_sides(target: str, config: ChatConfig) -> list[Side]:
    """Load the target, and the one that it is compared with.

    Raises:
        ValueError: `think_tokens` or `show` for targets that have no such thing.
    """
    trace = "routing" in config.show
    samplers = [load(target, sampler=config.sampler, attribution=config.attribution, trace=trace)]
    if config.against is not None:
        samplers.append(load(config.against, trace=trace))
    system = [{"role": "system", "content": config.system}] if config.system else []
    sides = [Side(sampler, list(system)) for sampler in samplers]
    names = " and ".join(side.sampler.name for side in sides)
    if config.think_tokens is not None:
        thinkers = [side.thinker for side in sides if side.thinker is not None]
        if not thinkers:
            raise ValueError(f"think_tokens={config.think_tokens}: {names} does not think before it answers")
        for thinker in thinkers:
            thinker.think_tokens = config.think_tokens
    remedy = {
        "scores": "nothing is chosen among candidates; set sampler=attribution or name a calibration run",
        "routing": "there is no gate; name a run or a bundle of safemoe",
        "reasoning": "it does not think before it answers; name a run of deliberative",
    }
    for what in config.show:
        if not any(what in side.shows for side in sides):
            raise ValueError(f"show={what}: {names}: {remedy[what]}")
    return sides


def exchange(sides: Sequence[Side], question: dict[str, str], config: ChatConfig) -> None:
    """Ask all, print the answers, and only then add question and answers to the conversations."""
    answers = converse(sides[0], question, config) if len(sides) == 1 else compare(sides, question, config)
    for side, answer in zip(sides, answers, strict=True):
        if len(sides) > 1 and config.show and side.shows & {*config.show}:
            say(f"[bold]{escape(side.sampler.name)}[/]")
        show(side, answer, [what for what in config.show if what != "reasoning" or len(sides) > 1])
    for side, answer in zip(sides, answers, strict=True):
        side.turns += [question, {"role": "assistant", "content": answer.text}]


def converse(side: Side, question: dict[str, str], config: ChatConfig) -> list[Completion]:
    """Ask one target and print its answer, as it comes where it does."""
    typing = Typing("reasoning" in config.show)
    if side.local is not None:
        answer = side.ask(question, config, typing)
    else:
        with progress("answering", 1, is_passing=True):
            answer = side.ask(question, config)
    typing.finish(answer)
    return [answer]


def compare(sides: Sequence[Side], question: dict[str, str], config: ChatConfig) -> list[Completion]:
    """Ask all, one after the other; print in columns on a terminal, else one below the other under their names."""
    names = [side.sampler.name for side in sides]
    answers: list[Completion] = []
    if not sys.stdout.isatty():
        with progress("answering", len(sides), is_passing=True) as advance:
            for side in sides:
                answers.append(side.ask(question, config))
                advance()
        for name, answer in zip(names, answers, strict=True):
            print(f"== {name}\n{answer.text}", flush=True)
        return answers
    texts = [""] * len(sides)
    with Live(columns(names, texts), console=Console(highlight=False), vertical_overflow="visible") as live:
        for i, side in enumerate(sides):

            def write(so_far: Completion, i: int = i) -> None:
                texts[i] += _more(texts[i], so_far.text)
                live.update(columns(names, texts))

            answers.append(side.ask(question, config, write))
            texts[i] = answers[i].text
            live.update(columns(names, texts))
    return answers


def columns(names: Sequence[str], texts: Sequence[str]) -> Table:
    """Return a table of answers side by side, under the names of their targets."""
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(harmless(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(harmless(text)) for text in texts))
    return table


# --- what is shown beside an answer ---------------------------------------------------------------------


def show(side: Side, answer: Completion, what: Sequence[Shown]) -> None:
    """Print on stderr what is wanted of an answer beside its text, as far as this side has it."""
    if "reasoning" in what and answer.thought is not None:
        console.print(Text(harmless(answer.thought.text), style="dim"), soft_wrap=True)
    if "scores" in what:
        for row in side.candidates:
            console.print(scores_table(row))
    if "routing" in what and "routing" in side.shows:
        for _, start, traced in side.sampler.traced:
            console.print(routing_table(side.sampler.policy.routing.experts.domains, traced, start))
        side.sampler.traced = []


def scores_table(row: Mapping[str, Any]) -> Table:
    """Return a table of the candidates of an answer, the chosen one marked, from a row of `candidate_row`."""
    table = Table("", "draw", "risk", "answer", "remarks")
    for i, c in enumerate(row["candidates"]):
        remarks = [*c["flags"], *([] if c["valid"] else ["not valid"])]
        line = harmless(" ".join(c["text"].split()))
        table.add_row(
            "*" if i == row["winner"] else "",
            str(c["draw"]),
            "-" if c["risk"] is None else f"{c['risk']:.6f}",
            Text(line if len(line) <= EXCERPT else line[: EXCERPT - 3] + "..."),
            ", ".join(remarks),
        )
    if row["fallback"]:
        table.caption = f"the winner's risk is above tau: fallback {row['fallback']}"
    return table


def routing_table(domains: Sequence[str], traced: Any, start: int) -> Table:
    """Return the weight that each expert had, over all routers, on the prompt's tokens and on the answer's."""
    parts = expert_shares(len(domains), traced.idx[:start], traced.w[:start]), expert_shares(
        len(domains), traced.idx[start:], traced.w[start:]
    )  # fmt: skip
    table = Table("expert", "prompt", "answer")
    for name, *shares in zip([*domains, "none of them"], *parts, strict=True):
        if name in domains or any(shares):
            table.add_row(Text(name), *(f"{share:.0%}" for share in shares))
    return table


def expert_shares(experts: int, idx: Any, w: Any) -> list[float]:
    """Share of each expert in all weight of (T, R, k) decisions, and last that of the null expert; 0 without any.

    >>> import torch
    >>> expert_shares(2, torch.tensor([[[0, 1]], [[0, 2]]]), torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]]))
    [0.625, 0.125, 0.25]
    """
    flat, weight = idx.flatten().long().tolist(), w.flatten().float().tolist()
    sums = [0.0] * (experts + 1)
    for expert, share in zip(flat, weight, strict=True):
        sums[expert] += share
    total = sum(sums)
    return [part / total if total else 0.0 for part in sums]


def harmless(text: str) -> str:
    r"""Replace the characters that a terminal obeys, and those that turn the direction of writing.

    >>> harmless("a\x1b[2Jb\n")
    'a\ufffd[2Jb\n'
    """
    return "".join(
        "\ufffd" if c not in "\n\t" and (unicodedata.category(c) == "Cc" or c in DIRECTIONS) else c for c in text
    )


def _for_stdout(text: str) -> str:
    return harmless(text) if sys.stdout.isatty() else text  # a file gets every character
