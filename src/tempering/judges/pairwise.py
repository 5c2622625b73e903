"""The pairwise judge: which of two completions, asked in both orders, so that a place in the prompt wins nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from tempering.core.ledger import Tokens
from tempering.core.records import Completion, Prompt, Verdict
from tempering.core.sampling import Sampler
from tempering.judges.llm import PARSER_VERSION, model_at_host, read_completion, request_of, rubric, rubric_question

VERSION = 1
COMPARES = ("safer", "more_helpful", "more_informative", "deflects_better")
"""What a pairwise judge may be asked; each is a file in `rubrics/`."""

Side = Literal["A", "B", "tie"]
Pair = tuple[Completion, Completion]
_SUPPORT: dict[Side, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}
_SWAPPED: dict[Side, Side] = {"A": "B", "tie": "tie", "B": "A"}
_SIDES: dict[str, Side] = {"a": "A", "b": "B", "tie": "tie"}


class Preference(NamedTuple):
    """What a pairwise judge says of a pair (A, B), or why it says nothing."""

    side: Side | None
    """`A` or `B` only where both orders say so; orders that differ make a tie, with the reason; `None`: unscored."""
    score: float | None
    """Support for A: the mean over the orders, in which A is 1, a tie 0.5 and B 0."""
    judge: str
    orders: tuple[Side, ...] = ()
    """What was said with A shown first and with B shown first, both in terms of this pair; empty where not asked."""
    reason: str | None = None

    @property
    def is_consistent(self) -> bool | None:
        """Whether both orders said the same; `None` where not both could be read."""
        return len(set(self.orders)) == 1 if len(self.orders) == 2 else None


class PairwiseJudge:
    """Compare completions of one prompt through any sampler, in both orders; both must be read, or it is unscored.

    Texts that are equal, up to white space at the ends, are a tie and not sent. The fence is that of `LLMJudge`.
    Greedy. As a `Judge` of a group it compares all pairs in it; a completion's score is then its mean support
    over the pairs that could be scored, which says how it stands among these completions and nothing else.
    """

    def __init__(self, sampler: Sampler, asks: str, *, max_new_tokens: int = 512) -> None:
        if asks not in COMPARES:
            raise ValueError(f"unknown question {asks!r}; a pairwise judge answers {', '.join(COMPARES)}")
        self.sampler, self.asks, self.max_new_tokens = sampler, asks, max_new_tokens
        self.rubric = rubric(asks)
        digest = hashlib.sha256(self.rubric.encode()).hexdigest()[:8]
        self.identity = f"pairwise:{model_at_host(sampler.name)}/{asks}-{digest}/v{VERSION}/parser-v{PARSER_VERSION}"

    def compare(self, prompt: Prompt, pairs: Sequence[Pair]) -> list[Preference]:
        """Compare pairs of completions of one prompt."""
        return self.compare_many([(prompt, pairs)])[0]

    def compare_many(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Pair]]],
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Preference]]:
        """Compare the pairs of several prompts with one call of the sampler."""
        found = [[self._without_asking(pair) for pair in pairs] for _, pairs in groups]
        open_ = [(g, i) for g, said in enumerate(found) for i, preference in enumerate(said) if preference is None]
        questions = []
        for g, i in open_:
            prompt, (a, b) = groups[g][0], groups[g][1][i]
            questions += [self.question(prompt, a.text, b.text), self.question(prompt, b.text, a.text)]
        answers = self.sampler(questions, max_new_tokens=self.max_new_tokens) if questions else []
        for k, (g, i) in enumerate(open_):
            (forward,), (backward,) = answers[2 * k], answers[2 * k + 1]
            found[g][i] = self._joined(forward, backward)
        if on_done:
            on_done(len(groups))
        return [[preference for preference in said if preference is not None] for said in found]

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Compare all pairs of the completions of one prompt, and return how each stands among them."""
        return self.judge_many([(prompt, completions)])[0]

    def judge_many(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Verdict]]:
        """Judge several groups with one call of the sampler."""
        compared = self.compare_many([(prompt, list(combinations(cs, 2))) for prompt, cs in groups], on_done)
        return [self._standings(len(cs), said) for (_, cs), said in zip(groups, compared, strict=True)]

    @property
    def usage(self) -> Tokens | None:
        """Tokens used so far, where the endpoint reports them."""
        return getattr(self.sampler, "usage", None)

    def question(self, prompt: Prompt, first: str, second: str) -> Prompt:
        """Build what the judge is asked, in this order."""
        texts = {"request": request_of(prompt), "answer A": first, "answer B": second}
        return rubric_question(self.rubric, texts, ["A", "B", "tie"])

    def _without_asking(self, pair: Pair) -> Preference | None:
        for completion in pair:
            if completion.finish == "error":
                reason = f"no completion: {completion.error or 'sampling failed'}"
                return Preference(None, None, self.identity, reason=reason)
        if pair[0].text.strip() == pair[1].text.strip():
            return Preference("tie", 0.5, self.identity, reason="the texts are the same")
        return None

    def _joined(self, forward: Completion, backward: Completion) -> Preference:
        first, why_first = read_completion(forward, _SIDES, self.max_new_tokens)
        second, why_second = read_completion(backward, _SIDES, self.max_new_tokens)
        if first is None or second is None:
            reason = f"with A first: {why_first}" if first is None else f"with B first: {why_second}"
            return Preference(None, None, self.identity, reason=reason)
        orders = (_SIDES[first], _SWAPPED[_SIDES[second]])
        score = (_SUPPORT[orders[0]] + _SUPPORT[orders[1]]) / 2
        if orders[0] != orders[1]:
            reason = f"the orders disagree: {orders[0]} with A first, {orders[1]} with B first"
            return Preference("tie", score, self.identity, orders, reason)
        return Preference(orders[0], score, self.identity, orders)

    def _standings(self, size: int, said: Sequence[Preference]) -> list[Verdict]:
        support: list[list[float]] = [[] for _ in range(size)]
        for (i, j), preference in zip(combinations(range(size), 2), said, strict=True):
            if preference.score is not None:
                support[i].append(preference.score)
                support[j].append(1 - preference.score)
        why = (
            next((p.reason for p in said if p.score is None), None) or "there is no other completion to compare with"
        )
        return [
            Verdict(sum(own) / len(own), self.identity, reason=f"over {len(own)} of {size - 1} comparisons")
            if own
            else Verdict(None, self.identity, reason=why)
            for own in support
        ]


def position_consistency(preferences: Sequence[Preference]) -> tuple[int, int]:
    """Return on how many pairs both orders said the same, and of how many that were asked and read in both."""
    asked = [p.is_consistent for p in preferences if p.is_consistent is not None]
    return sum(asked), len(asked)
