r"""Unlearning dangerous knowledge: make what is computed mid-depth on hazardous text useless, and keep the rest.

**A reconstruction.** Of "Model Unlearning Objectives Vary for Distinct Language Functions" (arXiv:2605.26454) only
title, abstract and opening were known to us: no equation, hyperparameter, model, data set or result. Nothing here is
a reproduction of that paper. `provenance.json` says `reconstruction: true`.

The claim (the abstract's): objectives should follow the language function; for dangerous knowledge, recalled
content, a cosine-based, meta-learned variant of RMU. In what form is our choice:

    cosine_rmu       gamma mean(1 - cos(h_l(x_f), u)) + alpha mean(||h_l(x_r) - h0_l(x_r)||^2 / ||h0_l(x_r)||^2)
    meta_cosine_rmu  the same, and its first term once more at the weights that a simulated relearning attack leaves

l is one block at about a fifth of the depth, u a random direction per topic, h0 the states before training. Means are
over the tokens of a text, then over texts. The cosine has no length c to set and its gradient is orthogonal to h.

Baselines: `rmu` (Li et al. 2024, arXiv:2403.03218; `compat: wmdp` computes what its released code does),
`adaptive_rmu` (arXiv:2408.06223), `grad_diff`, `npo` (arXiv:2404.05868), `simnpo` (arXiv:2410.07163),
`circuit_breakers` (arXiv:2406.04313). Differs: grad_diff, npo and simnpo edit the blocks, not embeddings and
head; circuit_breakers has no dropout.

Only the edited tensors train, in place; the pass stops at the loss layer; the reference is the same network with
clones of these tensors swapped in. The result is `final/edit.safetensors`, which can be taken out again. A model
that knows no more than chance of what it is to forget is refused before the first step.

Unknown, our choice: all of `MetaSettings`, layer, tensors, prices, and that meta-learning means an attack at all.

    temper train unlearn_knowledge out=runs/unlearned
    temper train unlearn_knowledge objective=cosine_rmu model=runs/taught out=runs/cosine
    temper train unlearn_knowledge objective=rmu dry_run=true
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tempering.core.activations import blocks as blocks_of
from tempering.core.bank import FOLDER, Bank, find_bank
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.editing import shorten
from tempering.core.loading import EMBEDDED
from tempering.core.policy import Policy, save_tensors
from tempering.core.probes import candidates
from tempering.core.progress import progress, say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.training import Processes, Stopwatch, last_checkpoint, save_checkpoint
from tempering.data.describe import inputs_of, licences_of
from tempering.data.overlap import overlaps
from tempering.methods.unlearn_knowledge import teach
from tempering.methods.unlearn_knowledge.measuring import Measurer, check_start
from tempering.methods.unlearn_knowledge.meta import agreeing
from tempering.methods.unlearn_knowledge.objectives import norm_of
from tempering.methods.unlearn_knowledge.quiz import Chance
from tempering.methods.unlearn_knowledge.quiz import asked as asks
from tempering.methods.unlearn_knowledge.settings import Plan, UnlearnKnowledgeConfig, plan
from tempering.methods.unlearn_knowledge.sweep import swept
from tempering.methods.unlearn_knowledge.terms import Terms, trained
from tempering.methods.unlearn_knowledge.texts import DEMO, Corpus, contrasted, tokenize

METHOD = "unlearn_knowledge"
CONFIG = UnlearnKnowledgeConfig


def train(config: UnlearnKnowledgeConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Unlearn and return the run; `policy` is the start model where the caller has it loaded already.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: a gradient or a state went wrong.
    """
    Run.require_free(config.out, resume)
    if config.is_taught:
        policy = None  # the caller's is the model before it was taught
        config = config.model_copy(update={"model": taught(config), "teach": False})
    policy = policy or Policy.load(config.model, dtype=config.dtype)
    config = config.model_copy(update={"dtype": str(policy.dtype).removeprefix("torch.")})
    count = len(blocks_of(policy.model))
    if not config.is_searched:
        plan(config, count)  # layers that are not there are refused before anything is written
    corpus = tokenize(config, policy.tokenizer)
    processes = Processes(policy.device, config.report_to)
    if processes.shards:
        raise ValueError("FSDP2 shards weights, which unlearning edits in place; use one process a model, or DDP")
    if config.compat and processes.world > 1:
        raise ValueError("compat=wmdp counts the pads of whole batches; run it in one process")
    measurer = Measurer(config, policy)
    known = check_start(config, measurer)
    run = Run.create(config.out, METHOD, config, resume=resume, is_main=processes.is_main)
    processes.wait()
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    if processes.is_main:
        read = [[t.id, t.ids] for rows in (*corpus.forget.values(), corpus.retain) for t in rows]
        run.require_inputs(content_id(read), str(config.data.train))
    watch = Stopwatch()
    bank: Bank | None = None
    if config.layer == "sweep":
        with watch.timed("sweep"):
            layer = swept(config, policy, corpus, measurer, run, processes)
        config = config.model_copy(update={"layer": layer})
    if config.objective == "probe":
        labelled = contrasted(config, policy.tokenizer, corpus)
        bank = find_bank(
            run, config.probes, policy, labelled, processes, watch, seed=config.seed, skip_first=config.skip_first,
            batch_tokens=config.batch_tokens,
        )  # fmt: skip
    if not config.probes_only:
        settled = plan(config, count, bank)
        describe(config, settled, corpus)
        terms = Terms(config, policy, settled, corpus, processes, bank)
        _loop(config, policy, terms, measurer, run, watch)
        if processes.is_main:
            policy.export(run.root / "final", {"method": METHOD, "reconstruction": True, "run": str(run.root)})
            save_tensors(run.root / "final" / "directions.safetensors", terms.tensors())
    if processes.is_main:
        run.write_provenance(**provenance(config, policy, corpus, measurer, known, watch))
        run.finish()
    processes.wait()
    return run


