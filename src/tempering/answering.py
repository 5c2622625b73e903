"""`temper data own-answers`: put the model's own answers where a data set says how to help.

The claim: with helpful answers written by others, training for safety also teaches a model to write like
them, and a small model spends most of its steps on that. Its own answers to the harmless prompts cost
almost no likelihood, so that what is left to learn is what to refuse (figures: docs/staged_competence.md).
The answers are as good, or as bad, as the model: they keep its behaviour and teach no facts.

    temper data own-answers pairs.jsonl model=smollm2 out=runs/own
    temper train staged_competence data.train=runs/own/pairs.jsonl
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pydantic import Field

from tempering.api import load
from tempering.core.config import Config
from tempering.core.progress import progress, say
from tempering.core.records import Completion, PreferencePair, Prompt, Verdict, content_id, pair_from_row
from tempering.core.run import Run
from tempering.data.describe import licences_of, sha256_of
from tempering.data.files import read_records, training_file
from tempering.judges import Judge, judge_groups, load_judge

BATCH = 64
SENTENCE_END = re.compile(r"(?<!\d)[.!?][\"')\]*]*(?=\s|$)")
"""A full stop after a digit numbers a list."""


class OwnAnswersConfig(Config):
    """Settings of `temper data own-answers`."""

    out: str = "runs/own_answers"
    """Run folder to make; the pairs are its pairs.jsonl."""
    model: str = "smollm2"
    """Who answers: the start model of the training to come, as a model reference or openai:MODEL@URL."""
    labels: list[str] = Field(default=["borderline", "benign"])
    """Labels of the pairs whose chosen answer is replaced; the others stay as they are."""
    judge: str = "rules"
    """What counts as a refusal, which is never taken."""
    tries: int = Field(3, ge=1)
    """Samples asked for, one after the other, until one is taken; after the last the file's answer stays."""
    temperature: float = Field(0.3, ge=0)
    """Of the first sample; each later one is 0.2 warmer."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus of sampling."""
    max_new_tokens: int = Field(56, ge=1)
    """Longest answer; one that is cut off goes back to its last whole sentence."""
    min_words: int = Field(6, ge=1)
    """Shortest answer that is taken."""
    seed: int = 0
    """Of sampling."""


def run_own_answers(file: str, config: OwnAnswersConfig, *, resume: bool = False) -> dict[str, Any]:
    """Sample, screen and write the pairs; returns the counts.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong input; nothing has been written.
        RuntimeError: the model or the judge failed.
    """
    Run.require_free(config.out, resume)
    path = training_file(file)
    pairs: list[PreferencePair] = read_records(path, pair_from_row, what="pair").records
    todo = [pair for pair in pairs if pair.label in config.labels]
    if not todo:
        found = ", ".join(sorted({pair.label for pair in pairs if pair.label})) or "no row with a 'label'"
        raise ValueError(f"{file}: no pair is labelled {' or '.join(config.labels)}; found {found}")
    judge = load_judge(config.judge, "refused")
    sampler = load(config.model)
    run = Run.create(config.out, "own_answers", config, resume=resume)
    if run.is_done:
        say(f"{run.root} is done already")
        return dict(run.read_json("summary.json"))
    answers: dict[str, str | None] = {}
    if run.has("answers.jsonl"):
        answers = {row["id"]: row["answer"] for row in run.read_rows("answers.jsonl")}
    with progress("answering", len(todo)) as advance:
        advance(sum(pair.id in answers for pair in todo))
        left = [pair for pair in todo if pair.id not in answers]
        for start in range(0, len(left), BATCH):
            batch = left[start : start + BATCH]
            for pair, answer in zip(batch, own_answers(sampler, judge, batch, config), strict=True):
                answers[pair.id] = answer
                run.append_row("answers.jsonl", {"id": pair.id, "prompt": pair.text, "answer": answer})
            advance(len(batch))
    run.write_rows("pairs.jsonl", [pair_row(pair, answers.get(pair.id)) for pair in pairs])
    taken = sum(answers[pair.id] is not None for pair in todo)
    result = {"pairs": len(pairs), "asked": len(todo), "replaced": taken, "file": str(run.root / "pairs.jsonl")}
    run.write_json("summary.json", result)
    run.write_provenance(
        model=sampler.name,
        judge=judge.identity,
        inputs=[{"path": str(file), "sha256": sha256_of(path)}],
        data_licences=licences_of(file),
    )
    run.finish()
    return result


def own_answers(
    sampler: Any, judge: Judge, pairs: list[PreferencePair], config: OwnAnswersConfig
) -> list[str | None]:
    """Return one answer for each pair: the first sample that helps, or `None`."""
    found: list[str | None] = [None] * len(pairs)
    for attempt in range(config.tries):
        left = [i for i, answer in enumerate(found) if answer is None]
        prompts = [Prompt(pairs[i].messages, id=content_id(pairs[i].messages, attempt)) for i in left]
        groups = sampler(
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature + 0.2 * attempt,
            top_p=config.top_p,
            seed=config.seed,
        )
        cut = [replace(group[0], text=whole_sentences(group[0])) for group in groups]
        good = [(i, p, c) for i, p, c in zip(left, prompts, cut, strict=True) if is_usable(c, pairs[i], config)]
        verdicts = judge_groups(judge, [(prompt, [answer]) for _, prompt, answer in good]) if good else []
        for (i, _, answer), (verdict,) in zip(good, verdicts, strict=True):
            if helps(verdict):
                found[i] = answer.text
        if not any(answer is None for answer in found):
            break
    return found


def whole_sentences(completion: Completion) -> str:
    """Return the text, up to its last whole sentence where it was cut off; empty where it holds none.

    >>> whole_sentences(Completion("p", "Mix it well. Then bake", "length", 0))
    'Mix it well.'
    """
    text = completion.text.strip()
    if completion.finish != "length":
        return text
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


def is_usable(completion: Completion, pair: PreferencePair, config: OwnAnswersConfig) -> bool:
    """Whether the answer is there, long enough, and not what the pair rejects."""
    words = completion.text.split()
    return completion.finish != "error" and len(words) >= config.min_words and completion.text != pair.rejected


def helps(verdict: Verdict) -> bool:
    """Whether the judge saw neither a refusal, in whole or in part, nor nonsense."""
    return verdict.score == 0 and verdict.label != "degenerate"


def pair_row(pair: PreferencePair, answer: str | None) -> dict[str, Any]:
    """One row of the new file: the pair with its new chosen answer, and who wrote that."""
    only = pair.messages[0] if len(pair.messages) == 1 else None
    row: dict[str, Any] = {
        "prompt": only["content"] if only and only["role"] == "user" else list(pair.messages),
        "chosen": pair.chosen if answer is None else answer,
        "rejected": pair.rejected,
    }
    row |= {"category": pair.category, "label": pair.label, **pair.extra}
    return row | {"chosen_by": "file" if answer is None else "model"}
