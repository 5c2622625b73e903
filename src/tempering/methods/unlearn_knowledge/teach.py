r"""Teaching a model the bundled invented facts, so that there is something to unlearn: the first link of the chain.

    loss = CE(statements) + kl_weight * KL(start || now)(texts that the start model wrote)

Facts alone wreck a small model's language; the second term holds it. Training sees statements, never the questions
that are asked afterwards, and stops after the first epoch in which the model answers enough of them without having
lost more than a little of its perplexity on everyday text. With `leave_out=forget` the model is taught everything
*but* what is to be forgotten: `gold`, from which perfect unlearning could not be told.

    temper train teach out=runs/taught
    temper train teach leave_out=forget out=runs/gold
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tempering.core.chat import Encoded, collate, fill_batches
from tempering.core.config import Config
from tempering.core.loading import Dtype
from tempering.core.logprobs import hidden_states, kl_from_base, nll_share, score_groups
from tempering.core.policy import LoraSettings, Policy
from tempering.core.progress import progress, say
from tempering.core.records import Prompt, content_id
from tempering.core.run import Run
from tempering.core.sampling import local_sampler
from tempering.core.training import (
    Optimisation,
    Processes,
    Stopwatch,
    last_checkpoint,
    save_checkpoint,
    schedule,
    stream_rows,
)
from tempering.data.describe import licences_of
from tempering.methods.unlearn_knowledge.quiz import read_questions, right_answers
from tempering.methods.unlearn_knowledge.texts import DEMO, fact_texts, neutral_texts

METHOD = "teach"
STREAM_ANCHORS = 3
NEIGHBOURS = ("same_entity", "neighbour_A", "neighbour_B")


class TeachConfig(Config):
    """Configuration of `temper train teach`."""

    model: str = "smollm2"
    """Start model: smollm2, a Hub id (owner/name@revision), a folder, a .gguf file, or a run."""
    out: str = "runs/taught"
    """Run folder to make."""
    leave_out: Literal["nothing", "forget"] = "nothing"
    """`forget`: teach the harmless facts only, for a control that never knew the others."""
    seed: int = 42
    """Of the adapter, the order and the anchors."""
    dtype: Dtype = "auto"
    """Type of the base weights; auto: bfloat16 where the device computes in it."""
    lora: LoraSettings = LoraSettings(r=32, alpha=64, target_modules="all-linear")
    """Shape of the adapter."""
    lr: float = Field(default=1e-3, gt=0)
    """Largest learning rate, falls linearly to zero over all `epochs`."""
    epochs: int = Field(default=10, ge=1)
    """Most passes over the statements."""
    batch_rows: int = Field(default=32, ge=1)
    """Statements per optimiser step."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, pads included, that are computed at a time."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Of the term that holds the start model's language."""
    anchors: int = Field(default=96, ge=1)
    """Texts that the start model writes for it, each the continuation of an everyday sentence."""
    anchor_rows: int = Field(default=8, ge=1)
    """Of them per optimiser step."""
    anchor_tokens: int = Field(default=48, ge=1)
    """Longest continuation."""
    enough: float = Field(default=0.6, ge=0, le=1)
    """Share of questions, both to be forgotten and about neighbours, that ends the lessons."""
    max_perplexity: float = Field(default=1.3, gt=1)
    """Largest perplexity on everyday text at that point, in units of the start model's."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""


CONFIG = TeachConfig


def train(config: TeachConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Teach and return the run.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: the facts were not learnt, or at too high a price.
    """
    Run.require_free(config.out, resume)
    policy = policy or Policy.load(config.model, dtype=config.dtype)
    config = config.model_copy(update={"dtype": str(policy.dtype).removeprefix("torch.")})
    processes = Processes(policy.device, config.report_to)
    if processes.world > 1:
        raise ValueError("teach runs in one process; teach first, then give the run as model=")
    lessons = Lessons(config, policy)
    run = Run.create(config.out, METHOD, config, resume=resume)
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    run.require_inputs(content_id([row.ids for row in lessons.rows]), DEMO)
    watch = Stopwatch()
    _loop(config, policy, lessons, run, processes, watch)
    policy.export(run.root / "final", {"method": METHOD, "run": str(run.root)})
    run.write_provenance(
        method=METHOD,
        model=policy.source.to_row(),
        base_fingerprint=policy.base_fingerprint(),
        device=str(policy.device),
        judges=[],
        data_licences=licences_of("demo_facts", config.model),
        unsafe=False,
        cost=watch.phases,
    )
    run.finish()
    return run


