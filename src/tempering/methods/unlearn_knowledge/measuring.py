"""What is measured on the way: the check before the first step, development questions, drift on neutral text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tempering.core.chat import Encoded, collate, fill_batches
from tempering.core.logprobs import hidden_states, kl_from_base, score_groups
from tempering.core.policy import Policy
from tempering.core.progress import say
from tempering.core.stats import forgotten, kept
from tempering.methods.unlearn_knowledge.quiz import Chance, Question, against_chance, read_questions, right_answers
from tempering.methods.unlearn_knowledge.settings import UnlearnKnowledgeConfig
from tempering.methods.unlearn_knowledge.texts import (
    DEMO,
    contaminated,
    neutral_texts,
    read_texts,
    to_forget,
    to_keep,
)

FORGET = "forget"
NEUTRAL_TEXTS = 64
"""So many neutral texts are measured on."""


class Measured(NamedTuple):
    """The state of a model at a step; `score` chooses between steps, larger is better."""

    step: int
    accuracy: dict[str, float]
    """Of development questions, by category; empty where there are none."""
    kl: float
    """KL(before || now), nats, mean over the tokens of neutral text."""
    perplexity: float
    score: float | None
    """min(forgotten share, kept share) of what the start model knew beyond chance; `None` without questions."""

    def to_row(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        accuracies = {f"dev_{name}": value for name, value in self.accuracy.items()}
        drift = {"kl": self.kl, "perplexity": self.perplexity, "score": self.score}
        return {"step": self.step, "event": "measured", **accuracies, **drift}


class Measurer:
    """Questions and neutral text, and how the start model did on them."""

    def __init__(self, config: UnlearnKnowledgeConfig, policy: Policy) -> None:
        self.config, self.policy = config, policy
        sources = config.data.questions or ([DEMO] if config.data.train == DEMO else [])
        self.questions = [q for s in ([sources] if isinstance(sources, str) else sources) for q in read_questions(s)]
        self.dev = [q for q in self.questions if q.is_dev]
        if config.data.neutral:
            texts = read_texts(config.data.neutral, limit=NEUTRAL_TEXTS)
        else:
            texts = [t for t in neutral_texts() if t.topic == "dev"][:NEUTRAL_TEXTS]
        limit = config.max_retain_length
        rows = [list(policy.tokenizer(t.text)["input_ids"])[:limit] for t in texts]
        self.neutral = [Encoded(ids, 0) for ids in rows if len(ids) > 1]
        if not self.neutral:
            raise ValueError(f"data.neutral={config.data.neutral}: no text of at least two tokens to measure on")
        self.before: list[torch.Tensor] = []
        self.start_accuracy = self.accuracies()

    def accuracies(self) -> dict[str, float]:
        """Share of development questions answered right, by category."""
        right = right_answers(self.policy, self.dev, self.config.batch_tokens)
        by: dict[str, list[bool]] = {}
        for q, is_right in zip(self.dev, right, strict=True):
            by.setdefault(q.category, []).append(is_right)
        return {name: sum(found) / len(found) for name, found in sorted(by.items())}

    def known(self) -> Chance | None:
        """How much the model knows of what is to be forgotten; `None` without questions about that."""
        asked = [q for q in self.questions if q.category == FORGET]
        return against_chance(right_answers(self.policy, asked, self.config.batch_tokens), asked) if asked else None

    @property
    def chance(self) -> float:
        """Share of the development questions that guessing answers."""
        return _chance(self.dev)

    def measure(self, step: int) -> Measured:
        """Measure the model as it is now, without gradient."""
        with torch.no_grad():
            accuracy = self.accuracies()
            kl, perplexity = self.kl(), self.perplexity()
        return Measured(step, accuracy, kl, perplexity, score(self.start_accuracy, accuracy, self.chance))

    def kl(self) -> float:
        """KL(before || now) of neutral text, in nats a token; what was before is computed once."""
        policy = self.policy
        batches = [
            collate([[self.neutral[i]] for i in picked], policy.tokenizer.pad_token_id, policy.device)
            for picked in fill_batches([len(row.ids) for row in self.neutral], self.config.batch_tokens)
        ]
        if not self.before:
            with policy.reference():
                self.before = [hidden_states(policy.model, b.ids).flatten(0, 1)[b.source] for b in batches]
        total, count = 0.0, 0
        for batch, before in zip(batches, self.before, strict=True):
            with torch.no_grad():
                now = hidden_states(policy.model, batch.ids).flatten(0, 1)[batch.source]
                total += float(kl_from_base(policy.model, now, before).sum())
            count += len(batch.source)
        return total / count

    def perplexity(self) -> float:
        """Of neutral text."""
        scored = score_groups(
            self.policy.scorer, [[row] for row in self.neutral], pad_id=self.policy.tokenizer.pad_token_id,
            device=self.policy.device, max_tokens=self.config.batch_tokens,
        )  # fmt: skip
        nll = -sum(nats for [(nats, _)] in scored) / sum(tokens for [(_, tokens)] in scored)
        return math.exp(min(nll, 100.0))


def score(start: dict[str, float], now: dict[str, float], chance: float) -> float | None:
    """Return min(forgotten, kept): shares of what was known beyond chance, the worst kept category counting.

    >>> round(score({"forget": 0.65, "kept": 0.75}, {"forget": 0.35, "kept": 0.65}, 0.25), 3)
    0.75
    """
    gone = forgotten(start[FORGET], now[FORGET], chance) if FORGET in start else None
    if gone is None:
        return None
    left = [kept(start[name], now[name], chance) for name in start if name != FORGET]
    return min([gone, *(share for share in left if share is not None)])


def check_start(config: UnlearnKnowledgeConfig, measurer: Measurer) -> Chance | None:
    """Refuse a start model that knows nothing to forget, and questions that training would see.

    Returns how much it knows; `None` where no question asks, and nothing can be claimed.

    Raises:
        ValueError: it is at chance, or a text to forget or to keep holds a question, or the simulated attacker is
            given one (every such row is named).
    """
    asked = {q.id: q.question for q in measurer.questions}
    for where, texts in (("data.train", to_forget(config)), ("data.retain", to_keep(config))):
        if found := contaminated(texts, asked):
            raise ValueError(
                f"{where} holds questions that the model is asked afterwards: {', '.join(found)}; remove these rows"
            )
    if config.data.attack_questions:
        words = {" ".join(q.casefold().split()): i for i, q in asked.items()}
        given = [(q.id, words.get(" ".join(q.question.casefold().split()))) for q in
                 read_questions(config.data.attack_questions)]  # fmt: skip
        if both := [f"{i} is {j}" for i, j in given if j]:
            raise ValueError(
                "data.attack_questions holds questions that the model is asked afterwards: "
                f"{', '.join(both)}; remove these rows"
            )
    known = measurer.known()
    if known is None:
        say("[yellow]no questions about what is to be forgotten (data.questions): nothing will be claimed[/]")
        return None
    told = f"{known.right} of {known.n} questions right ({known.accuracy:.0%}; chance is {known.chance:.0%})"
    if not known.is_above and not config.allow_chance:
        raise ValueError(
            f"model {config.model} knows no more than chance of what it is to forget: {told}; there is nothing to "
            "unlearn. Teach it first (temper train teach, or teach=true), or set allow_chance=true and claim nothing"
        )
    say(f"before: {told}" if known.is_above else f"[yellow]before: {told}: nothing will be claimed[/]")
    return known


def _chance(questions: Sequence[Question]) -> float:
    return sum(1 / len(q.options) for q in questions) / len(questions) if questions else 0.0
