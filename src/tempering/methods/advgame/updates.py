"""One player's update: its pairs (or samples) scored under itself and its reference, the loss, one optimiser step.

    L = sum_c w_c mean(loss over the class's pairs) / sum of the w_c that have pairs

The reference is scored first, without gradient, then one micro-batch after the other has its gradient taken. Also
measured on the way: how far the player is from its start and from its average, on what it is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempering.core.chat import Encoded, TokenBatch, collate, encode_prompt, group_length
from tempering.core.policy_gradient import kl_k3
from tempering.core.preference import PairScores
from tempering.core.records import content_id
from tempering.core.training import Optimisation, generator, step_batches
from tempering.data.attacker import Category
from tempering.methods.advgame.losses import advantages, class_weights, grpo, pair_loss, row_shares
from tempering.methods.advgame.networks import Weights
from tempering.methods.advgame.pairs import Pair, Response, Tree, build_pairs
from tempering.methods.advgame.players import Player
from tempering.methods.advgame.rollout import Dealer
from tempering.methods.advgame.settings import AdvGameConfig, Role

CHECKS = 8
"""Stream of the draws of what is computed again; 7 is that of opponents."""
CHECKED, MOST_GAP = 0.01, 0.05


class Example(NamedTuple):
    """What is trained on: the two sides of a pair, or one sample with its advantage."""

    sides: tuple[Encoded, ...]
    category: Category
    row: Mapping[str, Any]
    """What `data/pairs.jsonl` says of it."""
    advantage: float = 0.0
    share: float = 0.0
    """Of a sample: what it counts within its class."""
    sampled: tuple[float, ...] = ()
    """Log-probabilities, in nats, of the tokens of all sides as they were sampled, where they are kept."""


class Prompts:
    """Tokenizes what players were asked, once each."""

    def __init__(self, dealer: Dealer) -> None:
        self.dealer = dealer
        self._known: dict[tuple[int, str], list[int]] = {}

    def of(self, role: Role, tree: Tree, attack: int | None) -> tuple[str, list[int]]:
        """The user turn of a node, and the tokens that its completion continues."""
        if attack is None:
            text = self.dealer.instruction(tree.category, tree.seed)
        else:
            text = tree.attacks[attack].attack.prompt or ""
        policy = self.dealer.seats.of(role).policy
        key = (id(policy), text)
        if key not in self._known:
            self._known[key] = encode_prompt(policy.tokenizer, [{"role": "user", "content": text}])
        return text, self._known[key]


def lesson(config: AdvGameConfig, prompts: Prompts, trees: Sequence[Tree], role: Role, step: int) -> list[Example]:
    """Make what a role learns from: pairs, or with loss=grpo every sample that has a reward."""
    if config.loss == "grpo":
        return _samples(config, prompts, trees, role, step)
    found: list[Example] = []
    for tree in trees:
        made = build_pairs(tree, config.judges.tie_margin)
        pairs = made.defender if role == "defender" else [made.attacker] if made.attacker else []
        found += [_pair_example(config, prompts, tree, pair, role, step) for pair in pairs]
    return found


def _pair_example(config: AdvGameConfig, prompts: Prompts, tree: Tree, pair: Pair, role: Role, step: int) -> Example:
    text, prompt = prompts.of(role, tree, pair.attack)
    chosen, rejected = (Encoded([*prompt, *ids], len(prompt)) for ids in (pair.chosen_ids, pair.rejected_ids))
    key = content_id(config.seed, step, tree.category, tree.seed_id, role, pair.attack)
    is_flipped = config.labels == "shuffled" and int(key, 16) % 2 == 1
    nodes: Sequence[Response] = (
        [node.attack for node in tree.attacks] if pair.attack is None else tree.attacks[pair.attack].responses
    )
    row = {
        "prompt": text, "chosen": nodes[pair.chosen].text, "rejected": nodes[pair.rejected].text, "player": role,
        "step": step, "class": tree.category, "seed_id": tree.seed_id, "attack": pair.attack,
        "rewards": list(pair.rewards), "statuses": list(pair.statuses),
    }  # fmt: skip
    # The rejected side may have been cut.
    sampled = [nodes[pair.chosen].logprobs, nodes[pair.rejected].logprobs[: len(pair.rejected_ids)]]
    if is_flipped:
        row |= {"chosen": row["rejected"], "rejected": row["chosen"], "is_flipped": True}
        chosen, rejected, sampled = rejected, chosen, sampled[::-1]
    return Example((chosen, rejected), tree.category, row, sampled=(*sampled[0], *sampled[1]))


def _samples(config: AdvGameConfig, prompts: Prompts, trees: Sequence[Tree], role: Role, step: int) -> list[Example]:
    """Groups are seeds (attacker) or attacks (defender); advantages are of one class."""
    found: list[Example] = []
    for category in config.data.classes:
        groups: list[tuple[Tree, int | None, Sequence[Response]]] = []
        for tree in (tree for tree in trees if tree.category == category):
            if role == "attacker":
                groups.append((tree, None, [node.attack for node in tree.attacks]))
            else:
                groups += [(tree, a, node.responses) for a, node in enumerate(tree.attacks)]
        if not groups:
            continue
        nan = float("nan")
        reward = torch.tensor([[nan if n.reward is None else n.reward for n in nodes] for _, _, nodes in groups])
        valid = ~reward.isnan()
        advantage = advantages(reward, valid, config.grpo.baseline)
        counted = valid & (reward >= 0) if config.grpo.mask_invalid else valid
        share = row_shares(counted)
        for g, i in counted.nonzero().tolist():
            tree, attack, nodes = groups[g]
            if not nodes[i].token_ids:
                continue
            text, prompt = prompts.of(role, tree, attack)
            row = {
                "prompt": text, "completion": nodes[i].text, "player": role, "step": step, "class": category,
                "seed_id": tree.seed_id, "attack": attack, "rewards": [float(reward[g, i])],
                "statuses": [nodes[i].status], "advantage": float(advantage[g, i]),
            }  # fmt: skip
            side = Encoded([*prompt, *nodes[i].token_ids], len(prompt))
            points, weight = float(advantage[g, i]), float(share[g, i])
            found.append(Example((side,), category, row, points, weight, nodes[i].logprobs))
    return found


@dataclass
class Told:
    """Sums over an update's completions."""

    loss: float = 0.0
    delta: float = 0.0
    correct: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    completions: int = 0
    kl: dict[Weights, float] = field(default_factory=dict)


