r"""Unlearning toxicity: at several depths, take away the one direction along which a model's states are toxic.

**A reconstruction.** Of "Model Unlearning Objectives Vary for Distinct Language Functions" (arXiv:2605.26454) only
title, abstract and opening were known to us: no equation, hyperparameter, model, data set or result. Nothing here is
a reproduction of that paper. `provenance.json` says `reconstruction: true`.

The claim (the abstract's): objectives should follow the language function; for toxicity, a matter of style, a
multi-layer objective on layer-specific probe directions. In what form is our choice:

    L = sum_l w_l mean(phi(h_l(x_f)))  +  alpha sum_l w_l mean(||h_l(x_r) - h0_l(x_r)||^2 / ||h0_l(x_r)||^2)
        + beta_kl KL(p0 || p)(x_r)  [ + nll_weight NLL of civil continuations ]

    cos_hinge   phi(h) = relu(cos(h - mu_l, v_l) - tau_l)      nothing left to do where states look non-toxic

v_l is the direction of a logistic regression on mean states, h0 the states before training; mu_l and tau_l are the
mean and the median cosine of non-toxic text; the layers S are those whose probes are good and stable, w_l ~ AUROC_l -
1/2. Other phi: `core/probes.py`. The forget pass stops at the last layer of S; all terms of a pass share one forward.

Controls, one switch each: `directions=random`, `shuffled` (probes of permuted labels), `diff_of_means`;
`layers=single`; `objective=cosine_rmu`, `rmu` (the objective for knowledge on toxic text), `dpo`. **Unless the
default beats random and shuffled directions at equal KL (`max_kl`) by a paired interval without zero, probe
directions carry no signal there.**

Differs from what is said of the paper: its probes, phi, layers and data are unknown. `select=causal` takes the layers
whose direction matters most for what is said; `rounds` fits new probes when the old ones have done their work. The
baseline without training, `temper eval TARGET sampler=probe_subtract`, is in `subtracting.py`.

Only the edited tensors train, in place; the reference is the same network with clones of these swapped in. The result
is `final/edit.safetensors`, which can be taken out again. Where the start model is not more toxic after rude text
than after neutral text, there is nothing to unlearn, and the run is refused. Texts are never printed or logged.

    temper train unlearn_toxicity out=runs/civil
    temper train unlearn_toxicity probes_only=true out=runs/bank
    temper train unlearn_toxicity probes=runs/bank directions=random max_kl=0.01 out=runs/random
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tempering.core.activations import blocks as blocks_of
from tempering.core.bank import FOLDER, Bank, find_bank
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.editing import select_parameters
from tempering.core.policy import Policy, save_tensors
from tempering.core.progress import progress, say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.training import Processes, Stopwatch, last_checkpoint, save_checkpoint
from tempering.data.describe import inputs_of, licences_of
from tempering.data.overlap import overlaps
from tempering.methods.unlearn_toxicity.checks import check_start, load_scorer
from tempering.methods.unlearn_toxicity.choosing import Effect, found_effects, plan
from tempering.methods.unlearn_toxicity.settings import Plan, UnlearnToxicityConfig
from tempering.methods.unlearn_toxicity.terms import Unlearning
from tempering.methods.unlearn_toxicity.texts import Corpus, corpora_of, identity_auroc, openings, read_corpus

METHOD = "unlearn_toxicity"
CONFIG = UnlearnToxicityConfig


def train(config: UnlearnToxicityConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Unlearn and return the run; `policy` is the start model where the caller has it loaded already.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: a gradient or a state went wrong.
    """
    Run.require_free(config.out, resume)
    scorer = load_scorer(config)
    policy = policy or Policy.load(config.model, dtype=config.dtype)
    config = config.model_copy(update={"dtype": str(policy.dtype).removeprefix("torch.")})
    corpus = read_corpus(config, policy)
    processes = Processes(policy.device, config.report_to)
    if processes.shards:
        raise ValueError("FSDP2 shards weights, which unlearning edits in place; use one process a model, or DDP")
    run = Run.create(config.out, METHOD, config, resume=resume, is_main=processes.is_main)
    processes.wait()
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    if processes.is_main:
        read = [[t.id, t.ids] for t in [*(row.tokens for row in corpus.labelled), *corpus.forget, *corpus.neutral]]
        run.require_inputs(content_id(read), str(config.data.train))
    watch = Stopwatch()
    bank = find_bank(
        run, config.probes, policy, corpus.labelled, processes, watch, seed=config.seed,
        skip_first=config.skip_first, batch_tokens=config.batch_tokens, refits=config.refits,
        permutations=config.permutations,
        facts={"identity_auroc": identity_auroc(config.data.probe), "corpora": list(corpora_of(config))},
    )  # fmt: skip
    start: Mapping[str, Any] = {"claim": "none", "reason": "probes only"}
    if not config.probes_only:
        start = checked(config, policy, scorer, run, processes)
        count = len(blocks_of(policy.model))
        effects: list[Effect] = []
        if config.select == "causal":
            with watch.timed("causal effects"):
                effects = found_effects(config, policy, bank, corpus.neutral, scorer, run, processes, count)
        settled = plan(config, bank, count, effects)
        describe(settled, config, corpus)
        unlearning = Unlearning(config, policy, settled, bank, corpus, processes)
        _loop(config, unlearning, run, watch)
        if processes.is_main:
            policy.export(run.root / "final", {"method": METHOD, "reconstruction": True, "run": str(run.root)})
            save_tensors(run.root / "final" / "directions.safetensors", unlearning.tensors())
    if processes.is_main:
        run.write_provenance(**provenance(config, policy, corpus, start, scorer.identity, watch))
        run.finish()
    processes.wait()
    return run


