"""The reinforcement of `deliberative`: samples in groups, rewards on the answer, one clipped update a batch.

    advantage = (r - mean) / (std + eps) within the samples of a request
    loss      = clipped surrogate over the step's sampled tokens + beta * KL to the adapter as SFT left it

The trainer takes the log-probabilities of the samples again, in float32, of logits / temperature. One update a batch:
the old log-probabilities are the present ones, without gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tempering.core.chat import Encoded, TokenBatch, collate
from tempering.core.policy import Policy, load_tensors
from tempering.core.policy_gradient import clipped_surrogate, group_advantages, kl_k3
from tempering.core.progress import progress
from tempering.core.records import Completion, content_id
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler, ThinkSampler
from tempering.core.think import think_prompt
from tempering.core.training import (
    Optimisation,
    Processes,
    Stopwatch,
    last_checkpoint,
    save_checkpoint,
    schedule,
    step_batches,
)
from tempering.data.policies import Registry, policy_text
from tempering.methods.deliberative.judging import Judges, Reward, rewards
from tempering.methods.deliberative.prompts import Item
from tempering.methods.deliberative.settings import DeliberativeConfig

ADAPTER = "deliberative"
ROLLOUTS, ANCHOR = "data/rollouts.jsonl", "checkpoints/sft.safetensors"


def reinforce(
    config: DeliberativeConfig,
    policy: Policy,
    items: Sequence[Item],
    registry: Registry,
    judges: Judges,
    run: Run,
    processes: Processes,
    watch: Stopwatch,
    first_step: int,
) -> None:
    """GRPO: the same adapter goes on, from the last checkpoint on. One update for each batch of samples."""
    grpo = config.grpo
    plan = reinforcement_plan(config, len(items))
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None  # SFT ends with one
    first, tokens_done = checkpoint.state["step"] - first_step, checkpoint.state["tokens"]
    run.truncate_rows(ROLLOUTS, lambda row: row["step"] <= first_step + first)
    optimisation = Optimisation(policy, processes, lr=grpo.lr, steps=len(plan), clip=config.clip)
    require_trainable(policy)
    if first:
        optimisation.load_state(checkpoint.optimizer)
    anchor = load_tensors(run.root / ANCHOR) if grpo.beta else {}
    sampler = ThinkSampler(LocalSampler(policy, batch_rows=config.sample_rows, thinks=True), 0)
    pad, start, has_updated = policy.tokenizer.pad_token_id, time.monotonic(), False
    with progress("reinforcing", len(plan)) as advance:
        advance(first)
        for t in range(first, len(plan)):
            step, batch_items = first_step + t + 1, [items[i] for i in plan[t]]
            began = time.monotonic()
            groups = roll_out(config, sampler, batch_items, t)
            watch.add("rollouts", time.monotonic() - began, sum(len(c.token_ids) for g in groups for c in g))
            specs = [policy_text(registry, item.categories, config.policy_mode) for item in batch_items]
            earned = rewards(batch_items, groups, specs, judges, grpo.reward)
            r = torch.tensor([[0.0 if e.value is None else e.value for e in group] for group in earned])
            valid = torch.tensor([[e.value is not None for e in group] for group in earned])
            advantage, keep = group_advantages(r, valid, baseline=grpo.baseline, scale=grpo.scale)

            began = time.monotonic()
            places = [(p, g) for p, g in (valid & keep[:, None]).nonzero().tolist()]
            samples = [sample_row(policy, batch_items[p], groups[p][g]) for p, g in places]
            lengths = [len(sample.ids) for sample in samples]
            step_tokens = sum(sample.completion_tokens for sample in samples)
            total = float(step_tokens if grpo.agg == "token" else max(1, len(samples)))
            loss = kl_sum = 0.0
            batches = []
            for micro in step_batches(lengths, config.batch_tokens) if samples else []:
                a = torch.stack([advantage[places[j]] for j in micro.rows]).to(policy.device)
                batches.append((collate([[samples[j]] for j in micro.rows], pad, policy.device), a))
            references = anchored(policy, anchor, [batch for batch, _ in batches], grpo.temperature)
            with checkpointing(config, policy):
                for (batch, a), reference in zip(batches, references, strict=True):
                    lp, mask = by_row(policy.scorer.by_token(batch, grpo.temperature), batch.lengths)  # (B, T)
                    share = clipped_surrogate(
                        lp, lp.detach(), a, mask, low=grpo.low, high=grpo.high, agg=grpo.agg, total=total
                    ).loss
                    if reference is not None:
                        kl = (kl_k3(lp, reference) * mask).sum() / step_tokens
                        kl_sum += float(kl.detach())
                        share = share + grpo.beta * kl
                    optimisation.backward(share)
                    loss += float(share.detach())
            before = None if has_updated or not samples else policy.adapter_hash([ADAPTER])
            result = optimisation.step(t) if samples else None
            has_updated = has_updated or bool(samples)
            if before and result and result.grad_norm and before == policy.adapter_hash([ADAPTER]):
                raise RuntimeError("the first step of reinforcement has not changed the adapter; raise grpo.lr")
            tokens_done += sum(lengths)
            watch.add("reinforcement", time.monotonic() - began, sum(lengths))

            for row in rollout_rows(step, batch_items, groups, earned, advantage):
                run.append_row(ROLLOUTS, row)
            count = int(valid.sum())
            row = {
                "step": step, "stage": "grpo", "loss": loss, "lr": result.lr if result else 0.0,
                "grad_norm": result.grad_norm if result else 0.0,
                "reward": float(r[valid].mean()) if count else None,
                "well_formed": sum(is_well_formed(c) for g in groups for c in g) / r.numel(),
                "invalid": r.numel() - count, "degenerate_groups": int((~keep).sum()), "kl_nats": kl_sum,
                "tokens": tokens_done, "seconds": round(time.monotonic() - start, 3),
            }  # fmt: skip
            run.append_row("metrics.jsonl", row)
            processes.log(row, step)
            advance(1, note=f"reward {row['reward'] if row['reward'] is not None else float('nan'):.2f}")
            if t + 1 == len(plan) or (t + 1) % config.checkpoint_every == 0:
                save_checkpoint(run, policy, optimisation, {"step": step, "tokens": tokens_done}, whole=False)


def reinforcement_plan(config: DeliberativeConfig, n: int) -> list[list[int]]:
    """Which requests each step samples: passes in orders of their own, until there are enough steps."""
    size = config.grpo.prompts
    one_pass = -(-n // size)
    steps = one_pass if config.grpo.steps is None else config.grpo.steps
    return schedule(n, size, -(-steps // one_pass), config.seed + 1)[:steps]


def roll_out(
    config: DeliberativeConfig, sampler: ThinkSampler, items: Sequence[Item], t: int
) -> list[list[Completion]]:
    """Sample a group for each request, reasoning and answer apart; keyed by (seed, step, request, sample)."""
    grpo = config.grpo
    seed = int(content_id(config.seed, "grpo", t)[:7], 16)
    prompts = [item.prompt for item in items]
    groups = sampler.inner(
        prompts, n=grpo.group, max_new_tokens=grpo.max_new_tokens, temperature=grpo.temperature, seed=seed
    )
    return [[sampler.split(p, c) for c in group] for p, group in zip(prompts, groups, strict=True)]


def is_well_formed(sample: Completion) -> bool:
    """Whether reasoning and answer are both there, between tags that are right."""
    return sample.thought is not None and sample.thought.status == "ok"


def sample_row(policy: Policy, item: Item, sample: Completion) -> Encoded:
    """Put a sample behind its prompt: the ids that were generated, never encoded again."""
    prompt = think_prompt(policy.tokenizer, item.prompt.messages)
    return Encoded([*prompt, *sample.token_ids], len(prompt))


def by_row(logprob: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Turn log-probabilities, completion after completion (P,), into rows (B, T) and the mask of what is scored."""
    rows = torch.nn.utils.rnn.pad_sequence(list(logprob.split(list(lengths))), batch_first=True)
    width = torch.arange(rows.shape[1], device=rows.device)
    return rows, width[None] < torch.tensor(lengths, device=rows.device)[:, None]


