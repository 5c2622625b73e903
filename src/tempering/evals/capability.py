"""Eval `capability`: does the target still know and follow simple things?

Two kinds of questions. `choice`: the choice that the target finds likeliest is its answer (`score`), or,
where the target gives no log-probabilities, the letter that it writes. `exact`: a short answer is generated
and searched for an accepted one; generated, because log-probabilities do not show a target that has begun to
refuse ordinary questions (`capability_refusal_rate`).

Our choice: the sum of a choice's log-probabilities, which is that of the whole answer, not the mean per
token. The mean prefers words whose later tokens follow from the first: of the embedded questions whose
choices differ in length, SmolLM2 gets 76 % by the sum and 51 % by the mean, and 79 % of those where all are
equally long. A sum prefers short choices; where lengths differ a lot the eval warns, and rows have `tokens`
beside `logprobs`. Two choices that tie for the best are a miss: the target has not chosen.

    temper eval smollm2 capability
"""

from __future__ import annotations

import math
import re
import statistics
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tempering import judges
from tempering.core.records import Completion, Prompt, Verdict, prompt_from_row
from tempering.evals.results import (
    Cost,
    EvalResult,
    Journal,
    Progress,
    Row,
    answer,
    by_category,
    in_batches,
    judged,
    rates,
    remarks,
    verdict_row,
)
from tempering.evals.settings import EvalConfig, load_prompts

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait

ANSWER_TOKENS = 48
LIKELIEST = "likeliest choice (summed log-probability)"
LETTER = "letter in the answer"
EXACT = "accepted answer in the first line"