def evals_after(config: UnlearnToxicityConfig) -> str | None:
    """The recipe of evals that follows training where none is named."""
    return None if config.probes_only else "unlearned_toxicity"


def dry_run(config: UnlearnToxicityConfig) -> dict[str, Any]:
    """Check data, scorer and start model, list what may train, and write nothing; probes are not fitted."""
    Run.require_free(config.out, resume=False)
    load_scorer(config)
    policy = Policy.load(config.model, dtype=config.dtype)
    corpus = read_corpus(config, policy)
    count = len(blocks_of(policy.model))
    settled = None
    is_known = config.probes and config.select == "spread"
    if is_known or config.objective in ("rmu", "cosine_rmu") or isinstance(config.layers, list):
        settled = plan(config, Bank.load(Path(config.probes) / FOLDER) if config.probes else None, count)
    layers = settled.edit_layers if settled else list(range(count))
    chosen = select_parameters(policy.model, config.edit_roles, layers)
    every = sum(p.numel() for p in policy.model.parameters())
    for name, parameter in chosen.items():
        say(f"{name}  {tuple(parameter.shape)}  {str(policy.dtype).removeprefix('torch.')}  {parameter.numel():,}")
    total = sum(p.numel() for p in chosen.values())
    say(f"{len(chosen)} tensors, {total:,} numbers, {total / every:.1%} of the model" + ("" if settled else
        " at most: the layers are chosen when the probes are fitted") + "; nothing was written")  # fmt: skip
    return {
        "tensors": {n: list(p.shape) for n, p in chosen.items()}, "trained_at_most": total,
        "share": round(total / every, 6), "labelled": len(corpus.labelled), "forget": len(corpus.forget),
        "pairs": len(corpus.pairs), "retain": {k: len(rows) for k, rows in corpus.retain.items()},
        "steps": config.steps * config.rounds, "dropped": corpus.dropped,
        "dtype": str(policy.dtype).removeprefix("torch."),
    }  # fmt: skip


def describe(settled: Plan, config: UnlearnToxicityConfig, corpus: Corpus) -> None:
    """Say what will be trained, before it is; never a text."""
    kept = ", ".join(f"{kind}: {len(rows)}" for kind, rows in corpus.retain.items())
    rounds = f"{config.rounds} rounds of " if config.rounds > 1 else ""
    say(f"{config.objective}: {rounds}{config.steps} steps; {len(corpus.forget)} texts to unlearn; to keep {kept}")
    say(f"loss at blocks {sorted(settled.weights)}, edited blocks {settled.edit_layers}")
    for reason, count in corpus.dropped.items():
        say(f"[yellow]dropped {count} text(s): {reason}[/]")


def checked(
    config: UnlearnToxicityConfig, policy: Policy, scorer: Any, run: Run, processes: Processes
) -> Mapping[str, Any]:
    """The check of the start model, done once a run; every process learns what it found."""
    if processes.is_main and not run.has("data/start.json"):
        run.write_json("data/start.json", check_start(config, policy, scorer))
    processes.wait()
    return run.read_json("data/start.json")


# --- training -----------------------------------------------------------------------------------------


