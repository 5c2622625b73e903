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

Differs from what is said of the paper: its probes, phi, layers and data are unknown. Not here: choosing layers by
their causal effect, and subtracting directions at inference without training.

Only the edited tensors train, in place; the reference is the same network with clones of these swapped in. The result
is `final/edit.safetensors`, which can be taken out again. Where the start model is not more toxic after rude text
than after neutral text, there is nothing to unlearn, and the run is refused. Texts are never printed or logged.

    temper train unlearn_toxicity out=runs/civil
    temper train unlearn_toxicity probes_only=true out=runs/bank
    temper train unlearn_toxicity probes=runs/bank directions=random max_kl=0.01 out=runs/random
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.core.activations import blocks as blocks_of
from tempering.core.activations import cosine_to, mean_square
from tempering.core.bank import FOLDER, Bank, find_bank
from tempering.core.chat import Encoded, collate, fill_batches
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.editing import select_parameters, shorten
from tempering.core.logprobs import hidden_states, kl_from_base, nll_share
from tempering.core.policy import Policy, save_tensors
from tempering.core.preference import LossOptions, PairScores, sigmoid
from tempering.core.probe_losses import (
    NEEDS_FROZEN,
    STATE_LOSSES,
    StateLoss,
    forget_share,
    retain_share,
    tensors_of,
)
from tempering.core.probes import (
    auroc,
    choose_strength,
    fit,
    layer_weights,
    locate,
    mean_states,
    random_direction,
    select_layers,
)
from tempering.core.progress import progress, say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.text_rows import TokenRows, Tokens, collate_rows, moved
from tempering.core.training import Processes, Stopwatch, last_checkpoint, save_checkpoint, stream_rows
from tempering.data.describe import inputs_of, licences_of
from tempering.methods.unlearn_toxicity.checks import check_start, load_scorer
from tempering.methods.unlearn_toxicity.settings import Plan, UnlearnToxicityConfig, edited_blocks
from tempering.methods.unlearn_toxicity.texts import Corpus, Pair, corpora_of, identity_auroc, read_corpus

METHOD = "unlearn_toxicity"
CONFIG = UnlearnToxicityConfig
STREAM_FORGET, STREAM_RETAIN, STREAM_PAIRS = 1, 2, 20
REFIT_TEXTS = 200

Gradients = dict[str, Tensor]


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
        settled = plan(config, bank, len(blocks_of(policy.model)))
        describe(settled, config, corpus)
        unlearning = Unlearning(config, policy, settled, bank, corpus, processes)
        unlearning.loop(run, watch)
        if processes.is_main:
            policy.export(run.root / "final", {"method": METHOD, "reconstruction": True, "run": str(run.root)})
            save_tensors(run.root / "final" / "directions.safetensors", tensors_of(unlearning.probes))
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
    if config.probes or config.objective in ("rmu", "cosine_rmu") or isinstance(config.layers, list):
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
        "steps": config.steps, "dropped": corpus.dropped, "dtype": str(policy.dtype).removeprefix("torch."),
    }  # fmt: skip


def describe(settled: Plan, config: UnlearnToxicityConfig, corpus: Corpus) -> None:
    """Say what will be trained, before it is; never a text."""
    kept = ", ".join(f"{kind}: {len(rows)}" for kind, rows in corpus.retain.items())
    say(f"{config.objective}: {config.steps} steps; {len(corpus.forget)} texts to unlearn; to keep {kept}")
    say(f"loss at blocks {sorted(settled.weights)}, edited blocks {settled.edit_layers}")
    for reason, count in corpus.dropped.items():
        say(f"[yellow]dropped {count} text(s): {reason}[/]")


# --- probes -------------------------------------------------------------------------------------------


def checked(
    config: UnlearnToxicityConfig, policy: Policy, scorer: Any, run: Run, processes: Processes
) -> Mapping[str, Any]:
    """The check of the start model, done once a run; every process learns what it found."""
    if processes.is_main and not run.has("data/start.json"):
        run.write_json("data/start.json", check_start(config, policy, scorer))
    processes.wait()
    return run.read_json("data/start.json")


