"""Judges: callables that answer one question about a completion, or compare two of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from tempering.core.records import Completion, Prompt, Verdict

if TYPE_CHECKING:
    # Both load torch, for which `temper --help` must not wait.
    from tempering.core.sampling import Sampler
    from tempering.judges.pairwise import PairwiseJudge

__all__ = ["Asks", "Connect", "Group", "Judge", "check_files", "judge_groups", "load_judge", "load_pairwise"]

Asks = Literal["harmful", "refused", "toxic", "compliance", "informativeness", "deflection", "faithfulness"]
QUESTIONS: tuple[Asks, ...] = get_args(Asks)
"""What a judge may be asked about one completion; the words of the answers: `tempering.judges.llm.SCORES`."""
PAIRWISE = "pairwise"
"""The kind of judge that `load_pairwise` makes."""
Group = tuple[Prompt, Sequence[Completion]]


class Judge(Protocol):
    """Judge the completions of one prompt. A judge that fails says unscored, never yes and never no.

    A judge that is faster on many groups at once (over a network, in batches on a device) may also have
    `judge_many(groups, on_done)`, which returns what calling it on each group would; one that is read from files with
    the first question, `check_files()`.
    """

    identity: str
    """Name, model, rubric hash and parser version; stands in every verdict."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict for each completion, in order; a failed completion is unscored."""
        ...


Connect = Callable[[str], "Sampler"]
"""Makes what asks an endpoint, `openai:MODEL@URL`."""


def load_judge(spec: str, asks: Asks, connect: Connect | None = None) -> Judge:
    """Make a judge for one question; `connect` where an endpoint needs other settings than the default.

    `openai:MODEL@URL` (an LLM with our rubric) answers all of them; `rules` and `classifier:MODEL_ID[#LABEL[,LABEL]]`
    answer `harmful`, `refused` and `toxic`; `guard:MODEL_ID[#FORMAT]` answers `harmful` (WildGuard `refused` too),
    `detoxify[:VARIANT]`, `profanity_svm` and `lexicon` only `toxic`; `ensemble:JUDGE+JUDGE[+...]` is the majority of
    some of these. Models are loaded with the first question.

    Raises:
        ValueError: the kind of judge is unknown, or cannot answer this question.
    """
    if asks not in QUESTIONS:
        raise ValueError(f"unknown question {asks!r}; expected one of {', '.join(QUESTIONS)}")
    kind, _, rest = spec.partition(":")
    if kind == PAIRWISE:
        raise ValueError(f"{spec}: this judge compares two answers and says nothing of one; use openai:MODEL@URL")
    takes_nothing = kind in ("rules", "profanity_svm", "lexicon")
    if kind not in _KINDS or (kind != "detoxify" and (rest == "") != takes_nothing):
        raise ValueError(
            f"unknown judge {spec!r}; expected rules, openai:MODEL@URL, classifier:MODEL_ID, guard:MODEL_ID, "
            "detoxify[:VARIANT], profanity_svm, lexicon or ensemble:JUDGE+JUDGE"
        )
    return _KINDS[kind](spec, asks, connect)


def check_files(judge: Judge) -> None:
    """Make sure that a judge which is read from files can be, before anything is asked; no weights are loaded.

    Raises:
        ValueError: its files cannot be had, or are of another kind.
    """
    check = getattr(judge, "check_files", None)
    if check:
        check()


def load_pairwise(spec: str, question: str | None = None, connect: Connect | None = None) -> PairwiseJudge:
    """Make a judge that compares: `pairwise:openai:MODEL@URL[#QUESTION]`, where `question` is the same said apart.

    `connect` is as for `load_judge`.

    Raises:
        ValueError: not of this form, no question or an unknown one, or two that differ.
    """
    from tempering.core.endpoint import EndpointSampler
    from tempering.judges.pairwise import COMPARES, PairwiseJudge

    found = re.fullmatch(rf"{PAIRWISE}:(openai:.+?)(?:#([^#@/]*))?", spec)
    if not found:
        raise ValueError(f"unknown judge {spec!r}; expected {PAIRWISE}:openai:MODEL@URL[#QUESTION]")
    named = found[2]
    asks = question if named is None else named
    if asks not in COMPARES:
        told = "no question" if asks is None else f"unknown question {asks!r}"
        raise ValueError(f"{spec}: {told}; add one after '#': {', '.join(COMPARES)}")
    if question not in (None, asks):
        raise ValueError(f"{spec} asks {asks!r}, but {question!r} is wanted; name one question")
    return PairwiseJudge((connect or EndpointSampler)(found[1]), asks)


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


def _rules(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.rules import RulesJudge
    from tempering.judges.toxicity import ToxicityRules

    return ToxicityRules() if asks == "toxic" else RulesJudge(_plain(spec, asks, _TEXTS))


def _llm(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.core.endpoint import EndpointSampler
    from tempering.judges.llm import LLMJudge

    return LLMJudge((connect or EndpointSampler)(spec), asks)


def _classifier(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.classifier import ClassifierJudge

    model, _, labels = spec.partition(":")[2].partition("#")
    question = asks if asks == "toxic" else _plain(spec, asks, _TEXTS)
    return ClassifierJudge(model, question, labels=[x.strip() for x in labels.split(",") if x.strip()])


def _guard(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.guards import GuardJudge

    model, _, form = spec.partition(":")[2].partition("#")
    return GuardJudge(model, _plain(spec, asks), form=form or None)


def _detoxify(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.toxicity import DetoxifyJudge

    if asks != "toxic":
        raise ValueError(f"{spec}: detoxify says whether a text is toxic, not whether it is {asks}; use rules")
    return DetoxifyJudge(spec.partition(":")[2] or "original")


def _profanity(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.toxicity import ProfanityJudge

    if asks != "toxic":
        raise ValueError(f"{spec} says whether a text is toxic, not whether it is {asks}; use rules")
    return ProfanityJudge()


def _lexicon(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.toxicity import LexiconJudge

    if asks != "toxic":
        raise ValueError(f"{spec} says whether a text is toxic, not whether it is {asks}; use rules")
    return LexiconJudge()


def _ensemble(spec: str, asks: Asks, connect: Connect | None) -> Judge:
    from tempering.judges.ensemble import EnsembleJudge

    # A "+" may stand in the name of a model: it separates only where a kind of judge follows.
    members = re.split(rf"\+(?=(?:{'|'.join(_KINDS)})(?:[:+]|$))", spec.partition(":")[2])
    if any(member.partition(":")[0] == "ensemble" for member in members):
        raise ValueError(f"{spec}: an ensemble of ensembles; list the judges themselves")
    return EnsembleJudge([load_judge(member, asks, connect) for member in members])


_TEXTS = "'harmful', 'refused' or 'toxic'"


def _plain(spec: str, asks: Asks, known: str = "'harmful' or 'refused'") -> Literal["harmful", "refused"]:
    if asks == "harmful" or asks == "refused":
        return asks
    raise ValueError(f"{spec} cannot say {asks!r}, only {known}; use openai:MODEL@URL")


_KINDS: dict[str, Callable[[str, Asks, Connect | None], Judge]] = {
    "rules": _rules,
    "openai": _llm,
    "classifier": _classifier,
    "guard": _guard,
    "detoxify": _detoxify,
    "profanity_svm": _profanity,
    "lexicon": _lexicon,
    "ensemble": _ensemble,
}
