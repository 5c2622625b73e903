"""Numbers here are worked out from the formulas in the docs, not from the code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.data.split import hold_out_prompts
from tempering.methods.staged_competence import curriculum as cur
from tempering.methods.staged_competence.curriculum import Curriculum

PAPER = Curriculum(min_pool=1)
N, B = 2914, 32


def deciles(values):
    n = len(values)
    return [float(np.mean(values[j * n // 10 : (j + 1) * n // 10])) for j in range(10)]


def counts(n, rows):
    return np.bincount([i for row in rows for i in row], minlength=n)


def test_pools_of_the_paper_setting():
    steps = cur.stage_steps(N, B, 5)
    pools = cur.pools(N, B, steps, PAPER)
    assert steps == 460
    assert [pools[t] for t in (0, 1, 10, 230, 459)] == [30, 139, 431, 2061, 2911]
    assert cur.competence(459, 460, PAPER) == pytest.approx(0.998913, abs=1e-6)


def test_exposure_and_unseen_share_of_the_paper_setting():
    """Easy pairs are drawn twenty times as often as hard ones, and one pair in ten never."""
    exposure = cur.exposure(N, B, 5, PAPER)
    want = [9.639, 8.584, 7.573, 6.563, 5.553, 4.543, 3.534, 2.523, 1.513, 0.502]
    assert deciles(exposure) == pytest.approx(want, abs=6e-4)
    assert exposure.sum() == pytest.approx(460 * B)
    assert np.count_nonzero(exposure == 0) == 3
    assert cur.unseen_share(N, B, 5, PAPER) == pytest.approx(0.0993, abs=5e-5)


def test_distinct_share_of_a_batch_in_the_paper_setting():
    """Expected share of distinct pairs in B draws from a pool of s: s (1 - (1 - 1/s)^B) / B."""
    pools = np.array(cur.pools(N, B, 460, PAPER), dtype=float)
    share = pools * (1 - (1 - 1 / pools) ** B) / B
    assert share[0] == pytest.approx(0.6207, abs=5e-5) and share.mean() == pytest.approx(0.989, abs=5e-4)


def test_four_epochs():
    steps = cur.stage_steps(N, B, 4)
    assert (steps, cur.pools(N, B, steps, PAPER)[10]) == (368, 482)
    assert cur.unseen_share(N, B, 4, PAPER) == pytest.approx(0.1242, abs=5e-5)


def test_linear_pacing():
    linear = Curriculum(min_pool=1, pacing="linear")
    pools = cur.pools(N, B, 460, linear)
    assert [pools[t] for t in (1, 10, 230)] == [36, 92, 1472]
    assert cur.unseen_share(N, B, 5, linear) == pytest.approx(0.1646, abs=5e-5)
    first, *_, last = deciles(cur.exposure(N, B, 5, linear))
    assert (first, last) == (pytest.approx(16.389, abs=6e-4), pytest.approx(0.260, abs=6e-4))


def test_a_small_stage():
    pools = cur.pools(100, 8, cur.stage_steps(100, 8, 5), PAPER)
    assert len(pools) == 65 and [pools[t] for t in (0, 1, 10, 32, 64)] == [2, 13, 40, 71, 100]
    exposure = cur.exposure(100, 8, 5, PAPER)
    assert (exposure[0], exposure[50]) == (pytest.approx(13.2901, abs=5e-5), pytest.approx(5.0799, abs=5e-5))
    assert cur.unseen_share(100, 8, 5, PAPER) == pytest.approx(0.0948, abs=5e-5)


def test_the_whole_set_in_one_stage():
    steps = cur.stage_steps(8744, B, 5)
    pools = cur.pools(8744, B, steps, PAPER)
    assert (steps, pools[0], pools[10]) == (1370, 88, 753)
    assert cur.unseen_share(8744, B, 5, PAPER) == pytest.approx(0.0998, abs=5e-5)


def test_stage_sizes():
    assert [len(s) for s in cur.cut_stages([str(i) for i in range(8744)], 3)] == [2914, 2914, 2916]


def test_root_p_contains_sqrt_and_linear():
    for t in (0, 3, 9):
        assert cur.competence(t, 10, Curriculum(pacing="root_p", p=2)) == cur.competence(t, 10, Curriculum())
        linear = cur.competence(t, 10, Curriculum(pacing="linear"))
        assert cur.competence(t, 10, Curriculum(pacing="root_p", p=1)) == linear


def test_pacing_none_step_and_full_at():
    assert {cur.competence(t, 10, Curriculum(pacing="none")) for t in range(10)} == {1.0}
    steps = Curriculum(pacing="step", c0=0.2, steps=((0.5, 0.6), (0.9, 1.0)))
    assert [cur.competence(t, 10, steps) for t in (0, 4, 5, 8, 9)] == [0.2, 0.2, 0.6, 0.6, 1.0]
    half = Curriculum(full_at=0.5)
    assert cur.competence(4, 10, half) < 1.0 and cur.competence(5, 10, half) == 1.0
    assert cur.competence(0, 1, Curriculum()) == 1.0


@pytest.mark.parametrize("epochs", [2, 3, 4, 5])
def test_coverage_shows_every_pair_and_repeats_none_in_a_batch(epochs):
    rows = cur.stage_schedule(N, B, epochs, Curriculum(sampling="coverage"), 0, 0)
    assert counts(N, rows).min() >= 1 and sum(map(len, rows)) == len(rows) * B == epochs * 92 * B
    assert all(len(set(row)) == len(row) for row in rows)


def test_coverage_exposure():
    setting = Curriculum(sampling="coverage")
    drawn = np.mean([counts(N, cur.stage_schedule(N, B, 5, setting, seed, 0)) for seed in range(20)], axis=0)
    assert deciles(drawn) == pytest.approx([7.6, 7.6, 7.1, 6.5, 5.7, 5.0, 4.1, 3.2, 2.4, 1.4], abs=0.1)
    expected = cur.exposure(N, B, 5, setting)
    assert expected.sum() == pytest.approx(460 * B) and expected.min() >= 1 - 1e-9
    assert deciles(drawn) == pytest.approx(deciles(expected), abs=0.1)


def test_coverage_says_when_it_is_impossible():
    late = Curriculum(sampling="coverage", pacing="step", c0=0.1, steps=((0.9, 1.0),))
    with pytest.raises(ValueError, match=r"cannot show \d+ of 100 pairs in 13 steps of 8; raise curriculum.epochs"):
        cur.stage_schedule(100, 8, 1, late, 0, 0)


def test_coverage_and_replay_exclude_each_other():
    with pytest.raises(ValueError, match="use one of them"):
        Curriculum(sampling="coverage", replay=0.2)


@pytest.mark.parametrize(
    "bad", [{"stages": 0}, {"epochs": 0}, {"epochs": [5, 0]}, {"c0": 0}, {"full_at": 0}, {"p": 0}, {"replay": 1}]
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError):
        Curriculum(**bad)


def test_shuffled_and_sequential_make_whole_passes():
    for sampling in ("shuffled", "sequential"):
        rows = cur.stage_schedule(20, 8, 3, Curriculum(sampling=sampling), 1, 0)
        assert [len(row) for row in rows] == [8, 8, 4] * 3 and set(counts(20, rows)) == {3}
    assert rows[0] == list(range(8))
    shuffled = Curriculum(sampling="shuffled")
    passes = cur.stage_schedule(20, 20, 2, shuffled, 1, 0)
    assert passes[0] != passes[1] and cur.stage_schedule(20, 20, 2, shuffled, 2, 0) != passes


def test_weights_only_has_the_exposure_without_the_order():
    paced, flat = Curriculum(min_pool=1), Curriculum(min_pool=1, sampling="weights_only")
    assert cur.exposure(300, 8, 5, flat) == pytest.approx(cur.exposure(300, 8, 5, paced))
    first = [i for seed in range(60) for row in cur.stage_schedule(300, 8, 5, flat, seed, 0)[:5] for i in row]
    assert max(first) > 250  # hard pairs are drawn from the first step on


modes = st.sampled_from(["with_replacement", "weights_only", "shuffled", "sequential"])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), batch=st.integers(1, 40), epochs=st.integers(1, 4), c0=st.floats(0.001, 1),
    pacing=st.sampled_from(["sqrt", "linear", "none"]), full_at=st.floats(0.1, 2),
    min_pool=st.sampled_from([1, "batch", 7]), sampling=modes,
)  # fmt: skip
def test_pools_grow_and_exposure_sums_to_the_draws(n, batch, epochs, c0, pacing, full_at, min_pool, sampling):
    c = Curriculum(c0=c0, pacing=pacing, full_at=full_at, min_pool=min_pool, sampling=sampling)
    rows = cur.stage_schedule(n, batch, epochs, c, 3, 1)
    pools = cur.pools(n, batch, len(rows), c)
    assert len(rows) == cur.stage_steps(n, batch, epochs) and pools == sorted(pools)
    assert all(1 <= pool <= n for pool in pools)
    assert all(0 <= i < n for row in rows for i in row)
    if sampling == "with_replacement":
        assert all(max(row) < pool and len(row) == batch for row, pool in zip(rows, pools, strict=True))
    drawn = sum(map(len, rows))
    assert cur.exposure(n, batch, epochs, c).sum() == pytest.approx(drawn)
    assert 0 <= cur.unseen_share(n, batch, epochs, c) < 1
    some = len(rows) // 2
    assert cur.exposure(n, batch, epochs, c, some).sum() == pytest.approx(sum(map(len, rows[:some])))
    assert rows == cur.stage_schedule(n, batch, epochs, c, 3, 1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), batch=st.integers(1, 30), epochs=st.integers(2, 5), full_at=st.floats(0.1, 1))
def test_coverage_exposure_is_exact_in_sum_and_at_least_one(n, batch, epochs, full_at):
    c = Curriculum(sampling="coverage", full_at=full_at)
    try:
        rows = cur.stage_schedule(n, batch, epochs, c, 3, 1)
    except ValueError:
        return
    expected = cur.exposure(n, batch, epochs, c)
    assert expected.sum() == pytest.approx(sum(map(len, rows))) and expected.min() >= 1 - 1e-9


@pytest.mark.parametrize("sampling", ["with_replacement", "weights_only", "coverage"])
def test_draws_are_within_four_sigma_of_the_exact_expectation(sampling):
    n, batch, epochs, seeds = 120, 8, 5, 200
    c = Curriculum(sampling=sampling)
    drawn = np.array([counts(n, cur.stage_schedule(n, batch, epochs, c, seed, 2)) for seed in range(seeds)])
    expected = cur.exposure(n, batch, epochs, c)
    sigma = np.sqrt(np.maximum(drawn.var(axis=0), 1e-3) / seeds)
    assert np.all(np.abs(drawn.mean(axis=0) - expected) <= 4.5 * sigma + 1e-9)  # 120 positions at once


def test_unseen_share_agrees_with_the_draws():
    n, batch = 1000, 16
    c = Curriculum(min_pool=1)
    unseen = np.mean([np.mean(counts(n, cur.stage_schedule(n, batch, 5, c, s, 0)) == 0) for s in range(20)])
    assert unseen == pytest.approx(cur.unseen_share(n, batch, 5, c), abs=0.01)
    first = np.mean(counts(n, cur.stage_schedule(n, batch, 5, c, 0, 0)) == 0)
    assert first == pytest.approx(cur.unseen_share(n, batch, 5, c), abs=0.03)


def test_draws_depend_on_seed_stage_and_step_alone():
    """Nothing here knows of processes or micro-batches; a stage's stream does not depend on earlier stages."""
    c = Curriculum()
    base = cur.stage_schedule(50, 8, 3, c, 1, 0)
    assert cur.stage_schedule(50, 8, 3, c, 1, 0) == base
    assert cur.stage_schedule(50, 8, 3, c, 2, 0) != base != cur.stage_schedule(50, 8, 3, c, 1, 1)
    assert len({tuple(row) for row in base}) == len(base)