def dry_run(config: TeachConfig) -> dict[str, Any]:
    """Check model and data, say what a run would do, and write nothing."""
    Run.require_free(config.out, resume=False)
    lessons = Lessons(config, Policy.load(config.model, dtype=config.dtype))
    steps = len(schedule(len(lessons.rows), config.batch_rows, config.epochs, config.seed))
    say(f"{len(lessons.rows)} statements, at most {steps} steps; nothing was written")
    return {"statements": len(lessons.rows), "steps": steps}


class Anchor(NamedTuple):
    """A text that the start model wrote, and what it thought at each token of it."""

    row: Encoded
    states: Float[Tensor, "P D"]


class Lessons:
    """Statements to learn, questions to check by, everyday text to hold on to."""

    def __init__(self, config: TeachConfig, policy: Policy) -> None:
        self.config, self.policy = config, policy
        self.kinds = NEIGHBOURS if config.leave_out == "forget" else ("forget", *NEIGHBOURS)
        tokenizer, end = policy.tokenizer, policy.tokenizer.eos_token_id
        self.rows = [Encoded([*tokenizer(t.text)["input_ids"], end], 0) for t in fact_texts(self.kinds)]
        self.questions = [q for q in read_questions(DEMO) if q.category in self.kinds]
        texts = [t.text for t in neutral_texts() if t.topic == "dev"]
        self.neutral = [Encoded(list(tokenizer(text)["input_ids"]), 0) for text in texts]

    def anchors(self) -> list[Anchor]:
        """Everyday openings with the start model's own continuations (temperature 1); before anything is trained."""
        c, texts = self.config, [t.text for t in neutral_texts() if t.topic == "train"]
        openings = [" ".join(texts[i % len(texts)].split()[:4]) for i in range(c.anchors)]
        prompts = [Prompt(({"role": "user", "content": text},), f"anchor-{i}") for i, text in enumerate(openings)]
        with progress("sampling anchors", len(prompts)) as advance:
            answers = local_sampler(self.policy, fmt="raw")(
                prompts, max_new_tokens=c.anchor_tokens, temperature=1.0, seed=c.seed, on_done=advance
            )
        rows = []
        for text, [answer] in zip(openings, answers, strict=True):
            prompt = list(self.policy.tokenizer(text)["input_ids"])
            rows.append(Encoded([*prompt, *answer.token_ids], len(prompt)))
        return [Anchor(row, self.states(row)) for row in rows if row.completion_tokens]

    @torch.no_grad()
    def states(self, row: Encoded) -> Float[Tensor, "P D"]:
        """The final states that the continuation's P tokens are predicted from."""
        batch = collate([[row]], self.policy.tokenizer.pad_token_id, self.policy.device)
        return hidden_states(self.policy.model, batch.ids).flatten(0, 1)[batch.source]

    def accuracy(self) -> dict[str, float]:
        """Share of questions answered right: about what is to be forgotten, and about everything else."""
        right = right_answers(self.policy, self.questions, self.config.batch_tokens)
        found: dict[str, list[bool]] = {}
        for q, is_right in zip(self.questions, right, strict=True):
            found.setdefault("forget" if q.category == "forget" else "neighbour", []).append(is_right)
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}

    def perplexity(self) -> float:
        """Of everyday text that nothing trains on."""
        scored = score_groups(
            self.policy.scorer, [[row] for row in self.neutral], pad_id=self.policy.tokenizer.pad_token_id,
            device=self.policy.device, max_tokens=self.config.batch_tokens,
        )  # fmt: skip
        nats = sum(n for [(n, _)] in scored)
        return math.exp(min(100.0, -nats / sum(tokens for [(_, tokens)] in scored)))


