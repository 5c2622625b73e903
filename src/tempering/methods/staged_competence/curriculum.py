"""The curriculum: ranks, stages, competence, pools, draws and their exposure. Pure functions of numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from tempering.core.config import Config

Pacing = Literal["sqrt", "linear", "root_p", "none", "step"]
Sampling = Literal["with_replacement", "coverage", "weights_only", "shuffled", "sequential"]


Count = Annotated[int, Field(ge=1)]


class Curriculum(Config):
    """Stages, competence pacing and sampling."""

    stages: int = Field(default=3, ge=1)
    """K: number of difficulty stages; the reference moves after each."""
    epochs: Count | list[Count] = 5
    """E: epoch-equivalents per stage, one number or one a stage."""
    boundaries: list[float] | None = None
    """Descending difficulty scores that cut the stages, instead of equal sizes."""
    pacing: Pacing = "sqrt"
    """How competence grows inside a stage."""
    p: float = Field(default=2.0, gt=0)
    """Exponent of `root_p` pacing (sqrt is 2, linear 1)."""
    steps: tuple[tuple[float, float], ...] = ()
    """`step` pacing: [u, competence] pairs, u the share of the stage that is done."""
    c0: float = Field(default=0.01, gt=0, le=1)
    """Competence at the first step of a stage, in (0, 1]."""
    full_at: float = Field(default=1.0, gt=0)
    """Share of a stage after which competence is 1."""
    sampling: Sampling = "with_replacement"
    """How a batch is drawn from the pool."""
    min_pool: Count | Literal["batch"] = "batch"
    """Smallest pool in pairs; `batch` is the batch size, the paper has 1."""
    direction: Literal["easy_first", "hard_first"] = "easy_first"
    """`hard_first` reverses the whole ranking (a control)."""
    balance: bool = True
    """Rank inside each value of the rows' `label` and interleave, so that every pool has the mix of the whole set."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Share of each batch drawn uniformly from earlier stages."""

    @model_validator(mode="after")
    def _consistent(self) -> Curriculum:
        if self.replay and self.sampling == "coverage":
            raise ValueError("replay takes places in a batch that sampling=coverage needs; use one of them")
        return self


def rank(scores: dict[str, float], direction: str = "easy_first") -> list[str]:
    """Order ids from easy (high score) to hard; ties by id, so that file order means nothing.

    >>> rank({"b": 0.5, "a": 0.5, "c": 0.9})
    ['c', 'a', 'b']
    """
    order = sorted(scores, key=lambda i: (-scores[i], i))
    return order if direction == "easy_first" else order[::-1]


def rank_balanced(
    scores: dict[str, float], labels: dict[str, str | None], direction: str = "easy_first"
) -> list[str]:
    """Order ids by their relative rank inside their label: every prefix has about the mix of the whole.

    Without this, a score that tells harmful from benign prompts makes the last stage all harmful, and the model
    forgets what it must not refuse.

    >>> rank_balanced({"a": 9, "b": 8, "c": 2, "d": 1}, {"a": "safe", "b": "safe", "c": "harm", "d": "harm"})
    ['a', 'c', 'b', 'd']
    """
    place: dict[str, float] = {}
    for label in set(labels.values()):
        order = rank({i: s for i, s in scores.items() if labels[i] == label}, direction)
        place |= {i: (n + 0.5) / len(order) for n, i in enumerate(order)}
    sign = 1 if direction == "easy_first" else -1
    return sorted(scores, key=lambda i: (place[i], -sign * scores[i], i))


def cut_stages(order: Sequence[str], stages: int) -> list[list[str]]:
    """Cut a ranking into stages of floor(N/K); the last takes the remainder.

    >>> cut_stages(["a", "b", "c", "d", "e"], 2)
    [['a', 'b'], ['c', 'd', 'e']]

    Raises:
        ValueError: fewer ids than stages.
    """
    if stages < 1 or len(order) < stages:
        raise ValueError(f"curriculum.stages is {stages}, but there are only {len(order)} training pairs")
    n = len(order) // stages
    return [list(order[k * n : (k + 1) * n if k < stages - 1 else len(order)]) for k in range(stages)]


def cut_at(order: Sequence[str], scores: dict[str, float], boundaries: Sequence[float]) -> list[list[str]]:
    """Cut a ranking at descending scores: stage k holds those at or above boundary k and below the one before.

    Raises:
        ValueError: boundaries that do not descend, or an empty stage.
    """
    if list(boundaries) != sorted(set(boundaries), reverse=True):
        raise ValueError(f"curriculum.boundaries must descend, got {list(boundaries)}")
    stages: list[list[str]] = [[] for _ in range(len(boundaries) + 1)]
    for item in order:
        stages[sum(scores[item] < b for b in boundaries)].append(item)
    empty = [k for k, stage in enumerate(stages) if not stage]
    if empty:
        raise ValueError(f"curriculum.boundaries {list(boundaries)} leave stage {empty[0]} empty")
    return stages if order and scores[order[0]] >= scores[order[-1]] else stages[::-1]