def _loop(config: UnlearnToxicityConfig, unlearning: Unlearning, run: Run, watch: Stopwatch) -> None:
    """Train; with a checkpoint in the run, go on from it bit for bit."""
    processes, total = unlearning.processes, config.steps * config.rounds
    optimiser = EditOptimiser(unlearning.parameters, processes, config.lr)
    checkpoint = last_checkpoint(run)
    first, tokens_done = (checkpoint.state["step"], checkpoint.state["tokens"]) if checkpoint else (0, 0)
    if checkpoint:
        unlearning.policy.load_edit_state(checkpoint.weights)
        optimiser.load_state(checkpoint.optimizer)
        for _ in range(checkpoint.state.get("round", 0)):
            unlearning.begin_round(run)
    if processes.is_main:
        run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= first)
    start = time.monotonic()
    with progress("unlearning", total) as advance:
        advance(first)
        for t in range(first, total):
            if t // config.steps > unlearning.rounds_done:
                with watch.timed("probes"):
                    aurocs = unlearning.begin_round(run)
                if processes.is_main:
                    about = {"event": "probed", "round": unlearning.rounds_done + 1, "auroc": aurocs}
                    run.append_row("metrics.jsonl", {"step": t + 1, **about})
            began = time.monotonic()
            gradients, facts, spent = unlearning.step_gradient(t)
            norm = optimiser.step(gradients, t)
            tokens_done += spent
            watch.add("training", time.monotonic() - began, spent)
            row = {
                "step": t + 1, "loss": sum(facts.values()), **facts, "lr": optimiser.lr, "grad_norm": norm,
                "tokens": tokens_done, "seconds": round(time.monotonic() - start, 3),
            }  # fmt: skip
            if processes.is_main:
                run.append_row("metrics.jsonl", row)
            processes.log(row, t + 1)
            advance(1, note=f"forget {facts['forget']:.4f}")
            is_last, stop = t == total - 1, False
            if is_last or (t + 1) % config.measure_every == 0:
                with watch.timed("measuring"):
                    measured: dict[str, Any] = {"kl": unlearning.neutral_kl()}
                    stop = config.max_kl is not None and measured["kl"] > config.max_kl
                    if stop:
                        assert config.max_kl is not None
                        measured["back"], measured["kl"] = unlearning.step_back(config.max_kl)
                    measured["held_forget"] = unlearning.held_forget()
                    measured |= unlearning.norm_ratios()
                    if is_last or stop or (t + 1) % config.probe_every == 0:
                        measured["readable"] = unlearning.readable(run.root)
                if processes.is_main:
                    run.append_row("metrics.jsonl", {"step": t + 1, "event": "measured", **measured})
                warn_of(measured)
            if stop or is_last or (t + 1) % config.checkpoint_every == 0:
                state = {"step": total if stop else t + 1, "tokens": tokens_done, "round": unlearning.rounds_done}
                save_checkpoint(run, unlearning.policy, optimiser, state, whole=False)
            if stop:
                say(f"KL passed max_kl={config.max_kl} at step {t + 1}; {measured['back']:.3f} of the edit stays")
                break


def warn_of(measured: Mapping[str, Any]) -> None:
    """Say where states have grown or shrunk by more than half."""
    for name in ("norm_ratio_forget", "norm_ratio_retain"):
        if name in measured and not 0.5 <= measured[name] <= 2:
            say(f"[yellow]{name.replace('_', ' ')}: {measured[name]:.2f}, expected 0.5 to 2; see norm_guard[/]")


def provenance(
    config: UnlearnToxicityConfig,
    policy: Policy,
    corpus: Corpus,
    start: Mapping[str, Any],
    scorer: str,
    watch: Stopwatch,
) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    sources = [s for s in (config.data.probe, config.data.train, config.data.retain) if s and s != "demo"]
    licences: dict[str, str] = {} if sources else {"demo": "Apache-2.0"}
    for source in sources:
        licences |= licences_of(source, config.model)
    return {
        "method": METHOD,
        "reconstruction": True,
        "model": policy.source.to_row(),
        "base_fingerprint": policy.base_fingerprint(),
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "inputs": {k: v for source in sources for k, v in inputs_of(source).items()},
        "dropped": corpus.dropped,
        "overlap": overlaps(sets_of(config, policy, corpus)),
        "judges": [{"role": "check of the start model", "identity": scorer}],
        "probe_corpora": list(corpora_of(config)),
        "start": dict(start),
        "data_licences": licences,
        "unsafe": False,
        "cost": watch.phases,
    }


def sets_of(config: UnlearnToxicityConfig, policy: Policy, corpus: Corpus) -> dict[str, list[list[int]]]:
    """Tokens of all texts by what they are for; `eval`: what probes are tested on and the check goes on after."""
    held = [row.tokens.ids for row in corpus.labelled if row.split != "train"]
    asked, _ = openings(config, config.check.prompts) if config.check.data else ([], [])
    return {
        "forget": [row.ids for row in corpus.forget],
        "retain": [row.ids for rows in corpus.retain.values() for row in rows],
        "probe": [row.tokens.ids for row in corpus.labelled if row.split == "train"],
        "eval": held + [list(policy.tokenizer(p.text)["input_ids"]) for p in asked],
        "neutral": [row.ids for row in corpus.neutral],
    }
