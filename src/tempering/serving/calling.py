"""Answer requests by whole calls of a sampler: best of N, traces of routing, and whatever is not drawn in steps.

Requests of equal settings are one call. Used by the engine; refuses to know about threads and clients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tempering.core.records import Completion, tokens_of
from tempering.core.sampling import LocalSampler
from tempering.serving.errors import ApiError
from tempering.serving.jobs import Choice, Ended, Event, Job, Wrote
from tempering.serving.log import log
from tempering.serving.target import Target
from tempering.serving.text import Writer

REFUSED = ("HTTP 400", "HTTP 413", "HTTP 422")
"""What an endpoint says of a request that is at fault itself, such as one beyond its context."""


def together(jobs: Sequence[Job], batch_rows: int, rows_each: int) -> list[Job]:
    """The first job, and those behind it that the same call can answer: equal settings, within `batch_rows`.

    `rows_each`: answers that are drawn for one that is given.
    """
    first, rows = jobs[0], 0
    group = []
    for job in jobs:
        rows += len(job.choices) * rows_each
        if job is not first and (job.ask.settings != first.ask.settings or rows > batch_rows):
            break
        group.append(job)
    return group


def answer(target: Target, jobs: Sequence[Job], interrupt: Callable[[], bool]) -> None:
    """Ask the sampler once for all jobs, and tell each what it gave.

    Raises:
        Interrupted: `interrupt` said so.
    """
    ask = jobs[0].ask
    sampler: Any = target.sampler
    kept: list[dict[str, Any]] = []
    traced: Any = None
    if ask.routing:
        sampler = traced = _tracing(target.raw if ask.is_raw and target.raw is not None else target.sampler)
    elif ask.is_raw and target.raw is not None:
        sampler = target.raw
    prompts = [prompt for job in jobs for prompt in job.ask.prompts]
    watched = [s for s in (target.local, target.raw) if s is not None]
    if target.chooser is not None:
        target.chooser.keep = kept.append
        target.chooser.guarded.clear()  # a guard that was away is judged by what it says now
    for local in watched:
        local.interrupt = interrupt
    try:
        groups = sampler(
            prompts, n=ask.n, max_new_tokens=ask.max_new_tokens, temperature=ask.temperature, top_p=ask.top_p,
            seed=ask.seed,
        )  # fmt: skip
    finally:
        for local in watched:
            local.interrupt = None
        if target.chooser is not None:
            target.chooser.keep = None
    completions = [completion for group in groups for completion in group]
    choices = [choice for job in jobs for choice in job.choices]
    traces = traced.traced if traced is not None else []
    routers = traced.routers if traced is not None else []
    told: dict[int, list[Event]] = {}
    for i, (choice, completion) in enumerate(zip(choices, completions, strict=True)):
        details: dict[str, Any] = {}
        if choice.job.ask.candidates and kept:
            details["candidates"] = shown(kept[i])
        if traces:
            details["routing"] = routing(routers, *traces[i][1:])
        tokens = candidate_tokens(kept[i]) if kept else tokens_of([completion]) or 0
        told.setdefault(id(choice.job), []).extend(_events(choice, completion, tokens, details or None))
    for job in jobs:
        job.tell(told[id(job)])


def _events(choice: Choice, completion: Completion, tokens: int, details: dict[str, Any] | None) -> list[Event]:
    if completion.finish == "error":
        return [_failed(completion.error or "no reason given")]
    writer, thought, used = Writer(lambda ids: "", choice.job.ask.stops), completion.thought, completion.usage
    piece = writer.finish(completion.text, thought.text if thought else "")
    finish = "stop" if writer.is_stopped else completion.finish
    reasoning = thought.spans.get("tag", (0, 0))[1] if thought else 0
    return [
        Wrote(choice.index, piece.content, piece.reasoning),
        Ended(choice.index, finish, tokens, reasoning, details, used.prompt_tokens if used else 0),
    ]


def _failed(reason: str) -> ApiError:
    """What a client is told where an endpoint gave no answer; the log has the kind of it.

    A reason begins with the status, or words of the sampler; what an endpoint sent, which may be the prompt, is
    behind them.
    """
    kind = re.split("[:(]", reason, maxsplit=1)[0].strip()
    log(f"error: the target did not answer: {kind}")
    if kind in REFUSED:
        return ApiError(
            400, f"the endpoint that answers refused this request ({kind}); shorten it, or ask for less",
            code="target_refused",
        )  # fmt: skip
    return ApiError(502, "the target did not answer; the server's log says why", code="target_failed")


def _tracing(sampler: LocalSampler) -> Any:
    from tempering.methods.safemoe.tracing import TracingSampler

    return TracingSampler(sampler)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The candidates of one answer as a client sees them: without what it asked, and without token ids."""
    keep = ("draw", "text", "finish", "valid", "risk", "flags", "tokens")
    found: dict[str, Any] = {
        "winner": row["winner"],
        "fallback": row["fallback"],
        "candidates": [{key: c[key] for key in keep} for c in row["candidates"]],
    }
    if "resampled" in row:
        found["resampled"] = shown({"fallback": None, **row["resampled"]})
    return found


def candidate_tokens(row: dict[str, Any]) -> int:
    """Tokens of all candidates of one answer."""
    again = row.get("resampled", {"candidates": []})["candidates"]
    return sum(candidate["tokens"] or 0 for candidate in [*row["candidates"], *again])


def routing(routers: Sequence[str], prompt_tokens: int, traced: Any) -> dict[str, Any]:
    """The gate's decisions on one row: experts and weights of every token that was read, at every router."""
    return {
        "routers": list(routers),
        "prompt_tokens": prompt_tokens,
        "tokens": list(traced.tokens),
        "experts": traced.idx.tolist(),
        "weights": [[[round(w, 4) for w in place] for place in token] for token in traced.w.tolist()],
    }
