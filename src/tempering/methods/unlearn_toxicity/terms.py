"""What unlearning of toxicity minimises at a step, and what it measures; no loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.core.activations import cosine_to, mean_square, norm_guard
from tempering.core.bank import FOLDER, Bank
from tempering.core.chat import Encoded, collate, fill_batches
from tempering.core.editing import select_parameters, shorten
from tempering.core.logprobs import hidden_states, kl_from_base, nll_share
from tempering.core.policy import Policy, load_tensors, save_tensors
from tempering.core.preference import LossOptions, PairScores, sigmoid
from tempering.core.probe_losses import (
    NEEDS_FROZEN,
    STATE_LOSSES,
    StateLoss,
    forget_share,
    given,
    probes_of,
    retain_share,
    tensors_of,
)
from tempering.core.probes import (
    Array,
    Fit,
    Probe,
    auroc,
    choose_strength,
    difference_of_means,
    fit,
    locate,
    mean_states,
    permuted,
    random_direction,
)
from tempering.core.run import Run
from tempering.core.text_rows import TokenRows, Tokens, collate_rows, moved, read_states
from tempering.core.training import Processes, stream_rows
from tempering.methods.unlearn_toxicity.settings import Plan, UnlearnToxicityConfig
from tempering.methods.unlearn_toxicity.texts import Corpus, Pair

STREAM_FORGET, STREAM_RETAIN, STREAM_PAIRS = 1, 2, 20
REFIT_TEXTS = 200
GUARD_TEXTS = 32
"""Texts of each sort whose norms are compared with what they were."""

Gradients = dict[str, Tensor]


class Unlearning:
    """What trains, along which directions, the terms of a step, and what is measured of it."""

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
        self.probes = self._located(directions)
        self.earlier: list[dict[int, Probe]] = []
        self.phi = self._phi()
        policy.train_edit(select_parameters(policy.model, config.edit_roles, settled.edit_layers))
        own = policy.base_parameters()
        self.parameters = {name: own[name] for name in policy.edit_state()}
        self.neutral_before: list[Tensor] = []

    def _located(self, directions: Mapping[int, Array]) -> dict[int, Probe]:
        """Probes along these directions, and where non-toxic text lies now.

        That is measured for a control's direction too, else it would be a weaker loss.
        """
        plain = [r.tokens for r in self.corpus.labelled if not r.has_attribute and r.split == "train"]
        return locate(
            self.policy, plain or self.corpus.neutral, directions, skip_first=self.config.skip_first,
            batch_tokens=self.config.batch_tokens,
        )  # fmt: skip

    def _phi(self) -> StateLoss:
        c = self.config
        phi = STATE_LOSSES[c.mode]
        if c.objective == "cosine_rmu":
            phi = lambda h, h0, p: cosine_to(h, p.direction)  # noqa: E731
        elif c.objective == "rmu":
            phi = lambda h, h0, p: mean_square(h, c.coefficient * p.norm * p.direction)  # noqa: E731
        if not c.norm_guard:
            return phi
        return lambda h, h0, p: phi(h, h0, p) + c.norm_guard * norm_guard(h, given(h0))

    @property
    def rounds_done(self) -> int:
        """Rounds of probes that are over."""
        return len(self.earlier)

    def begin_round(self, run: Run) -> dict[str, float]:
        """Go on along probes of the states as they are now, fitted at the same blocks; returns their AUROC.

        Kept in the run: one that is resumed takes up the same. The main process fits, all get the same.
        """
        file = run.root / FOLDER / f"round-{self.rounds_done + 2}.safetensors"
        if self.processes.is_main and not file.is_file():
            directions, worth = self._refitted(run.root)
            aurocs = {f"{layer}.auroc": torch.tensor(value) for layer, value in worth.items()}
            save_tensors(file, {**tensors_of(self._located(directions)), **aurocs})
        self.processes.wait()
        tensors = load_tensors(file)
        self.earlier.append(self.probes)
        self.probes = probes_of(tensors, self.policy.device)
        return {str(layer): round(float(tensors[f"{layer}.auroc"]), 4) for layer in self.layers}

    def _refitted(self, folder: Path) -> tuple[dict[int, Array], dict[int, float]]:
        """Directions of the next round, of the kind of the first ones, and their AUROC on validation texts."""
        c, seed = self.config, self.config.seed + self.rounds_done + 1
        rows = [row for row in self.corpus.labelled if row.split in ("train", "validation")]
        y, is_train = (np.array(x) for x in zip(*((r.has_attribute, r.split == "train") for r in rows), strict=True))
        groups = [row.tokens.record for row in rows if row.split == "train"]
        labels = y[is_train]
        if c.directions == "shuffled":
            labels = permuted(labels, groups, np.random.default_rng([seed, 3]))
        directions, worth = {}, {}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".states-") as temporary:
            features = mean_states(
                self.policy, [row.tokens for row in rows], self.layers, Path(temporary), skip_first=c.skip_first,
                batch_tokens=c.batch_tokens,
            )  # fmt: skip
            for layer, states in features.items():
                x, held, held_y = np.asarray(states[is_train], np.float64), states[~is_train], y[~is_train]
                found = Fit(random_direction(x.shape[1], seed, layer), 0.0)
                if c.directions == "diff_of_means":
                    found = difference_of_means(x, labels)
                elif c.directions != "random":
                    found = fit(x, labels, choose_strength(x, y[is_train], held, held_y))
                directions[layer], worth[layer] = found.direction, auroc(found, held, held_y)
        return directions, worth

    def tensors(self) -> dict[str, Tensor]:
        """Directions and statistics for `directions.safetensors`; of earlier rounds directions alone."""
        old = {
            f"{layer}.round{n}.direction": p.direction.cpu()
            for n, probes in enumerate(self.earlier, 1)
            for layer, p in probes.items()
        }
        return {**tensors_of(self.probes), **old}

    # --- a step ----------------------------------------------------------------------------------------

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
        c = self.config
        needs_frozen = c.norm_guard > 0 or (c.objective == "probe" and c.mode in NEEDS_FROZEN)
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

    def norm_ratios(self) -> dict[str, float]:
        """Norm of states at the loss layers over what it was before, mean over tokens of toxic and of neutral texts.

        Of the layers the one that is farthest from 1. Losses of angles leave norms free.
        """
        held = [r.tokens for r in self.corpus.labelled if r.has_attribute and r.split == "validation"]
        out = {}
        for name, rows in (("forget", held), ("retain", self.corpus.neutral)):
            sums, count = torch.zeros(len(self.layers)), 0.0
            rows = rows[:GUARD_TEXTS]
            for picked in fill_batches([len(row.ids) for row in rows], self.config.batch_tokens):
                batch = self.batch([rows[i] for i in picked])
                with torch.no_grad():
                    now = read_states(self.policy, batch, self.layers)
                    with self.policy.reference():
                        before = read_states(self.policy, batch, self.layers)
                for i, (h, h0) in enumerate(zip(now, before, strict=True)):
                    ratio = h.float().norm(dim=-1) / h0.float().norm(dim=-1).clamp(min=1e-8)
                    sums[i] += float((ratio * batch.mask).sum())
                count += float(batch.mask.sum())
            if count:
                farthest = int((sums / count).clamp(min=1e-8).log().abs().argmax())
                out[f"norm_ratio_{name}"] = round(float(sums[farthest]) / count, 4)
        return out

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


def _length(row: Tokens | Pair) -> int:
    return len(row.ids) if isinstance(row, Tokens) else max(len(row.chosen.ids), len(row.rejected.ids)) * 2
