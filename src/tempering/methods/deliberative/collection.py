"""Collection: ask the teacher with the policies before its eyes, judge what comes, write every candidate down.

`data/candidates.jsonl` only grows. A row's key depends on the request, the teacher, the policies, what is asked and
how it is sampled; keys that are there are not asked for again, so that a killed collection goes on where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tempering.core.endpoint import EndpointSampler
from tempering.core.ledger import SPENT
from tempering.core.loading import Dtype
from tempering.core.policy import Policy
from tempering.core.progress import progress
from tempering.core.records import Completion, Prompt, content_id
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler, Sampler, ScriptedSampler
from tempering.core.think import CLOSE, OPEN, parse_think
from tempering.data.policies import Registry, policy_text
from tempering.methods.deliberative.judging import Judges, judge_candidates
from tempering.methods.deliberative.prompts import BUILDER_VERSION, Item, deliberation_messages
from tempering.methods.deliberative.settings import RECORDS, DeliberativeConfig

CANDIDATES = "data/candidates.jsonl"
BATCH = 64
"""Requests that are asked, judged and written down at a time."""


def load_teacher(config: DeliberativeConfig, items: Sequence[Item], run: Run) -> Sampler:
    """Make the teacher: records replayed, an endpoint with its cache in the run, or a model in this process.

    Raises:
        ValueError, FileNotFoundError: it is not to be had.
    """
    teacher = config.teacher
    if teacher.model == RECORDS:
        replies = {item.prompt.id: item.reply for item in items}
        return ScriptedSampler(lambda prompt, _: replies[prompt.extra["prompt_id"]] or "", name=RECORDS)
    if teacher.is_endpoint:
        return EndpointSampler(teacher.model, cache=run.path("cache/x").parent, **teacher.endpoint_settings)
    dtype: Dtype = config.dtype
    policy = Policy.load(teacher.model, dtype=dtype)
    return LocalSampler(policy, batch_rows=config.sample_rows, thinks=True, name=teacher.model)


def require_replies(config: DeliberativeConfig, items: Sequence[Item]) -> None:
    """Refuse records without reasoning and answer where these are to be replayed.

    Raises:
        ValueError: how many, and the first of them.
    """
    if missing := [item.prompt.id for item in items if item.reply is None]:
        raise ValueError(
            f"{config.data.train}: {len(missing)} of {len(items)} rows hold no 'cot' and 'answer' (the first is id "
            f"{missing[0]}); add them, or name a teacher, as in teacher=openai:MODEL@URL"
        )


def sampling_of(config: DeliberativeConfig) -> dict[str, Any]:
    """How the teacher is sampled: part of a candidate's key."""
    teacher = config.teacher
    return {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_new_tokens": teacher.max_new_tokens,
        "seed": config.seed,
    }


def candidate_key(config: DeliberativeConfig, prompt_id: str, registry: Registry, draw: int) -> str:
    """Identify a candidate by all that it depends on."""
    return content_id(
        prompt_id, config.teacher.model, config.teacher.visible_deliberation, registry.digest, config.policy_mode,
        BUILDER_VERSION, sampling_of(config), draw,
    )  # fmt: skip


def read_reply(completion: Completion, opened: bool) -> tuple[str, str, str, str]:
    """Return (text, cot, answer, status) of a teacher's reply.

    Reasoning that an API tells apart is joined in front of the answer; a tag that the template opened (`opened`, or a
    reply that only closes one) is put back. A sample that failed has the status `error`.
    """
    if completion.finish == "error":
        return completion.text, "", "", "error"
    text = completion.text.strip()
    if completion.thought is not None:
        text = f"{OPEN}{completion.thought.text}{CLOSE}{text}"
    elif opened or (CLOSE in text and OPEN not in text):
        text = f"{OPEN}\n{text}"
    read = parse_think(text, completion.finish)
    return (text, *read)


