"""Our statistics recompute the published tables of arXiv:2604.09665 from its rows, and the rest from its curves."""

import json
from pathlib import Path

import numpy as np
import pytest

from tempering.core.stats import spearman
from tempering.methods.attribution.analysis import (
    best_layer_by_others,
    clustered_interval,
    densities,
    drops,
    gap_matrix,
    length_correlation,
)
from tempering.methods.attribution.scores import depth_layer

HERE = Path(__file__).parent / "data"
TABLES = json.loads((HERE / "deliberative_tables.json").read_text(encoding="utf-8"))
CURVES = json.loads((HERE / "deliberative_layer_curves.json").read_text(encoding="utf-8"))["configs"]
ATTACKS = ("DAN", "WJ", "SR")
BENCHMARKS = (*ATTACKS, "GSM8K", "MMLU")
FIRST = {(r["teacher"], r["student"]): r["values"]["first"] for r in TABLES["sft"]}


def values(table, selector):
    return np.array([row["values"][selector] for row in TABLES[table]])


def summary(table, selector):
    first, other = values(table, "first"), values(table, selector)
    return [drops(first[:, k], other[:, k]) for k in range(first.shape[1])]


SFT = {
    "random": ([-1.16, 0.35, -2.39, 0.99, 0.76], [20, 19, 23]),
    "perplexity": ([-26.27, -31.90, -8.08, -5.25, -1.93], [11, 12, 20]),
    "self_certainty": ([-46.31, -75.61, -87.49, -6.13, 5.43], [6, 1, 1]),
    "kl": ([19.20, 17.06, 32.15, 29.83, 36.37], [29, 29, 30]),
    "latent_12": ([28.22, 31.43, 35.43, 7.52, 11.41], [41, 38, 37]),
    "latent_best": ([42.33, 47.96, 56.64, -8.13, -17.85], [42, 42, 42]),
}
GRPO = {
    "perplexity": [-36.39, -14.94, 15.64, -55.11, -11.40],
    "self_certainty": [-61.34, -75.47, -112.64, -41.85, -3.52],
    "kl": [52.01, 64.58, 73.90, -13.44, 13.18],
    "latent_12": [21.93, 35.70, 48.16, 5.37, 2.25],
    "latent_best": [42.98, 50.51, 75.37, -12.86, -12.30],
}


@pytest.mark.parametrize("selector", SFT)
def test_table_of_sft_drops(selector):
    want, lowered = SFT[selector]
    found = summary("sft", selector)
    np.testing.assert_allclose([100 * d.mean_relative for d in found], want, atol=0.01)
    assert [d.lowered for d in found[:3]] == lowered
    published = TABLES["published_mean_relative_drop"]["sft"][selector]
    np.testing.assert_allclose([100 * d.mean_relative for d in found], published, atol=0.65)


@pytest.mark.parametrize("selector", GRPO)
def test_table_of_grpo_drops(selector):
    found = [100 * d.mean_relative for d in summary("grpo", selector)]
    np.testing.assert_allclose(found, GRPO[selector], atol=0.01)


def test_after_grpo_kl_beats_layer_12_against_the_published_summary():
    kl, latent = values("grpo", "kl"), values("grpo", "latent_12")
    assert (kl[:, :3] < latent[:, :3]).sum(axis=0).tolist() == [11, 12, 11]
    published = TABLES["published_mean_relative_drop"]["grpo"]["kl"]
    assert published[0] < 0 < 50 < 100 * summary("grpo", "kl")[0].mean_relative


def test_absolute_rates_ratios_medians_and_intervals_of_layer_12():
    first, latent = values("sft", "first"), values("sft", "latent_12")
    np.testing.assert_allclose(first.mean(axis=0), [25.79, 25.39, 20.74, 39.23, 36.77], atol=0.01)
    np.testing.assert_allclose(latent.mean(axis=0), [19.60, 19.05, 14.74, 36.29, 32.41], atol=0.01)
    found = summary("sft", "latent_12")
    np.testing.assert_allclose([100 * d.of_means for d in found[:3]], [24.0, 25.0, 28.9], atol=0.1)
    np.testing.assert_allclose([100 * d.median_relative for d in found[:3]], [24.0, 31.1, 42.9], atol=0.1)
    kl = summary("sft", "kl")
    np.testing.assert_allclose([100 * d.median_relative for d in kl[:3]], [25.0, 32.2, 46.0], atol=0.1)
    students = [row["student"] for row in TABLES["sft"]]
    for k, (low, high) in enumerate(((16, 42), (19, 45), (27, 43))):
        got = clustered_interval(first[:, k], latent[:, k], students)
        assert 100 * got.low == pytest.approx(low, abs=1.5) and 100 * got.high == pytest.approx(high, abs=1.5)


def test_layer_12_fails_to_lower_the_rate_in_ten_cells():
    first, latent = values("sft", "first")[:, :3], values("sft", "latent_12")[:, :3]
    assert (latent >= first).sum() == 10 and (latent == first).sum() == 1
    worst = np.unravel_index(np.argmax(latent / first), first.shape)
    row = TABLES["sft"][worst[0]]
    assert (row["student"], row["teacher"], first[worst], latent[worst]) == ("Qwen2.5-7B", "R1-Llama-8B", 22.6, 31.9)


def test_instruct_against_pretrained():
    for selector, want in (
        ("latent_12", [0.88, 2.31, -1.53]), ("latent_best", [9.24, 13.81, 18.96]), ("kl", [-1.06, -1.90, 1.55])
    ):  # fmt: skip
        found = [100 * d.mean_relative for d in summary("instruct_vs_pretrained", selector)]
        np.testing.assert_allclose(found, want, atol=0.01)