def rollout_rows(
    step: int,
    items: Sequence[Item],
    groups: Sequence[Sequence[Completion]],
    earned: Sequence[Sequence[Reward]],
    advantage: Tensor,
) -> Iterator[dict[str, Any]]:
    """Rows of `data/rollouts.jsonl`."""
    for p, (item, group) in enumerate(zip(items, groups, strict=True)):
        for g, sample in enumerate(group):
            thought, reward = sample.thought, earned[p][g]
            yield {
                "step": step, "prompt_id": item.prompt.id, "draw": g, "text": sample.text,
                "cot": thought.text if thought else "", "finish": sample.finish, "reward": reward.value,
                "parts": reward.parts, "advantage": float(advantage[p, g]), "valid": reward.value is not None,
            }  # fmt: skip


def anchored(
    policy: Policy, anchor: dict[str, Tensor], batches: Sequence[TokenBatch], temperature: float
) -> list[Tensor | None]:
    """Score batches (B, T) under other values of the adapter, taken back bit for bit; `None` each without any."""
    if not anchor:
        return [None] * len(batches)
    own = policy.adapter_state([ADAPTER])
    try:
        policy.load_state(anchor)
        with torch.no_grad():
            return [by_row(policy.scorer.by_token(b, temperature), b.lengths)[0] for b in batches]
    finally:
        policy.load_state(own)


@contextmanager
def checkpointing(config: DeliberativeConfig, policy: Policy) -> Iterator[None]:
    """Recompute activations while gradients are taken, where that is asked for; never while sampling."""
    if not config.gradient_checkpointing:
        yield
        return
    policy.base.gradient_checkpointing_enable({"use_reentrant": False})
    policy.base.train()  # dropout is zero everywhere; checkpointing is off in eval mode
    try:
        yield
    finally:
        policy.base.gradient_checkpointing_disable()
        policy.base.eval()


def require_trainable(policy: Policy) -> None:
    """Refuse to train what cannot change.

    Raises:
        RuntimeError: no parameter of the adapter has a gradient, as PEFT leaves an adapter that it has loaded.
    """
    names = [name for name, _ in policy.trainable_parameters()]
    if not names or not all(f".{ADAPTER}." in name for name in names):
        held = f"{len(names)} others are trainable" if names else "nothing is trainable"
        raise RuntimeError(
            f"the adapter {ADAPTER!r} is frozen ({held}); load it with policy.add_adapter and policy.load_state, "
            f"then call policy.train_only({ADAPTER!r})"
        )