def update(
    config: AdvGameConfig,
    player: Player,
    optimisation: Optimisation,
    examples: Sequence[Example],
    t: int,
    *,
    sampler: Weights,
    reference: Weights,
    measures: bool,
) -> dict[str, float]:
    """Take one optimiser step on what a player learned; nothing happens where that is nothing. Returns metrics.

    Raises:
        RuntimeError: the gradient is not finite.
    """
    if not examples:
        return {}
    policy = player.policy
    counts: dict[str, int] = {c: sum(e.category == c for e in examples) for c in config.data.classes}
    if config.loss == "grpo":  # shares add up to one within a class
        counts = dict.fromkeys((c for c, n in counts.items() if n), 1)
    weights = class_weights(counts, dict[str, float](config.class_weights.items()))
    rows = [policy.groups(example.sides) for example in examples]
    lengths = [len(groups) * max(map(group_length, groups)) for groups in rows]
    micros = [
        (
            [examples[j] for j in micro.rows],
            collate([g for j in micro.rows for g in rows[j]], policy.tokenizer.pad_token_id, policy.device),
        )
        for micro in step_batches(lengths, config.batch_tokens)
    ]
    kept: list[Tensor] | None = None
    if config.rollout.logprobs:
        kept = [torch.tensor([lp for e in part for lp in e.sampled], device=policy.device) for part, _ in micros]
    is_there = sampler == "initial" or not config.rollout.staleness  # what sampled is still as it was
    is_reference = kept is not None and is_there and sampler == reference
    wanted: set[Weights] = {reference} | ({"ema", "initial"} if measures else set())
    wanted |= {sampler} if config.loss == "grpo" and kept is None else set()
    batches = [batch for _, batch in micros]
    scored = {name: kept if kept and is_reference and name == reference else _scored(player, name, batches)
              for name in sorted(wanted)}  # fmt: skip
    facts = _gap(config, player, sampler, kept, batches, t) if kept and is_there else {}
    total = sum(len(batch.target) for batch in batches)
    told = Told(kl=dict.fromkeys(sorted(wanted & {"ema", "initial"}), 0.0))
    with player.training():
        for m, (part, batch) in enumerate(micros):
            lp, entropy = _now(config, player, batch)  # (P,) completion after completion
            old = {name: scores[m] for name, scores in scored.items()}
            if config.loss == "grpo":
                drawn = kept[m] if kept else old[sampler]
                loss = _grpo_share(config, part, batch, lp, drawn, old[reference], weights)
            else:
                loss = _pair_share(config, part, batch, lp, old[reference], weights, told)
            if entropy is not None:
                loss = loss - config.entropy_scale * entropy.sum() / total
            optimisation.backward(loss)
            told.loss += float(loss.detach())
            told.nats -= float(lp.detach().sum())
            told.tokens += len(lp)
            told.completions += len(batch.lengths)
            for name in told.kl:
                told.kl[name] += float(kl_k3(lp.detach(), old[name]).sum())
    result = optimisation.step(t)
    n = len(examples)
    facts |= {
        "loss": told.loss, "lr": result.lr, "grad_norm": result.grad_norm, "entropy_nats": told.nats / told.tokens,
        "length": told.tokens / told.completions,
        **{f"kl_{name}_nats": value / told.tokens for name, value in told.kl.items()},
    }  # fmt: skip
    if config.loss != "grpo":
        facts |= {"delta": told.delta / n, "accuracy": told.correct / n}
    return facts


