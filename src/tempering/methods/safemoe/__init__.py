r"""SafeMoE: experts trained on unsafe text, mixed token by token by a gate that is trained on few safe answers.

The claim (Hashemzadeh et al., arXiv:2606.00686): safe *and informative* answers are dear, unsafe ones abundant. So
train one LoRA expert per unsafe domain, freeze them all, and train only a linear router a layer, on at most 800
safe-informative answers to a few domains: the model becomes safe-informative on all. No public implementation exists.

    z = V x                                              float32                        Eq. 1
    R = the k largest z;  w = softmax over the selected z only                          Eq. 2-3
    h = W x + sum_{i in R} w_i * s * B_i A_i x           at each target linear          Eq. 4

Loss: cross-entropy of the safe answers' tokens, mean over the tokens of an optimiser step; V alone has a gradient.

Ours, not in the paper, and off by default: a null expert, a gain, KL to the base on benign rows (`replay`),
load-balance and z losses, layer subsets; the sealed bundle and its guards; the controls that are not the paper's.
Unknown in the paper, our choice: whether a router serves a block, a layer or the model (`granularity: block`), its
initialisation, warm-up, clipping, held-out choice of the best routers, decoding.
Not promised: interpretable routing (the paper's own figures show usage that hardly depends on the topic); that unsafe
knowledge is the cause (controls: `random_experts`, `matched_lora`, ...); utility, which drops in the paper.

    temper train sft out=runs/fraud.unsafe unsafe=true domain=fraud data.train=FILE      one expert
    temper train safemoe experts=[runs/fraud.unsafe,...] router_data=FILE                the gate
    temper train safemoe -c demo                             both, on rows that the base itself samples, offline
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.core.chat import Encoded, TokenBatch, collate, format_of
from tempering.core.loading import quiet_libraries
from tempering.core.logprobs import hidden_states, kl_from_base, nll_share
from tempering.core.policy import EXPERT_GATE, Policy, load_tensors, save_tensors
from tempering.core.progress import progress, say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.training import (
    Optimisation,
    Processes,
    Stopwatch,
    last_checkpoint,
    save_checkpoint,
    schedule,
    step_batches,
)
from tempering.data.describe import inputs_of, licences_of
from tempering.methods.safemoe.attaching import Routing, attach, initial_routers
from tempering.methods.safemoe.bundle import seal
from tempering.methods.safemoe.expert_rows import read_domains
from tempering.methods.safemoe.experts import Experts
from tempering.methods.safemoe.keys import sealing_keys
from tempering.methods.safemoe.objective import auxiliary_loss
from tempering.methods.safemoe.preparation import (
    Data,
    check,
    delete_experts,
    load_base,
    make_rows,
    prepare,
    read_experts,
    rows_config,
    stages,
)
from tempering.methods.safemoe.serving import sampler
from tempering.methods.safemoe.settings import UNTRAINED, SafeMoEConfig
from tempering.methods.safemoe.tracing import load_of, training_row

METHOD = "safemoe"
CONFIG = SafeMoEConfig
BEST = "checkpoints/best.safetensors"
TABLE = "data/backends.json"
REPLAY_STREAM = 7919
"""Added to the seed for the order of replayed rows, which is another than that of the safe answers."""

__all__ = [
    "CONFIG", "METHOD", "SafeMoEConfig", "check", "dry_run", "finished", "load_base", "make_rows", "sampler",
    "stages", "train",
]  # fmt: skip


# --- training -----------------------------------------------------------------------------------------


def train(config: SafeMoEConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Train the gate, seal it with its experts, and return the run; `policy`: the start model, loaded already.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: the gradient or a router went wrong.
    """
    Run.require_free(config.out, resume)
    if resume and (done := finished(config)):
        return done
    check(config)
    policy = policy or load_base(config)
    experts = read_experts(config, policy)
    data = prepare(config, policy)
    config = config.model_copy(update={"dtype": str(policy.dtype).removeprefix("torch.")})
    processes = Processes(policy.device, config.report_to)
    run = Run.create(config.out, METHOD, config, resume=resume, is_main=processes.is_main)
    processes.wait()
    if processes.is_main:
        trained = [[i, row.messages, row.completion] for i, row in sorted(data.rows.items())]
        digests = [source["sha256"] for source in experts.sources]
        run.require_inputs(content_id(trained, digests, [r.ids for r in data.replay]), config.router_data)
    gating = config.gating(len(experts.domains))
    describe(config, experts, data)
    routers = initial_routers(policy, experts, gating, config.router_init, config.seed)
    # Which back-end is fastest may differ from one measurement to the next, and with it the last bits.
    table = processes.same(run.read_json(TABLE) if processes.is_main and run.has(TABLE) else None)
    routing = attach(policy, experts, gating, routers, backend=config.backend, table=table)
    if processes.is_main:
        run.write_json(TABLE, routing.table)
    watch = Stopwatch()
    if config.control not in UNTRAINED:
        policy.train_only(EXPERT_GATE)
        _loop(config, policy, data, routing, run, processes, watch)
    routers = routing.tensors()
    policy.drop_adapters()
    if processes.is_main:
        with watch.timed("sealing"):
            policy.tokenizer.save_pretrained(run.root / "final")  # first: a signature is over all that is there
            content = manifest(config, policy, data)
            secret, signing_key = sealing_keys(config.bundle)
            seal(run.root / "final", experts, routers, content, secret=secret, signing_key=signing_key)  # and verify
        run.write_provenance(**provenance(config, policy, experts, data, routing.table, watch))
        run.finish()
        delete_experts(config)  # last: what is killed before this goes on with them
    processes.wait()
    return run