def collect(
    config: DeliberativeConfig,
    items: Sequence[Item],
    registry: Registry,
    judges: Judges,
    run: Run,
    teacher: Sampler | None = None,
) -> list[dict[str, Any]]:
    """Ask for what is not in `data/candidates.jsonl` yet, judge it, append it; returns all candidates, in order.

    Raises:
        RuntimeError: the teacher's cap on spending is reached, the teacher answers nothing, or a judge does not work.
    """
    run.truncate_rows(CANDIDATES, lambda row: True)  # drops a line that a kill has torn
    known = {row["key"] for row in run.read_rows(CANDIDATES)} if run.has(CANDIDATES) else set()
    draws = range(config.teacher.draws)
    keys = {item.prompt.id: [candidate_key(config, item.prompt.id, registry, d) for d in draws] for item in items}
    todo = [item for item in items if not known.issuperset(keys[item.prompt.id])]
    if todo:
        teacher = teacher or load_teacher(config, items, run)
    with progress("collecting", len(items)) as advance:
        advance(len(items) - len(todo))
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            assert teacher is not None
            specs = [policy_text(registry, item.categories, config.policy_mode) for item in batch]
            groups = _ask(config, teacher, batch, specs, registry)
            rows, owners, texts, is_spent = [], [], [], ""
            for item, spec, group in zip(batch, specs, groups, strict=True):
                for draw, completion in enumerate(group):
                    key = keys[item.prompt.id][draw]
                    is_spent = is_spent or (completion.error if SPENT in (completion.error or "") else "") or ""
                    if key in known or is_spent:  # what comes after a gap is in the cache, and keeps its place
                        continue
                    rows.append(_row(config, item, registry, key, draw, completion, opened=_opens(teacher)))
                    owners.append(item)
                    texts.append(spec)
            _require_answers(rows, teacher)
            judge_candidates(rows, owners, texts, judges, registry, config.filter)
            for row in rows:
                run.append_row(CANDIDATES, row)
            if is_spent:
                done = len(run.read_rows(CANDIDATES))
                raise RuntimeError(
                    f"teacher.max_cost: {is_spent}; {done} of {len(items) * len(draws)} candidates are there. "
                    "Raise it and run again with --resume: nothing is paid twice"
                )
            advance(len(batch))
    wanted = {key for several in keys.values() for key in several}
    return [row for row in run.read_rows(CANDIDATES) if row["key"] in wanted]


def costs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up what candidates took, where their teacher told it."""
    usage = [row["usage"] for row in rows if row["usage"]]
    return {
        "calls": len(rows),
        "errors": sum(row["status"] == "error" for row in rows),
        "prompt_tokens": sum(u["prompt_tokens"] for u in usage),
        "completion_tokens": sum(u["completion_tokens"] for u in usage),
        "cost": sum(row["cost"] or 0.0 for row in rows),
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 3),
    }


def tally(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what became of the candidates."""
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    return {
        "candidates": len(rows),
        "kept": sum(row["kept"] for row in rows),
        "rejected": dict(sorted(reasons.items())),
    }


def _ask(
    config: DeliberativeConfig, teacher: Sampler, batch: Sequence[Item], specs: Sequence[str], registry: Registry
) -> list[list[Completion]]:
    prompts = [
        Prompt(
            deliberation_messages(
                item.prompt, spec, registry, item.categories, visible=config.teacher.visible_deliberation
            ),
            extra={"prompt_id": item.prompt.id},
        )
        for item, spec in zip(batch, specs, strict=True)
    ]
    sampling = sampling_of(config)
    return teacher(prompts, n=config.teacher.draws, **sampling)


def _row(
    config: DeliberativeConfig,
    item: Item,
    registry: Registry,
    key: str,
    draw: int,
    completion: Completion,
    *,
    opened: bool,
) -> dict[str, Any]:
    text, cot, answer, status = read_reply(completion, opened)
    usage = completion.usage
    return {
        "key": key,
        "prompt_id": item.prompt.id,
        "messages": list(item.prompt.messages),
        "categories": list(item.categories),
        "policy_hash": registry.digest,
        "teacher": config.teacher.model,
        "sampling": sampling_of(config),
        "draw": draw,
        "text": text,
        "cot": cot,
        "answer": answer,
        "status": status,
        "error": completion.error,
        "decision": item.decision,
        "verdicts": {},
        "kept": False,
        "reason": None,
        "usage": usage and {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        "cost": usage and usage.cost,
        "seconds": usage and usage.seconds,
    }


def _opens(teacher: Sampler) -> bool:
    return isinstance(teacher, LocalSampler) and teacher.thinks


def _require_answers(rows: Sequence[dict[str, Any]], teacher: Sampler) -> None:
    if len(rows) >= 8 and all(row["status"] == "error" for row in rows):
        raise RuntimeError(
            f"{teacher.name} answered none of {len(rows)} requests ({rows[0]['error']}); --resume goes on"
        )
