"""Diversity by hand."""

import math

import numpy as np
import pytest

from tempering.evals.diversity import (
    bleu,
    clusters,
    cosine_matrix,
    dispersion,
    distinct_prefixes,
    diversity,
    self_bleu,
)


def test_bleu_of_one_changed_word():
    """'a b c d e' against 'a b c d f': 4/5, 3/4, 2/3, 1/2 of the n-grams; no brevity penalty."""
    expected = math.exp((math.log(4 / 5) + math.log(3 / 4) + math.log(2 / 3) + math.log(1 / 2)) / 4)
    assert bleu(list("abcde"), [list("abcdf")]) == pytest.approx(expected)


def test_a_short_candidate_pays_for_its_brevity_and_needs_no_four_grams():
    assert bleu(["a", "b"], [list("abcd")]) == pytest.approx(math.exp(1 - 2))
    assert bleu(list("aaaa"), [list("abbb")]) == 0.0, "clipped: one a of four, and no pair"
    assert bleu([], [[]]) == 1.0 and bleu([], [["a"]]) == 0.0


def test_self_bleu_ignores_case_and_order_of_the_texts():
    texts = ["Give me the recipe now please", "give me the recipe NOW please", "how would one bake such a thing"]
    assert self_bleu(texts) == pytest.approx(2 / 3) == pytest.approx(self_bleu(texts[::-1]))


def test_embeddings_cluster_at_cosine_08():
    """Directions at 0, 30, 60 and 180 degrees: cosines of neighbours .866, so three in a chain, and one apart."""
    angles = np.radians([0, 30, 60, 180])
    cosines = cosine_matrix(np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [2], [3], [4]])
    assert clusters(cosines) == 2
    mean = (2 * math.cos(math.pi / 6) + 0.5 - 1 - math.cos(math.pi / 6) - 0.5) / 6
    assert dispersion(cosines) == pytest.approx(1 - mean)
    assert cosine_matrix(np.zeros((2, 3))).tolist() == [[0, 0], [0, 0]]


def test_all_measures_of_two_seeds():
    same, apart = ["bake a cake at home"] * 2, ["a b c d", "e f g h"]
    vectors = {"bake a cake at home": [1.0, 0.0], "a b c d": [1.0, 0.0], "e f g h": [0.0, 1.0]}
    found = diversity({"s": same, "t": apart, "u": ["alone"]}, lambda texts: np.array([vectors[t] for t in texts]))
    assert found == {"seeds": 2, "self_bleu": 0.5, "dispersion": 0.5, "clusters": 1.5, "distinct_prefixes": 0.8}


def test_without_an_encoder_or_several_attacks_nothing_is_claimed():
    assert diversity({"s": ["one"]})["self_bleu"] is None and diversity({})["distinct_prefixes"] is None
    assert diversity({"s": ["a", "b"]})["dispersion"] is None


def test_prefixes_are_of_twenty_words():
    text = " ".join(map(str, range(20)))
    assert distinct_prefixes([f"{text} a", f"{text} b", f"x {text}"]) == pytest.approx(2 / 3)