def test_safer_teachers_do_not_make_safer_students():
    unsafe = {name: t["unsafe_training_responses_approx"] for name, t in TABLES["teachers"].items()}
    for k, want in enumerate((-0.38, -0.30, -0.46)):
        found = [
            spearman(
                [unsafe[r["teacher"]] for r in TABLES["sft"] if r["student"] == student],
                [r["values"]["first"][k] for r in TABLES["sft"] if r["student"] == student],
            )
            for student in TABLES["students"]
        ]
        assert np.mean(found) == pytest.approx(want, abs=0.01)
        rows = [
            {
                "teacher": r["teacher"], "student": r["student"], "asr": r["values"]["first"][k] / 100,
                "teacher_unsafe": unsafe[r["teacher"]] / 41_000,
            }
            for r in TABLES["sft"]
        ]  # fmt: skip
        assert gap_matrix(rows).mean_transfer == pytest.approx(np.mean(found), abs=1e-9)


# --- curves -------------------------------------------------------------------------------------------


def rates(config, benchmark):
    """ASR or accuracy at each layer, in percent."""
    if benchmark in ATTACKS:
        return 100 - np.array(config["safety_rate"][benchmark])
    return np.array(config["accuracy"][benchmark])


def drop_curve(config, benchmark):
    first = FIRST[config["teacher"], config["student"]][BENCHMARKS.index(benchmark)]
    return (first - rates(config, benchmark)) / first


def test_curves_agree_with_the_tables_at_layer_12():
    latent = {(r["teacher"], r["student"]): r["values"]["latent_12"] for r in TABLES["sft"]}
    agree = [
        sum(abs(rates(c, b)[12] - latent[c["teacher"], c["student"]][k]) < 0.15 for c in CURVES)
        for k, b in enumerate(BENCHMARKS)
    ]
    assert agree == [40, 42, 40, 42, 41]


DEPTHS = {
    0.40: ([31.5, 33.7, 39.9, 8.2, 10.7], 118),
    0.50: ([27.0, 31.9, 28.5, 5.8, 8.1], 109),
    0.55: ([29.8, 36.1, 42.2, 6.1, 9.0], 120),
    0.60: ([29.9, 35.1, 39.7, 5.5, 8.5], 119),
    1.0: ([10.7, 10.3, 16.1, 8.8, 9.2], 97),
    "index 0": ([-54.5, -73.2, -86.5, 4.7, -16.6], 34),
    "index 12": ([28.1, 31.2, 35.3, 7.4, 11.3], 116),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_table(depth):
    want, wins = DEPTHS[depth]
    found, lowered = [], 0
    for benchmark in BENCHMARKS:
        picked = [
            drop_curve(c, benchmark)[
                int(depth.split()[1]) if isinstance(depth, str) else depth_layer(depth, c["blocks"])
            ]
            for c in CURVES
        ]
        found.append(100 * np.mean(picked))
        lowered += sum(d > 0 for d in picked) if benchmark in ATTACKS else 0
    np.testing.assert_allclose(found, want, atol=0.1)
    assert lowered == wins


@pytest.mark.parametrize(("smooth", "want"), [(0, [36.4, 41.8, 43.4]), (1, [35.6, 40.0, 41.2])])
def test_layer_chosen_on_the_other_two_benchmarks(smooth, want):
    found = []
    for held_out in ATTACKS:
        picked = []
        for config in CURVES:
            curves = {b: drop_curve(config, b) for b in ATTACKS}
            picked.append(curves[held_out][best_layer_by_others(curves, held_out, smooth=smooth)])
        found.append(100 * np.mean(picked))
    np.testing.assert_allclose(found, want, atol=0.1)


def test_the_oracle_layer_of_utility_is_often_the_embeddings():
    zero = {
        b: sum(int(np.argmax(rates(c, b))) == 0 for c in CURVES) for b in ("GSM8K", "MMLU")
    }  # fmt: skip
    assert zero == {"MMLU": 32, "GSM8K": 14}


# --- by hand ------------------------------------------------------------------------------------------


def test_gap_matrix_by_hand():
    rows = [
        {"teacher": "a", "student": "s", "asr": 0.3, "teacher_asr": 0.1, "accuracy": 0.4, "base_accuracy": 0.5},
        {"teacher": "b", "student": "s", "asr": 0.2, "teacher_asr": 0.2},
    ]
    found = gap_matrix(rows)
    assert found.gap == [[pytest.approx(0.2)], [0.0]] and found.utility_tax == [[pytest.approx(0.2)], [None]]
    assert found.transfer == {"s": None}
    with pytest.raises(ValueError, match="row 1: missing column 'asr'"):
        gap_matrix([{"teacher": "a", "student": "s"}])
    with pytest.raises(ValueError, match="two rows"):
        gap_matrix([rows[0], rows[0]])


def test_densities_and_length_correlation():
    rng = np.random.default_rng(0)
    y = (rng.random((100, 8)) < 0.5).astype(float)
    found = densities(np.where(y == 1, 0.98, 0.94) + rng.normal(size=y.shape) * 0.003, y)
    assert found["peak_harmful"] == pytest.approx(0.98, abs=0.005) and found["auroc"] > 0.99
    assert found["peak_safe"] == pytest.approx(0.94, abs=0.005)
    tokens = rng.integers(5, 500, y.shape)
    assert length_correlation(tokens * 2.0, tokens)["within_prompt"] == pytest.approx(1)
    assert abs(length_correlation(rng.random(y.shape), tokens)["pooled"]) < 0.15
