r"""Staged-Competence: curriculum preference optimisation for safety.

The claim: order preference pairs by how hard they are for the start model, cut them into stages, move the
reference to the policy after each stage, and inside a stage draw from a pool that grows from easy to hard;
then safety generalises further than with plain DPO on the same pairs, at the same cost in capability.

Paper: Kumar, Smith, Yadav, "Curriculum Learning for Safety Alignment", arXiv:2605.26315 v1. Competence:
Platanios et al. 2019 (arXiv:1903.09848), Eq. 3. DPO: Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7.

Differs from the paper: the reference is a stack of adapters, not a merged copy of the weights
(`handover: merge` merges); held-out pairs are held out by prompt; the first pool is a whole batch.
`recipes/staged_competence/paper.yaml` undoes all three. Unknown, our choice: see docs/staged_competence.md.

    temper train staged_competence out=runs/mine model=smollm2 data.train=pairs.jsonl
    temper train staged_competence -c recipes/staged_competence/tiny.yaml out=runs/tiny

The pure parts are `curriculum` (stages, pools, draws), `difficulty` (scores) and `core/preference.py` (losses);
the loop is below.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from rich.markup import escape
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tempering.core import preference
from tempering.core.chat import PromptFormat, collate, encode, group_length
from tempering.core.config import Config
from tempering.core.loading import Dtype, quiet_libraries
from tempering.core.policy import LoraSettings, Policy
from tempering.core.preference import LossOptions, PairScores
from tempering.core.progress import progress, say
from tempering.core.records import PreferencePair, pair_from_row
from tempering.core.run import Run, file_hash
from tempering.core.training import (
    Micro,
    Optimisation,
    Processes,
    Stopwatch,
    is_first_process,
    last_checkpoint,
    save_checkpoint,
    step_batches,
)
from tempering.data.files import bundled, read_records
from tempering.methods.staged_competence import curriculum as cur
from tempering.methods.staged_competence import kto
from tempering.methods.staged_competence.curriculum import Curriculum
from tempering.methods.staged_competence.difficulty import (
    Difficulty,
    Logprobs,
    PairTokens,
    check_scores,
    pair_logprobs,
    resolve_scorer,
    score_pairs,
    summary,
)

METHOD = "staged_competence"


class Data(Config):
    """Where the pairs come from."""

    train: str = "demo"
    """File (JSONL, Parquet, CSV), folder or Hub id of prompt/chosen/rejected rows; `demo`: the bundled ones."""
    invalid: Literal["error", "drop"] = "error"
    """A row that cannot be used stops the run, or is dropped and counted."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training pairs to use, the same in each quartile of difficulty (data efficiency)."""


class Split(Config):
    """What is held out, to measure margins on."""

    by: Literal["prompt", "margin_rows"] = "prompt"
    """`prompt`: all pairs of a prompt together, before scoring. `margin_rows`: the paper's, by score strata."""
    share: float = Field(default=0.2, ge=0, lt=1)
    """Share held out."""
    seed: int = 42
    """Of the split: the same for every training seed."""
    limit: int = 64
    """Largest number of held-out pairs that training measures itself on."""