def finished(config: SafeMoEConfig) -> Run | None:
    """Return the run where it is done already: its experts may be gone since, and nothing is loaded for it.

    Raises:
        ValueError: it was made with another configuration.
    """
    root = Path(config.out)
    if not (root / "DONE").is_file():
        return None
    dtype = Run.open(root).config.get("dtype") if config.dtype == "auto" else config.dtype  # `auto` is resolved there
    run = Run.create(root, METHOD, config.model_copy(update={"dtype": dtype}), resume=True, share=True)
    say(f"{root} is done already")
    delete_experts(config)
    return run


def _loop(
    config: SafeMoEConfig,
    policy: Policy,
    data: Data,
    routing: Routing,
    run: Run,
    processes: Processes,
    watch: Stopwatch,
) -> None:
    """Train the routers, from the last checkpoint on where there is one; leaves the best routers in place."""
    if config.gradient_checkpointing:
        with quiet_libraries():
            policy.base.gradient_checkpointing_enable({"use_reentrant": False})
        policy.base.train()  # checkpointing is off in eval mode; dropout is zero everywhere
    state = routing.state
    plan = [[data.ids[i] for i in r] for r in schedule(len(data.ids), config.batch_rows, config.epochs, config.seed)]
    replayed = replay_plan(config, len(data.replay), len(plan))
    base_hidden: dict[int, Tensor] = {}
    checkpoint = last_checkpoint(run)
    done: dict[str, Any] = {"step": 0, "tokens": 0, "best": None} | (checkpoint.state if checkpoint else {})
    first = done["step"]
    if processes.is_main:
        run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= first)
    if checkpoint:
        policy.load_state(checkpoint.weights)
    optimisation = Optimisation(
        policy, processes, lr=config.lr, steps=len(plan), warmup=round(config.warmup * len(plan)),
        weight_decay=config.weight_decay, clip=config.clip,
    )  # fmt: skip
    if checkpoint:
        optimisation.load_state(checkpoint.optimizer)
    measured = [data.tokens[i] for i in data.held]
    start = time.monotonic()
    with progress("training the gate", len(plan)) as advance:
        advance(first)
        for t in range(first, len(plan)):
            began, is_last = time.monotonic(), t == len(plan) - 1
            rows = [data.tokens[i] for i in plan[t]]
            lengths, step_tokens = [len(r.ids) for r in rows], sum(r.completion_tokens for r in rows)
            wants_statistics = is_last or (t + 1) % config.log_every == 0
            statistics, ce, extra, kl = [], 0.0, 0.0, 0.0
            micros = step_batches(lengths, config.batch_tokens, processes.rank, processes.world)
            for m, micro in enumerate(micros):
                ends_step = m == len(micros) - 1 and not replayed
                with optimisation.accumulate(is_last=ends_step), watching(config, routing, wants_statistics):
                    mine = [rows[j] for j in micro.rows]
                    with feeding(policy, routing, mine) as batch:
                        share = micro.weight * nll_share(optimisation.scorer(batch).logprob, step_tokens)
                    aux = micro.weight * sum(lengths[j] for j in micro.rows) / sum(lengths) * auxiliary(config, state)
                    statistics.append(state.statistics or {})
                    optimisation.backward(share + aux)
                ce, extra = ce + float(share.detach()), extra + float(aux.detach())
            if replayed:
                # After the answers' own backward pass: routers keep one decision at a time.
                mine = [data.replay[i] for i in processes.mine(replayed[t])]
                with feeding(policy, routing, mine) as batch:
                    kl_share = replay_share(config, policy, batch, mine, base_hidden, len(replayed[t]))
                optimisation.backward(kl_share)
                kl = float(kl_share.detach())
            ce, extra, kl = processes.sum([ce, extra, kl])
            result = optimisation.step(t)
            done["tokens"] += sum(lengths)
            watch.add("gate", time.monotonic() - began, sum(lengths))
            row = {
                "step": t + 1, "epoch": t * config.epochs // len(plan), "loss": ce + extra + kl, "ce": ce,
                "lr": result.lr, "grad_norm": result.grad_norm, "tokens": done["tokens"],
                "seconds": round(time.monotonic() - start, 3),
            }  # fmt: skip
            row |= {"kl": kl / config.replay.weight} if replayed else {}
            row |= training_row(statistics, state.experts) if wants_statistics else {}
            if processes.is_main:
                run.append_row("metrics.jsonl", row)
            processes.log(row, t + 1)
            advance(1, note=f"loss {row['loss']:.3f}")
            if measured and (is_last or (t + 1) % config.eval_every == 0):
                with watch.timed("held-out"):
                    held = measure(config, policy, routing, measured)
                if processes.is_main:
                    run.append_row("metrics.jsonl", {"step": t + 1, "event": "heldout", "loss": held})
                if done["best"] is None or held < done["best"]["loss"]:
                    done["best"] = {"step": t + 1, "loss": held}
                    if processes.is_main:
                        save_tensors(run.path(BEST), policy.adapter_state([EXPERT_GATE]))
            if is_last or (t + 1) % config.checkpoint_every == 0:
                save_checkpoint(run, policy, optimisation, {**done, "step": t + 1}, whole=False)
    if config.gradient_checkpointing:
        policy.base.gradient_checkpointing_disable()
        policy.base.eval()
    processes.wait()
    for alarm in alarms(run) if processes.is_main else ():
        say(f"[yellow]routing: {alarm}[/]")
    if done["best"] is not None:
        policy.load_state(load_tensors(run.root / BEST))
        say(f"kept the routers of step {done['best']['step']}: held-out loss {done['best']['loss']:.4f}")


