"""The game of AdvGame as a table: every expectation exact, the losses those of the package. Shared by its tests.

One seed of each class, half of the weight each; two attacks on it; three answers: comply, deflect, refuse. In `T1`
each class has attacks of its own, in `T2` both reach the attack s, and the defender cannot know from which. All
starts and both games are played at once: logits of the defender are (S, G, X, Y), of the attacker (S, G, C, K).
"""

from typing import NamedTuple

import torch

from tempering.methods.advgame import losses

T1, T2 = 0, 1
HARMFUL, BENIGN = 0, 1
COMPLY, DEFLECT, REFUSE = 0, 1, 2
R_DEF = torch.tensor([[0, 2, 1], [2, 1, 0]], dtype=torch.float64)  # (C, Y)
R_ATT = torch.tensor([[2, 0.5, 0], [0, 0.5, 2]], dtype=torch.float64)
ANSWERS = {
    "h0": (0.5, 0.2, 0.3), "h1": (0.9, 0.05, 0.05), "b0": (0.9, 0.05, 0.05), "b1": (0.2, 0.2, 0.6),
    "s": (0.4, 0.2, 0.4),
}  # fmt: skip
ATTACKS = (("h0", "h1", "b0", "b1"), ("h0", "s", "b0", "s"))
"""Of each game, by place; the last of T2 is never reached."""
REACH = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 1]]]), 4).double()  # (G, C, K, X)
LOG_PI_REF = torch.tensor([[ANSWERS[x] for x in game] for game in ATTACKS], dtype=torch.float64).log()[None]
LOG_RHO_REF = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64).log()
BETA = 1.0
FIRST, SECOND = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T


class Players(NamedTuple):
    """Logits of both."""

    defender: torch.Tensor
    attacker: torch.Tensor


def start(copies=0, seed=0):
    """The reference, and so many copies of it with N(0, 1) added to the logits."""
    draw = torch.Generator().manual_seed(seed)
    d, a = LOG_PI_REF.repeat(copies + 1, 1, 1, 1), LOG_RHO_REF.repeat(copies + 1, 1, 1, 1)
    for logits in (d, a):
        logits[1:] += torch.randn(logits[1:].shape, generator=draw, dtype=torch.float64)
    return Players(d, a)


class Payoffs(NamedTuple):
    """What the samplers' play makes of each choice."""

    weight: torch.Tensor
    """(S, G, X, C): how often an attack is seen, from a seed of this class."""
    defender: torch.Tensor
    """(S, G, X, Y): mean reward of an answer, given the attack."""
    attacker: torch.Tensor
    """(S, G, C, K): mean reward of an attack."""
    prefers_answer: torch.Tensor
    """(S, G, X, Y, Y): how often the judge takes the first."""
    prefers_attack: torch.Tensor
    """(S, G, C, 2): that it takes the first attack, or the second."""


def beats(reward, deterministic):
    """How often a judge prefers i to j: Bradley-Terry, or always the better one; equal rewards make no pair."""
    gap = reward[..., :, None] - reward[..., None, :]
    return (gap > 0).double() if deterministic else torch.sigmoid(gap)


def payoffs(sampler, deterministic=False):
    pi, rho = sampler.defender.softmax(-1), sampler.attacker.softmax(-1)
    weight = torch.einsum("sgck,gckx->sgxc", rho, REACH) / 2
    posterior = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    seen = torch.einsum("sgxy,gckx->sgcky", pi, REACH)
    first = torch.einsum("sgcy,sgcz,cyz->sgc", seen[..., 0, :], seen[..., 1, :], beats(R_ATT, deterministic))
    other = torch.einsum("sgcy,sgcz,czy->sgc", seen[..., 0, :], seen[..., 1, :], beats(R_ATT, deterministic))
    return Payoffs(
        weight, posterior @ R_DEF, (seen * R_ATT[:, None]).sum(-1),
        torch.einsum("sgxc,cyz->sgxyz", posterior, beats(R_DEF, deterministic)), torch.stack([first, other], -1),
    )  # fmt: skip