def evals_after(config: UnlearnKnowledgeConfig) -> str | None:
    """The recipe of evals that follows training where none is named: of the bundled facts questions are known."""
    return None if config.probes_only or config.data.train != DEMO else "unlearned_facts"


def taught(config: UnlearnKnowledgeConfig) -> str:
    """Teach the start model the bundled facts beside `out`, unless that was done before; returns that run."""
    name = f"taught-{content_id(config.model, config.dtype)[:8]}"
    if config.model == EMBEDDED and config.dtype == "auto":
        name = f"taught-{config.model}"
    root = Path(config.out).parent / name
    if not Run(root).is_done:
        say(f"{config.model} does not know the facts that it is to forget: teaching them first, in {root}")
        lesson = teach.TeachConfig(model=config.model, out=str(root), dtype=config.dtype)
        teach.train(lesson, resume=root.exists())
    return str(root)


def dry_run(config: UnlearnKnowledgeConfig) -> dict[str, Any]:
    """List the tensors that would train, check data and start model, and write nothing."""
    Run.require_free(config.out, resume=False)
    policy = Policy.load(config.model, dtype=config.dtype)
    bank = Bank.load(Path(config.probes) / FOLDER) if config.probes else None
    # Before probes are fitted all layers that may be chosen are shown, of a sweep what `auto` would take.
    shown = config
    if config.objective == "probe" and config.layers == "auto" and bank is None:
        shown = config.model_copy(update={"layers": candidates(len(blocks_of(policy.model)))})
    settled = plan(shown, len(blocks_of(policy.model)), bank)
    corpus = tokenize(config, policy.tokenizer)
    chosen = trained(config, policy, settled)
    every = sum(p.numel() for p in policy.model.parameters())
    for name, parameter in chosen.items():
        say(f"{name}  {tuple(parameter.shape)}  {str(policy.dtype).removeprefix('torch.')}  {parameter.numel():,}")
    count = sum(p.numel() for p in chosen.values())
    describe(config, settled, corpus)
    if config.is_taught:
        say(f"{config.model} would first be taught the bundled facts, beside {config.out}")
    at_most = " at most, the layers are chosen later" if config.is_searched and bank is None else ""
    say(f"{len(chosen)} tensors, {count:,} numbers, {count / every:.1%} of the model{at_most}; nothing was written")
    return {
        "tensors": {n: list(p.shape) for n, p in chosen.items()}, "trained": count, "share": round(count / every, 6),
        "loss_layers": settled.loss_layers, "steps": config.steps, "dropped": corpus.dropped,
        "forget": {k: len(rows) for k, rows in corpus.forget.items()}, "retain": len(corpus.retain),
        "dtype": str(policy.dtype).removeprefix("torch."),
    }  # fmt: skip