def _gap(
    config: AdvGameConfig,
    player: Player,
    sampler: Weights,
    kept: Sequence[Tensor],
    batches: Sequence[TokenBatch],
    t: int,
) -> dict[str, float]:
    """Compute `CHECKED` of what was kept again, of the first update some; returns how far it is off, in nats a token.

    Raises:
        RuntimeError: by more than `MOST_GAP`.
    """
    drawn = generator(config.seed, CHECKS, t).random(len(batches)) < CHECKED
    places = [m for m in range(len(batches)) if drawn[m] or (t == 0 and m == 0)]
    if not places:
        return {}
    again = _scored(player, sampler, [batches[m] for m in places])
    gap = float(torch.cat([(kept[m] - lp).abs() for m, lp in zip(places, again, strict=True)]).mean())
    if gap > MOST_GAP:
        raise RuntimeError(
            f"log-probabilities as sampled differ from those computed by {gap:.3f} nats a token (limit {MOST_GAP}); "
            "set rollout.logprobs=false"
        )
    return {"sampled_gap_nats": gap}


def _now(config: AdvGameConfig, player: Player, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the tokens, and with a bonus for it the entropy at each."""
    scorer = player.policy.scorer
    return scorer.with_entropies(batch) if config.entropy_scale else (scorer.by_token(batch), None)


def _scored(player: Player, weights: Weights, batches: Sequence[TokenBatch]) -> list[Tensor]:
    with player.playing(weights), torch.no_grad():
        return [player.policy.scorer.by_token(batch) for batch in batches]


def _pair_share(
    config: AdvGameConfig,
    part: Sequence[Example],
    batch: TokenBatch,
    lp: Tensor,
    ref: Tensor,
    weights: Mapping[str, float],
    told: Told,
) -> Tensor:
    sides = torch.stack([x.sum() for x in lp.split(batch.lengths)]).unflatten(0, (-1, 2))  # (B, 2): chosen, rejected
    ref_sides = torch.stack([x.sum() for x in ref.split(batch.lengths)]).unflatten(0, (-1, 2))
    tokens = torch.tensor(batch.lengths, dtype=torch.float32, device=lp.device).unflatten(0, (-1, 2))
    s = PairScores(sides[:, 0], sides[:, 1], ref_sides[:, 0], ref_sides[:, 1], tokens[:, 0], tokens[:, 1])
    delta = s.delta.detach()
    told.delta += float(delta.sum())
    told.correct += float((delta > 0).sum())
    weight = torch.tensor([weights[e.category] for e in part], device=lp.device)
    if config.loss == "sft":
        return -(weight * s.chosen / s.chosen_tokens).sum()
    assert config.loss != "grpo"
    return (weight * pair_loss(config.loss, s, config.beta, config.nll_scale)).sum()


def _grpo_share(
    config: AdvGameConfig,
    part: Sequence[Example],
    batch: TokenBatch,
    lp: Tensor,
    sampler: Tensor,
    ref: Tensor,
    weights: Mapping[str, float],
) -> Tensor:
    def by_row(flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(batch.lengths)), batch_first=True)

    width = torch.arange(max(batch.lengths), device=lp.device)
    mask = width[None] < torch.tensor(batch.lengths, device=lp.device)[:, None]
    advantage = torch.tensor([e.advantage for e in part], device=lp.device)
    share = torch.tensor([weights[e.category] * e.share for e in part], device=lp.device)
    terms = grpo(by_row(lp), by_row(sampler), by_row(ref), advantage, share, mask, config.beta, cap=config.grpo.cap)
    return terms.loss


def tree_metrics(config: AdvGameConfig, trees: Sequence[Tree]) -> dict[str, Any]:
    """What happened in some trees: statuses, rewards and wins of each seat and class, lengths, dispersion."""
    found: dict[str, Any] = {}
    for category in config.data.classes:
        own = [tree for tree in trees if tree.category == category]
        attacks = [node.attack for tree in own for node in tree.attacks]
        answers = [response for tree in own for node in tree.attacks for response in node.responses]
        for role, nodes in (("attacker", attacks), ("defender", answers)):
            name = f"{role}/{category}"
            rewards = [n.reward for n in nodes if n.reward is not None]
            scores = [n.reward for n in nodes if n.status == "OK" and n.reward is not None]
            for status in sorted({n.status for n in nodes}):
                found[f"{name}/status/{status}"] = sum(n.status == status for n in nodes)
            if rewards:
                found[f"{name}/reward"] = float(np.mean(rewards))
            if scores:
                found[f"{name}/win"] = float(np.mean([score > 5 for score in scores]))
            written = [len(n.token_ids) for n in nodes if n.finish is not None]
            if written:
                found[f"{name}/tokens"] = float(np.mean(written))
        if config.rollout.attacks > 1 and attacks:
            found[f"attacker/{category}/dispersion"] = _dispersion(own)
    return found


def benign_compliance(trees: Sequence[Tree]) -> tuple[int, int]:
    """Of the judged answers to benign attacks, how many comply (5 points or more), of how many."""
    scores = [
        r.score
        for t in trees
        if t.category == "benign"
        for n in t.attacks
        for r in n.responses
        if r.score is not None
    ]
    return sum(score >= 5 for score in scores), len(scores)


def _dispersion(trees: Sequence[Tree]) -> float:
    """Mean share of words by which two attacks on one seed differ (one minus Jaccard); 0 where all are equal."""
    gaps = []
    for tree in trees:
        words = [set(node.attack.text.lower().split()) for node in tree.attacks]
        for i in range(len(words)):
            for j in range(i):
                union = words[i] | words[j]
                gaps.append(1 - len(words[i] & words[j]) / len(union) if union else 0.0)
    return float(np.mean(gaps)) if gaps else 0.0