class StagedCompetenceConfig(Config):
    """Configuration of `temper train staged_competence`."""

    model: str = "smollm2"
    """Start model: smollm2, a Hub id (owner/name@revision), a folder, a .gguf file, or a run."""
    out: str = "runs/staged_competence"
    """Run folder to make."""
    data: Data = Data()
    """Training pairs."""
    limit: int | None = None
    """Use only the first rows of the file."""
    seed: int = 42
    """Of adapters and draws."""
    dtype: Dtype = "auto"
    """Type of the base weights; auto: bfloat16 where the device computes in it."""
    prompt_format: PromptFormat = "chat"
    """`chat`: the tokenizer's template. `raw`: no template, as in the paper's training."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt + completion, in tokens; longer completions are cut at their end."""
    max_prompt_length: int = Field(512, gt=0)
    """Longest prompt, in tokens; a row with a longer one is unusable."""
    split: Split = Split()
    """Held-out pairs."""
    difficulty: Difficulty = Difficulty()
    """How hard a pair is."""
    curriculum: Curriculum = Curriculum()
    """Stages, pacing, draws."""
    reference: Literal["previous", "initial"] = "previous"
    """`previous`: the policy as the stage began. `initial`: the start model throughout (a control)."""
    handover: Literal["stack", "merge", "full"] = "stack"
    """`stack`: one adapter a stage. `merge`: into the weights. `full`: all weights train, no adapter."""
    lora: LoraSettings = LoraSettings()
    """Shape of each adapter."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "kto"] = (
        "sigmoid"
    )
    """Preference loss; sigmoid is DPO."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the KL penalty."""
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """`robust`: assumed share of flipped labels."""
    gamma: float = 1.0
    """`simpo`: target margin."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answers' negative log-likelihood (token mean over the step), added to the loss."""
    batch_pairs: int = Field(32, gt=0)
    """B: pairs per optimiser step, over all processes."""
    batch_tokens: int = Field(4096, gt=0)
    """Tokens, pads included, that are computed at a time."""
    lr: float = Field(5e-5, gt=0)
    """Learning rate at the start of each stage; falls linearly to zero."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up at the start of each stage."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int = Field(50, gt=0)
    """Optimiser steps between measurements on held-out pairs (and at each stage's end)."""
    early_stop: int | None = None
    """End a stage after this many measurements without a better held-out margin."""
    checkpoint_every: int = Field(20, gt=0)
    """Optimiser steps between checkpoints (and at each stage's end)."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""


CONFIG = StagedCompetenceConfig


# --- pure functions -----------------------------------------------------------------------------------


class StepTotals(NamedTuple):
    """What normalises a step's sums, over all micro-batches and processes."""

    pairs: int
    chosen_tokens: float


def step_share(
    s: PairScores, config: StagedCompetenceConfig, totals: StepTotals, kl_nats: float = 0.0
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss, and the pair loss of each pair.

    Shares of all micro-batches add up to: mean over pairs of the pair loss + w * (negative log-likelihood of
    the chosen answers, mean over all their tokens in the step). `kl_nats`: the step's estimate, read by `kto`.
    """
    options = LossOptions(config.beta, config.label_smoothing, config.gamma)
    is_kto = config.loss == "kto"
    values = preference.kto(s, options, kl_nats) if is_kto else preference.LOSSES[config.loss](s, options)
    share = values.sum() / totals.pairs
    weight = config.sft_weight + preference.NLL_WEIGHT.get(config.loss, 0.0)
    if weight:
        share = share - weight * s.chosen.sum() / totals.chosen_tokens
    return share, values


def first_loss_tolerance(value: float, dtype: torch.dtype) -> float:
    """How far the first loss of a stage may be from its known value (relative above one)."""
    return (1e-4 if dtype == torch.float32 else 2e-2) * max(1.0, value)


# --- data ---------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Usable pairs by id, their tokens, and what was left out."""

    pairs: dict[str, PreferencePair]
    tokens: dict[str, PairTokens]
    dropped: dict[str, int]
    source: Path | str


def data_source(train: str) -> Path | str:
    """Where `data.train` leads: the bundled pairs for `demo`."""
    return bundled("pairs") if train == "demo" else train


def read_pairs(config: StagedCompetenceConfig) -> tuple[list[PreferencePair], dict[str, int]]:
    """Read and check the rows, before any model is loaded."""
    parsed = read_records(
        data_source(config.data.train),
        pair_from_row,
        limit=config.limit,
        invalid=config.data.invalid,
        what="pair",
    )
    return parsed.records, dict(parsed.dropped)


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
                where = f"{data_source(config.data.train)}: pair {number} (id {pair.id})"
                raise ValueError(f"{where}: {error}; fix the pair or set data.invalid=drop") from None
            say(f"[yellow]dropped pair {escape(pair.id)}: {escape(str(error))}[/]")
            dropped["unusable as tokens"] = dropped.get("unusable as tokens", 0) + 1
            continue
        pairs[pair.id], tokens[pair.id] = pair, PairTokens(*sides)
    if not pairs:
        raise ValueError(f"{config.data.train}: no usable pair is left")
    return Pairs(pairs, tokens, dropped, data_source(config.data.train))


class Plan(NamedTuple):
    """Who is held out, who is in which stage (easy to hard), and which ids each optimiser step draws."""

    held: list[str]
    scores: dict[str, float]
    stages: list[list[str]]
    rows: list[list[list[str]]]
    epochs: list[int]


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


# --- training -----------------------------------------------------------------------------------------


def train(config: StagedCompetenceConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Train and return the run; `policy` is the start model where the caller has it loaded already.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: the loss or the gradient went wrong.
    """
    if is_first_process():
        Run.require_free(config.out, resume)
    records, dropped = read_pairs(config)
    policy = policy or Policy.load(config.model, dtype=config.dtype)
    data = tokenize_pairs(config, policy, records, dropped)
    config = resolved(config, policy)
    processes = Processes(policy.device, config.report_to)
    if processes.shards and config.handover != "stack":
        raise ValueError(f"handover={config.handover} changes weights that FSDP2 shards; use handover=stack, or DDP")
    run = Run.create(config.out, METHOD, config, resume=resume, is_main=processes.is_main)
    processes.wait()
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    watch = Stopwatch()
    with watch.timed("scoring"):
        plan, logp0 = prepare(config, policy, data, run, processes)
    if processes.is_main:
        describe(config, plan, data)
    _loop(config, policy, data, plan, logp0, run, processes, watch)
    with watch.timed("export"):
        if config.handover == "merge":
            policy.merge()  # the adapter alone would lack the stages before it
        if processes.is_main:
            write_exposure(run, config, plan)
            policy.export(run.root / "final", {"method": METHOD, "run": str(run.root)})
    if processes.is_main:
        run.write_provenance(**provenance(config, policy, data, watch), processes=processes.world)
        run.finish()
    processes.wait()
    return run


def dry_run(config: StagedCompetenceConfig) -> dict[str, Any]:
    """Check data, model and tokens, say what a run would do, and write nothing."""
    Run.require_free(config.out, resume=False)
    records, dropped = read_pairs(config)
    policy = Policy.load(config.model, dtype=config.dtype)
    data = tokenize_pairs(config, policy, records, dropped)
    config = resolved(config, policy)
    # Difficulty needs the model's answers or likelihoods; sizes and steps do not.
    held = cur.hold_out_prompts({i: p.text for i, p in data.pairs.items()}, config.split.share, config.split.seed)
    fake = {i: float(n) for n, i in enumerate(sorted(set(data.tokens) - held))}
    plan = make_plan(config, fake, sorted(held), {i: p.label for i, p in data.pairs.items()})
    describe(config, plan, data)
    steps = sum(map(len, plan.rows))
    mean = float(np.mean([len(t.chosen.ids) + len(t.rejected.ids) for t in data.tokens.values()]))
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    facts = {
        "pairs": len(data.pairs), "held_out": len(held), "stages": [len(ids) for ids in plan.stages], "steps": steps,
        "training_tokens": round(mean * sum(len(row) for rows in plan.rows for row in rows)),
        "weights_gb": round(weights / 1e9, 3), "dtype": config.dtype, "scorer": config.difficulty.scorer,
        "dropped": data.dropped,
    }  # fmt: skip
    say(f"about {facts['training_tokens']:,} training tokens; weights {facts['weights_gb']} GB; nothing was written")
    return facts


def resolved(config: StagedCompetenceConfig, policy: Policy) -> StagedCompetenceConfig:
    """Replace every `auto` by what it came to, so that `config.yaml` says what was done."""
    scorer = resolve_scorer(config.difficulty.scorer)
    return config.model_copy(
        update={
            "dtype": str(policy.dtype).removeprefix("torch."),
            "difficulty": config.difficulty.model_copy(update={"scorer": scorer}),
        }
    )


def prepare(
    config: StagedCompetenceConfig, policy: Policy, data: Pairs, run: Run, processes: Processes
) -> tuple[Plan, dict[str, Logprobs]]:
    """Split, score, plan, and write what was decided; returns the plan and the start model's log-probabilities."""
    pairs, by_prompt = data.pairs, config.split.by == "prompt"
    held: set[str] = set()
    if by_prompt:
        held = cur.hold_out_prompts({i: p.text for i, p in pairs.items()}, config.split.share, config.split.seed)
    to_score = [pairs[i] for i in sorted(pairs) if i not in held]
    if not to_score:
        raise ValueError(f"split.share={config.split.share} leaves no pair to train on")
    measured = sorted(held)[: config.split.limit]
    wanted = set(measured)
    if config.difficulty.scorer == "logprob_margin" or config.reference == "initial" or not by_prompt:
        wanted |= {p.id for p in to_score}
    what = "scoring: start model's log-probabilities"
    tokens = {i: data.tokens[i] for i in wanted}
    logp0 = pair_logprobs(policy, tokens, what, batch_tokens=config.batch_tokens, cached=True) if tokens else {}
    scored = score_pairs(policy, to_score, config.difficulty, logp0)
    if not by_prompt:
        held = cur.hold_out_by_score(scored.scores, config.split.share, config.split.seed)
        measured = sorted(held)[: config.split.limit]
    scores = {i: s for i, s in scored.scores.items() if i not in held}
    plan = make_plan(config, scores, measured, {i: p.label for i, p in pairs.items()})
    if processes.is_main:
        gap = {i: data.tokens[i].rejected.completion_tokens - data.tokens[i].chosen.completion_tokens for i in scores}
        facts = {**summary(scores, gap), "scorer": config.difficulty.scorer, "cut_share": scored.cut_share}
        run.write_json("data/difficulty.json", facts)
        for warning in facts["warnings"]:
            say(f"[yellow]warning: {warning}[/]")
        run.write_rows("data/scored.jsonl", _scored_rows(config, data, held, scored, logp0))
        run.write_rows("data/generations.jsonl", scored.generations)
        run.write_rows("data/plan.jsonl", _plan_rows(config, plan))
        if plan.held:
            run.write_rows("data/heldout.jsonl", [_heldout_row(pairs[i]) for i in plan.held])
    return processes.same((plan, logp0))  # a device's rounding must not give two processes two plans


def _loop(
    config: StagedCompetenceConfig,
    policy: Policy,
    data: Pairs,
    plan: Plan,
    logp0: Mapping[str, Logprobs],
    run: Run,
    processes: Processes,
    watch: Stopwatch,
) -> None:
    """Train stage after stage; with a checkpoint in the run, go on from it bit for bit."""
    checkpoint = last_checkpoint(run)
    fresh: dict[str, Any] = {"stage": 0, "stage_step": 0, "step": 0, "held_ref": None}
    at = checkpoint.state if checkpoint else fresh
    if processes.is_main:
        run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= at["step"])
    step, tokens_done, start = at["step"], at.get("tokens", 0), time.monotonic()
    held_now: Mapping[str, Logprobs] = (
        {i: Logprobs(*v) for i, v in at["held_ref"].items()} if at["held_ref"] else logp0
    )
    last = len(plan.stages) - 1
    partners, partners0 = kto_partners(config, policy, data, plan)
    # The stage that the checkpoint was taken in. Its adapter, and earlier ones, exist before their tensors are
    # put back; what was decided at its end is done again.
    here = at["stage"] if at["stage_step"] else at["stage"] - 1
    for k in range(here + 1):
        begin_stage(config, policy, k, restoring=True)
    if checkpoint is not None:
        policy.load_state(checkpoint.weights)
    with progress("training", sum(map(len, plan.rows))) as advance:
        advance(sum(len(r) for r in plan.rows[: at["stage"]]) + at["stage_step"])
        for k in range(at["stage"], len(plan.stages)):
            if k != here:
                begin_stage(config, policy, k)
            rows = plan.rows[k]
            drawn = {i: data.tokens[i] for row in rows for i in row}
            reference = stage_reference(config, policy, drawn, k, logp0, run, processes, watch)
            partner_reference = stage_reference(
                config, policy, partners[k], k, partners0[k], run, processes, watch, kind="kto"
            )
            held_ref = held_now if config.reference == "previous" else logp0
            optimisation = Optimisation(
                policy, processes, lr=config.lr, steps=len(rows), warmup=config.warmup_steps,
                weight_decay=config.weight_decay, clip=config.clip,
            )  # fmt: skip
            first = at["stage_step"] if k == here else 0
            if first:
                assert checkpoint is not None
                optimisation.load_state(checkpoint.optimizer)
            pools = cur.pools(len(plan.stages[k]), config.batch_pairs, len(rows), config.curriculum)
            best, stale = (at["best"], at["stale"]) if first else (-float("inf"), 0)
            for t in range(first, len(rows)):
                began = time.monotonic()
                draws = rows[t]
                totals = StepTotals(len(draws), sum(data.tokens[i].chosen.completion_tokens for i in draws))
                kl_nats = 0.0
                if config.loss == "kto":
                    kl_nats = kto_step_kl(config, policy, optimisation, draws, partners[k], partner_reference)
                micros = micro_batches(config, policy, processes, [data.tokens[i] for i in draws])
                sums = np.zeros(6)
                for m, micro in enumerate(micros):
                    with optimisation.accumulate(is_last=m == len(micros) - 1):
                        ids = [draws[j] for j in micro.rows]
                        s = micro_scores(optimisation.scorer, ids, data.tokens, reference, policy)
                        share, values = step_share(s, config, totals, kl_nats)
                        optimisation.backward(micro.weight * share)
                    sums += micro.weight * _sums(s, values, share, config.beta)
                sums = np.array(processes.sum(sums.tolist()))
                if t == 0:
                    check_first_loss(config, k, float(sums[1]) / len(draws), policy.dtype)
                result = optimisation.step(t)
                step += 1
                spent = sum(len(data.tokens[i].chosen.ids) + len(data.tokens[i].rejected.ids) for i in draws)
                tokens_done += spent
                watch.add("training", time.monotonic() - began, spent)
                means = sums / len(draws)
                row = {
                    "step": step, "stage": k, "stage_step": t, "loss": float(sums[0]), "pair_loss": float(means[1]),
                    "lr": result.lr, "grad_norm": result.grad_norm, "tokens": tokens_done,
                    "seconds": round(time.monotonic() - start, 3),
                    "competence": cur.competence(t, len(rows), config.curriculum), "pool": pools[t],
                    "distinct_in_batch": len(set(draws)), "reward_chosen": float(means[2]),
                    "reward_rejected": float(means[3]), "margin": float(means[2] - means[3]),
                    "accuracy": float(means[4]), **({"kl_nats": kl_nats} if config.loss == "kto" else {}),
                }  # fmt: skip
                if processes.is_main:
                    run.append_row("metrics.jsonl", row)
                processes.log(row, step)
                advance(1, note=f"stage {k + 1}/{last + 1} loss {row['loss']:.3f} margin {row['margin']:.2f}")
                is_last_step = t == len(rows) - 1
                if plan.held and ((t + 1) % config.eval_every == 0 or is_last_step):
                    with watch.timed("held-out"):
                        held_now, report = processes.same(measure(config, policy, data, plan, held_ref, logp0))
                    if processes.is_main:
                        run.append_row("metrics.jsonl", {"step": step, "event": "heldout", "stage": k, **report})
                    best, stale = (report["margin_stage"], 0) if report["margin_stage"] > best else (best, stale + 1)
                    is_last_step |= config.early_stop is not None and stale >= config.early_stop
                if is_last_step or (t + 1) % config.checkpoint_every == 0:
                    state = {
                        "step": step, "tokens": tokens_done, "stage": k + is_last_step,
                        "stage_step": 0 if is_last_step else t + 1,
                        "held_ref": held_now if is_last_step else held_ref, "best": best, "stale": stale,
                    }  # fmt: skip
                    save_checkpoint(run, policy, optimisation, state, whole=config.handover != "stack")
                if is_last_step:
                    break


def begin_stage(config: StagedCompetenceConfig, policy: Policy, k: int, *, restoring: bool = False) -> None:
    """Hand over: make the policy the start of stage k, equal to its reference, with one part that trains."""
    name = f"stage_{k}"
    if config.handover == "full":
        if policy.adapters:
            policy.merge()  # the start model's own
        policy.train_only("full")
    elif config.handover == "stack":
        policy.add_adapter(name, config.lora, config.seed)
        policy.train_only(name)
    else:
        if policy.adapters and restoring:
            policy.drop_adapters()  # the folded weights come from the checkpoint
        if policy.adapters:
            policy.merge()
        policy.add_adapter(name, config.lora, config.seed)
        policy.train_only(name)
    if config.gradient_checkpointing:
        with quiet_libraries():  # renamed within transformers 5
            policy.base.gradient_checkpointing_enable({"use_reentrant": False})
        # Checkpointing is off in eval mode, and dropout, which some models have, must stay off.
        for module in policy.base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def stage_reference(
    config: StagedCompetenceConfig,
    policy: Policy,
    tokens: Mapping[str, PairTokens],
    k: int,
    start: Mapping[str, Logprobs],
    run: Run,
    processes: Processes,
    watch: Stopwatch,
    *,
    kind: str = "logprobs",
) -> Mapping[str, Logprobs]:
    """Reference log-probabilities of every pair that the stage draws: one pass, kept in the run.

    `start` holds those of the start model, which serve the first stage; `kind` names the file.
    """
    wanted = set(tokens)
    if config.reference == "initial" or (k == 0 and wanted <= set(start)) or config.loss in preference.REFERENCE_FREE:
        return start
    name = f"data/reference_{kind}.jsonl"
    mark = (
        f"full:{k}"
        if config.handover == "full"
        else f"{policy.base_fingerprint()[:16]}:{policy.adapter_hash(policy.adapters[:-1])}"
    )
    known = run.read_rows(name) if run.has(name) else []
    found = {r["id"]: Logprobs(*r["logprobs"]) for r in known if r["stage"] == k and r["reference_hash"] == mark}
    found = processes.same(found)
    if wanted <= set(found):
        return found
    with watch.timed("reference", sum(len(side.ids) for pair in tokens.values() for side in pair)):
        if config.handover == "full":
            found = pair_logprobs(
                policy, tokens, f"reference of stage {k + 1}", batch_tokens=config.batch_tokens, cached=False
            )
        else:
            with policy.reference():
                found = pair_logprobs(
                    policy,
                    tokens,
                    f"reference of stage {k + 1}",
                    batch_tokens=config.batch_tokens,
                    cached=False,
                )
    if processes.is_main:
        kept = [r for r in known if r["stage"] != k]
        run.write_rows(
            name,
            [
                *kept,
                *({"id": i, "stage": k, "reference_hash": mark, "logprobs": found[i]} for i in sorted(found)),
            ],
        )
    return processes.same(found)


def kto_partners(
    config: StagedCompetenceConfig, policy: Policy, data: Pairs, plan: Plan
) -> tuple[list[dict[str, PairTokens]], list[dict[str, Logprobs]]]:
    """For `kto`: each stage's mismatched rows, and their log-probabilities where the start model is the reference."""
    stages: list[dict[str, PairTokens]] = [{} for _ in plan.stages]
    start: list[dict[str, Logprobs]] = [{} for _ in plan.stages]
    if config.loss != "kto":
        return stages, start
    for k, rows in enumerate(plan.rows):
        drawn = [data.pairs[i] for i in sorted({i for row in rows for i in row})]
        stages[k] = kto.mismatched(drawn, config.seed, k, side_encoder(config, policy))
        if k == 0 or config.reference == "initial":
            what = f"mismatched answers of stage {k + 1}"
            start[k] = pair_logprobs(policy, stages[k], what, batch_tokens=config.batch_tokens, cached=True)
    return stages, start


def kto_step_kl(
    config: StagedCompetenceConfig,
    policy: Policy,
    optimisation: Optimisation,
    draws: Sequence[str],
    partners: Mapping[str, PairTokens],
    reference: Mapping[str, Logprobs],
) -> float:
    """KTO's z for this step, in nats: over both mismatched rows of every pair and over all processes."""
    total = 0.0
    for micro in micro_batches(config, policy, optimisation.processes, [partners[i] for i in draws]):
        with torch.no_grad():
            ids = [draws[j] for j in micro.rows]
            s = micro_scores(optimisation.scorer, ids, partners, reference, policy)
        total += micro.weight * float((s.delta_chosen + s.delta_rejected).sum())
    return preference.kto_kl(optimisation.processes.sum([total])[0], 2 * len(draws))


def micro_batches(
    config: StagedCompetenceConfig, policy: Policy, processes: Processes, pairs: Sequence[PairTokens]
) -> list[Micro]:
    """Cut an optimiser step into what this process computes at a time, by tokens."""
    lengths = [_row_tokens(policy, pair) for pair in pairs]
    return step_batches(lengths, config.batch_tokens, processes.rank, processes.world)


def micro_scores(
    scorer: Any,
    ids: Sequence[str],
    tokens: Mapping[str, PairTokens],
    reference: Mapping[str, Logprobs],
    policy: Policy,
) -> PairScores:
    """Score both sides of some pairs in one forward pass; a pair shares its prompt's tokens where it can."""
    groups = [group for i in ids for group in policy.groups(tokens[i])]
    scores = scorer(collate(groups, policy.tokenizer.pad_token_id, policy.device))
    chosen, rejected = scores.logprob.unflatten(0, (-1, 2)).unbind(1)  # completions stand chosen, rejected, ...
    chosen_tokens, rejected_tokens = scores.tokens.unflatten(0, (-1, 2)).unbind(1)
    zero = Logprobs(0.0, 0.0, 1, 1)  # losses without reference do not read it
    ref = torch.tensor([reference.get(i, zero)[:2] for i in ids], device=policy.device)
    return PairScores(chosen, rejected, ref[:, 0], ref[:, 1], chosen_tokens, rejected_tokens)


def check_first_loss(config: StagedCompetenceConfig, k: int, value: float, dtype: torch.dtype) -> None:
    """Stop a run whose reference is not the policy that the stage began with.

    Raises:
        RuntimeError: the first pair loss of a stage is not its known value.
    """
    if config.reference == "initial" and k > 0:
        return
    want = preference.start_value(config.loss, config.beta)
    if want is not None and not abs(value - want) <= first_loss_tolerance(want, dtype):  # NaN fails too
        raise RuntimeError(
            f"first loss of stage {k} is {value:.6f}, expected {want:.6f}: the reference is not the policy's start"
        )


def measure(
    config: StagedCompetenceConfig,
    policy: Policy,
    data: Pairs,
    plan: Plan,
    held_ref: Mapping[str, Logprobs],
    logp0: Mapping[str, Logprobs],
) -> tuple[dict[str, Logprobs], dict[str, float]]:
    """Margins on held-out pairs: raw (policy only), against the stage's reference, and against the start model."""
    tokens = {i: data.tokens[i] for i in plan.held}
    now = pair_logprobs(policy, tokens, "held-out pairs", batch_tokens=config.batch_tokens, cached=False, quiet=True)

    def margin(ref: Mapping[str, Logprobs]) -> float:
        return float(
            np.mean(
                [config.beta * ((now[i].chosen - ref[i].chosen) - (now[i].rejected - ref[i].rejected)) for i in now]
            )
        )

    return now, {
        "margin_raw": float(np.mean([v.chosen - v.rejected for v in now.values()])),
        "margin_stage": margin(held_ref),
        "margin_initial": margin(logp0),
        "accuracy": float(np.mean([v.chosen > v.rejected for v in now.values()])),
        "logp_chosen": float(np.mean([v.chosen for v in now.values()])),
        "logp_rejected": float(np.mean([v.rejected for v in now.values()])),
    }


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


def provenance(config: StagedCompetenceConfig, policy: Policy, data: Pairs, watch: Stopwatch) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    source = Path(str(data.source))
    return {
        "method": METHOD,
        "model": policy.source.to_row(),
        "base_fingerprint": policy.base_fingerprint(),
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "inputs": {str(data.source): file_hash(source)} if source.is_file() else {},
        "dropped": data.dropped,
        "judges": [],
        "data_licences": ["Apache-2.0"] if config.data.train == "demo" else [],
        "unsafe": False,
        "cost": watch.phases,
    }


def _row_tokens(policy: Policy, tokens: PairTokens) -> int:
    """What a pair takes of a micro-batch, pads aside."""
    groups = policy.groups(tokens)
    return len(groups) * max(map(group_length, groups))


def _sums(s: PairScores, values: Tensor, share: Tensor, beta: float) -> np.ndarray:
    """Sums over a micro-batch: loss share, pair loss, rewards of both sides, correct pairs, pairs."""
    chosen, rejected = beta * s.delta_chosen.detach(), beta * s.delta_rejected.detach()
    parts = [share.detach(), values.detach().sum(), chosen.sum(), rejected.sum(), (chosen > rejected).sum()]
    return np.array([*(float(p) for p in parts), float(len(values))])


def _scored_rows(
    config: StagedCompetenceConfig, data: Pairs, held: set[str], scored: Any, logp0: Mapping[str, Logprobs]
) -> list[dict[str, Any]]:
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


def _plan_rows(config: StagedCompetenceConfig, plan: Plan) -> list[dict[str, Any]]:
    c = config.curriculum
    return [
        {
            "stage": k, "ids": ids, "n": len(ids), "T": len(plan.rows[k]), "B": config.batch_pairs,
            "E": plan.epochs[k], "pacing": c.pacing, "c0": c.c0, "sampling": c.sampling, "seed": config.seed,
            "schedule_sha256": cur.schedule_hash(plan.rows[k]),
        }
        for k, ids in enumerate(plan.stages)
    ]  # fmt: skip


def _heldout_row(pair: PreferencePair) -> dict[str, Any]:
    return {"id": pair.id, "prompt": list(pair.messages), "chosen": pair.chosen, "rejected": pair.rejected}
