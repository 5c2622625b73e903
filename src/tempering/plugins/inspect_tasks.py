"""Our evals as tasks of Inspect, and our judges as its scorers.

    inspect eval tempering/harm -T attack=templates -T judge=openai:MODEL@URL --model openai-api/local/MODEL

Inspect finds this module by the entry point `inspect_ai`. Prompts, attacks, judges, and how a verdict is counted are
those of `temper eval`, so that with the same answers the means and intervals are the same. One task is one attack.
An answer that the judge could not tell of is unscored, as in ours, and counts in no mean.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from tempering import judges
from tempering.attacks import ATTACKS
from tempering.core.config import build
from tempering.core.records import Completion, Finish, Prompt, Verdict
from tempering.evals import capability as questions
from tempering.evals import harm as requests
from tempering.evals.over_refusal import HARMFUL
from tempering.evals.results import Cost, judged, rate
from tempering.evals.safe_informative import outcomes_of
from tempering.evals.settings import EvalConfig, load_prompts
from tempering.judges.informative import load_informative_judge

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import (
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        GenerateConfig,
    )
    from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
    from inspect_ai.solver import TaskState, generate
except ImportError as error:
    raise ImportError(f"these are tasks of Inspect ({error}); pip install 'tempering[inspect]'") from error

MESSAGES: dict[str, Callable[..., ChatMessage]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}
ASKED = ("attack", "template", "prompt_id")
"""What a sample's metadata keeps of an attacked prompt."""
_ONE_AT_A_TIME = threading.Lock()
"""Judges that compute in this process are asked by one thread at a time."""


# --- metrics --------------------------------------------------------------------------------------------


def interval(scores: Sequence[SampleScore]) -> Mapping[str, float]:
    """Return `value`, `low` and `high` of scores, the 95 % interval that `temper eval` prints; NaN without any."""
    values = [float(cast(float, s.score.value)) for s in scores]
    told = [bool(v) if v in (0.0, 1.0) else v for v in values if not math.isnan(v)]
    rows = [{"prompt_id": str(i), "outcomes": {"m": value}} for i, value in enumerate(told)]
    found = rate(rows, "m", None) or {}
    return {key: math.nan if found.get(key) is None else found[key] for key in ("value", "low", "high")}


@metric(name="mean")
def rate_mean() -> Metric:
    """Mean over the samples that were scored."""

    def mean_of(scores: list[SampleScore]) -> float:
        return interval(scores)["value"]

    return mean_of


@metric(name="low_95")
def low() -> Metric:
    """Lower end of the 95 % interval."""

    def low_of(scores: list[SampleScore]) -> float:
        return interval(scores)["low"]

    return low_of


@metric(name="high_95")
def high() -> Metric:
    """Upper end of the 95 % interval."""

    def high_of(scores: list[SampleScore]) -> float:
        return interval(scores)["high"]

    return high_of


RATE = [rate_mean(), low(), high()]


# --- scorers --------------------------------------------------------------------------------------------


@scorer(metrics=RATE)
def harmful(judge: str = "rules") -> Scorer:
    """1 where the judge of harm says that the answer does what it should not; see `tempering.judges.load_judge`."""
    return _verdicts(judges.load_judge(judge, "harmful"), lambda v: v.holds)


@scorer(metrics=RATE)
def refused(judge: str = "rules") -> Scorer:
    """1 where the answer is a refusal."""
    return _verdicts(judges.load_judge(judge, "refused"), lambda v: v.holds)


@scorer(metrics=RATE)
def over_refused(judge: str = "rules") -> Scorer:
    """1 where a request that should be answered is refused, in whole or in part."""
    return _verdicts(judges.load_judge(judge, "refused"), lambda v: bool(v.holds or v.label == "partial"))


@scorer(metrics=RATE)
def toxic(judge: str = "rules") -> Scorer:
    """1 where the answer is toxic."""
    return _verdicts(judges.load_judge(judge, "toxic"), lambda v: v.holds)


@scorer(metrics={"safe_rate": RATE, "joint_score": RATE})
def safe_and_informative(judge: str = "rules") -> Scorer:
    """`safe_rate`: 1 where the answer is safe. `joint_score`: what a reader learns of it, 0 where it is unsafe."""

    def count(verdict: Verdict) -> dict[str, bool | float | None]:
        found = outcomes_of(verdict)
        return {name: found[name] for name in ("safe_rate", "joint_score")}

    return _verdicts(load_informative_judge(judge), count)


@scorer(metrics=RATE)
def right_answer() -> Scorer:
    """1 where the answer names the right choice, or holds an accepted answer in its first line; for `capability`."""

    async def score(state: TaskState, target: Target) -> Score:
        question = Prompt(_turns(state.input), id=str(state.sample_id), extra=dict(state.metadata))
        if "choices" in question.extra:
            row = questions.letter_row(question, _completion(state))
        else:
            nothing = Verdict(None, "", reason="not asked")
            row = questions.exact_row(question, _completion(state), nothing)
        told = row["verdict"]
        return _score(row["outcome"], Verdict(told["score"], told["judge"], told["label"], told["reason"]), state)

    return score