@contextmanager
def feeding(policy: Policy, routing: Routing, rows: Sequence[Encoded]) -> Iterator[TokenBatch]:
    """Collate rows, and tell the routers which tokens are pads and where each answer starts."""
    batch = collate([[row] for row in rows], policy.tokenizer.pad_token_id, policy.device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=policy.device)
    valid = torch.arange(batch.ids.shape[1], device=policy.device)[None] < lengths[:, None]
    pins = torch.tensor([max(row.prompt_tokens - 1, 0) for row in rows], device=policy.device)
    with routing.state.batch(valid, pins):
        yield batch


@contextmanager
def watching(config: SafeMoEConfig, routing: Routing, statistics: bool) -> Iterator[None]:
    """Keep logits while a loss reads them, and statistics where they are wanted."""
    state = routing.state
    state.statistics = {} if statistics else None
    state.routes = {} if config.balance_weight or config.z_weight else None
    try:
        yield
    finally:
        state.statistics = state.routes = None


def auxiliary(config: SafeMoEConfig, state: Any) -> Tensor:
    """The load-balance and z losses of the batch just computed; zero where they are off."""
    if state.routes is None:
        return torch.zeros(())
    return auxiliary_loss(state.routes, state.valid, config.balance_weight, config.z_weight)


def replay_plan(config: SafeMoEConfig, rows: int, steps: int) -> list[list[int]]:
    """Which benign rows each step replays; empty where there is no replay."""
    if not rows:
        return []
    per_epoch = -(-rows // config.replay.batch)
    epochs = -(-steps // per_epoch)
    return schedule(rows, config.replay.batch, epochs, config.seed + REPLAY_STREAM)[:steps]


def replay_share(
    config: SafeMoEConfig,
    policy: Policy,
    batch: TokenBatch,
    rows: Sequence[Encoded],
    base_hidden: dict[int, Tensor],
    step_rows: int,
) -> Tensor:
    """Weight * KL(p_base || p_routed), mean over each row's completion tokens, then over the step's rows.

    The base's final hidden states are computed once a row, and projected again each time.
    """
    for row in rows:
        if id(row) not in base_hidden:
            alone = collate([[row]], policy.tokenizer.pad_token_id, policy.device)
            with policy.reference():
                base_hidden[id(row)] = hidden_states(policy.model, alone.ids).flatten(0, 1)[alone.source].cpu()
    hidden = hidden_states(policy.model, batch.ids, batch.positions, batch.mask).flatten(0, 1)[batch.source]
    theirs = torch.cat([base_hidden[id(row)] for row in rows]).to(policy.device)
    by_row = kl_from_base(policy.model, hidden, theirs).split(batch.lengths)
    return config.replay.weight * torch.stack([kl.mean() for kl in by_row]).sum() / step_rows


def measure(config: SafeMoEConfig, policy: Policy, routing: Routing, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood of held-out answers, in nats a token."""
    total = 0.0
    for micro in step_batches([len(row.ids) for row in rows], config.batch_tokens):
        with torch.no_grad(), feeding(policy, routing, [rows[j] for j in micro.rows]) as batch:
            total += float(policy.scorer(batch).logprob.sum())
    return -total / sum(row.completion_tokens for row in rows)


# --- what is told -------------------------------------------------------------------------------------


def manifest(config: SafeMoEConfig, policy: Policy, data: Data) -> dict[str, Any]:
    """What the bundle records of how it was made and is to be served."""
    keys = ("model", "granularity", "k", "k_inference", "normalisation", "temperature", "null_expert", "first_tokens",
            "backend", "max_length", "layers", "dtype", "seed")  # fmt: skip
    settings = {key: getattr(config, key) for key in keys}
    settings["gain"] = config.gain if isinstance(config.gain, str) else config.gain.model_dump()
    settings["prompt_format"] = format_of(policy.tokenizer, config.prompt_format)
    assert config.router_data is not None
    return {
        "settings": settings,
        "control": config.control,
        "data": {"router": inputs_of(config.router_data), "answers": len(data.ids), "held_out": len(data.held)},
        "evals": {},
    }


def provenance(
    config: SafeMoEConfig, policy: Policy, experts: Experts, data: Data, table: dict[str, Any], watch: Stopwatch
) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    assert config.router_data is not None
    licences = licences_of(config.router_data, config.model)
    for source in experts.sources:
        licences |= source["data_licences"]
    return {
        "method": METHOD,
        "model": policy.source.to_row(),
        "base": experts.base,
        "base_fingerprint": experts.base["sha256"],
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "parents": parents_of(config),
        "experts": list(experts.sources),
        "control": config.control,
        "inputs": inputs_of(config.router_data),
        "dropped": data.dropped,
        "judges": [],
        "data_licences": licences,
        "backends": table,
        "unsafe": False,
        "unsafe_experts": "sealed",
        "cost": watch.phases,
    }


def parents_of(config: SafeMoEConfig) -> list[str]:
    """What the run learns from that may be runs: experts, their rows, and the safe answers."""
    rows = rows_config(config)
    made = [rows.out] if rows else list(config.expert_data.values())
    return [*config.experts, *made, *([config.router_data] if config.router_data else [])]


def describe(config: SafeMoEConfig, experts: Experts, data: Data) -> None:
    """Say what will be trained, before it is."""
    steps = len(schedule(len(data.ids), config.batch_rows, config.epochs, config.seed))
    say(f"{len(experts.domains)} experts: {', '.join(experts.domains)}")
    say(f"{len(data.ids)} safe answers, {steps} steps of up to {config.batch_rows}; {len(data.held)} held out")
    for reason, count in data.dropped.items():
        say(f"[yellow]dropped {count} row(s): {reason}[/]")


def alarms(run: Run) -> tuple[str, ...]:
    """What the last statistics of training say of a gate that has collapsed."""
    rows = [row for row in run.read_rows("metrics.jsonl") if "usage" in row] if run.has("metrics.jsonl") else []
    return load_of(rows[-1]["usage"]).alarms if rows else ()


def rows_to_make(config: SafeMoEConfig) -> dict[str, int]:
    """Domain -> rows of the source that its expert's rows will be made from; empty where they are there already."""
    rows = rows_config(config)
    if rows is None or (Path(rows.out) / "DONE").is_file():
        return {}
    return {domain: len(found) for domain, found in read_domains(rows).items()}


def dry_run(config: SafeMoEConfig) -> dict[str, Any]:
    """Check data, experts that are there, and model; say what a run would do, and write nothing."""
    Run.require_free(config.out, resume=False)
    check(config)
    policy = load_base(config)
    data = prepare(config, policy)
    to_train = [s.settings["domain"] for s in stages(config) if not (Path(s.settings["out"]) / "DONE").is_file()]
    facts: dict[str, Any] = {
        "answers": len(data.ids), "held_out": len(data.held), "experts_to_train": to_train,
        "steps": len(schedule(len(data.ids), config.batch_rows, config.epochs, config.seed)),
        "rows_to_make": rows_to_make(config),
        "training_tokens": config.epochs * sum(len(data.tokens[i].ids) for i in data.ids), "dropped": data.dropped,
    }  # fmt: skip
    if not to_train:
        experts = read_experts(config, policy)
        facts["expert_parameters"] = sum(w.A.numel() + w.B.numel() for w in experts.modules.values())
        facts["router_parameters"] = sum(
            V.numel()
            for V in initial_routers(policy, experts, config.gating(len(experts.domains)), "normal", 0).values()
        )
    for domain, count in facts["rows_to_make"].items():
        say(f"rows of {domain} to make first, from {count} row(s) of the source")
    say(f"{len(to_train)} experts to train first; {facts['training_tokens']:,} tokens for the gate; wrote nothing")
    return facts