def competence(t: int, steps: int, cur: Curriculum) -> float:
    """Share of the stage's ranking that is open at step t of `steps`.

    Platanios et al. 2019 (arXiv:1903.09848), Eq. 3: c = min(1, (u (1 - c0^p) + c0^p)^(1/p)).
    """
    if cur.pacing == "none" or steps == 1:
        return 1.0
    # `coverage` must open the last pair at the last step, the paper's rule would one step after it.
    last = steps - 1 if cur.sampling == "coverage" else steps
    u = min(1.0, t / (cur.full_at * last))
    if cur.pacing == "step":
        return [cur.c0, *(c for start, c in sorted(cur.steps) if start <= u)][-1]
    p = {"sqrt": 2.0, "linear": 1.0, "root_p": cur.p}[cur.pacing]
    return min(1.0, (u * (1 - cur.c0**p) + cur.c0**p) ** (1 / p))


def pool_size(c: float, n: int, min_pool: int) -> int:
    """Number of easiest pairs that are open at competence c: never empty, never more than n."""
    return min(n, max(int(np.floor(c * n + 1e-9)) + 1, min(min_pool, n)))


def pools(n: int, batch: int, steps: int, cur: Curriculum) -> list[int]:
    """Pool size at each step of a stage of n pairs."""
    # `coverage` draws without replacement and must be able to fill a batch.
    floor = batch if cur.min_pool == "batch" or cur.sampling == "coverage" else cur.min_pool
    return [pool_size(competence(t, steps, cur), n, int(floor)) for t in range(steps)]


