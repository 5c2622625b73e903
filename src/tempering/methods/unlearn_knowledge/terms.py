"""The gradient of each term of the objective, summed over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempering.core.activations import RETAIN_LOSSES, cosine, distance, frozen_hinge, masked_mean
from tempering.core.activations import blocks as blocks_of
from tempering.core.bank import Bank
from tempering.core.chat import Encoded, collate, fill_batches
from tempering.core.editing import block_parameters, select_parameters
from tempering.core.logprobs import entropies, hidden_states, kl_from_base, nll_share
from tempering.core.policy import Policy
from tempering.core.probe_losses import NEEDS_FROZEN, STATE_LOSSES, forget_share, retain_share, tensors_of
from tempering.core.probes import Probe, locate
from tempering.core.text_rows import TokenRows, Tokens, collate_rows, moved, read_states
from tempering.core.training import Processes, stream_rows
from tempering.methods.unlearn_knowledge.meta import (
    STREAM_QUERY,
    Attacker,
    Pools,
    capped,
    checkpoint_weights,
    draw_attack,
)
from tempering.methods.unlearn_knowledge.objectives import (
    Target,
    cosine_schedule,
    draw_target,
    forget_tokens,
    needs_frozen,
    npo,
    simnpo,
)
from tempering.methods.unlearn_knowledge.quiz import asked, read_questions
from tempering.methods.unlearn_knowledge.settings import Plan, UnlearnKnowledgeConfig
from tempering.methods.unlearn_knowledge.states import CACHE_BYTES, FrozenStates
from tempering.methods.unlearn_knowledge.texts import Corpus, contrasted

ADAPTER = "unlearn_knowledge"
STREAM_FORGET, STREAM_RETAIN = 100, 2
"""Of the order of texts; topic k has stream 100 + k."""

Gradients = dict[str, Tensor]


def trained(config: UnlearnKnowledgeConfig, policy: Policy, settled: Plan) -> dict[str, torch.nn.Parameter]:
    """The tensors that an edit trains, by name (with `adapter`, those whose layers it would be on)."""
    if not settled.is_whole:
        return select_parameters(policy.model, settled.roles, settled.edit_layers)
    own = {id(p) for i in settled.edit_layers for p in blocks_of(policy.model)[i].parameters()}
    return {name: p for name, p in block_parameters(policy.model).items() if id(p) in own}


class Terms:
    """What trains, where it is driven to, and the gradient of each term of the objective at a step."""

    def __init__(
        self,
        config: UnlearnKnowledgeConfig,
        policy: Policy,
        settled: Plan,
        corpus: Corpus,
        processes: Processes,
        bank: Bank | None = None,
    ) -> None:
        self.config, self.policy, self.plan, self.corpus, self.processes = config, policy, settled, corpus, processes
        self.topics = list(corpus.forget)
        self.weights = dict(zip(settled.loss_layers, settled.weights, strict=True))
        self.probes = {} if bank is None else self._probes(bank)
        if config.adapter:
            policy.add_adapter(ADAPTER, config.adapter, config.seed)
            policy.train_only(ADAPTER)
            reach = {id(p) for i in settled.edit_layers for p in blocks_of(policy.model)[i].parameters()}
            self.parameters = {n: p for n, p in policy.trainable_parameters() if id(p) in reach}
        else:
            policy.train_edit(trained(config, policy, settled))
            self.parameters = policy.edited
        inner: Any = policy.base.config
        self.target: Target = draw_target(config, len(self.topics), inner.hidden_size, inner.vocab_size, policy.dtype)
        self.target = self.target._replace(directions=self.target.directions.to(policy.device))
        self.is_compat = config.compat == "wmdp"
        self.pad = policy.tokenizer.eos_token_id if self.is_compat else policy.tokenizer.pad_token_id
        self.frozen = FrozenStates(policy, settled.layer, config.skip_first, self.pad)
        is_simple = config.reads_states and config.price != "kl" and len(settled.loss_layers) == 1 and not self.probes
        recurs = config.steps * config.retain_rows > len(corpus.retain)
        fits = self.frozen.size(corpus.retain) < CACHE_BYTES
        wanted = recurs and fits if config.cache_reference == "auto" else config.cache_reference
        if is_simple and wanted and not self.is_compat:
            self.frozen.keep(corpus.retain, config.batch_tokens)
        self.frozen_forget = FrozenStates(policy, settled.layer, config.skip_first, self.pad)  # never cached
        self.lengths = self._lengths()
        self.attacker: Attacker | None = None
        if config.objective == "meta_cosine_rmu" and config.meta.weight:
            self.pools = self._pools()
            self.attacker = Attacker(policy, config.meta, self.parameters, settled.layer)

    def rows_of(self, t: int, topic: int) -> tuple[list[Tokens], list[Tokens]]:
        """Texts of step t: to forget, of its topic, and to keep, from streams of their own."""
        c, own = self.config, self.corpus.forget[self.topics[topic]]
        picked = stream_rows(
            len(own), c.batch_rows, t // len(self.topics), c.seed, STREAM_FORGET + topic, shuffle=c.shuffle
        )
        # The released code walks through the retained texts once per topic, in step with those to forget.
        index = t // len(self.topics) if self.is_compat else t
        kept = stream_rows(len(self.corpus.retain), c.retain_rows, index, c.seed, STREAM_RETAIN, shuffle=c.shuffle)
        return [own[i] for i in picked], [self.corpus.retain[i] for i in kept]

    # --- the terms -------------------------------------------------------------------------------------

    def forget_gradient(self, rows: Sequence[Tokens], topic: int, t: int) -> tuple[Gradients, dict[str, float]]:
        """Gradient of gamma times the forget term, and what it is."""
        gamma = self.config.value("gamma")
        if not self.config.reads_states:
            return self.gradient(rows, lambda part, total: gamma * self.output_forget(part, rows), "forget")
        if self.config.objective == "circuit_breakers":
            away, _ = cosine_schedule(t, self.config.steps, self.config.value("alpha"))
            return self.gradient(
                rows, lambda part, total: gamma * away * self.breaker(part, total, is_forget=True), "forget"
            )
        if self.probes:
            return self.gradient(rows, lambda part, total: gamma * self.probed_forget(part, total), "forget")
        return self.gradient(rows, lambda part, total: gamma * self.state_forget(part, total, topic), "forget")

    def retain_gradient(self, rows: Sequence[Tokens], t: int) -> tuple[Gradients, dict[str, float]]:
        """Gradient of alpha times the retain term, and what it is."""
        alpha = self.config.value("alpha")
        if not self.config.reads_states:
            return self.gradient(rows, lambda part, total: alpha * self.token_nll(part, rows), "retain")
        if self.config.objective == "circuit_breakers":
            _, back = cosine_schedule(t, self.config.steps, alpha)
            if not back:
                return {n: torch.zeros_like(p) for n, p in self.parameters.items()}, {"retain": 0.0}
            return self.gradient(
                rows, lambda part, total: back * self.breaker(part, total, is_forget=False), "retain"
            )
        if self.probes:
            beta = self.config.beta_kl
            return self.gradient(
                rows,
                lambda part, total: retain_share(self.policy, self.batch(part), self.weights, alpha, beta, total),
                "retain",
            )
        return self.gradient(rows, lambda part, total: alpha * self.state_retain(part, total), "retain")

    def gradient(
        self,
        rows: Sequence[Tokens],
        loss: Callable[[list[Tokens], float], Tensor],
        name: str,
    ) -> tuple[Gradients, dict[str, float]]:
        """Add up the gradients of a batch's parts, over micro-batches and processes.

        `loss` gets a part and the total of which a mean is taken: texts, or in `compat` positions, pads included.
        """
        total = float(len(rows))
        if self.is_compat:
            total = float(len(rows) * max(len(row.ids) for row in rows))
        out = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        value = 0.0
        mine = list(rows[self.processes.rank :: self.processes.world])
        # The released code pads a batch to its longest text, and counts the pads: its batches are never cut.
        parts = [list(range(len(mine)))] if self.is_compat else fill_batches(
            [len(row.ids) for row in mine], self.config.batch_tokens
        )  # fmt: skip
        for picked in parts:
            share = loss([mine[i] for i in picked], total)
            for n, g in zip(out, torch.autograd.grad(share, list(self.parameters.values())), strict=True):
                out[n] += g
            value += float(share.detach())
        if self.processes.world > 1:
            out = {n: self.processes.accelerator.reduce(g, reduction="sum") for n, g in out.items()}
            [value] = self.processes.sum([value])
        return out, {name: value}

    def batch(self, rows: Sequence[Tokens]) -> TokenRows:
        """Pad texts on this device."""
        found = collate_rows(rows, self.pad, self.config.skip_first, left=self.is_compat, count_pads=self.is_compat)
        return moved(found, self.policy.device)

    def mean(self, x: Tensor, batch: TokenRows, total: float) -> Tensor:
        """This part's share of the step's mean."""
        return masked_mean(x, batch.mask, reduction="token" if self.is_compat else "sequence", total=total)

    def state_forget(self, rows: list[Tokens], total: float, topic: int) -> Tensor:
        """The forget term on states at the loss layer."""
        batch = self.batch(rows)
        h0 = self.frozen_forget.of(rows, batch) if needs_frozen(self.config) else None
        [h] = read_states(self.policy, batch, [self.plan.layer])
        x = forget_tokens(self.config, h, self.target.at(topic, batch.ids), self.lengths[topic], h0)
        return self.mean(x, batch, total)

    def probed_forget(self, rows: list[Tokens], total: float) -> Tensor:
        """The forget term of `probe`: states at several layers, each along its own direction."""
        mode = self.config.mode
        return forget_share(
            self.policy, self.batch(rows), self.probes, self.weights, STATE_LOSSES[mode], total,
            needs_frozen=mode in NEEDS_FROZEN,
        )  # fmt: skip

    def state_retain(self, rows: list[Tokens], total: float) -> Tensor:
        """The retain term: drift of states at the loss layer, or of the output."""
        batch = self.batch(rows)
        if self.config.price == "kl":
            return self.mean(self.kl_tokens(batch), batch, total)
        h0 = self.frozen.of(rows, batch)
        [h] = read_states(self.policy, batch, [self.plan.layer])
        return self.mean(RETAIN_LOSSES[self.config.price](h, h0), batch, total)

    def kl_tokens(self, batch: TokenRows) -> Tensor:
        """KL(before || now) after every token, (B, T)."""
        with self.policy.reference():
            before = hidden_states(self.policy.model, batch.ids, batch.positions, batch.attention)
        now = hidden_states(self.policy.model, batch.ids, batch.positions, batch.attention)
        return kl_from_base(self.policy.model, now.flatten(0, 1), before.flatten(0, 1)).view(batch.ids.shape)

    def breaker(self, rows: list[Tokens], total: float, *, is_forget: bool) -> Tensor:
        """Circuit breakers, before their coefficient: a hinge at two blocks, or drift at all of them."""
        batch, every = self.batch(rows), list(range(len(blocks_of(self.policy.model))))
        layers, price = (self.plan.loss_layers, frozen_hinge) if is_forget else (every, distance)
        with self.policy.reference():
            before = read_states(self.policy, batch, layers)
        now = read_states(self.policy, batch, layers)
        return torch.stack([self.mean(price(h, h0), batch, total) for h, h0 in zip(now, before, strict=True)]).mean()

    def nll(self, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood (B,) of texts, in nats, and their scored tokens."""
        encoded = [[Encoded(row.ids, 0)] for row in rows]
        scores = self.policy.scorer(collate(encoded, self.policy.tokenizer.pad_token_id, self.policy.device))
        return -scores.logprob, scores.tokens

    def token_nll(self, rows: Sequence[Tokens], whole: Sequence[Tokens]) -> Tensor:
        """This part's share of the mean negative log-likelihood a token of a batch."""
        return nll_share(-self.nll(rows)[0], sum(len(row.ids) - 1 for row in whole))

    def output_forget(self, rows: list[Tokens], whole: Sequence[Tokens]) -> Tensor:
        """The forget term of objectives on the output."""
        c, beta = self.config, self.config.value("beta")
        if c.objective == "grad_diff":
            return -self.token_nll(rows, whole)
        nll, tokens = self.nll(rows)
        if c.objective == "npo":
            with self.policy.reference():
                before, _ = self.nll(rows)
            return npo(nll, before, beta).sum() / len(whole)
        return simnpo(nll, tokens, beta, c.delta).sum() / len(whole)

    # --- the simulated attack --------------------------------------------------------------------------

    def meta_gradient(self, t: int, topic: int, limit: float, facts: dict[str, float]) -> Gradients | None:
        """Attack, and return the defender's gradient at the attacked weights; `None` where no attack is due."""
        settings, attacker = self.config.meta, self.attacker
        if attacker is None or t < settings.warmup * self.config.steps:
            return None
        is_persistent = settings.adversary == "persistent"
        # Counted by topic: topics alternate, and every fourth step would always be that of the same one.
        if t // len(self.topics) % settings.every and not is_persistent:
            return None
        pools = self.pools[topic]
        query_at = stream_rows(
            len(pools.query), min(self.config.batch_rows, len(pools.query)), t, self.config.seed, STREAM_QUERY
        )
        query = [pools.query[i] for i in query_at]
        # A persistent attacker is drawn when it is reset, so that its Adam and reach stay with it.
        drawn = t - t % settings.reset_every if is_persistent else t
        attack = draw_attack(settings, self.config.seed, drawn, bool(pools.mcq))
        if not is_persistent or t == drawn or attacker.adam is None:
            attacker.reset(self.config.seed, drawn, attack)
        found = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        if is_persistent:
            self._add_defence(found, query, topic, 1.0, facts)
        weights = checkpoint_weights(settings.checkpoints, settings.steps)
        for j in range(1, 2 if is_persistent else settings.steps + 1):
            step, index = (t - drawn, t) if is_persistent else (j - 1, t * settings.steps + j - 1)
            rows = pools.batch(attack, step, index, self.config.batch_rows, self.config.seed)
            facts["attack"] = attacker.learn(partial(self.token_nll, rows, rows), attack.is_everywhere)
            if not is_persistent and j in weights:
                self._add_defence(found, query, topic, weights[j], facts)
        return capped(found, limit)

    def _add_defence(
        self, found: Gradients, query: list[Tokens], topic: int, weight: float, facts: dict[str, float]
    ) -> None:
        """Add the gradient of the query loss at the attacked weights; every process computes a part of it."""
        assert self.attacker is not None
        mine = query[self.processes.rank :: self.processes.world]
        part: Gradients = {n: torch.zeros_like(g) for n, g in found.items()}
        value = 0.0
        if mine:
            batch = self.batch(mine)
            # Before the attacker is there, who would change what the states were.
            h0 = self.frozen_forget.of(mine, batch) if needs_frozen(self.config) else None
            part, value = self.attacker.defend(lambda: self.query_loss(batch, float(len(query)), topic, h0))
        for n in found:
            g = part[n].float()
            found[n] += weight * (self.processes.accelerator.reduce(g) if self.processes.world > 1 else g)
        [value] = self.processes.sum([value])
        facts["query"] = facts.get("query", 0.0) + weight * value

    def query_loss(self, batch: TokenRows, total: float, topic: int, h0: Tensor | None) -> Tensor:
        """The forget term on texts that the attacker has not seen, less mu_H times the entropy of the output.

        The state is read at one block: an attacker that adapts later ones shows only in the output.
        """
        mu = self.config.meta.entropy
        h, *final = read_states(self.policy, batch, [self.plan.layer], to_end=mu > 0)
        x = forget_tokens(self.config, h, self.target.at(topic, batch.ids), self.lengths[topic], h0)
        if final:
            x = x - mu * entropies(self.policy.model, final[0].flatten(0, 1)).view(x.shape)
        return self.mean(x, batch, total)

    def _pools(self) -> list[Pools]:
        share = self.config.meta.query_share
        support, query = self.corpus.query(share)
        mcq: list[Tokens] = []
        if self.config.data.attack_questions:
            for question in read_questions(self.config.data.attack_questions):
                ids = self.policy.tokenizer("".join(asked(question.question, question.options[question.answer])))[
                    "input_ids"
                ]
                mcq.append(Tokens(question.id, question.id, list(ids)[: self.config.max_retain_length]))
        found = []
        for topic in self.topics:
            both = self.corpus.forget[topic]
            s, q = (both, both) if self.config.meta.share_records else (support[topic], query[topic])
            if not s or not q:
                raise ValueError(
                    f"topic {topic}: {len(both)} text(s) cannot be split into records to attack and to judge "
                    f"(meta.query_share={share}); add records, or set meta.share_records=true"
                )
            found.append(Pools(s, q, self.corpus.retain, mcq))
        return found

    def _probes(self, bank: Bank) -> dict[int, Probe]:
        """The direction of each loss layer, and where states of texts to keep lie to it."""
        c = self.config
        directions = {layer: bank.direction(c.directions, layer, c.seed) for layer in self.plan.loss_layers}
        rows = [
            row.tokens
            for row in contrasted(c, self.policy.tokenizer, self.corpus)
            if row.split == "train" and not row.has_attribute
        ]
        return locate(self.policy, rows, directions, skip_first=c.skip_first, batch_tokens=c.batch_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Where states to forget are driven, for `directions.safetensors`."""
        return tensors_of(self.probes) if self.probes else self.target.tensors()

    # --- odds and ends ---------------------------------------------------------------------------------

    def _lengths(self) -> list[float | None]:
        """The length of the target of each topic; `None` where it is each token's own, or there is none."""
        c = self.config
        if c.objective == "rmu":
            given = c.coefficient if isinstance(c.coefficient, list) else [c.coefficient] * len(self.topics)
            if len(given) != len(self.topics):
                raise ValueError(f"coefficient={given}: expected one for each topic: {', '.join(self.topics)}")
            return list(given)
        if c.objective != "adaptive_rmu" or c.adaptive == "per_token":
            return [None] * len(self.topics)
        lengths: list[float | None] = []
        for topic in range(len(self.topics)):
            rows, _ = self.rows_of(topic, topic)
            batch = self.batch(rows)
            norms = self.frozen_forget.of(rows, batch).float().norm(dim=-1)
            lengths.append(c.scale * float(masked_mean(norms, batch.mask)))
        return lengths

    def drift(self, f_rows: list[Tokens], r_rows: list[Tokens], topic: int) -> dict[str, Any]:
        """Say how states at the loss layer have changed on a batch: mean norm ratio, and cosines to the target."""
        found: dict[str, Any] = {}
        with torch.no_grad():
            for name, rows in (("forget", f_rows), ("retain", r_rows)):
                batch = self.batch(rows)
                h0 = self.frozen_forget.of(rows, batch)
                [h] = read_states(self.policy, batch, [self.plan.layer])
                ratio = h.float().norm(dim=-1) / h0.float().norm(dim=-1).clamp(min=1e-8)
                found[f"norm_ratio_{name}"] = float(masked_mean(ratio, batch.mask))
                if name == "forget" and self.config.reads_states:
                    own = self.probes.get(self.plan.layer)
                    u = self.target.at(topic, batch.ids) if own is None else own.direction
                    toward = cosine(h, u)[batch.mask > 0]
                    found["cosine_histogram"] = torch.histc(toward.cpu(), bins=10, min=-1, max=1).int().tolist()
        return found