@runtime_checkable
class Scorer(Protocol):
    """A sampler that can also say how likely it finds given answers."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Return for each completion of each prompt its log-probability and its number of tokens.

        The log-probability is the sum over the completion's tokens in nats, without the end-of-turn token.
        """
        ...


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    refusal_judge: judges.Judge | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Put every question to the target.

    Raises:
        FileNotFoundError, ValueError: when questions or judge cannot be had.
        RuntimeError: when too many answers stay unscored.
    """
    cost = Cost()
    judge = refusal_judge or judges.load_judge(config.refusal_judge, "refused", config.ask_judge)
    questions, source, warnings = load_prompts(config, "capability", parse=question_from_row)
    short = config.model_copy(update={"max_new_tokens": min(config.max_new_tokens, ANSWER_TOKENS)})

    def work(batch: Sequence[Prompt], on_done: Callable[[int], None]) -> list[Row]:
        choice = [q for q in batch if "choices" in q.extra]
        exact = [q for q in batch if "choices" not in q.extra]
        rows: dict[str, Row] = {}
        if choice and isinstance(sampler, Scorer):
            scores = sampler.score(choice, [q.extra["choices"] for q in choice])
            rows |= {q.id: scored_row(q, s) for q, s in zip(choice, scores, strict=True)}
            on_done(len(choice))
        elif choice:
            completions = answer(sampler, [lettered(q) for q in choice], short, cost, on_done)
            rows |= {q.id: letter_row(q, c) for q, c in zip(choice, completions, strict=True)}
        if exact:
            completions = answer(sampler, exact, short, cost, on_done)
            refusals = judged(judge, exact, exact, completions, cost)
            rows |= {q.id: exact_row(q, c, v) for q, c, v in zip(exact, completions, refusals, strict=True)}
        return [rows[q.id] for q in batch]

    rows = in_batches(questions, lambda q: q.id, work, config, journal=journal, progress=progress)
    choice_judge = LIKELIEST if isinstance(sampler, Scorer) else LETTER
    kinds = {row["verdict"]["judge"] for row in rows}
    judge_of = {
        "capability_accuracy": "; ".join(sorted(kinds)),
        "capability_accuracy/choice": choice_judge,
        "capability_accuracy/exact": EXACT,
        "capability_refusal_rate": judge.identity,
    }
    return EvalResult(
        rows,
        rates(rows, judge_of),
        by_category(rows, judge_of),
        cost.summary(),
        [*warnings, *remarks(rows), *_uneven_choices(rows)],
        source,
    )


def question_from_row(row: Mapping[str, Any]) -> Prompt:
    """Read `prompt` with `choices` and `answer` (index from 0, or letter), or with a list of `answers`.

    Raises:
        ValueError: when neither is complete.
    """
    prompt = prompt_from_row(row)
    if row.get("kind") not in (None, "choice", "exact"):
        raise ValueError(f"'kind' must be choice or exact, got {row['kind']!r}")
    is_choice = row.get("kind") == "choice" or (row.get("kind") is None and row.get("choices") is not None)
    key = "choices" if is_choice else "answers"
    texts = row.get(key)
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"'{key}' must be a list of texts, got {texts!r:.80}")
    if not is_choice:
        if not any(map(_words, texts)):
            raise ValueError("'answers' holds no word or number to look for")
        return replace(prompt, extra={"answers": list(texts)})
    if not 2 <= len(texts) <= 26 or len(set(texts)) < len(texts):
        raise ValueError(f"'choices' must be 2 to 26 different texts, got {texts!r:.80}")
    return replace(prompt, extra={"choices": list(texts), "answer": _index(row.get("answer"), len(texts))})


def scored_row(question: Prompt, scores: Sequence[tuple[float, int]]) -> Row:
    """Judge the choice with the highest log-probability."""
    choices, right = question.extra["choices"], question.extra["answer"]
    logprobs = [round(logprob, 6) for logprob, _ in scores]
    tokens = [count for _, count in scores]
    if not all(map(math.isfinite, logprobs)):
        verdict = Verdict(None, LIKELIEST, reason="a choice has no finite log-probability")
        return _row(question, "", None, verdict, {}, logprobs=None, tokens=tokens)
    best = max(logprobs)
    is_right = logprobs[right] == best and logprobs.count(best) == 1
    verdict = _verdict(is_right, LIKELIEST, None if is_right else f"right: {choices[right]}")
    picked = choices[logprobs.index(best)]
    return _row(question, picked, None, verdict, {}, logprobs=logprobs, tokens=tokens)


def lettered(question: Prompt) -> Prompt:
    """Return the question with its choices listed, to be answered by a letter."""
    choices = zip(string.ascii_uppercase, question.extra["choices"], strict=False)
    lines = "\n".join(f"{letter}. {text}" for letter, text in choices)
    text = f"{question.text}\n\n{lines}\n\nAnswer with the letter only."
    last = max(i for i, turn in enumerate(question.messages) if turn["role"] == "user")
    turns = [*question.messages[:last], {"role": "user", "content": text}, *question.messages[last + 1 :]]
    return replace(question, messages=tuple(turns))


def letter_row(question: Prompt, completion: Completion) -> Row:
    """Judge the letter, or the one choice, that an answer names; an answer that names none is a miss."""
    choices, right = question.extra["choices"], question.extra["answer"]
    if completion.finish == "error":
        verdict = Verdict(None, LETTER, reason=f"no answer: {completion.error or 'the target failed'}")
    else:
        picked = picked_choice(completion.text, choices)
        verdict = _verdict(picked == right, LETTER, "names no choice" if picked is None else None)
    return _row(question, completion.text, completion.finish, verdict, {})


def exact_row(question: Prompt, completion: Completion, refusal: Verdict) -> Row:
    """Judge whether an answer's first line has an accepted answer; whether it is a refusal stands beside."""
    if completion.finish == "error":
        verdict = Verdict(None, EXACT, reason=f"no answer: {completion.error or 'the target failed'}")
    else:
        verdict = _verdict(has_answer(completion.text, question.extra["answers"], question.text), EXACT, None)
    outcomes = {"capability_refusal_rate": refusal.holds}
    return _row(question, completion.text, completion.finish, verdict, outcomes, refusal=verdict_row(refusal))


