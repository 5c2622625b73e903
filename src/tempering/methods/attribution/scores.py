"""Risks of the candidates of one prompt, from what was measured on them; pure. The lowest risk is selected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tempering.methods.attribution.settings import Aggregate, SelectionConfig

Floats = NDArray[np.float64]
DECIMALS = 6
"""Risks are rounded before ranking, so that equal states tie whatever batch they were computed in."""
WINDOW = (0.35, 0.60)
"""Default layers, as shares of the depth. A choice of ours: single layers have outliers (docs/attribution.md)."""


class Likelihood(NamedTuple):
    """Means over the response tokens of each of N candidates, in nats: (N,) each."""

    nll: Floats
    base_nll: Floats
    kl: Floats
    """KL(model || base), over the whole vocabulary."""
    reverse_kl: Floats
    self_certainty: Floats
    """KL(uniform || model)."""


class Evidence(NamedTuple):
    """What was measured on the N candidates of one prompt. NaN where a candidate could not be scored."""

    prompt_id: str
    tokens: Floats
    """Response tokens, end of turn included: (N,)."""
    similarity: Floats | None = None
    """Cosine, or minus the distance, between the two models' states at the read-out: (N, layers asked for)."""
    likelihood: Likelihood | None = None
    guard: Floats | None = None
    """The guard's probability of harm, 0.5 where it could not tell: (N,)."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compare states in float32, clamped to [-1, 1]; 0 where one is zero. (..., D), (..., D) -> (...).

    Eq. 2 of arXiv:2604.09665. In bfloat16 there are about 26 values between 0.9 and 1, so states are raised first.

    >>> round(float(cosine(torch.tensor([1.0, 2, 2]), torch.tensor([2.0, 1, 2]))), 7)
    0.8888889
    """
    a, b = a.float(), b.float()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    dot = (a * b).sum(-1)
    return torch.where(norms > 0, dot / norms.clamp(min=torch.finfo(torch.float32).tiny), dot).clamp(-1, 1)


def rounded(risk: ArrayLike) -> Floats:
    """Round risks so that what differs by computation alone ties; minus zero is zero."""
    return np.asarray(np.round(np.asarray(risk, dtype=np.float64), DECIMALS) + 0.0, dtype=np.float64)


def ranks(risk: ArrayLike) -> Floats:
    """Rank from 0, the lowest first; ties share their mean rank, NaN come last (and tie).

    >>> ranks([0.3, 0.1, 0.3, float("nan")]).tolist()
    [1.5, 0.0, 1.5, 3.0]
    """
    x = rounded(risk)
    x = np.where(np.isnan(x), np.inf, x)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def rank_fusion(risks: Sequence[ArrayLike]) -> Floats:
    """Add up the ranks that several risks give the same candidates.

    >>> rank_fusion([[0.1, 0.2, 0.3], [3, 1, 2]]).tolist()
    [2.0, 1.0, 3.0]
    """
    return np.sum([ranks(risk) for risk in risks], axis=0)


def window(n: int) -> tuple[int, ...]:
    """The default layers of a model of n blocks: all l with 0.35 n <= l <= 0.60 n, never the embeddings.

    >>> window(30)[0], window(30)[-1]
    (11, 18)
    """
    low, high = (round(share * n, 9) for share in WINDOW)
    return tuple(layer for layer in range(1, n + 1) if low <= layer <= high) or (max(1, round(n / 2)),)


def depth_layer(depth: float, n: int) -> int:
    """The layer at a share of the depth: Python's `round(depth * n)`, which rounds halves to even.

    >>> depth_layer(0.55, 30)
    16
    """
    return round(depth * n)


def over_layers(similarity: ArrayLike, aggregate: Aggregate) -> Floats:
    """Turn (N, layers) into one risk for each candidate: the mean, or the median of the ranks at each layer.

    A layer is read for all candidates or for none, so a candidate with a NaN is NaN.
    """
    s = np.asarray(similarity, dtype=np.float64)
    if aggregate == "mean":
        return s.mean(axis=1)
    found = np.median([ranks(column) for column in s.T], axis=0)
    return np.where(np.isnan(s).any(axis=1), np.nan, found)


def length_beta(risk: ArrayLike, tokens: ArrayLike) -> float:
    """Fit how the risk follows the logarithm of the length within prompts.

    beta = sum (ln L - mean_p)(s - mean_p) / sum (ln L - mean_p)^2, over (P, N), means within the prompt, NaN left
    out; 0 where all lengths are equal.

    >>> round(length_beta([[0.90, 0.96, 0.95]], [[100, 300, 400]]), 7)
    0.0412124
    """
    s, x = np.asarray(risk, dtype=np.float64), np.log(np.asarray(tokens, dtype=np.float64))
    known = np.isfinite(s) & np.isfinite(x)
    n = known.sum(axis=1, keepdims=True).clip(min=1)
    s, x = (np.where(known, v - np.where(known, v, 0).sum(axis=1, keepdims=True) / n, 0.0) for v in (s, x))
    square = float((x * x).sum())
    return float((x * s).sum()) / square if square else 0.0


def residual(risk: ArrayLike, tokens: ArrayLike, beta: float) -> Floats:
    """Take from a risk what the length explains: s - beta ln L."""
    return np.asarray(risk, dtype=np.float64) - beta * np.log(np.asarray(tokens, dtype=np.float64))


def risk(config: SelectionConfig, evidence: Evidence, *, beta: float = 0.0, seed: int = 0) -> Floats:
    """Return the risk of each candidate under `config.scorer`: (N,), not rounded, NaN where it has none.

    `beta` is the card's, for `residual`; `random` is keyed by (seed, prompt).

    Raises:
        RuntimeError: the evidence lacks what the scorer reads.
    """
    if config.scorer == "rank_fusion":
        found = rank_fusion([_plain(name, config, evidence, beta, seed) for name in config.fuse])
    else:
        found = _plain(config.scorer, config, evidence, beta, seed)
    return -found if config.reverse else found


def _plain(name: str, config: SelectionConfig, evidence: Evidence, beta: float, seed: int) -> Floats:
    n = len(evidence.tokens)
    if name == "first":
        return np.zeros(n)
    if name == "random":
        key = hashlib.sha256(f"random:{seed}:{evidence.prompt_id}".encode("utf-8", "surrogatepass")).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big"))).random(n)
    if name == "length":
        return np.asarray(evidence.tokens, dtype=np.float64)
    if name == "guard":
        return _there(evidence.guard, name)
    if name == "latent":
        found = over_layers(_there(evidence.similarity, name), config.aggregate)
        return residual(found, evidence.tokens, beta) if config.residual else found
    if evidence.likelihood is None:
        raise RuntimeError(f"scorer {name} reads likelihoods, which were not computed")
    return likelihood_risk(name, evidence.likelihood, config)


def likelihood_risk(name: str, found: Likelihood, config: SelectionConfig) -> Floats:
    """`kl` and `self_certainty` are better when larger, perplexity when smaller (their directions in the paper)."""
    table: Mapping[str, Floats] = {
        "kl": -(found.kl if config.direction == "forward" else found.reverse_kl),
        "perplexity": np.exp(found.nll if config.of == "model" else found.base_nll),
        "self_certainty": -found.self_certainty,
    }
    return table[name]


def _there(values: Floats | None, name: str) -> Floats:
    if values is None:
        raise RuntimeError(f"scorer {name} reads values that were not computed")
    return values
