"""Linear probes of an attribute, one per block: directions, what they are worth, and where states without it lie.

Used by objectives that move states along such directions; refuses to know what the attribute is. Blocks count from 0.

A probe is a logistic regression on the mean state of a text. Directions are unit vectors in the space of the states
and point towards the attribute. What a probe is worth is told by its AUROC on held-out groups, by how stable its
direction is when groups are resampled, and by what probes of permuted labels reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from tempering.core.activations import capture
from tempering.core.chat import fill_batches
from tempering.core.logprobs import hidden_states
from tempering.core.policy import Policy
from tempering.core.progress import Advance
from tempering.core.text_rows import Tokens, collate_rows, moved, read_states

Array = NDArray[Any]
Direction = Literal["probe", "random", "shuffled", "diff_of_means"]
"""What a layer's direction is: the probe's, or a control's."""
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Inverse strengths of the penalty that are tried, by log-loss on validation texts."""
AUROC_SLACK, STABILITY, DEPTH = 0.02, 0.7, (0.2, 0.8)
"""Which layers may be chosen: this close to the best AUROC, this stable, at this share of the depth."""


class Labelled(NamedTuple):
    """A text with its label; `tokens.record` is its group, which is never split."""

    tokens: Tokens
    has_attribute: bool
    split: Literal["train", "validation", "test", "other"]
    """`other`: of another data set, for the AUROC out of distribution."""


class Fit(NamedTuple):
    """A unit direction (D,) and a bias: the logit of a state h over ||w|| is <h, direction> + bias."""

    direction: Array
    bias: float


@dataclass(frozen=True)
class Probe:
    """A direction at the output of one block, and how states of texts without the attribute lie to it.

    Statistics are over their tokens under the start model: `mean` (D,) of the states, `projection` and `spread` mean
    and standard deviation of <h, v>, `threshold` median of cos(h - mean, v), `norm` mean of ||h||.
    """

    layer: int
    direction: Tensor
    mean: Tensor
    projection: float
    spread: float
    threshold: float
    norm: float


@dataclass(frozen=True)
class Worth:
    """What the probe of one layer is worth. Refits and permutations only where the layer may be chosen."""

    layer: int
    strength: float
    """Inverse strength of its penalty."""
    auroc: float
    """On validation texts, of which layers are chosen."""
    test_auroc: float
    other_auroc: float | None = None
    """On another data set."""
    stability: float | None = None
    """Mean cosine between the directions of refits on resampled groups."""
    permuted_mean: float | None = None
    """AUROC of probes of permuted labels."""
    permuted_95: float | None = None
    """Their 95th percentile: a real probe has to be above."""


# --- features -------------------------------------------------------------------------------------------


def mean_states(
    policy: Policy,
    rows: Sequence[Tokens],
    layers: Sequence[int],
    folder: Path,
    *,
    skip_first: int,
    batch_tokens: int,
    on_done: Advance | None = None,
) -> dict[int, Array]:
    """Return block -> (n, D) float16: the mean state of each text over its tokens, in one pass for all blocks.

    One file a block in `folder`, mapped into memory: 20,000 texts of a 7B model are 5 GB.

    Raises:
        RuntimeError: a mean state is not finite in float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), policy.base.config.hidden_size)
    out: dict[int, Array] = {
        layer: np.lib.format.open_memmap(folder / f"block-{layer}.npy", mode="w+", dtype=np.float16, shape=shape)
        for layer in layers
    }
    pad = policy.tokenizer.pad_token_id
    for picked in fill_batches([len(row.ids) for row in rows], batch_tokens):
        batch = moved(collate_rows([rows[i] for i in picked], pad, skip_first), policy.device)
        if not bool((batch.mask.sum(-1) > 0).all()):
            raise ValueError(f"a text of no more than skip_first={skip_first} tokens has no mean state; leave it out")
        weights = batch.mask / batch.mask.sum(-1, keepdim=True)  # (B, T)

        def keep(h: Tensor, weights: Tensor = weights) -> Tensor:
            return torch.einsum("btd,bt->bd", h.float(), weights)

        wanted = [layer + 1 for layer in layers]
        with torch.no_grad(), capture(policy.model, wanted, stop_after=max(wanted), keep=keep) as states:
            hidden_states(policy.model, batch.ids, batch.positions, batch.attention)
        for layer in layers:
            out[layer][picked] = states[layer + 1].half().cpu().numpy()
        if on_done:
            on_done(len(picked))
    for layer, array in out.items():
        if not np.isfinite(array).all():
            raise RuntimeError(f"states of block {layer} do not fit in float16; raise skip_first, or leave it out")
    return out


# --- fits -----------------------------------------------------------------------------------------------


