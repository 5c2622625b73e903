"""What a run is made of before its first step: usable pairs, their tokens, stages and draws; and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape

from tempering.core import preference
from tempering.core.chat import encode
from tempering.core.policy import Policy
from tempering.core.progress import say
from tempering.core.records import PreferencePair, content_id, pair_from_row
from tempering.core.run import Run
from tempering.data.files import read_records, training_file
from tempering.data.split import hold_out_prompts, mixed
from tempering.methods.staged_competence import curriculum as cur
from tempering.methods.staged_competence import kto
from tempering.methods.staged_competence.difficulty import Logprobs, PairTokens, Scored, check_scores, score_pairs
from tempering.methods.staged_competence.settings import StagedCompetenceConfig


class Pairs(NamedTuple):
    """Usable pairs by id, their tokens, and what was left out."""

    pairs: dict[str, PreferencePair]
    tokens: dict[str, PairTokens]
    dropped: dict[str, int]
    source: Path | str


def read_pairs(config: StagedCompetenceConfig) -> tuple[list[PreferencePair], dict[str, int]]:
    """Read and check the rows, before any model is loaded."""
    parsed = read_records(
        training_file(config.data.train),
        pair_from_row,
        limit=config.limit,
        invalid=config.data.invalid,
        what="pair",
    )
    return mixed(parsed.records, config.data.mix), dict(parsed.dropped)


def digest(data: Pairs) -> str:
    """Hash what a run trains on: a run that goes on must see the same."""
    rows = [[i, p.messages, p.chosen, p.rejected, p.label, str(p.extra)] for i, p in sorted(data.pairs.items())]
    return content_id(rows)


def side_encoder(config: StagedCompetenceConfig, policy: Policy) -> kto.EncodeSide:
    """How a prompt and one answer become tokens in this run."""
    return partial(
        encode,
        policy.tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        fmt=config.prompt_format,
        end_ids=policy.end_ids,
    )


def tokenize_pairs(
    config: StagedCompetenceConfig, policy: Policy, rows: list[PreferencePair], dropped: dict[str, int]
) -> Pairs:
    """Tokenize both sides of every pair.

    Raises:
        ValueError: naming the pair whose prompt is too long, or whose template cannot be masked.
    """
    pairs, tokens = {}, {}
    encode_side = side_encoder(config, policy)
    for number, pair in enumerate(rows, 1):
        try:
            sides = [encode_side(pair.messages, text) for text in (pair.chosen, pair.rejected)]
            if min(side.completion_tokens for side in sides) < 1:
                raise ValueError(f"nothing of a completion is left within max_length={config.max_length}")
        except ValueError as error:
            if config.data.invalid == "error":
                where = f"{training_file(config.data.train)}: pair {number} (id {pair.id})"
                raise ValueError(f"{where}: {error}; fix the pair or set data.invalid=drop") from None
            say(f"[yellow]dropped pair {escape(pair.id)}: {escape(str(error))}[/]")
            dropped["unusable as tokens"] = dropped.get("unusable as tokens", 0) + 1
            continue
        pairs[pair.id], tokens[pair.id] = pair, PairTokens(*sides)
    if not pairs:
        raise ValueError(f"{config.data.train}: no usable pair is left")
    return Pairs(pairs, tokens, dropped, training_file(config.data.train))


class Plan(NamedTuple):
    """Who is held out, who is in which stage (easy to hard), and which ids each optimiser step draws."""

    held: list[str]
    scores: dict[str, float]
    stages: list[list[str]]
    rows: list[list[list[str]]]
    epochs: list[int]


def trial_plan(config: StagedCompetenceConfig, policy: Policy, data: Pairs) -> Plan:
    """Plan as `prepare` does, but for scores that need the model: sizes and steps do not depend on those.

    Raises:
        ValueError: split, stages or scores that do not fit the data.
    """
    held = hold_out_prompts({i: p.text for i, p in data.pairs.items()}, config.split.share, config.split.seed)
    left = [data.pairs[i] for i in sorted(set(data.tokens) - held)]
    if not left:
        raise ValueError(f"split.share={config.split.share} leaves no pair to train on")
    is_column = config.difficulty.scorer == "column"
    scores = score_pairs(policy, left, config.difficulty, {}).scores if is_column else {}
    scores = scores or {pair.id: float(n) for n, pair in enumerate(left)}
    return make_plan(config, scores, sorted(held), {i: p.label for i, p in data.pairs.items()})


def make_plan(
    config: StagedCompetenceConfig,
    scores: dict[str, float],
    held: Sequence[str],
    labels: Mapping[str, str | None] | None = None,
) -> Plan:
    """Rank, cut and schedule: everything that is random about the run is decided here.

    Raises:
        ValueError: fewer pairs than stages, an empty stage, or `epochs` of another length than the stages.
    """
    check_scores(scores)
    if config.data.share < 1:
        kept = cur.nested_subset(scores, config.data.share, config.split.seed)
        scores = {i: s for i, s in scores.items() if i in kept}
    c = config.curriculum
    of = {i: labels.get(i) for i in scores} if labels else {}
    balanced = c.balance and c.boundaries is None and len(set(of.values())) > 1
    order = cur.rank_balanced(scores, of, c.direction) if balanced else cur.rank(scores, c.direction)
    stages = cur.cut_stages(order, c.stages) if c.boundaries is None else cur.cut_at(order, scores, c.boundaries)
    epochs = c.epochs if isinstance(c.epochs, list) else [c.epochs] * len(stages)
    if len(epochs) != len(stages):
        raise ValueError(f"curriculum.epochs has {len(epochs)} entries for {len(stages)} stages")
    rows: list[list[list[str]]] = []
    for k, ids in enumerate(stages):
        schedule = cur.stage_schedule(len(ids), config.batch_pairs, epochs[k], c, config.seed, k)
        drawn = [[ids[position] for position in row] for row in schedule]
        rows.append(cur.add_replay(drawn, [i for earlier in stages[:k] for i in earlier], c.replay, config.seed, k))
    return Plan(sorted(held), scores, stages, rows, epochs)


def describe(config: StagedCompetenceConfig, plan: Plan, data: Pairs) -> None:
    """Say what will be trained, before it is."""
    sizes = [len(ids) for ids in plan.stages]
    unseen = [
        cur.unseen_share(n, config.batch_pairs, e, config.curriculum) for n, e in zip(sizes, plan.epochs, strict=True)
    ]
    say(
        f"{sum(sizes)} pairs in {len(sizes)} stages of {sizes}, {sum(map(len, plan.rows))} steps of "
        f"{config.batch_pairs} pairs; difficulty by {config.difficulty.scorer}; {len(plan.held)} held-out pairs "
        f"measured; expected share of pairs never drawn {np.average(unseen, weights=sizes):.1%}"
    )
    if config.loss in preference.REFERENCE_FREE and len(sizes) > 1:
        say(f"loss {config.loss} has no reference: the hand-over between stages is only a warm start")
    small = [n for n in sizes if n < 4 * config.batch_pairs]
    if small and len(sizes) > 1:
        say(
            f"[yellow]note: stages of {min(small)} pairs are small for batches of {config.batch_pairs}; "
            "consider fewer stages[/]"
        )
    for reason, count in data.dropped.items():
        say(f"[yellow]dropped {count} row(s): {escape(reason)}[/]")


def write_exposure(run: Run, config: StagedCompetenceConfig, plan: Plan) -> None:
    """Write how often each stage drew each pair, replayed ones too, beside the exact expectation.

    Counts the steps that were taken: `early_stop` may have ended a stage before its plan did.
    """
    taken = Counter(row["stage"] for row in run.read_rows("metrics.jsonl") if "event" not in row)
    rows = []
    earlier: list[str] = []
    for k, ids in enumerate(plan.stages):
        steps = plan.rows[k][: taken[k]]
        draws = Counter(i for row in steps for i in row)
        replayed = sum(cur.replay_count(config.curriculum.replay, len(row)) for row in steps) if earlier else 0
        own = sum(map(len, steps)) - replayed
        expected = cur.exposure(len(ids), config.batch_pairs, plan.epochs[k], config.curriculum, taken[k])
        expected = expected * (own / max(expected.sum(), 1e-9))
        wanted = [*zip(ids, expected, strict=True), *((i, replayed / len(earlier)) for i in earlier if replayed)]
        rows += [{"id": i, "stage": k, "draws": draws[i], "expected": float(e)} for i, e in wanted]
        earlier += ids
    run.write_rows("data/exposure.jsonl", rows)


def scored_rows(
    config: StagedCompetenceConfig, data: Pairs, held: set[str], scored: Scored, logp0: Mapping[str, Logprobs]
) -> list[dict[str, Any]]:
    """Rows of `data/scored.jsonl`: every pair, its side of the split, its score and what it came from."""
    rows = []
    for i in sorted(data.pairs):
        t = data.tokens[i]
        rows.append(
            {
                "id": i,
                "split": "held_out" if i in held else "train",
                "score": scored.scores.get(i),
                "scorer": config.difficulty.scorer,
                "sims": scored.sims.get(i),
                "logp0": {"chosen": logp0[i].chosen, "rejected": logp0[i].rejected} if i in logp0 else None,
                "len": {
                    "prompt": t.chosen.prompt_tokens,
                    "chosen": t.chosen.completion_tokens,
                    "rejected": t.rejected.completion_tokens,
                },
            }
        )
    return rows


def plan_rows(config: StagedCompetenceConfig, plan: Plan) -> list[dict[str, Any]]:
    """Rows of `data/plan.jsonl`, one a stage."""
    c = config.curriculum
    return [
        {
            "stage": k, "ids": ids, "n": len(ids), "T": len(plan.rows[k]), "B": config.batch_pairs,
            "E": plan.epochs[k], "pacing": c.pacing, "c0": c.c0, "sampling": c.sampling, "seed": config.seed,
            "schedule_sha256": cur.schedule_hash(plan.rows[k]),
        }
        for k, ids in enumerate(plan.stages)
    ]  # fmt: skip


def heldout_row(pair: PreferencePair) -> dict[str, Any]:
    """One row of `data/heldout.jsonl`, which evals of separation read."""
    return {"id": pair.id, "prompt": list(pair.messages), "chosen": pair.chosen, "rejected": pair.rejected}
