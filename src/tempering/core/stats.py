"""Intervals and paired tests: what a measured rate or mean is worth, and whether two systems differ.

Used by evals, judges, methods and reports; refuses to know what is counted. A leaf: numpy and scipy only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, ndtri

Floats = NDArray[np.float64]

_CHUNK = 2_000_000
"""Resampled values held at once: bounds the memory of a bootstrap to about 32 MB."""


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """How much a exceeds b on the same items, with a two-sided p-value for "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str


class Margin(NamedTuple):
    """One kind of margin over held-out pairs, in nats (nats per token for `per_token`)."""

    mean: Interval
    accuracy: Interval
    """Share of pairs with a margin above 0."""
    accuracy_matched: Interval
    """The same on the third of pairs with the smallest difference in length."""


class Separation(NamedTuple):
    """How far chosen and rejected answers are apart under a policy."""

    n: int
    n_matched: int
    margins: dict[str, Margin]
    """`raw`, `per_token`, and with reference values `stage` and `initial`."""
    logprob_chosen: Interval
    logprob_rejected: Interval


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Estimate a proportion by the score interval of Wilson 1927, which stays in [0, 1] and is not empty.

    `successes` may be fractional where each of the n items holds a mean, over seeds for instance.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.8, 0.4902, 0.9433]

    Raises:
        ValueError: when n is 0, or `successes` is not within 0 and n.
    """
    if n <= 0:
        raise ValueError(f"a proportion needs at least one observation, got n = {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie within 0 and n = {n}, got {successes}")
    p, z = successes / n, _z(level)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and 1 the end is exactly p; rounding must not put it on the other side.
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Estimate a mean with the percentile interval of the bootstrap (Efron 1979).

    With `groups`, one per value, whole groups are resampled: several values of one prompt are not
    independent. One value, or one group, gives an interval of no width, which says nothing.

    Raises:
        ValueError: when there are no values, one is not finite, or `groups` has another length.
    """
    x = _finite(values, "values")
    means = _resampled_means(x, groups, seed, draws)
    return Interval(float(x.mean()), *_percentiles(means, level))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Comparison:
    """Compare two systems on the same prompts: mean of a - b, percentile interval, two-sided p-value.

    The p-value is twice the smaller share of resampled means at or beyond 0, counting the observed
    sample as one draw (Davison and Hinkley 1997, section 4.2), so it is never 0. Nor is it below 2 / 2^n, the
    least that the signs of n differences can tell: resampling one or two items would be certain of anything.

    Raises:
        ValueError: when the lengths differ, there are no values, or one is not finite.
    """
    x, y = _finite(a, "a"), _finite(b, "b")
    _same_length(a=x, b=y)
    means = _resampled_means(x - y, None, seed, draws)
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    p_value = min(1.0, max(2 * (min(below, above) + 1) / (draws + 1), 2.0 ** (1 - len(x))))
    return Comparison(float((x - y).mean()), *_percentiles(means, level), p_value, "paired_bootstrap")


def mcnemar(a: Sequence[bool], b: Sequence[bool], *, level: float = 0.95) -> Comparison:
    """Compare two proportions on the same prompts.

    The p-value is McNemar's, exact: the discordant pairs are a fair coin under "no difference". The
    interval of the difference is Newcombe's hybrid score for paired data (Newcombe 1998, Statistics in
    Medicine 17:2635, method 10, its correlation with continuity correction): with p_a, p_b and their
    Wilson limits,

        low  = D - sqrt((p_a - l_a)^2 - 2 phi (p_a - l_a)(u_b - p_b) + (u_b - p_b)^2)
        high = D + sqrt((u_a - p_a)^2 - 2 phi (u_a - p_a)(p_b - l_b) + (p_b - l_b)^2)

    Interval and p-value are different constructions; at the edge one may exclude "no difference" and
    the other not.

    Raises:
        ValueError: when the lengths differ or there are no pairs.
    """
    x, y = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    _same_length(a=x, b=y)
    n = len(x)
    both, only_a = int((x & y).sum()), int((x & ~y).sum())
    only_b, neither = int((~x & y).sum()), int((~x & ~y).sum())
    p_a, low_a, high_a = wilson(both + only_a, n, level)
    p_b, low_b, high_b = wilson(both + only_b, n, level)
    phi = _paired_correlation(both, only_a, only_b, neither)
    difference = (only_a - only_b) / n
    low = difference - _hypotenuse(p_a - low_a, high_b - p_b, phi)
    high = difference + _hypotenuse(high_a - p_a, p_b - low_b, phi)
    discordant = only_a + only_b
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), discordant, 0.5))) if discordant else 1.0
    return Comparison(difference, max(-1.0, low), min(1.0, high), p_value, "mcnemar_exact")