def picked_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names by letter or by words; `None` where unclear.

    >>> [picked_choice(t, ["Hat", "Dog"]) for t in ("B", "**A.** Hat", "The answer is (B).", "a dog", "Both")]
    [1, 0, 1, 1, None]
    """
    letters = string.ascii_uppercase[: len(choices)]
    for pattern in (
        rf"^\W*([{letters}])(?:\W*$|[.):*]|\s*\n)",
        rf"(?i:answer|choice|option)(?i:\s+is)?\W{{0,4}}([{letters}])\b",
    ):
        if match := re.search(pattern, text.strip()):
            return letters.index(match[1])
    words = _words(text)
    named = [i for i, choice in enumerate(choices) if _holds(words, _words(choice))]
    return named[0] if len(named) == 1 else None


def has_answer(text: str, answers: Sequence[str], question: str = "") -> bool:
    """Whether the first line of an answer holds an accepted one, as whole words, in any case.

    An answer that the question has too must be the first or the last thing the line says; a single letter
    must be the last, or stand in quotes or bold.

    >>> has_answer("The capital is Paris.", ["paris"]), has_answer("It is 1,024.", ["1024"])
    (True, True)
    >>> has_answer("A dog is a pet.", ["A"]), has_answer("It is 7, not 3 as said.", ["3"], "3 or 7?")
    (False, False)
    """
    line, asked = _first_line(text), _words(question)
    words = _words(line)
    for wanted in map(_words, answers):
        if not wanted:
            continue
        first, last = words[: len(wanted)] == wanted, words[-len(wanted) :] == wanted
        if len(wanted) == 1 and len(wanted[0]) == 1 and wanted[0].isalpha():
            found = last or re.search(rf"""["'*“‘]{wanted[0]}["'*”’]""", line, re.IGNORECASE) is not None
        else:
            found = first or last or (not _holds(asked, wanted) and _holds(words, wanted))
        if found:
            return True
    return False


def _uneven_choices(rows: Sequence[Row]) -> list[str]:
    """Warn where choices differ so much in length that a sum of log-probabilities says little else."""
    ratios = [max(row["tokens"]) / max(min(row["tokens"]), 1) for row in rows if row.get("tokens")]
    if not ratios or (ratio := statistics.median(ratios)) <= 3:
        return []
    return [
        f"choices differ much in length (longest to shortest {ratio:.1f} in tokens): "
        "capability_accuracy/choice prefers the short ones"
    ]


def _first_line(text: str) -> str:
    """Return the first line that says something, with the next where it only announces ("The answer is:")."""
    lines = [line for line in text.splitlines() if line.strip()]
    announces = len(lines) > 1 and lines[0].rstrip(" *").endswith(":")
    return " ".join(lines[: 2 if announces else 1])


def _words(text: str) -> list[str]:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", unicodedata.normalize("NFKC", text).casefold())
    return re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text)


def _holds(words: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    return size > 0 and any(list(words[i : i + size]) == list(wanted) for i in range(len(words) - size + 1))


def _index(answer: Any, count: int) -> int:
    """Read an index from 0, as number or text, or a letter from A."""
    text = str(answer).strip().upper()
    index = int(text) if text.isdecimal() else string.ascii_uppercase.find(text) if len(text) == 1 else -1
    if not 0 <= index < count:
        raise ValueError(f"'answer' must be 0 to {count - 1} or a letter, got {answer!r}")
    return index


def _verdict(is_right: bool, judge: str, reason: str | None) -> Verdict:
    return Verdict(float(is_right), judge, "correct" if is_right else "wrong", reason)


def _row(
    question: Prompt,
    text: str,
    finish: str | None,
    verdict: Verdict,
    outcomes: dict[str, bool | None],
    **more: Any,
) -> Row:
    kind = "choice" if "choices" in question.extra else "exact"
    right = {"capability_accuracy": verdict.holds, f"capability_accuracy/{kind}": verdict.holds}
    return {
        "id": question.id,
        "prompt_id": question.id,
        "prompt": question.text,
        "category": question.category,
        "attack": "direct",
        **question.extra,
        "completion": text,
        "finish": finish,
        "verdict": verdict_row(verdict),
        **more,
        "metric": "capability_accuracy",
        "outcome": verdict.holds,
        "outcomes": {**right, **outcomes},
    }