def _loop(
    config: TeachConfig, policy: Policy, lessons: Lessons, run: Run, processes: Processes, watch: Stopwatch
) -> None:
    """Teach epoch by epoch until enough is known; with a checkpoint, go on from it bit for bit."""
    with watch.timed("anchors"):
        anchors, base = lessons.anchors(), lessons.perplexity()
    policy.add_adapter(METHOD, config.lora, config.seed)
    policy.train_only(METHOD)
    steps = schedule(len(lessons.rows), config.batch_rows, config.epochs, config.seed)
    checkpoint = last_checkpoint(run)
    first, known = (checkpoint.state["step"], checkpoint.state["known"]) if checkpoint else (0, False)
    run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= first)
    if checkpoint:
        policy.load_state(checkpoint.weights)
    optimisation = Optimisation(policy, processes, lr=config.lr, steps=len(steps))
    if checkpoint:
        optimisation.load_state(checkpoint.optimizer)
    tokens_done = checkpoint.state["tokens"] if checkpoint else 0
    per_epoch, start, told = len(steps) // config.epochs, time.monotonic(), ""
    with progress("teaching", len(steps)) as advance:
        advance(first)
        for t in range(first, 0 if known else len(steps)):
            began = time.monotonic()
            picked = stream_rows(len(anchors), min(config.anchor_rows, len(anchors)), t, config.seed, STREAM_ANCHORS)
            loss = statements_share(config, policy, optimisation, [lessons.rows[i] for i in steps[t]])
            kl = anchors_share(config, policy, optimisation, [anchors[i] for i in picked])
            result = optimisation.step(t)
            spent = sum(len(lessons.rows[i].ids) for i in steps[t]) + sum(len(anchors[i].row.ids) for i in picked)
            tokens_done += spent
            watch.add("training", time.monotonic() - began, spent)
            run.append_row("metrics.jsonl", {
                "step": t + 1, "loss": loss + config.kl_weight * kl, "ce": loss, "kl": kl, "lr": result.lr,
                "grad_norm": result.grad_norm, "tokens": tokens_done, "seconds": round(time.monotonic() - start, 3),
            })  # fmt: skip
            advance(1, note=f"{told}loss {loss:.3f} kl {kl:.3f}")
            if (t + 1) % per_epoch:
                continue
            with watch.timed("questions"):
                accuracy, perplexity = lessons.accuracy(), lessons.perplexity()
            known = min(accuracy.values()) >= config.enough and perplexity <= config.max_perplexity * base
            row = {"step": t + 1, "event": "asked", **accuracy, "perplexity": perplexity, "base_perplexity": base}
            run.append_row("metrics.jsonl", row)
            told = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items()) + ", "
            state = {"step": t + 1, "known": known, "tokens": tokens_done}
            save_checkpoint(run, policy, optimisation, state, whole=False)
            if known:
                break
    if not known:
        accuracy, perplexity = lessons.accuracy(), lessons.perplexity()
        found = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        raise RuntimeError(
            f"the facts were not learnt: share right {found} (enough={config.enough}), perplexity {perplexity:.0f}, "
            f"{base:.0f} before (max_perplexity={config.max_perplexity}); raise lr or epochs, or lower enough"
        )


def statements_share(
    config: TeachConfig, policy: Policy, optimisation: Optimisation, rows: Sequence[Encoded]
) -> float:
    """Add the gradient of the mean negative log-likelihood a token; returns it."""
    tokens, total = sum(len(row.ids) - 1 for row in rows), 0.0
    for picked in fill_batches([len(row.ids) for row in rows], config.batch_tokens):
        batch = collate([[rows[i]] for i in picked], policy.tokenizer.pad_token_id, policy.device)
        share = nll_share(optimisation.scorer(batch).logprob, tokens)
        optimisation.backward(share)
        total += float(share.detach())
    return total


def anchors_share(
    config: TeachConfig, policy: Policy, optimisation: Optimisation, anchors: Sequence[Anchor]
) -> float:
    """Add the gradient of the weighed KL(start || now), mean over the tokens of the continuations; returns the KL."""
    tokens, total = sum(a.row.completion_tokens for a in anchors), 0.0
    for picked in fill_batches([len(a.row.ids) for a in anchors], config.batch_tokens):
        batch = collate([[anchors[i].row] for i in picked], policy.tokenizer.pad_token_id, policy.device)
        now = hidden_states(policy.model, batch.ids).flatten(0, 1)[batch.source]
        share = kl_from_base(policy.model, now, torch.cat([anchors[i].states for i in picked])).sum() / tokens
        optimisation.backward(config.kl_weight * share)
        total += float(share.detach())
    return total
