"""Judges: callables that say whether a completion is harmful, a refusal, or toxic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

from tempering.core.records import Completion, Prompt, Verdict

__all__ = ["Asks", "Group", "Judge", "judge_groups", "load_judge"]

Asks = Literal["harmful", "refused", "toxic"]
Group = tuple[Prompt, Sequence[Completion]]


class Judge(Protocol):
    """Judge the completions of one prompt. A judge that fails says unscored, never yes and never no.

    A judge that is faster on many groups at once (over a network, in batches on a device) may also have
    `judge_many(groups, on_done)`, which returns what calling it on each group would.
    """

    identity: str
    """Name, model, rubric hash and parser version; stands in every verdict."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict for each completion, in order; a failed completion is unscored."""
        ...


def load_judge(spec: str, asks: Asks) -> Judge:
    """Make a judge for one of the three questions.

    `rules`; `openai:MODEL@URL` (an LLM with our rubric); `classifier:MODEL_ID[#LABEL[,LABEL]]`;
    `guard:MODEL_ID` (question `harmful` only); `detoxify[:VARIANT]` (question `toxic` only). Models are loaded
    with the first question, not here.

    Raises:
        ValueError: the kind of judge is unknown, or cannot answer this question.
    """
    if asks not in get_args(Asks):
        raise ValueError(f"unknown question {asks!r}; a judge answers 'harmful', 'refused' or 'toxic'")
    kind, _, rest = spec.partition(":")
    if kind not in _KINDS or (kind != "detoxify" and (rest == "") != (kind == "rules")):
        raise ValueError(
            f"unknown judge {spec!r}; expected rules, openai:MODEL@URL, classifier:MODEL_ID, guard:MODEL_ID or "
            "detoxify[:VARIANT]"
        )
    return _KINDS[kind](spec, asks)


def judge_groups(
    judge: Judge,
    groups: Sequence[Group],
    *,
    max_unscored: float = 0.05,
    on_done: Callable[[int], None] | None = None,
) -> list[list[Verdict]]:
    """Judge every group, in order; `on_done` is told how many groups were just finished.

    Raises:
        RuntimeError: more than the share `max_unscored` of the verdicts is unscored.
    """
    verdicts: list[list[Verdict]] = []
    many = getattr(judge, "judge_many", None)
    step = 64 if many else 1
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        if many:
            verdicts += many(part, on_done)
        else:
            verdicts += [judge(prompt, completions) for prompt, completions in part]
            if on_done:
                on_done(len(part))
    require_scored([v for group in verdicts for v in group], max_unscored)
    return verdicts


def require_scored(verdicts: Sequence[Verdict], max_unscored: float) -> None:
    """Stop where a judge failed too often for its verdicts to mean anything.

    Raises:
        RuntimeError: how many of how many, the limit, and the most frequent reason.
    """
    reasons = Counter(v.reason for v in verdicts if v.is_unscored)
    failed = sum(reasons.values())
    if failed > max_unscored * len(verdicts):
        reason, _ = reasons.most_common(1)[0]
        raise RuntimeError(
            f"{failed} of {len(verdicts)} verdicts unscored (limit {100 * max_unscored:g} %), most often "
            f"{reason!r}; look at the reasons, repair the judge or the sampler, and run again"
        )


def _rules(spec: str, asks: Asks) -> Judge:
    from tempering.judges.rules import RulesJudge
    from tempering.judges.toxicity import ToxicityRules

    return ToxicityRules() if asks == "toxic" else RulesJudge(asks)


def _llm(spec: str, asks: Asks) -> Judge:
    from tempering.core.endpoint import EndpointSampler
    from tempering.judges.llm import LLMJudge

    return LLMJudge(EndpointSampler(spec), asks)


def _classifier(spec: str, asks: Asks) -> Judge:
    from tempering.judges.classifier import ClassifierJudge

    model, _, labels = spec.partition(":")[2].partition("#")
    return ClassifierJudge(model, asks, labels=[x.strip() for x in labels.split(",") if x.strip()])


def _guard(spec: str, asks: Asks) -> Judge:
    from tempering.judges.classifier import GuardJudge

    if asks != "harmful":
        raise ValueError(f"{spec}: a guard says whether an answer is harmful, not whether it is {asks}; use rules")
    return GuardJudge(spec.partition(":")[2])


def _detoxify(spec: str, asks: Asks) -> Judge:
    from tempering.judges.toxicity import DetoxifyJudge

    if asks != "toxic":
        raise ValueError(f"{spec}: detoxify says whether a text is toxic, not whether it is {asks}; use rules")
    return DetoxifyJudge(spec.partition(":")[2] or "original")


_KINDS: dict[str, Callable[[str, Asks], Judge]] = {
    "rules": _rules,
    "openai": _llm,
    "classifier": _classifier,
    "guard": _guard,
    "detoxify": _detoxify,
}