def _verdicts(judge: judges.Judge, count: Callable[[Verdict], Any]) -> Scorer:
    """Make a scorer of a judge; `count` says what a verdict counts for, and is not asked about an unscored one."""
    is_remote = judge.identity.startswith("openai:")

    def ask(request: Prompt, asked: Prompt, completion: Completion) -> Verdict:
        return judged(judge, [request], [asked], [completion], Cost())[0]

    def ask_alone(request: Prompt, asked: Prompt, completion: Completion) -> Verdict:
        with _ONE_AT_A_TIME:
            return ask(request, asked, completion)

    async def score(state: TaskState, target: Target) -> Score:
        known = {key: state.metadata[key] for key in ASKED if key in state.metadata}
        asked = Prompt(_turns(state.input), id=str(state.sample_id), extra=known)
        turns = tuple(dict(turn) for turn in state.metadata.get("request") or asked.messages)
        request = Prompt(turns, id=str(known.get("prompt_id") or asked.id))
        run = ask if is_remote else ask_alone
        verdict = await asyncio.to_thread(run, request, asked, _completion(state))
        return _score(None if verdict.is_unscored else count(verdict), verdict, state)

    return score


def _score(outcome: Any, verdict: Verdict, state: TaskState) -> Score:
    said: dict[str, Any] = {
        "answer": state.output.completion,
        "explanation": verdict.reason,
        "metadata": {"judge": verdict.judge, "label": verdict.label, "score": verdict.score},
    }
    if outcome is None:
        return Score.unscored(**said)
    value = {k: float(v) for k, v in outcome.items()} if isinstance(outcome, dict) else float(outcome)
    return Score(value=value, **said)


def _completion(state: TaskState) -> Completion:
    """What the model answered, as our judges read it."""
    text, reason = state.output.completion, state.output.stop_reason
    failed = state.output.error or ("the content filter withheld the answer" if reason == "content_filter" else None)
    finish: Finish = (
        "error" if failed and not text else "length" if reason in ("max_tokens", "model_length") else "stop"
    )
    return Completion(str(state.sample_id), text, finish, error=failed if finish == "error" else None)


def _turns(given: str | list[ChatMessage]) -> tuple[dict[str, str], ...]:
    if isinstance(given, str):
        return ({"role": "user", "content": given},)
    return tuple({"role": message.role, "content": message.text} for message in given)


# --- tasks ----------------------------------------------------------------------------------------------


@task
def harm(
    data: str | None = None,
    attack: str = "direct",
    judge: str = "rules",
    refusal_judge: str = "rules",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 128,
) -> Task:
    """Ask for what should be refused, plainly or under an attack that only rewrites; docs/evals.md."""
    config = _config(data=data, attacks=attack, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    if attack not in ATTACKS:
        raise ValueError(f"attack {attack!r} asks the target several times, which temper redteam does; expected one "
                         f"of {', '.join(ATTACKS)}")  # fmt: skip
    plain = load_prompts(
        config, "harmful_heldout", skip_labels=requests.HARMLESS, why="`harm` asks what should be refused"
    ).prompts
    asked = ATTACKS[attack](plain, requests.attack_options(config))
    return _task(config, asked, [harmful(judge), refused(refusal_judge)], {p.id: p for p in plain})


@task
def over_refusal(
    data: str | None = None,
    refusal_judge: str = "rules",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 128,
) -> Task:
    """Ask what sounds bad and should be answered."""
    config = _config(data=data, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    prompts = load_prompts(
        config, "borderline_heldout", skip_labels=HARMFUL,
        why="`over_refusal` asks what should be answered",
    ).prompts  # fmt: skip
    return _task(config, prompts, [over_refused(refusal_judge)])


@task
def safe_informative(
    data: str | None = None,
    judge: str = "rules",
    refusal_judge: str = "rules",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 128,
) -> Task:
    """Ask whether answers are safe, and what a reader learns of them."""
    config = _config(data=data, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    prompts = load_prompts(config, "safemoe_eval").prompts
    return _task(config, prompts, [safe_and_informative(judge), refused(refusal_judge)])


@task
def capability(
    data: str | None = None,
    refusal_judge: str = "rules",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = questions.ANSWER_TOKENS,
) -> Task:
    """Put short questions; choices are answered by letter, since a server tells no log-probabilities of them."""
    config = _config(data=data, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    prompts = load_prompts(config, "capability", parse=questions.question_from_row).prompts
    asked = [questions.lettered(p) if "choices" in p.extra else p for p in prompts]
    return _task(config, asked, [right_answer(), refused(refusal_judge)])


def _config(**given: Any) -> EvalConfig:
    return build(EvalConfig, {key: value for key, value in given.items() if value is not None}, "task arguments")


def _task(
    config: EvalConfig,
    asked: Sequence[Prompt],
    scorers: Sequence[Scorer],
    plain: Mapping[str, Prompt] | None = None,
) -> Task:
    samples = []
    for prompt in asked:
        request = (plain or {}).get(str(prompt.extra.get("prompt_id")), prompt)
        told = {"category": prompt.category, **prompt.extra}
        if request.messages != prompt.messages:
            told["request"] = list(request.messages)
        only = prompt.messages[0]["content"] if len(prompt.messages) == 1 else None
        turns = [MESSAGES[turn["role"]](content=turn["content"]) for turn in prompt.messages]
        samples.append(Sample(id=prompt.id, input=turns if only is None else only, metadata=told))
    return Task(
        dataset=MemoryDataset(samples, name=config.data or "embedded"),
        solver=generate(),
        scorer=list(scorers),
        config=GenerateConfig(
            max_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
        ),
    )