def stage_steps(n: int, batch: int, epochs: int) -> int:
    """Optimiser steps of a stage: T = E ceil(n / B)."""
    return epochs * -(-n // batch)


def stage_schedule(n: int, batch: int, epochs: int, cur: Curriculum, seed: int, stage: int) -> list[list[int]]:
    """Return the positions (0 easiest) that each optimiser step of a stage draws.

    A pure function: world size, micro-batches and resuming do not touch it. Draws come from a counter-based
    generator keyed by (seed, stage, step).

    Raises:
        ValueError: `coverage` cannot show every pair within these steps.
    """
    steps = stage_steps(n, batch, epochs)
    if cur.sampling in ("shuffled", "sequential"):
        return _passes(n, batch, epochs, cur, seed, stage)
    sizes = pools(n, batch, steps, cur)
    if cur.sampling == "coverage":
        return _coverage(n, batch, sizes, seed, stage)
    if cur.sampling == "weights_only":
        weight = expected_draws(n, 1, sizes) / steps
        return [_generator(seed, stage, t).choice(n, size=batch, p=weight).tolist() for t in range(steps)]
    return [_generator(seed, stage, t).integers(0, size, size=batch).tolist() for t, size in enumerate(sizes)]


def _passes(n: int, batch: int, epochs: int, cur: Curriculum, seed: int, stage: int) -> list[list[int]]:
    rows = []
    for e in range(epochs):
        order = np.arange(n) if cur.sampling == "sequential" else _generator(seed, stage, e).permutation(n)
        rows += [order[i : i + batch].tolist() for i in range(0, n, batch)]
    return rows


def _coverage(n: int, batch: int, sizes: Sequence[int], seed: int, stage: int) -> list[list[int]]:
    queue: list[int] = []
    rows: list[list[int]] = []
    seen = 0
    for t, size in enumerate(sizes):
        generator = _generator(seed, stage, t)
        queue += (generator.permutation(size - seen) + seen).tolist() if size > seen else []
        seen = max(seen, size)
        row, queue = queue[:batch], queue[batch:]
        if len(row) < min(batch, size):
            rest = np.setdiff1d(np.arange(size), row)
            row += generator.choice(rest, size=min(batch, size) - len(row), replace=False).tolist()
        rows.append(row)
    missing = n - len({i for row in rows for i in row})
    if missing:
        raise ValueError(
            f"curriculum.sampling=coverage cannot show {missing} of {n} pairs in {len(sizes)} steps of {batch}; "
            "raise curriculum.epochs"
        )
    return rows


def expected_draws(n: int, batch: int, sizes: Sequence[int]) -> np.ndarray:
    """Exact expectation of draws per position: E[draws_i] = sum over t with pool(t) > i of B / pool(t)."""
    per_pool = np.zeros(n + 1)
    for size in sizes:
        per_pool[size] += batch / size
    return np.cumsum(per_pool[::-1])[::-1][1:]


def expected_coverage_draws(n: int, batch: int, sizes: Sequence[int]) -> np.ndarray:
    """Exact expectation of draws per position under `coverage`: once from the queue, then fills.

    Pairs that enter the pool together stand in the queue in random order, so each is equally likely to be in
    a given row; a row's free places go to the rest of the pool with equal probability.
    """
    out = np.zeros(n)
    entry = np.repeat(np.arange(len(sizes)), np.diff([0, *np.maximum.accumulate(sizes)]))  # queue slot -> its block
    served, seen = 0, 0
    for size in sizes:
        seen = max(seen, size)
        queued = min(batch, seen - served)
        blocks = np.bincount(entry[served : served + queued], minlength=len(sizes))
        in_row = (blocks / np.maximum(np.bincount(entry, minlength=len(sizes)), 1))[entry[:size]]
        free = min(batch, size) - queued
        out[:size] += in_row + (free / (size - queued) * (1 - in_row) if size > queued else 0)
        served += queued
    return out


def exposure(n: int, batch: int, epochs: int, cur: Curriculum, taken: int | None = None) -> np.ndarray:
    """Expected draws of each position under `cur`, in the first `taken` steps of the stage (default: all)."""
    steps = stage_steps(n, batch, epochs)
    taken = steps if taken is None else taken
    sizes = pools(n, batch, steps, cur)
    if cur.sampling == "shuffled":
        whole, rest = divmod(taken, -(-n // batch))
        return np.full(n, whole + min(1.0, rest * batch / n))
    if cur.sampling == "sequential":
        positions = _passes(n, batch, epochs, cur, 0, 0)[:taken]
        return np.bincount([i for row in positions for i in row], minlength=n).astype(float)
    if cur.sampling == "coverage":
        return expected_coverage_draws(n, batch, sizes[:taken])
    if cur.sampling == "weights_only":
        return expected_draws(n, batch, sizes) * (taken / steps)
    return expected_draws(n, batch, sizes[:taken])


def unseen_share(n: int, batch: int, epochs: int, cur: Curriculum) -> float:
    """Expected share of a stage that is never drawn: (1/n) sum_i prod_{t: pool(t)>i} (1 - 1/pool(t))^B."""
    if cur.sampling in ("shuffled", "sequential", "coverage"):
        return 0.0
    steps = stage_steps(n, batch, epochs)
    sizes = pools(n, batch, steps, cur)
    if cur.sampling == "weights_only":
        weight = expected_draws(n, 1, sizes) / steps
        return float(np.mean((1 - weight) ** (batch * steps)))
    log_miss = np.zeros(n + 1)
    for size in sizes:
        # A pool of one is always drawn: its only pair cannot be missed.
        log_miss[size] += batch * np.log1p(-1 / size) if size > 1 else -np.inf
    return float(np.mean(np.exp(np.cumsum(log_miss[::-1])[::-1][1:])))


def replay_count(share: float, batch: int) -> int:
    """Places of a batch that replayed pairs take."""
    return round(share * batch)


def add_replay(rows: list[list[str]], earlier: Sequence[str], share: float, seed: int, stage: int) -> list[list[str]]:
    """Replace the last round(share B) ids of each batch by ids drawn uniformly from earlier stages."""
    if not share or not earlier:
        return rows
    out = []
    for t, row in enumerate(rows):
        count = replay_count(share, len(row))
        # A counter beyond any step: the draws of the pool itself stay what they are without replay.
        picks = _generator(seed, stage, t + (1 << 40)).integers(0, len(earlier), size=count)
        out.append([*row[: len(row) - count], *(earlier[i] for i in picks)])
    return out


def hold_out_by_score(scores: dict[str, float], share: float, seed: int) -> set[str]:
    """The paper's split: four equal strata by score, each shuffled; the last `share` of each is held out."""
    order = rank(scores)
    held: set[str] = set()
    for stratum in np.array_split(np.arange(len(order)), 4):
        shuffled = np.random.default_rng(seed).permutation(stratum)
        held |= {order[i] for i in shuffled[round((1 - share) * len(stratum)) :]}
    return held


def nested_subset(scores: dict[str, float], share: float, seed: int) -> set[str]:
    """Take the same share of each score quartile; a smaller share is a subset of a larger one."""
    order = rank(scores)
    kept: set[str] = set()
    for quartile in np.array_split(np.arange(len(order)), 4):
        keyed = sorted((order[i] for i in quartile), key=lambda item: _sha(f"{seed}:{item}"))
        kept |= set(keyed[: round(share * len(keyed))])
    return kept


def random_score(item: str, seed: int) -> float:
    """A difficulty that says nothing, in [0, 1): the first 8 bytes of SHA-256("seed:id") / 2^64."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed}:{item}".encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    )


def schedule_hash(rows: Sequence[Sequence[str]]) -> str:
    """Identify a schedule in `plan.jsonl`."""
    return _sha(json.dumps([list(row) for row in rows]))[:16]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _generator(seed: int, stage: int, t: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stage], counter=[0, 0, 0, t]))