def fit(x: Array, y: Array, strength: float) -> Fit:
    """Fit a logistic regression on standardised features; returns its unit direction in raw space.

    w = w_std / sd, b = b_std - <w, a>, both over ||w||. Classes weigh the same however many texts they have.

    Raises:
        ValueError: one class only, or nothing that tells them apart.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, bool)
    if len(np.unique(y)) < 2:
        raise ValueError("a probe needs texts with the attribute and texts without it")
    a, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit((x - a) / sd, y)
    w = model.coef_[0] / sd
    norm = float(np.linalg.norm(w))
    found = Fit(w / max(norm, 1e-300), (float(model.intercept_[0]) - float(w @ a)) / max(norm, 1e-300))
    if norm == 0 or not (x[y] @ found.direction).mean() > (x[~y] @ found.direction).mean():
        raise ValueError("the probe does not tell its own training texts apart; look at the labels")
    return found


def choose_strength(x: Array, y: Array, held_x: Array, held_y: Array) -> float:
    """Return the penalty whose probe has the least log-loss on held-out texts; of equals the stronger."""
    x, held_x = np.asarray(x, np.float64), np.asarray(held_x, np.float64)
    a, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    losses = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit((x - a) / sd, y)
        losses.append(log_loss(held_y, model.predict_proba((held_x - a) / sd)[:, 1], labels=[False, True]))
    return STRENGTHS[int(np.argmin(losses))]


def difference_of_means(x: Array, y: Array) -> Fit:
    """Point from the mean without the attribute to the mean with it; the bias is at the middle."""
    x, y = np.asarray(x, np.float64), np.asarray(y, bool)
    low, high = x[~y].mean(0), x[y].mean(0)
    v = (high - low) / np.linalg.norm(high - low)
    return Fit(v, -float(v @ (low + high)) / 2)


def auroc(found: Fit, x: Array, y: Array) -> float:
    """Area under the ROC curve of a probe on texts of both classes."""
    return float(roc_auc_score(y, np.asarray(x, np.float64) @ found.direction))


def random_direction(width: int, seed: int, layer: int) -> Array:
    """Draw a unit vector, keyed by (seed, layer)."""
    v = np.random.Generator(np.random.Philox(key=[seed, layer])).standard_normal(width)
    return v / np.linalg.norm(v)


def permuted(y: Array, groups: Sequence[str], rng: np.random.Generator) -> Array:
    """Permute labels by cells of (group, label): texts that share a frame and a label go on sharing one.

    >>> y = permuted(np.array([True, True, False, False]), ["a", "a", "b", "b"], np.random.default_rng(0))
    >>> bool(y[0] == y[1] and y[2] == y[3] and y[0] != y[2])
    True
    """
    cells = sorted({(g, bool(v)) for g, v in zip(groups, y, strict=True)})
    labels = rng.permutation([label for _, label in cells])
    new = dict(zip(cells, labels, strict=True))
    return np.array([new[g, bool(v)] for g, v in zip(groups, y, strict=True)])


def stability(x: Array, y: Array, groups: Sequence[str], strength: float, refits: int, seed: int) -> float:
    """Mean cosine between the directions of refits on resampled groups.

    Not on resampled texts, of which many are the same but for a word: those gave .98 at every layer.
    """
    names = sorted(set(groups))
    members = {g: np.flatnonzero(np.array(groups) == g) for g in names}
    rng = np.random.default_rng([seed, 1])
    found: list[Array] = []
    while len(found) < refits:
        rows = np.concatenate([members[names[i]] for i in rng.integers(0, len(names), len(names))])
        if len(np.unique(y[rows])) == 2:
            found.append(fit(x[rows], y[rows], strength).direction)
    cosines = np.array(found) @ np.array(found).T
    return float(cosines[np.triu_indices(refits, 1)].mean())


def permuted_aurocs(
    x: Array, y: Array, groups: Sequence[str], held_x: Array, held_y: Array, strength: float, count: int, seed: int
) -> list[float]:
    """AUROC against the true labels of held-out texts, of probes that were fitted to permuted ones."""
    rng = np.random.default_rng([seed, 2])
    found: list[float] = []
    while len(found) < count:
        labels = permuted(y, groups, rng)
        if len(np.unique(labels)) == 2:
            found.append(auroc(fit(x, labels, strength), held_x, held_y))
    return found


def assess(
    layer: int,
    x: Array,
    rows: Sequence[Labelled],
    *,
    seed: int,
    refits: int = 5,
    permutations: int = 20,
    is_candidate: bool = True,
) -> tuple[Fit, Worth]:
    """Fit the probe of one layer and say what it is worth; `x` (n, D) has a row a text."""
    y = np.array([row.has_attribute for row in rows])
    at = {name: np.array([row.split == name for row in rows]) for name in ("train", "validation", "test", "other")}
    train, held = np.asarray(x[at["train"]], np.float64), np.asarray(x[at["validation"]], np.float64)
    ty, hy = y[at["train"]], y[at["validation"]]
    groups = [row.tokens.record for row in rows if row.split == "train"]
    strength = choose_strength(train, ty, held, hy)
    found = fit(train, ty, strength)
    worth = Worth(
        layer, strength, auroc(found, held, hy), auroc(found, x[at["test"]], y[at["test"]]),
        auroc(found, x[at["other"]], y[at["other"]]) if at["other"].any() else None,
    )  # fmt: skip
    if not is_candidate:
        return found, worth
    null = permuted_aurocs(train, ty, groups, held, hy, strength, permutations, seed)
    return found, replace(
        worth,
        stability=stability(train, ty, groups, strength, refits, seed),
        permuted_mean=float(np.mean(null)),
        permuted_95=float(np.quantile(null, 0.95)),
    )


def candidates(count: int) -> list[int]:
    """Blocks that may be chosen of a model of `count`: at 20 to 80 % of its depth."""
    return list(range(math.ceil(DEPTH[0] * count), math.floor(DEPTH[1] * count) + 1))


def good_layers(worth: Sequence[Worth], count: int) -> dict[int, float]:
    """Return layer -> AUROC of the candidates whose probe is good and stable.

    That is an AUROC of at least the best minus .02, above that of permuted labels, and a stability of at least .7.

    Raises:
        ValueError: fewer than two qualify; the table says why.
    """
    may = set(candidates(count))
    known = {w.layer: w for w in worth if w.layer in may and w.stability is not None}
    best = max((w.auroc for w in known.values()), default=0.0)
    good = {
        layer: w.auroc
        for layer, w in known.items()
        if w.auroc >= best - AUROC_SLACK
        and (w.stability or 0) >= STABILITY
        and (w.permuted_95 is None or w.auroc > w.permuted_95)
    }
    if len(good) < 2:
        table = "; ".join(
            f"{w.layer}: AUROC {w.auroc:.3f}, stability {w.stability:.2f}, permuted {w.permuted_95 or 0:.3f}"
            for w in known.values()
        )
        raise ValueError(
            f"{len(good)} layer(s) have a probe that is good (AUROC within {AUROC_SLACK} of {best:.3f} and above the "
            f"permuted ones) and stable (at least {STABILITY}): {table}; name layers=[...], or use other texts"
        )
    return good


def select_layers(worth: Sequence[Worth], count: int, n_layers: int = 8) -> list[int]:
    """Choose of the good layers some that are spread over the depth.

    First the one with the best probe, then each time the one farthest from those chosen (ties: higher AUROC, lower
    index).

    Raises:
        ValueError: fewer than two are good; the table says why.
    """
    good = good_layers(worth, count)
    chosen = [min(good, key=lambda layer: (-good[layer], layer))]
    while len(chosen) < min(n_layers, len(good)):
        left = [layer for layer in good if layer not in chosen]
        chosen.append(min(left, key=lambda i: (-min(abs(i - c) for c in chosen), -good[i], i)))
    return sorted(chosen)


def layer_weights(aurocs: Mapping[int, float]) -> dict[int, float]:
    """Weigh layers by what their probe knows: AUROC - .5, sum 1.

    >>> layer_weights({3: 0.875, 5: 0.625})
    {3: 0.75, 5: 0.25}
    """
    raw = {layer: max(value - 0.5, 1e-6) for layer, value in aurocs.items()}
    return {layer: value / sum(raw.values()) for layer, value in raw.items()}


# --- where texts without the attribute lie ---------------------------------------------------------------


def locate(
    policy: Policy,
    rows: Sequence[Tokens],
    directions: Mapping[int, Array],
    *,
    skip_first: int,
    batch_tokens: int,
) -> dict[int, Probe]:
    """Measure the states of texts without the attribute, token by token, against each layer's direction.

    Two passes: the mean first, then angles to it.
    """
    layers = sorted(directions)
    v = {layer: torch.tensor(directions[layer], dtype=torch.float32, device=policy.device) for layer in layers}
    pad = policy.tokenizer.pad_token_id
    batches = [
        moved(collate_rows([rows[i] for i in picked], pad, skip_first), policy.device)
        for picked in fill_batches([len(row.ids) for row in rows], batch_tokens)
    ]
    total = {layer: torch.zeros_like(v[layer], dtype=torch.float64) for layer in layers}
    count = 0
    for batch in batches:
        is_valid = batch.mask > 0
        count += int(is_valid.sum())
        with torch.no_grad():
            states = read_states(policy, batch, layers)
        for layer, h in zip(layers, states, strict=True):
            total[layer] += h[is_valid].double().sum(0)
    if not count:
        raise ValueError("no token of the texts without the attribute counts; they are shorter than skip_first")
    mean = {layer: (total[layer] / count).float() for layer in layers}
    along: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    angle: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    norms = dict.fromkeys(layers, 0.0)
    for batch in batches:
        is_valid = batch.mask > 0
        with torch.no_grad():
            states = read_states(policy, batch, layers)
        for layer, states_l in zip(layers, states, strict=True):
            h = states_l[is_valid].float()
            away = h - mean[layer]
            along[layer].append(h @ v[layer])
            angle[layer].append((away @ v[layer]) / away.norm(dim=-1).clamp(min=1e-8))
            norms[layer] += float(h.norm(dim=-1).sum())
    return {
        layer: Probe(
            layer, v[layer], mean[layer], float(torch.cat(along[layer]).mean()),
            max(float(torch.cat(along[layer]).std(correction=0)), 1e-8),
            float(torch.cat(angle[layer]).median()), norms[layer] / count,
        )
        for layer in layers
    }  # fmt: skip
