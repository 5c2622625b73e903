"""Intervals and paired tests: hand-derived numbers, scipy as oracle, simulated coverage."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tempering.core.stats import (
    bootstrap_mean,
    correct_rate,
    information_test,
    mcnemar,
    mutual_information,
    paired_bootstrap,
    paired_fractions,
    separation,
    spearman,
    switch_rate,
    wilson,
)


def paired(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


def test_wilson_by_hand():
    """n = 10, 8 successes, z = 1.959964, z^2 = 3.841459.

    centre = (0.8 + 0.192073) / 1.384146 = 0.716740; half = 1.959964 / 1.384146
    * sqrt(0.016 + 0.0096036) = 1.416010 * 0.160011 = 0.226578; so 0.490162 to 0.943318.
    """
    assert wilson(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy_and_contains_its_estimate(counts):
    k, n = counts
    ours, oracle = wilson(k, n), scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_keeps_its_promise_of_95_percent():
    rng = np.random.default_rng(0)
    for p in (0.05, 0.3, 0.5):
        hits = [i.low <= p <= i.high for i in (wilson(int(k), 80) for k in rng.binomial(80, p, 4000))]
        assert 0.93 < np.mean(hits) < 0.98


@pytest.mark.parametrize(("k", "n"), [(0, 0), (1, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError):
        wilson(k, n)


def test_bootstrap_mean_agrees_with_the_normal_interval_and_repeats():
    x = np.random.default_rng(1).normal(3, 2, 400)
    got = bootstrap_mean(x, seed=5)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert got == pytest.approx((x.mean(), x.mean() - half, x.mean() + half), abs=0.02)
    assert got == bootstrap_mean(x, seed=5) != bootstrap_mean(x, seed=6)


def test_few_and_many_distinct_values_follow_the_same_law():
    few = np.repeat([0.0, 1.0, 4.0], [60, 30, 10])
    many = few + np.random.default_rng(0).normal(0, 1e-9, len(few))
    assert bootstrap_mean(few) == pytest.approx(bootstrap_mean(many), abs=0.03)


def test_values_of_one_prompt_are_resampled_together():
    """Ten prompts, each value ten times: 100 values are worth ten."""
    prompts = np.random.default_rng(2).normal(size=10)
    repeated, groups = np.repeat(prompts, 10), np.repeat(np.arange(10), 10).tolist()
    clustered, single = bootstrap_mean(repeated, groups=groups), bootstrap_mean(prompts)
    assert clustered == pytest.approx(single, abs=0.05)
    naive = bootstrap_mean(repeated)
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def test_one_value_has_an_interval_of_no_width():
    assert bootstrap_mean([0.25]) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_refuses_what_has_no_mean(bad):
    with pytest.raises(ValueError):
        bootstrap_mean(bad)


def test_groups_must_match_the_values():
    with pytest.raises(ValueError, match="2 entries for 3 values"):
        bootstrap_mean([1, 2, 3], groups=["a", "b"])


def test_paired_bootstrap_finds_a_shift_that_unpaired_noise_hides():
    rng = np.random.default_rng(3)
    prompt = rng.normal(0, 5, 120)
    got = paired_bootstrap(prompt + 0.5 + rng.normal(0, 0.5, 120), prompt)
    assert got.low > 0.3 and got.high < 0.7 and got.p_value < 0.001
    assert got.test == "paired_bootstrap"


def test_paired_bootstrap_swapped_negates():
    a, b = np.random.default_rng(4).normal(size=(2, 50))
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert there.difference == -back.difference
    assert there.low == pytest.approx(-back.high, abs=0.05)


def test_equal_systems_do_not_differ():
    assert paired_bootstrap([1, 2, 3], [1, 2, 3])[:4] == (0, 0, 0, 1)
    got = mcnemar([True, False, True], [True, False, True])
    assert got.difference == 0 and got.p_value == 1 and got.low < 0 < got.high


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(5)
    p = [paired_bootstrap(*rng.normal(size=(2, 40)), seed=i, draws=500).p_value for i in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.10


def test_mcnemar_reproduces_the_published_example():
    """Newcombe 1998, cells 36, 12, 2, 0: difference 0.2000, by method 10 from 0.0569 to 0.3404.

    By hand, exact p: 2 * P(X <= 2 | 14, 1/2) = 2 * (1 + 14 + 91) / 16384 = 0.0129395.
    """
    got = mcnemar(*paired(36, 12, 2, 0))
    assert got[:4] == pytest.approx((0.2, 0.0569, 0.3404, 212 / 16384), abs=5e-5)


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(sum))
def test_mcnemar_p_value_equals_scipy_and_interval_contains_the_difference(cells):
    got = mcnemar(*paired(*cells))
    _, only_a, only_b, _ = cells
    n = only_a + only_b
    assert got.p_value == pytest.approx(scipy.stats.binomtest(only_a, n).pvalue if n else 1.0, abs=1e-9)
    assert -1 <= got.low <= got.difference <= got.high <= 1


def test_mcnemar_interval_covers():
    """Correlated pairs: P(both) .2, P(only a) .25, P(only b) .1, so the difference is .15."""
    rng, hits = np.random.default_rng(6), []
    for cells in rng.multinomial(100, [0.2, 0.25, 0.1, 0.45], size=1500):
        got = mcnemar(*paired(*map(int, cells)))
        hits.append(got.low <= 0.15 <= got.high)
    assert 0.93 < np.mean(hits) < 0.98


def test_mcnemar_needs_pairs():
    with pytest.raises(ValueError, match="lengths differ"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError):
        mcnemar([], [])


def test_paired_fractions_by_hand():
    """a - b = 1, 0.5, 0, 0: mean 0.375; D = 1.5 / 6 = 0.25, variance (3.25 / 6 - 0.0625) / 6 = 0.0798611.

    half = 1.959964 * 0.282597 = 0.553880: from -0.303880 to 0.803880; z = 0.884653, p = 0.3763.
    """
    got = paired_fractions([1, 0.5, 0.5, 0], [0, 0, 0.5, 0])
    assert got[:4] == pytest.approx((0.375, -0.303880, 0.803880, 0.3763), abs=1e-4)


def test_no_disagreement_at_all_still_has_an_interval():
    got = paired_fractions([0.0] * 60, [0.0] * 60)
    assert got.p_value == 1 and got.low == pytest.approx(-got.high) and 0.02 < got.high < 0.06


def test_paired_fractions_cover_the_difference_of_seed_means():
    """Each prompt has its own rate, three seeds draw from it: the true difference is 0.1."""
    rng, hits = np.random.default_rng(8), []
    for _ in range(1000):
        rate = rng.beta(0.5, 0.8, 80) * 0.9
        a, b = rng.random((2, 3, 80))
        got = paired_fractions((a < rate + 0.1).mean(0), (b < rate).mean(0))
        hits.append(got.low <= 0.1 <= got.high)
    assert 0.93 < np.mean(hits) < 0.99


def test_paired_fractions_refuse_what_is_no_fraction():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        paired_fractions([1.5], [0])


def test_correct_rate_by_hand():
    """40 of 100 flagged, Se 0.9, Sp 0.95: (0.4 + 0.95 - 1) / (0.9 + 0.95 - 1) = 0.35 / 0.85 = 0.411765.

    Adjusted: p 0.403700 with variance 0.00231820 (n 103.8415), Se 91/102 with 0.000943166, Sp 96/102 with
    0.000542776; z^2 3.841459; excess 0.344876, informedness 0.833333. Then
    a = 0.694444 - 3.841459 * 0.001485942 = 0.688736, b = 0.344876 * 0.833333 - 3.841459 * 0.000542776
    = 0.285312, c = 0.118940 - 3.841459 * 0.00286098 = 0.107949; root = sqrt(0.0814029 - 0.0743484) = 0.0839911:
    (0.285312 -+ 0.083991) / 0.688736 = 0.292305 and 0.536205.
    """
    got = correct_rate(40, 100, true_positives=90, positives=100, true_negatives=95, negatives=100)
    assert got == pytest.approx((0.35 / 0.85, 0.292305, 0.536205), abs=1e-5)
    few = correct_rate(40, 100, true_positives=18, positives=20, true_negatives=19, negatives=20)
    assert few.high - few.low > got.high - got.low  # a judge checked on fewer labels is worth less


def test_a_perfect_judge_corrects_nothing():
    got = correct_rate(30, 100, true_positives=10**6, positives=10**6, true_negatives=10**6, negatives=10**6)
    assert got == pytest.approx(wilson(30, 100), abs=5e-3)


def test_corrected_rate_is_clipped_and_a_coin_is_refused():
    got = correct_rate(1, 100, true_positives=90, positives=100, true_negatives=80, negatives=100)
    assert got.value == 0 and got.low == 0 and 0 < got.high < 0.2
    with pytest.raises(ValueError, match="tells nothing"):
        correct_rate(1, 100, true_positives=50, positives=100, true_negatives=50, negatives=100)


def simulated(rate, se, sp, n, positives, negatives, runs, seed=7):
    """Judged answers and a labelled set drawn anew each time: (hits of the corrected interval, of the raw one)."""
    rng = np.random.default_rng(seed)
    yes = rng.binomial(n, rate * se + (1 - rate) * (1 - sp), runs)
    found, cleared = rng.binomial(positives, se, runs), rng.binomial(negatives, sp, runs)
    corrected, raw = [], []
    for k, tp, tn in zip(yes.tolist(), found.tolist(), cleared.tolist(), strict=True):
        if tp / positives + tn / negatives > 1:
            labels = {"true_positives": tp, "positives": positives, "true_negatives": tn, "negatives": negatives}
            got, plain = correct_rate(k, n, **labels), wilson(k, n)
            corrected.append(got.low <= rate <= got.high)
            raw.append(plain.low <= rate <= plain.high)
    return np.mean(corrected), np.mean(raw)


def test_correction_recovers_a_planted_rate_that_the_raw_interval_misses():
    """30 % comply; a judge with Se 0.95 and Sp 0.76, checked on 80 + 88 labels, reports 45 %."""
    corrected, raw = simulated(0.3, 0.95, 0.76, 200, 80, 88, runs=4000)
    assert 0.93 < corrected < 0.99
    assert raw < 0.05


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("se", "sp"), [(0.55, 0.6), (0.7, 0.95), (0.98, 0.76), (1.0, 1.0)])
@pytest.mark.parametrize(("positives", "negatives"), [(15, 100), (100, 15), (50, 50)])
def test_corrected_interval_covers_also_with_few_labels_and_poor_judges(rate, se, sp, positives, negatives):
    corrected, _ = simulated(rate, se, sp, 300, positives, negatives, runs=800)
    assert corrected > 0.93 - 3 * math.sqrt(0.95 * 0.05 / 800)


def test_labels_that_cannot_tell_a_judge_from_a_coin_leave_every_rate_possible():
    got = correct_rate(40, 100, true_positives=6, positives=10, true_negatives=5, negatives=10)
    assert (got.low, got.high) == (0, 1)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.data())
def test_corrected_interval_contains_its_estimate(n, positives, negatives, draw):
    k, tp, tn = (draw.draw(st.integers(0, m)) for m in (n, positives, negatives))
    labels = {"true_positives": tp, "positives": positives, "true_negatives": tn, "negatives": negatives}
    if tp / positives + tn / negatives <= 1:
        with pytest.raises(ValueError, match="tells nothing"):
            correct_rate(k, n, **labels)
    else:
        got = correct_rate(k, n, **labels)
        assert 0 <= got.low <= got.value <= got.high <= 1


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_spearman_equals_scipy_with_ties(points):
    a, b = zip(*points, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman(a, b) is None
    else:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_separation_by_hand():
    """S+ = -10, -20, -30; S- = -12, -15, -60; lengths 5, 10, 10 and 6, 5, 30.

    raw 2, -5, 30: mean 9, accuracy 2/3. per_token -2+2, -2+3, -3+2 = 0, 1, -1: mean 0, accuracy 1/3.
    Length differences 1, 5, 20: the matched third is the first pair. With stage reference S+ -11, -18,
    -35 and S- -11, -15, -55: (1 - -1, -2 - 0, 5 - -5) = 2, -2, 10, times beta 0.5: mean 10/6.
    """
    got = separation(
        [-10, -20, -30], [-12, -15, -60], [5, 10, 10], [6, 5, 30],
        beta=0.5, stage_reference=([-11, -18, -35], [-11, -15, -55]),
    )  # fmt: skip
    assert set(got.margins) == {"raw", "per_token", "stage"}
    assert got.margins["raw"].mean.value == 9
    assert got.margins["raw"].accuracy == wilson(2, 3)
    assert got.margins["raw"].accuracy_matched == wilson(1, 1)
    assert got.margins["per_token"].mean.value == pytest.approx(0)
    assert got.margins["per_token"].accuracy.value == pytest.approx(1 / 3)
    assert got.margins["stage"].mean.value == pytest.approx(10 / 6)
    assert (got.n, got.n_matched) == (3, 1)
    assert got.logprob_chosen.value == -20 and got.logprob_rejected.value == -29


def test_policy_equal_to_the_start_model_has_no_initial_margin():
    s = ([-1.0, -2.0, -3.0], [-4.0, -2.0, -9.0])
    margin = separation(*s, [1, 2, 3], [3, 2, 1], beta=0.1, initial_reference=s).margins["initial"]
    assert margin.mean == (0, 0, 0) and margin.accuracy.value == 0  # a tie is not a win


def test_accuracy_intervals_count_prompts_not_pairs():
    s = ([1.0] * 40, [0.0] * 20 + [2.0] * 20)
    one = separation(*s, [3] * 40, [3] * 40, beta=0.1).margins["raw"].accuracy
    shared = separation(*s, [3] * 40, [3] * 40, beta=0.1, prompt_ids=[i // 4 for i in range(40)])
    assert one == wilson(20, 40) and shared.margins["raw"].accuracy == wilson(5, 10)


def test_separation_refuses_broken_input():
    with pytest.raises(ValueError, match="lengths differ"):
        separation([1, 2], [1], [1, 1], [1, 1], beta=0.1)
    with pytest.raises(ValueError, match="positive"):
        separation([1], [1], [0], [1], beta=0.1)
    with pytest.raises(ValueError, match="not finite"):
        separation([float("inf")], [1], [1], [1], beta=0.1)


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (2, 0.5), (5, 0.0625)])
def test_few_items_cannot_be_certain(n, least):
    """All n differences are positive: under "no difference" n equal signs have the probability 2 / 2^n."""
    assert paired_bootstrap([0.9] * n, [0.1] * n).p_value == least


def test_the_corrected_rate_by_hand():
    """Se 45/50 = 0.9, Sp 40/50 = 0.8, 100 answers of which the judge calls 34: (0.34 - 0.2) / 0.7 = 0.2.

    A perfect judge changes nothing; one that finds its false alarms only says 0; one at its sensitivity says 1.
    """
    card = {"true_positives": 45, "positives": 50, "true_negatives": 40, "negatives": 50}
    rate = correct_rate(34, 100, **card)
    assert rate.value == pytest.approx(0.2) and rate.low < 0.2 < rate.high
    assert correct_rate(20, 100, **card).value == pytest.approx(0.0)
    assert correct_rate(90, 100, **card).value == pytest.approx(1.0)
    perfect = correct_rate(30, 100, true_positives=10**6, positives=10**6, true_negatives=10**6, negatives=10**6)
    assert perfect == pytest.approx(wilson(30, 100), abs=1e-3)


def test_more_labels_and_more_answers_narrow_the_corrected_interval():
    def width(labels, n):
        got = correct_rate(
            0.34 * n, n, true_positives=round(0.9 * labels), positives=labels,
            true_negatives=round(0.8 * labels), negatives=labels,
        )  # fmt: skip
        return got.high - got.low

    assert width(500, 100) < width(50, 100) and width(50, 1000) < width(50, 100)


def test_mcnemar_by_hand():
    """12 pairs: 3 both, 6 only a, 1 only b, 2 neither. D = 5/12; p = 2 (C(7,0) + C(7,1)) / 2^7 = 16/128."""
    a = [True] * 3 + [True] * 6 + [False] * 1 + [False] * 2
    b = [True] * 3 + [False] * 6 + [True] * 1 + [False] * 2
    found = mcnemar(a, b)
    assert (found.difference, found.p_value) == (pytest.approx(5 / 12), pytest.approx(0.125))
    swapped = mcnemar(b, a)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_information_is_zero_for_identical_rows_and_ln_d_for_disjoint_experts():
    assert mutual_information([[3, 1, 2], [6, 2, 4]]) == pytest.approx(0)
    assert mutual_information(np.eye(5) * 7) == pytest.approx(math.log(5))


def test_the_permutation_test_tells_dependence_from_chance():
    counts = np.tile([[9, 1], [1, 9]], (10, 1))
    found, p = information_test(counts, ["a", "b"] * 10)
    assert found == pytest.approx(mutual_information([[90, 10], [10, 90]])) and p < 0.01
    assert information_test(counts, ["a", "a", "b", "b"] * 5)[1] > 0.5


def test_switch_rate_by_hand():
    assert switch_rate([1, 1, 2, 1]) == pytest.approx(2 / 3)
    assert switch_rate([[0, 1], [0, 2]]) == pytest.approx(0.5)
    assert math.isnan(switch_rate([1]))