def describe(config: UnlearnKnowledgeConfig, settled: Plan, corpus: Corpus) -> None:
    """Say what will be trained, before it is; never a text."""
    topics = ", ".join(f"{k}: {len(rows)}" for k, rows in corpus.forget.items())
    say(f"{config.objective}: {config.steps} steps; texts to forget {topics}; to keep {len(corpus.retain)}")
    if config.reads_states:
        say(f"loss at block {', '.join(map(str, settled.loss_layers))}, edited blocks {settled.edit_layers}")
    if config.adapter:
        say("[yellow]an adapter is trained: who drops it has the knowledge back; leave `adapter` out to edit[/]")
    for reason, count in corpus.dropped.items():
        say(f"[yellow]dropped {count} text(s): {reason}[/]")


def _loop(
    config: UnlearnKnowledgeConfig, policy: Policy, terms: Terms, measurer: Measurer, run: Run, watch: Stopwatch
) -> None:
    """Train; with a checkpoint in the run, go on from it bit for bit."""
    processes = terms.processes
    optimiser = EditOptimiser(terms.parameters, processes, config.value("lr"), is_compat=terms.is_compat)
    checkpoint = last_checkpoint(run)
    first, tokens_done = (checkpoint.state["step"], checkpoint.state["tokens"]) if checkpoint else (0, 0)
    best_score, best_step = (checkpoint.state["best"], checkpoint.state["best_step"]) if checkpoint else (0.0, 0)
    if checkpoint:
        (policy.load_state if config.adapter else policy.load_edit_state)(checkpoint.weights)
        optimiser.load_state(checkpoint.optimizer)
    elif config.max_kl is not None:
        optimiser.remember()
    if processes.is_main:
        run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= first)
    start = time.monotonic()
    with progress("unlearning", config.steps) as advance:
        advance(first)
        for t in range(first, config.steps):
            began = time.monotonic()
            topic = t % len(terms.topics)
            f_rows, r_rows = terms.rows_of(t, topic)
            g_f, facts = terms.forget_gradient(f_rows, topic, t)
            g_r, retained = terms.retain_gradient(r_rows, t)
            facts |= retained
            g_m = terms.meta_gradient(t, topic, norm_of(list(g_f.values())), facts)
            if config.meta.disruption_mask and terms.attacker:
                optimiser.follow(g_r)
                g_f, g_m = agreeing(g_f, optimiser.running), g_m and agreeing(g_m, optimiser.running)
            weight = config.meta.weight
            norm = optimiser.step({n: g_f[n] + g_r[n] + (weight * g_m[n] if g_m else 0) for n in g_f}, t)
            spent = sum(len(row.ids) for row in (*f_rows, *r_rows))
            tokens_done += spent
            watch.add("training", time.monotonic() - began, spent)
            row = {
                "step": t + 1, "topic": terms.topics[topic], "loss": facts["forget"] + facts["retain"], **facts,
                "lr": optimiser.lr, "grad_norm": norm, "tokens": tokens_done,
                "seconds": round(time.monotonic() - start, 3),
            }  # fmt: skip
            if processes.is_main:
                run.append_row("metrics.jsonl", row)
            processes.log(row, t + 1)
            advance(1, note=f"forget {facts['forget']:.3f} retain {facts['retain']:.3f}")
            is_last, is_over = t == config.steps - 1, False
            if is_last or (t + 1) % config.measure_every == 0:
                with watch.timed("measuring"):
                    now = measurer.measure(t + 1)
                    drift = terms.drift(f_rows, r_rows, topic)
                if processes.is_main:
                    run.append_row("metrics.jsonl", {**now.to_row(), **drift})
                warn_of(drift)
                is_over = config.max_kl is not None and now.kl > config.max_kl
                # Without questions the latest step that has not drifted too far is the best.
                if config.max_kl is not None and not is_over and (now.score is None or now.score >= best_score):
                    best_score, best_step = now.score or 0.0, t + 1
                    optimiser.remember()
            if is_over and config.back == "best":
                say(f"[yellow]KL {now.kl:.4f} is above max_kl={config.max_kl}: back to step {best_step}[/]")
                optimiser.go_back()
            elif is_over:
                assert config.max_kl is not None
                share, _ = shorten(terms.parameters, policy.before, measurer.kl, config.max_kl)
                say(f"KL {now.kl:.4f} is above max_kl={config.max_kl}: {share:.3f} of the edit stays")
                if processes.is_main:
                    run.append_row("metrics.jsonl", {**measurer.measure(t + 1).to_row(), "back": share})
            if is_over or is_last or (t + 1) % config.checkpoint_every == 0:
                done = config.steps if is_over else t + 1
                state = {"step": done, "tokens": tokens_done, "best": best_score, "best_step": best_step}
                save_checkpoint(run, policy, optimiser, state, whole=False)
            if is_over:
                break
    if terms.attacker:
        terms.attacker.drop()