def paired_fractions(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Comparison:
    """Compare two systems whose outcome on a prompt is a fraction: yes-or-no answers averaged over seeds.

    The adjusted Wald interval of Bonett and Price 2012 (Journal of Educational and Behavioral Statistics
    37:479) adds one pair to each discordant cell, so that it keeps a width where a bootstrap has none:

        D = sum d / (n + 2),  variance = ((sum d^2 + 2) / (n + 2) - D^2) / (n + 2),  d = a - b

    with a two-sided p-value from D / sqrt(variance). Differs: theirs has d in -1, 0, 1; here d is a mean.
    The reported difference is the plain mean of d.

    Raises:
        ValueError: when the lengths differ, there are no values, or one is outside [0, 1].
    """
    x, y = _finite(a, "a"), _finite(b, "b")
    _same_length(a=x, b=y)
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) > 1:
        raise ValueError("fractions must lie in [0, 1]")
    d, n = x - y, len(x) + 2
    centre = float(d.sum()) / n
    deviation = math.sqrt(((float(d @ d) + 2) / n - centre**2) / n)
    half, value = _z(level) * deviation, float(d.mean())
    low, high = min(value, max(-1.0, centre - half)), max(value, min(1.0, centre + half))
    p_value = float(2 * ndtr(-abs(centre) / deviation))
    return Comparison(value, low, high, p_value, "paired_fractions")


def correct_rate(
    successes: float,
    n: int,
    *,
    true_positives: int,
    positives: int,
    true_negatives: int,
    negatives: int,
    level: float = 0.95,
) -> Interval:
    """Correct a judge's rate for the judge's own errors, which were measured on human labels.

    With sensitivity Se = true_positives / positives and specificity Sp = true_negatives / negatives, Rogan and
    Gladen 1978 (American Journal of Epidemiology 107:71), clipped to [0, 1]:

        rate = (p + Sp - 1) / (Se + Sp - 1),  p = successes / n

    The interval carries the uncertainty of p, Se and Sp. It holds every rate r that they do not contradict,

        (p + Sp - 1 - r (Se + Sp - 1))^2 <= z^2 (var p + r^2 var Se + (1 - r)^2 var Sp)

    which is a quadratic in r (Fieller 1954), with the adjusted counts of Lang and Reiczigel 2014 (Preventive
    Veterinary Medicine 113:13): Wilson's midpoint for p, one success and one failure added to Se and to Sp.
    Differs: they linearise at the estimate, which covers too rarely where Se + Sp is near 1 and labels are few.
    Where the labels leave open whether Se + Sp exceeds 1, every rate is possible: 0 to 1.

    `successes` may be fractional, as for `wilson`.

    Raises:
        ValueError: when a count is impossible, or the judge is no better than chance (Se + Sp <= 1),
            which leaves the true rate undetermined.
    """
    p, z2 = wilson(successes, n).value, _z(level) ** 2
    se, sp = wilson(true_positives, positives).value, wilson(true_negatives, negatives).value
    if se + sp <= 1:
        raise ValueError(
            f"sensitivity {se:.3f} and specificity {sp:.3f} sum to 1 or less: the judge tells nothing, "
            "so its rate cannot be corrected"
        )
    p_, se_ = (successes + z2 / 2) / (n + z2), (true_positives + 1) / (positives + 2)
    sp_ = (true_negatives + 1) / (negatives + 2)
    var_p, var_se, var_sp = (
        x * (1 - x) / size for x, size in ((p_, n + z2), (se_, positives + 2), (sp_, negatives + 2))
    )
    informedness = se_ + sp_ - 1
    # An observed rate that no true rate would give (below the false alarms) counts as the nearest that one would:
    # otherwise labels that do not fit the answers would yield the narrowest interval of all.
    excess = min(max(p_ + sp_ - 1, 0.0), max(informedness, 0.0))
    # a r^2 - 2 b r + c <= 0. At r = excess / informedness it holds, so with a > 0 the roots are real.
    a = informedness**2 - z2 * (var_se + var_sp)
    b, c = excess * informedness - z2 * var_sp, excess**2 - z2 * (var_p + var_sp)
    low, high = 0.0, 1.0
    if informedness > 0 and a > 0:
        root = math.sqrt(max(0.0, b * b - a * c))
        low, high = (b - root) / a, (b + root) / a
    value, low, high = (min(1.0, max(0.0, x)) for x in ((p + sp - 1) / (se + sp - 1), low, high))
    return Interval(value, min(low, value), max(high, value))