def exploitability(players):
    """What the best answers to the present play would gain: of the defender, and of the attacker. (S, G)."""
    pi, rho, found = players.defender.softmax(-1), players.attacker.softmax(-1), payoffs(players)
    value = found.weight @ R_DEF  # (S, G, X, Y)
    defender = (value.amax(-1) - (pi * value).sum(-1)).sum(-1)
    attacker = (found.attacker.amax(-1) - (rho * found.attacker).sum(-1)).mean(-1)
    return defender + attacker


def pair_objective(name, players, sampler, reference, deterministic):
    """Per attack sum_{i != j} mu_i mu_j P_ij loss(Delta_ij), and the same of the attacks of each seed."""
    found = payoffs(sampler, deterministic)
    lp, ref = ([p.defender.log_softmax(-1), p.attacker.log_softmax(-1)] for p in (players, reference))
    mu, rho = sampler.defender.softmax(-1), sampler.attacker.softmax(-1)
    weights = (
        mu[..., FIRST] * mu[..., SECOND] * found.prefers_answer[..., FIRST, SECOND],
        rho.prod(-1, keepdim=True) * found.prefers_attack,
    )

    def sides(parts):
        d, a = parts
        return (torch.cat([d[..., i].flatten(), a[..., k].flatten()]) for i, k in ((FIRST, [0, 1]), (SECOND, [1, 0])))

    s = losses.sums(*sides(lp), *sides(torch.broadcast_tensors(r, p)[0] for r, p in zip(ref, lp, strict=True)))
    return (torch.cat([w.flatten() for w in weights]) * losses.pair_loss(name, s, BETA)).sum()


def gradient_objective(estimator, players, sampler, reference):
    """The policy gradient's loss in expectation over the sampler: each choice a rollout of one token."""
    found = payoffs(sampler)
    rows = []
    for logits, own, ref, reward in zip(players, sampler, reference, (found.defender, found.attacker), strict=True):
        mu = own.softmax(-1)
        advantage = reward - (mu * reward).sum(-1, keepdim=True)
        parts = (logits.log_softmax(-1), own.log_softmax(-1), ref.log_softmax(-1).expand_as(own), advantage, mu)
        rows.append([part.flatten() for part in parts])
    lp, own, ref, advantage, share = (torch.cat(part) for part in zip(*rows, strict=True))
    mask = torch.ones(len(lp), 1, dtype=torch.bool)
    return losses.grpo(
        lp[:, None], own[:, None], ref[:, None], advantage, share, mask, BETA, estimator=estimator
    ).loss


def gradients(algorithm, players, sampler, reference, deterministic=False):
    free = Players(*(logits.clone().requires_grad_() for logits in players))
    if algorithm in ("dpo", "ipo"):
        objective = pair_objective(algorithm, free, sampler, reference, deterministic)
    else:
        objective = gradient_objective(algorithm, free, sampler, reference)
    return Players(*torch.autograd.grad(objective, free))


def play(algorithm, players, updates, *, decay=None, deterministic=False, marks=()):
    """Plain gradient descent of both players at once; returns them, and exploitability after the updates in `marks`.

    `algorithm`: `dpo`, `ipo`, or the estimator of a policy gradient's KL (`k2`, `k3`). `decay`: samplers, references
    are averages of the logits; else the samplers are the players, and the reference is fixed. Where nothing moves any
    more the rest of the updates would change nothing.
    """
    lr = 0.2 if algorithm == "ipo" else 0.5
    fixed = Players(LOG_PI_REF, LOG_RHO_REF)
    average, seen = players, {}
    for t in range(1, updates + 1):
        sampler, reference = (players, fixed) if decay is None else (average, average)
        step = gradients(algorithm, players, sampler, reference, deterministic)
        players = Players(*(p - lr * g for p, g in zip(players, step, strict=True)))
        if decay is not None:
            average = Players(*(decay * a + (1 - decay) * p for a, p in zip(average, players, strict=True)))
        elif max(float(g.abs().max()) for g in step) < 5e-6:
            break
        if t in marks:
            seen[t] = exploitability(players)
    return players, seen
