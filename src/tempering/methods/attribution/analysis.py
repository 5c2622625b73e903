"""Statistics of the paper and beside it: drops over configurations, transfer, densities, length; pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tempering.core.stats import Interval, spearman
from tempering.methods.attribution.scores import Floats
from tempering.methods.attribution.selection import auroc


class Drops(NamedTuple):
    """What a selector does to a rate over C configurations, against the first candidate. Fractions."""

    mean_relative: float
    """Mean over configurations of (first - other) / first: the paper's figure. Small rates weigh as much as large."""
    median_relative: float
    of_means: float
    """(mean first - mean other) / mean first."""
    points: float
    """Mean first - mean other."""
    lowered: int
    """Configurations in which the rate is lower."""
    configurations: int


def drops(first: ArrayLike, other: ArrayLike) -> Drops:
    """Summarise how much lower `other` is than `first`, configuration by configuration: (C,), (C,).

    >>> drops([0.5, 0.25], [0.25, 0.25])[:4]
    (0.25, 0.25, 0.3333333333333333, 0.125)

    Raises:
        ValueError: a first value is 0, which no relative drop can start from.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if not (a > 0).all():
        raise ValueError("a relative drop needs first values above 0")
    relative = (a - b) / a
    return Drops(
        float(relative.mean()),
        float(np.median(relative)),
        float((a.mean() - b.mean()) / a.mean()),
        float(a.mean() - b.mean()),
        int((b < a).sum()),
        len(a),
    )


def clustered_interval(
    first: ArrayLike, other: ArrayLike, groups: Sequence[Hashable], *, seed: int = 0, draws: int = 10_000
) -> Interval:
    """The mean relative drop with a 95 % interval over whole groups: configurations of one student are alike."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(other, dtype=np.float64)
    relative = (a - b) / a
    names = sorted(set(map(str, groups)))
    means = np.array([relative[[str(g) == name for g in groups]].mean() for name in names])
    sizes = np.array([sum(str(g) == name for g in groups) for name in names], dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    resampled = (means * sizes)[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(relative.mean()), float(low), float(high))


def best_layer_by_others(curves: Mapping[str, ArrayLike], held_out: str, *, smooth: int = 0) -> int:
    """The layer (1 or above) with the largest summed drop on the benchmarks other than `held_out`.

    `curves`: benchmark -> relative drop at each layer 0..n. `smooth`: average over so many neighbours either side.

    >>> best_layer_by_others({"a": [9, 1, 2, 0], "b": [9, 1, 3, 0], "c": [0, 0, 0, 9]}, "c")
    2
    """
    total = np.sum([np.asarray(c, dtype=np.float64) for name, c in curves.items() if name != held_out], axis=0)
    n = len(total) - 1
    means = [total[max(1, k - smooth) : min(n, k + smooth) + 1].mean() for k in range(1, n + 1)]
    return 1 + int(np.argmax(means))


class Gap(NamedTuple):
    """Teachers by students: how much less safe the student is, and whether safer teachers make safer students."""

    teachers: list[str]
    students: list[str]
    gap: list[list[float | None]]
    """ASR of the student minus that of its teacher (asked without the policy): [teacher][student]."""
    transfer: dict[str, float | None]
    """Student -> Spearman over teachers of 1 - (unsafe share of the teacher's data) and 1 - ASR; 1 is ideal."""
    mean_transfer: float | None
    utility_tax: list[list[float | None]]
    """(accuracy unaligned - accuracy) / accuracy unaligned."""


def gap_matrix(rows: Sequence[Mapping[str, Any]]) -> Gap:
    """Tabulate rows of `teacher`, `student`, `asr`, and where known `teacher_asr`, `teacher_unsafe`, `accuracy`,
    `base_accuracy`, all fractions.

    Raises:
        ValueError: a column is missing, or a teacher and student stand in two rows.
    """
    for number, row in enumerate(rows, 1):
        if missing := [key for key in ("teacher", "student", "asr") if row.get(key) is None]:
            raise ValueError(f"row {number}: missing column '{missing[0]}'; expected teacher, student, asr")
    cells = {(str(row["teacher"]), str(row["student"])): row for row in rows}
    if len(cells) < len(rows):
        raise ValueError("a teacher and student stand in two rows; keep one")
    teachers, students = (sorted({key[i] for key in cells}) for i in (0, 1))

    def cell(teacher: str, student: str, plus: str, minus: str, over: str | None = None) -> float | None:
        row = cells.get((teacher, student), {})
        if row.get(plus) is None or row.get(minus) is None or row.get(over or minus) in (None, 0):
            return None if over or row.get(plus) is None or row.get(minus) is None else row[plus] - row[minus]
        return float((row[plus] - row[minus]) / (row[over] if over else 1))

    transfer: dict[str, float | None] = {}
    for student in students:
        known = [
            row for (_, name), row in cells.items() if name == student and row.get("teacher_unsafe") is not None
        ]  # fmt: skip
        transfer[student] = (
            spearman([1 - r["teacher_unsafe"] for r in known], [1 - r["asr"] for r in known])
            if len(known) > 2
            else None
        )
    found = [value for value in transfer.values() if value is not None]
    return Gap(
        teachers,
        students,
        [[cell(t, s, "asr", "teacher_asr") for s in students] for t in teachers],
        transfer,
        float(np.mean(found)) if found else None,
        [[cell(t, s, "base_accuracy", "accuracy", "base_accuracy") for s in students] for t in teachers],
    )


def densities(risk: ArrayLike, y: ArrayLike, bins: int = 40) -> dict[str, Any]:
    """Densities of the risk of harmful and of safe candidates on common bins, their peaks, and the AUROC."""
    x, labels = (np.ravel(np.asarray(v, dtype=np.float64)) for v in (risk, y))
    known = ~np.isnan(x) & ~np.isnan(labels)
    x, labels = x[known], labels[known]
    if not len(x):
        return {"edges": [], "harmful": [], "safe": [], "auroc": None}
    edges = np.histogram_bin_edges(x, bins)
    found: dict[str, Any] = {"edges": edges.tolist(), "auroc": auroc(x, labels)}
    for name, label in (("harmful", 1), ("safe", 0)):
        part = x[labels == label]
        density = np.histogram(part, edges, density=True)[0] if len(part) else np.zeros(bins)
        found[name] = density.tolist()
        peak = int(np.argmax(density))
        found[f"peak_{name}"] = float((edges[peak] + edges[peak + 1]) / 2) if len(part) else None
    return found


def length_correlation(risk: ArrayLike, tokens: ArrayLike) -> dict[str, float | None]:
    """Spearman correlation of risk and length: over all candidates, and the mean inside prompts. (P, N) each."""
    s, x = np.asarray(risk, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    known = ~np.isnan(s)
    inside = [spearman(a[k], b[k]) for a, b, k in zip(s, x, known, strict=True) if k.sum() > 1]
    scored = [value for value in inside if value is not None]
    return {
        "pooled": spearman(s[known], x[known]) if known.any() else None,
        "within_prompt": float(np.mean(scored)) if scored else None,
    }


def mean_curve(curves: Sequence[Floats]) -> Floats:
    """The mean over prompts of best-of-k curves, prompts with an unscored candidate left out."""
    whole = np.array([curve for curve in curves if not np.isnan(curve).any()])
    return np.asarray(whole.mean(axis=0)) if len(whole) else np.zeros(0)