def forgotten(before: float, now: float, chance: float) -> float | None:
    """Share of what was known beyond chance that is gone: clip((before - now) / (before - chance), 0, 1).

    Of toxicity, `chance` is that after neutral text. `None` where nothing was known.

    >>> round(forgotten(0.637, 0.312, 0.25), 3), round(forgotten(0.44, 0.282, 0.25), 3)
    (0.84, 0.832)
    """
    return None if before <= chance else min(1.0, max(0.0, (before - now) / (before - chance)))


def kept(before: float, now: float, chance: float = 0.0) -> float | None:
    """Share of what was known beyond chance that is left: clip((now - chance) / (before - chance), 0, 1)."""
    gone = forgotten(before, now, chance)
    return None if gone is None else 1 - gone


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return the rank correlation of a and b, ties at their mean rank; `None` where one is constant.

    >>> spearman([1, 2, 3], [1, 4, 9]), spearman([1, 1], [1, 2])
    (1.0, None)

    Raises:
        ValueError: when the lengths differ, there are no values, or one is not finite.
    """
    x, y = _finite(a, "a"), _finite(b, "b")
    _same_length(a=x, b=y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rank_x, rank_y = _ranks(x), _ranks(y)
    rank_x, rank_y = rank_x - rank_x.mean(), rank_y - rank_y.mean()
    return float((rank_x @ rank_y) / math.sqrt((rank_x @ rank_x) * (rank_y @ rank_y)))


def separation(
    chosen_logprob: ArrayLike,
    rejected_logprob: ArrayLike,
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: float,
    stage_reference: tuple[ArrayLike, ArrayLike] | None = None,
    initial_reference: tuple[ArrayLike, ArrayLike] | None = None,
    prompt_ids: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> Separation:
    """Measure how far held-out chosen and rejected answers are apart, pair by pair.

    With S the summed completion log-probability (nats), |y| the completion length (tokens) and S_ref the
    (chosen, rejected) values of a reference:

        raw        S(y+) - S(y-)                    policy alone, without beta
        per_token  S(y+)/|y+| - S(y-)/|y-|          policy alone, without beta
        stage      beta ((S(y+) - S_ref(y+)) - (S(y-) - S_ref(y-))), reference of this stage
        initial    the same against the start model

    Means have bootstrap intervals over prompts, accuracies score intervals that count prompts, not pairs.
    Of pairs with equal difference in length, the earlier ones enter the matched third.

    Raises:
        ValueError: when lengths differ, there are no pairs, a value is not finite, or a length is not
            positive.
    """
    chosen, rejected = (
        _finite(chosen_logprob, "chosen_logprob"),
        _finite(rejected_logprob, "rejected_logprob"),
    )
    size_chosen = _finite(chosen_length, "chosen_length")
    size_rejected = _finite(rejected_length, "rejected_length")
    _same_length(
        chosen_logprob=chosen,
        rejected_logprob=rejected,
        chosen_length=size_chosen,
        rejected_length=size_rejected,
    )
    if min(size_chosen.min(), size_rejected.min()) <= 0:
        raise ValueError("completion lengths must be positive")
    n = len(chosen)
    if prompt_ids is not None and len(prompt_ids) != n:
        raise ValueError(f"prompt_ids has {len(prompt_ids)} entries for {n} pairs")

    per_pair = {"raw": chosen - rejected, "per_token": chosen / size_chosen - rejected / size_rejected}
    for name, reference in (("stage", stage_reference), ("initial", initial_reference)):
        if reference is not None:
            ref_chosen, ref_rejected = (_finite(r, f"{name}_reference") for r in reference)
            _same_length(chosen_logprob=chosen, reference_chosen=ref_chosen, reference_rejected=ref_rejected)
            per_pair[name] = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))

    matched = np.argsort(np.abs(size_chosen - size_rejected), kind="stable")[: max(1, round(n / 3))]
    groups = list(prompt_ids) if prompt_ids is not None else list(range(n))

    def mean(x: Floats) -> Interval:
        return bootstrap_mean(x, groups=groups, seed=seed, draws=draws, level=level)

    def accuracy(x: Floats, rows: NDArray[np.intp]) -> Interval:
        prompts = len({groups[i] for i in rows})
        return wilson(float((x[rows] > 0).mean()) * prompts, prompts, level)

    margins = {name: Margin(mean(x), accuracy(x, np.arange(n)), accuracy(x, matched)) for name, x in per_pair.items()}
    return Separation(n, len(matched), margins, mean(chosen), mean(rejected))


def mutual_information(counts: ArrayLike) -> float:
    """MI(domain; expert) in nats of counts (D, K): sum p(d) p(e|d) ln[p(e|d) / p(e)] with p(d) = 1/D.

    0 where all rows are alike; ln D where no two domains share an expert.
    """
    given = np.asarray(counts, dtype=float)
    given = given / given.sum(1, keepdims=True)
    marginal = given.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(given > 0, given * np.log(given / marginal), 0.0)
    return float(terms.sum(1).mean())


def information_test(
    by_prompt: ArrayLike, domains: Sequence[str], permutations: int = 200, seed: int = 0
) -> tuple[float, float]:
    """MI of counts by prompt (P, K), and its p-value: domains are permuted over prompts, so prompts stay whole."""
    counts, labels = np.asarray(by_prompt, dtype=float), np.asarray(domains)
    names = np.unique(labels)

    def statistic(order: NDArray[Any]) -> float:
        return mutual_information(np.stack([counts[order == name].sum(0) for name in names]))

    found = statistic(labels)
    generator = np.random.default_rng(seed)
    chance = [statistic(generator.permutation(labels)) for _ in range(permutations)]
    return found, (1 + sum(value >= found - 1e-12 for value in chance)) / (permutations + 1)


def switch_rate(top: ArrayLike) -> float:
    """Share of adjacent tokens, (T,) or (T, R), whose first expert differs; NaN below two tokens."""
    top = np.asarray(top)
    return float((top[1:] != top[:-1]).mean()) if len(top) > 1 else math.nan


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return float(ndtri(0.5 + level / 2))


def _paired_correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    n = both + only_a + only_b + neither
    denominator = math.sqrt(float(both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    numerator = float(both * neither - only_a * only_b)
    if numerator > 0:  # continuity correction, for positive correlation only
        numerator = max(0.0, numerator - n / 2)
    return numerator / denominator if denominator else 0.0


def _hypotenuse(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _resampled_means(x: Floats, groups: Sequence[Hashable] | None, seed: int, draws: int) -> Floats:
    """Means of resampled groups: sum of sums over sum of sizes, so that a large group weighs more."""
    rng = np.random.default_rng(seed)
    if groups is not None and len(groups) != len(x):
        raise ValueError(f"groups has {len(groups)} entries for {len(x)} values")
    if groups is None or len(set(groups)) == len(x):
        distinct, counts = np.unique(x, return_counts=True)
        if len(distinct) <= 64:  # how often each distinct value is drawn: the same law, much less work
            drawn = rng.multinomial(len(x), counts / len(x), size=draws)
            return (drawn @ distinct / len(x)).astype(np.float64)
        sums, sizes = x, np.ones_like(x)
    else:
        number: dict[Hashable, int] = {}
        index = np.array([number.setdefault(g, len(number)) for g in groups])
        sums = np.bincount(index, weights=x).astype(np.float64)
        sizes = np.bincount(index).astype(np.float64)
    n = len(sums)
    means: list[Floats] = []
    for start in range(0, draws, step := max(1, _CHUNK // n)):
        picks = rng.integers(0, n, size=(min(step, draws - start), n))
        means.append(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1))
    return np.concatenate(means)


def _percentiles(means: Floats, level: float) -> tuple[float, float]:
    _z(level)  # checks it
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ranks(x: Floats) -> Floats:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _finite(values: ArrayLike, name: str) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        position = int(np.argmin(np.isfinite(x)))
        raise ValueError(f"{name} has a value that is not finite at position {position}: {x[position]}")
    return x


def _same_length(**arrays: NDArray[np.generic]) -> None:
    if len({len(x) for x in arrays.values()}) > 1:
        raise ValueError("lengths differ: " + ", ".join(f"{name} {len(x)}" for name, x in arrays.items()))
