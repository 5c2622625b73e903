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

Configuration: `settings`. Pure parts: `curriculum` (stages, pools, draws), `difficulty` (scores), `kto`, and
`core/preference.py` (losses). `plan` is what is decided before the first step, `reference` what a stage is
measured against. The loop is below.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tempering.core import preference
from tempering.core.chat import collate, group_length
from tempering.core.loading import quiet_libraries
from tempering.core.policy import Policy
from tempering.core.preference import LossOptions, PairScores
from tempering.core.progress import progress, say
from tempering.core.run import Run
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
from tempering.data.describe import inputs_of, licences_of
from tempering.data.split import hold_out_prompts
from tempering.methods.staged_competence import curriculum as cur
from tempering.methods.staged_competence.difficulty import (
    Logprobs,
    PairTokens,
    pair_logprobs,
    resolve_scorer,
    score_pairs,
    summary,
)
from tempering.methods.staged_competence.plan import (
    Pairs,
    Plan,
    describe,
    digest,
    heldout_row,
    make_plan,
    plan_rows,
    read_pairs,
    scored_rows,
    tokenize_pairs,
    trial_plan,
    write_exposure,
)
from tempering.methods.staged_competence.reference import check_first_loss, kto_partners, measure, stage_reference
from tempering.methods.staged_competence.settings import StagedCompetenceConfig

METHOD = "staged_competence"
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
    trial_plan(config, policy, data)  # what cannot be planned fails before anything is written
    processes = Processes(policy.device, config.report_to)
    if processes.shards and config.handover != "stack":
        raise ValueError(f"handover={config.handover} changes weights that FSDP2 shards; use handover=stack, or DDP")
    run = Run.create(config.out, METHOD, config, resume=resume, is_main=processes.is_main)
    processes.wait()
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    if processes.is_main:
        run.require_inputs(digest(data), data.source)
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
    plan = trial_plan(config, policy, data)
    describe(config, plan, data)
    steps = sum(map(len, plan.rows))
    mean = float(np.mean([len(t.chosen.ids) + len(t.rejected.ids) for t in data.tokens.values()]))
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    facts = {
        "pairs": len(data.pairs), "held_out": len(plan.held), "steps": steps,
        "stages": [len(ids) for ids in plan.stages],
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
        held = hold_out_prompts({i: p.text for i, p in pairs.items()}, config.split.share, config.split.seed)
    to_score = [pairs[i] for i in sorted(pairs) if i not in held]
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
        run.write_rows("data/scored.jsonl", scored_rows(config, data, held, scored, logp0))
        run.write_rows("data/generations.jsonl", scored.generations)
        run.write_rows("data/plan.jsonl", plan_rows(config, plan))
        if plan.held:
            run.write_rows("data/heldout.jsonl", [heldout_row(pairs[i]) for i in plan.held])
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


def provenance(config: StagedCompetenceConfig, policy: Policy, data: Pairs, watch: Stopwatch) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    return {
        "method": METHOD,
        "model": policy.source.to_row(),
        "base_fingerprint": policy.base_fingerprint(),
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "inputs": inputs_of(config.data.train),
        "dropped": data.dropped,
        "judges": [],
        "data_licences": licences_of(config.data.train, config.model),
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