def plan(config: UnlearnToxicityConfig, bank: Bank | None, count: int) -> Plan:
    """Settle the layers that the loss reads, their weights, and what is edited.

    Raises:
        ValueError: a layer that is not there, or too few probes that are good and stable.
    """
    worth = {w.layer: w for w in bank.worth} if bank else {}
    if isinstance(config.layers, list):
        chosen = sorted(set(config.layers))
        if not 0 <= chosen[0] <= chosen[-1] < count:
            raise ValueError(f"layers={config.layers}: this model has blocks 0 to {count - 1}")
    elif config.objective in ("cosine_rmu", "rmu"):
        chosen = [round(0.22 * count)]
    else:
        assert bank is not None
        chosen = select_layers(bank.worth, count, config.n_layers)
        if config.layers == "single":
            chosen = [max(chosen, key=lambda layer: (worth[layer].auroc, -layer))]
    is_weighed = config.objective == "probe" and all(layer in worth for layer in chosen)
    weights = layer_weights({i: worth[i].auroc if is_weighed else 1.0 for i in chosen})
    return Plan(weights, edited_blocks(config, chosen))


# --- training -----------------------------------------------------------------------------------------


class Unlearning:
    """One training: what trains, along which directions, and the loop."""

    def __init__(
        self, config: UnlearnToxicityConfig, policy: Policy, settled: Plan, bank: Bank, corpus: Corpus,
        processes: Processes,
    ) -> None:  # fmt: skip
        self.config, self.policy, self.plan, self.corpus, self.processes = config, policy, settled, corpus, processes
        self.bank, self.pad = bank, policy.tokenizer.pad_token_id
        self.layers = sorted(settled.weights)
        width = policy.base.config.hidden_size
        kind = config.directions if config.objective == "probe" else "random"
        directions = {
            layer: random_direction(width, config.seed, layer) if kind == "random" else
            bank.direction(kind, layer, config.seed)
            for layer in self.layers
        }  # fmt: skip
        # Where non-toxic text lies is measured for a control's direction too, else it would be a weaker loss.
        plain = [r.tokens for r in corpus.labelled if not r.has_attribute and r.split == "train"]
        self.probes = locate(
            policy,
            plain or corpus.neutral,
            directions,
            skip_first=config.skip_first,
            batch_tokens=config.batch_tokens,
        )
        self.phi = self._phi()
        policy.train_edit(select_parameters(policy.model, config.edit_roles, settled.edit_layers))
        own = policy.base_parameters()
        self.parameters = {name: own[name] for name in policy.edit_state()}
        self.neutral_before: list[Tensor] = []

    def _phi(self) -> StateLoss:
        if self.config.objective == "cosine_rmu":
            return lambda h, h0, p: cosine_to(h, p.direction)
        if self.config.objective == "rmu":
            return lambda h, h0, p: mean_square(h, self.config.coefficient * p.norm * p.direction)
        return STATE_LOSSES[self.config.mode]

    # --- the loop --------------------------------------------------------------------------------------

    def loop(self, run: Run, watch: Stopwatch) -> None:
        """Train; with a checkpoint in the run, go on from it bit for bit."""
        config, processes = self.config, self.processes
        optimiser = EditOptimiser(self.parameters, processes, config.lr)
        checkpoint = last_checkpoint(run)
        first, tokens_done = (checkpoint.state["step"], checkpoint.state["tokens"]) if checkpoint else (0, 0)
        if checkpoint:
            self.policy.load_edit_state(checkpoint.weights)
            optimiser.load_state(checkpoint.optimizer)
        if processes.is_main:
            run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= first)
        start = time.monotonic()
        with progress("unlearning", config.steps) as advance:
            advance(first)
            for t in range(first, config.steps):
                began = time.monotonic()
                gradients, facts, spent = self.step_gradient(t)
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
                is_last, stop = t == config.steps - 1, False
                if is_last or (t + 1) % config.measure_every == 0:
                    with watch.timed("measuring"):
                        measured: dict[str, Any] = {"kl": self.neutral_kl()}
                        stop = config.max_kl is not None and measured["kl"] > config.max_kl
                        if stop:
                            assert config.max_kl is not None
                            measured["back"], measured["kl"] = self.step_back(config.max_kl)
                        measured["held_forget"] = self.held_forget()
                        if is_last or stop or (t + 1) % config.probe_every == 0:
                            measured["readable"] = self.readable(run.root)
                    if processes.is_main:
                        run.append_row("metrics.jsonl", {"step": t + 1, "event": "measured", **measured})
                if stop or is_last or (t + 1) % config.checkpoint_every == 0:
                    state = {"step": config.steps if stop else t + 1, "tokens": tokens_done}
                    save_checkpoint(run, self.policy, optimiser, state, whole=False)
                if stop:
                    say(f"KL passed max_kl={config.max_kl} at step {t + 1}; {measured['back']:.3f} of the edit stays")
                    break

    def step_gradient(self, t: int) -> tuple[Gradients, dict[str, float], int]:
        """Gradient of the whole loss at step t, its terms, and the tokens that were read."""
        c = self.config
        total, facts, spent = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}, {}, 0
        pairs: list[Pair] = []
        if c.objective == "dpo" or c.nll_weight:
            at = stream_rows(len(self.corpus.pairs), c.batch_rows, t, c.seed, STREAM_PAIRS)
            pairs = [self.corpus.pairs[i] for i in at]
        terms: list[tuple[str, Sequence[Any], Callable[[list[Any], float], Tensor]]] = []
        if c.objective == "dpo":
            terms.append(("forget", pairs, lambda part, n: c.gamma * self.preference(part) / n))
        else:
            at = stream_rows(len(self.corpus.forget), c.batch_rows, t, c.seed, STREAM_FORGET)
            toxic = [self.corpus.forget[i] for i in at]
            terms.append(("forget", toxic, lambda part, n: c.gamma * self.forget(part, n)))
        if c.alpha or c.beta_kl:
            terms.append(("retain", self.retained(t), self.retain))
        if c.nll_weight:
            civil = [pair.chosen for pair in pairs]
            tokens = sum(len(row.ids) - max(1, row.prompt_tokens) for row in civil)
            terms.append(("nll", civil, lambda part, n: c.nll_weight * nll_share(self.logprobs(part), tokens)))
        for name, rows, loss in terms:
            gradient, value = self.gradient(rows, loss)
            facts[name] = value
            for n in total:
                total[n] += gradient[n]
            spent += sum(_length(row) for row in rows)
        return total, facts, spent

    def retained(self, t: int) -> list[Tokens]:
        """Texts to keep of step t: each kind its share of the batch, from a stream of its own."""
        kinds = [kind for kind in self.corpus.retain if self.config.data.mix.get(kind)] or list(self.corpus.retain)
        shares = np.array([self.config.data.mix.get(kind, 1.0) for kind in kinds])
        shares = shares / shares.sum()
        # Cumulative rounding: shares hold over steps also where a batch is smaller than 1 / share.
        rows: list[Tokens] = []
        for number, (kind, share) in enumerate(zip(kinds, shares, strict=True)):
            done, due = (round(share * self.config.retain_rows * step) for step in (t, t + 1))
            own = self.corpus.retain[kind]
            for place in range(done, due):
                [at] = stream_rows(len(own), 1, place, self.config.seed, STREAM_RETAIN + number)
                rows.append(own[at])
        return rows

    def gradient(self, rows: Sequence[Any], loss: Callable[[list[Any], float], Tensor]) -> tuple[Gradients, float]:
        """Add up the gradients of a batch's parts, over micro-batches and processes; `loss` gets a part and the
        total.
        """
        out = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        value = 0.0
        mine = list(rows[self.processes.rank :: self.processes.world])
        for picked in fill_batches([_length(row) for row in mine], self.config.batch_tokens):
            share = loss([mine[i] for i in picked], float(len(rows)))
            if share.requires_grad:
                found = torch.autograd.grad(share, list(self.parameters.values()), allow_unused=True)
                for n, g in zip(out, found, strict=True):
                    if g is not None:  # a tensor above the last layer that this term reads
                        out[n] += g
            value += float(share.detach())
        if self.processes.world > 1:
            out = {n: self.processes.accelerator.reduce(g, reduction="sum") for n, g in out.items()}
            [value] = self.processes.sum([value])
        return out, value

    # --- the terms -------------------------------------------------------------------------------------

    def batch(self, rows: Sequence[Tokens]) -> TokenRows:
        """Pad texts on this device."""
        return moved(collate_rows(rows, self.pad, self.config.skip_first), self.policy.device)

    def forget(self, rows: list[Tokens], total: float) -> Tensor:
        """sum_l w_l mean(phi(h_l))."""
        needs_frozen = self.config.objective == "probe" and self.config.mode in NEEDS_FROZEN
        batch, weights = self.batch(rows), self.plan.weights
        return forget_share(self.policy, batch, self.probes, weights, self.phi, total, needs_frozen=needs_frozen)

    def retain(self, rows: list[Tokens], total: float) -> Tensor:
        """Drift of states at the loss layers, and of the output."""
        c = self.config
        return retain_share(self.policy, self.batch(rows), self.plan.weights, c.alpha, c.beta_kl, total)

    def logprobs(self, rows: Sequence[Tokens]) -> Tensor:
        """Summed log-probability (B,) of texts after their prompts, in nats."""
        encoded = [[Encoded(row.ids, row.prompt_tokens)] for row in rows]
        return self.policy.scorer(collate(encoded, self.pad, self.policy.device)).logprob

    def preference(self, pairs: list[Pair]) -> Tensor:
        """Sum of DPO losses: civil continuations over rude ones."""
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        with self.policy.reference():
            ref = self.logprobs(sides)
        now, n = self.logprobs(sides), len(pairs)
        tokens = torch.tensor([len(row.ids) - row.prompt_tokens for row in sides], dtype=torch.float32)
        scores = PairScores(now[:n], now[n:], ref[:n], ref[n:], tokens[:n], tokens[n:])
        return sigmoid(scores, LossOptions(beta=self.config.beta)).sum()

    # --- measurements ----------------------------------------------------------------------------------

    def neutral_kl(self) -> float:
        """KL(before || now) on held-out neutral texts, mean over their tokens, in nats."""
        batches = [
            self.batch([self.corpus.neutral[i] for i in picked])
            for picked in fill_batches([len(row.ids) for row in self.corpus.neutral], self.config.batch_tokens)
        ]
        if not self.neutral_before:
            with self.policy.reference():
                self.neutral_before = [self._final(batch) for batch in batches]
        total, count = 0.0, 0.0
        for batch, before in zip(batches, self.neutral_before, strict=True):
            with torch.no_grad():
                now = self._final(batch)
                kl = kl_from_base(self.policy.model, now.flatten(0, 1), before.flatten(0, 1)).view(batch.ids.shape)
            total += float((kl * batch.mask).sum())
            count += float(batch.mask.sum())
        return total / count

    def held_forget(self) -> float | None:
        """The forget term on toxic texts that are only validated on: what is left to do. `None` with `dpo`."""
        if self.config.objective == "dpo":
            return None
        rows = [row.tokens for row in self.corpus.labelled if row.has_attribute and row.split == "validation"]
        with torch.no_grad():
            return sum(
                float(self.forget([rows[i] for i in picked], float(len(rows))))
                for picked in fill_batches([len(row.ids) for row in rows], self.config.batch_tokens)
            )

    def _final(self, batch: TokenRows) -> Tensor:
        return hidden_states(self.policy.model, batch.ids, batch.positions, batch.attention)

    def step_back(self, max_kl: float) -> tuple[float, float]:
        """Shorten the edit on the straight line to the start until its KL is at most `max_kl`; share kept, and KL."""
        return shorten(self.parameters, self.policy.before, self.neutral_kl, max_kl)

    def readable(self, folder: Path) -> dict[str, float]:
        """AUROC on validation texts of probes that are fitted anew to the states as they are now."""
        rows = [
            *[row for row in self.corpus.labelled if row.split == "train"][:: max(1, len(self.corpus.labelled) //
            REFIT_TEXTS)], *[row for row in self.corpus.labelled if row.split == "validation"],
        ]  # fmt: skip
        y, is_train = (
            np.array(column) for column in zip(*((r.has_attribute, r.split == "train") for r in rows), strict=True)
        )
        if not 0 < y[is_train].mean() < 1:
            return {}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".states-") as temporary:
            features = mean_states(
                self.policy, [row.tokens for row in rows], self.layers, Path(temporary),
                skip_first=self.config.skip_first, batch_tokens=self.config.batch_tokens,
            )  # fmt: skip
            out = {}
            for layer, x in features.items():
                x = np.asarray(x, np.float64)
                strength = choose_strength(x[is_train], y[is_train], x[~is_train], y[~is_train])
                out[str(layer)] = round(auroc(fit(x[is_train], y[is_train], strength), x[~is_train], y[~is_train]), 4)
        return out


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
        "judges": [{"role": "check of the start model", "identity": scorer}],
        "probe_corpora": list(corpora_of(config)),
        "start": dict(start),
        "data_licences": licences,
        "unsafe": False,
        "cost": watch.phases,
    }


def _length(row: Tokens | Pair) -> int:
    return len(row.ids) if isinstance(row, Tokens) else max(len(row.chosen.ids), len(row.rejected.ids)) * 2