scores_of = st.dictionaries(
    st.text(max_size=6), st.floats(-2, 2, allow_nan=False), min_size=1, max_size=60
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(scores=scores_of, stages=st.integers(1, 6), direction=st.sampled_from(["easy_first", "hard_first"]))
def test_stages_partition_the_ids_in_order_whatever_the_input_order(scores, stages, direction):
    order = cur.rank(scores, direction)
    assert order == cur.rank(dict(reversed(scores.items())), direction)
    assert order == cur.rank(scores, "easy_first")[:: 1 if direction == "easy_first" else -1]
    if len(scores) < stages:
        with pytest.raises(ValueError, match="only"):
            cur.cut_stages(order, stages)
        return
    cut = cur.cut_stages(order, stages)
    assert [i for stage in cut for i in stage] == order
    assert {len(stage) for stage in cut[:-1]} <= {len(order) // stages}


def test_boundaries_cut_at_scores():
    scores = {"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.1, "e": -1.0}
    order = cur.rank(scores)
    assert cur.cut_at(order, scores, [0.5, 0.0]) == [["a", "b", "c"], ["d"], ["e"]]
    assert cur.cut_at(cur.rank(scores, "hard_first"), scores, [0.5, 0.0]) == [["e"], ["d"], ["c", "b", "a"]]
    with pytest.raises(ValueError, match="leave stage 1 empty"):
        cur.cut_at(order, scores, [0.5, 0.4])
    with pytest.raises(ValueError, match="must descend"):
        cur.cut_at(order, scores, [0.0, 0.5])


@settings(max_examples=40, deadline=None)
@given(prompts=st.dictionaries(st.text(max_size=8), st.text(max_size=3), min_size=1, max_size=60))
def test_held_out_prompts_do_not_leak(prompts):
    held = hold_out_prompts(prompts, 0.2, 42)
    plain = {i: " ".join(p.split()).casefold() for i, p in prompts.items()}
    assert not {plain[i] for i in held} & {plain[i] for i in set(prompts) - held}
    assert len({plain[i] for i in held}) == round(0.2 * len(set(plain.values())))
    assert held == hold_out_prompts(dict(reversed(prompts.items())), 0.2, 42)


def test_holding_out_by_score_gives_the_published_sizes():
    scores = {str(i): float(i) for i in range(10_931)}
    assert len(cur.hold_out_by_score(scores, 0.2, 42)) == 2187


def test_smaller_shares_are_subsets_with_the_same_share_of_each_quartile():
    scores = {str(i): float(i) for i in range(400)}
    half, most = cur.nested_subset(scores, 0.5, 42), cur.nested_subset(scores, 0.75, 42)
    assert half < most and len(half) == 200 and len(most) == 300
    quartiles = [sum(100 * q <= int(i) < 100 * (q + 1) for i in half) for q in range(4)]
    assert quartiles == [50] * 4
    assert cur.nested_subset(dict(reversed(scores.items())), 0.5, 42) == half


def test_replay_takes_the_last_places_and_leaves_the_other_draws():
    rows = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    replayed = cur.add_replay(rows, ["x", "y"], 0.5, 1, 2)
    assert [row[:2] for row in replayed] == [["a", "b"], ["e", "f"]]
    assert all(i in "xy" for row in replayed for i in row[2:])
    assert cur.add_replay(rows, [], 0.5, 1, 0) == rows == cur.add_replay(rows, ["x"], 0.0, 1, 2)


def test_random_scores_say_nothing_but_stay():
    assert cur.random_score("a", 1) == cur.random_score("a", 1) != cur.random_score("a", 2)
    values = [cur.random_score(str(i), 0) for i in range(2000)]
    assert min(values) >= 0 and max(values) < 1 and np.mean(values) == pytest.approx(0.5, abs=0.03)