def warn_of(drift: dict[str, Any]) -> None:
    """Say where states have grown or shrunk by more than half."""
    for name in ("norm_ratio_forget", "norm_ratio_retain"):
        if name in drift and not 0.5 <= drift[name] <= 2:
            say(f"[yellow]{name.replace('_', ' ')}: {drift[name]:.2f}, expected 0.5 to 2[/]")


def provenance(
    config: UnlearnKnowledgeConfig,
    policy: Policy,
    corpus: Corpus,
    measurer: Measurer,
    known: Chance | None,
    watch: Stopwatch,
) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    train = config.data.train
    sources = list(train.values()) if isinstance(train, dict) else [train]
    retain = config.data.retain
    sources += [] if retain is None else [retain] if isinstance(retain, str) else retain
    inputs: dict[str, str] = {}
    licences: dict[str, str] = licences_of(DEMO, config.model)
    for source in sources:
        inputs |= inputs_of("demo_facts" if source == DEMO else source)
        licences |= licences_of("demo_facts" if source == DEMO else source)
    claims = known is not None and known.is_above
    return {
        "method": METHOD,
        "reconstruction": True,
        "claim": config.objective if claims else "none",
        "parents": [config.model] if (Path(config.model) / "config.yaml").is_file() else [],
        "known_before": None if known is None else {**known._asdict(), "accuracy": known.accuracy},
        "model": policy.source.to_row(),
        "base_fingerprint": policy.base_fingerprint(),
        "device": str(policy.device),
        "inputs": inputs,
        "dropped": corpus.dropped,
        "overlap": overlaps(sets_of(config, policy, corpus, measurer)),
        "judges": [],
        "data_licences": licences,
        "unsafe": False,
        "cost": watch.phases,
    }


def sets_of(
    config: UnlearnKnowledgeConfig, policy: Policy, corpus: Corpus, measurer: Measurer
) -> dict[str, list[list[int]]]:
    """Tokens of all texts by what they are for; `eval`: the questions with their right answers."""
    asked = [" ".join(asks(q.question, q.options[q.answer])) for q in measurer.questions]
    labelled = contrasted(config, policy.tokenizer, corpus) if config.objective == "probe" else []
    return {
        "forget": [row.ids for rows in corpus.forget.values() for row in rows],
        "retain": [row.ids for row in corpus.retain],
        "probe": [row.tokens.ids for row in labelled if row.split == "train"],
        "eval": [list(policy.tokenizer(text)["input_ids"]) for text in asked],
        "neutral": [row.ids for row in measurer.neutral],
    }
