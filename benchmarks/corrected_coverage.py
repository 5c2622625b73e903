"""Print how often the 95 % interval of a corrected rate holds the true one, beside two others, by simulation.

    python benchmarks/corrected_coverage.py [RUNS]

Answers and labelled sets are drawn anew each time. `linearised` is the interval of Lang and Reiczigel 2014, `raw`
Wilson's interval of the uncorrected rate. Labelled sets that show no better than chance are left out, as they are of
the correction.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np

from tempering.core.stats import correct_rate, wilson

RATES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.9)
JUDGES = ((0.55, 0.6), (0.7, 0.95), (0.95, 0.76), (0.98, 0.98), (1.0, 0.6))
LABELS = ((15, 15), (15, 100), (100, 15), (50, 50), (80, 88))
ANSWERS = (50, 200)
Z = 1.959963984540054


def linearised(k: int, n: int, tp: int, positives: int, tn: int, negatives: int) -> tuple[float, float]:
    n_, p = n + Z * Z, (k + Z * Z / 2) / (n + Z * Z)
    se, sp = (tp + 1) / (positives + 2), (tn + 1) / (negatives + 2)
    if se + sp <= 1:
        return 0.0, 1.0
    rate = min(1.0, max(0.0, (p + sp - 1) / (se + sp - 1)))
    var_se, var_sp = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    centre = rate + 2 * Z * Z * (rate * var_se - (1 - rate) * var_sp)
    half = Z * math.sqrt(p * (1 - p) / n_ + rate**2 * var_se + (1 - rate) ** 2 * var_sp) / (se + sp - 1)
    return max(0.0, centre - half), min(1.0, centre + half)


def main(runs: int) -> None:
    rng = np.random.default_rng(0)
    coverage: dict[str, list[float]] = {"corrected": [], "linearised": [], "raw": []}
    width: dict[str, list[float]] = {name: [] for name in coverage}
    for rate, (se, sp), (positives, negatives), n in itertools.product(RATES, JUDGES, LABELS, ANSWERS):
        draws = zip(
            rng.binomial(n, rate * se + (1 - rate) * (1 - sp), runs).tolist(),
            rng.binomial(positives, se, runs).tolist(),
            rng.binomial(negatives, sp, runs).tolist(),
            strict=True,
        )
        ends: dict[str, list[tuple[float, float]]] = {name: [] for name in coverage}
        for k, tp, tn in draws:
            if tp / positives + tn / negatives > 1:
                labels = {"true_positives": tp, "positives": positives, "true_negatives": tn, "negatives": negatives}
                ends["corrected"].append(correct_rate(k, n, **labels)[1:])
                ends["linearised"].append(linearised(k, n, tp, positives, tn, negatives))
                ends["raw"].append(wilson(k, n)[1:])
        for name, found in ends.items():
            coverage[name].append(float(np.mean([low <= rate <= high for low, high in found])))
            width[name].append(float(np.mean([high - low for low, high in found])))
    print(f"{len(coverage['raw'])} settings, {runs} runs each; coverage of the 95 % interval over settings")
    for name, shares in coverage.items():
        low, mean = min(shares), np.mean(shares)
        print(f"  {name:<12} lowest {low:.3f}   mean {mean:.3f}   mean width {np.mean(width[name]):.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
