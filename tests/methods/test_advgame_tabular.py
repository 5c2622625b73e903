"""The tabular game: where each loss ends, and what averaging does, against values worked out apart from this code."""

import pytest
import torch
from advgame_tabular import (
    BENIGN,
    DEFLECT,
    HARMFUL,
    LOG_PI_REF,
    LOG_RHO_REF,
    R_DEF,
    T1,
    T2,
    Players,
    exploitability,
    gradients,
    play,
    start,
)

GIBBS = {
    "h0": (0.1790, 0.5291, 0.2919), "h1": (0.6404, 0.2629, 0.0967),
    "b0": (0.9728, 0.0199, 0.0073), "b1": (0.5637, 0.2074, 0.2289),
}  # fmt: skip
FIXED = {
    "k2": ((0.3122, 0.3689), GIBBS),
    "k3": ((0.4007, 0.3733), {
        "h0": (0.2125, 0.5659, 0.2217), "h1": (0.4295, 0.5248, 0.0457),
        "b0": (0.9572, 0.0258, 0.0170), "b1": (0.5936, 0.1496, 0.2568),
    }),
    "dpo": ((0.3396, 0.3925), GIBBS),
    "ipo": ((0.4609, 0.4481), {
        "h0": (0.4272, 0.2566, 0.3163), "h1": (0.8686, 0.0710, 0.0604),
        "b0": (0.9242, 0.0409, 0.0350), "b1": (0.2602, 0.2155, 0.5242),
    }),
}  # fmt: skip
"""T1, fixed reference: rho(first attack) of both seeds, and what the defender answers."""
FIXED_T2 = {
    "k2": ((0.4021, 0.3484), (0.4271, 0.3301, 0.2429)),
    "dpo": ((0.4220, 0.3660), (0.4297, 0.3023, 0.2680)),
    "ipo": ((0.5027, 0.4627), (0.4083, 0.2240, 0.3676)),
}
PLACES = {"h0": 0, "h1": 1, "b0": 2, "b1": 3}


def probabilities(players):
    return players.defender.softmax(-1), players.attacker.softmax(-1)


def solution(algorithm):
    """The tabulated play as logits, of T1."""
    first, answers = FIXED[algorithm]
    d = torch.tensor([answers[x] for x in PLACES], dtype=torch.float64).log()
    a = torch.tensor([(p, 1 - p) for p in first], dtype=torch.float64).log()
    return Players(d[None, None].repeat(1, 2, 1, 1), a[None, None].repeat(1, 2, 1, 1))


@pytest.mark.parametrize("algorithm", FIXED)
def test_the_gradient_vanishes_at_the_known_solution_and_not_elsewhere(algorithm):
    at, fixed = solution(algorithm), Players(LOG_PI_REF, LOG_RHO_REF)
    still = gradients(algorithm, at, at, fixed)
    moving = gradients(algorithm, start(), start(), fixed)
    for player in range(2):
        assert still[player][0, T1].abs().max() < 3e-4 < 1e-2 < moving[player][0, T1].abs().max()


def test_the_solution_of_the_policy_gradient_is_gibbs_and_that_of_k3_is_not():
    """Gibbs: pi_ref exp(R / beta) normalised. k3: beta pi_ref / (beta + m - R), m by normalisation."""
    ref = LOG_PI_REF[0, T1, :2].exp()
    gibbs = ref * R_DEF[HARMFUL].exp()
    gibbs /= gibbs.sum(-1, keepdim=True)
    assert torch.allclose(gibbs[0], torch.tensor(GIBBS["h0"]).double(), atol=6e-5)
    low, high = (torch.full((2, 1), x, dtype=torch.float64) for x in (1.0 + 1e-9, 3.0))  # beta + m > max R
    for _ in range(80):
        middle = (low + high) / 2
        too_much = (ref / (1 + middle - R_DEF[HARMFUL])).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    k3 = ref / (1 + low - R_DEF[HARMFUL])
    assert torch.allclose(k3, torch.tensor([FIXED["k3"][1][x] for x in ("h0", "h1")]).double(), atol=6e-5)


@pytest.mark.parametrize(
    ("algorithm", "decay", "want"),
    [
        ("dpo", 0.95, {100: 0.58, 300: 0.037}),
        ("dpo", 0.999, {100: 1.15, 300: 0.94}),
        ("ipo", 0.95, {100: 1.18, 300: 0.30}),
    ],
)
def test_a_reference_that_is_averaged_brings_exploitability_down(algorithm, decay, want):
    _, seen = play(algorithm, start(), max(want), decay=decay, marks=want)
    for t, value in want.items():
        assert seen[t][0, T1].item() == pytest.approx(value, abs=0.006, rel=0.02), (t, seen[t])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "decay", "want"),
    [
        ("dpo", 0.95, {1000: 0.0074, 3000: 0.0022}), ("dpo", 0.999, {1000: 0.47, 3000: 0.04}),
        ("ipo", 0.95, {1000: 0.015, 3000: 0.003}),
    ],
)  # fmt: skip
def test_it_goes_to_zero_and_the_decay_sets_the_speed(algorithm, decay, want):
    _, seen = play(algorithm, start(), max(want), decay=decay, marks=want)
    for t, value in want.items():
        assert seen[t][0, T1].item() == pytest.approx(value, rel=0.13), (t, seen[t])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FIXED)
def test_with_a_fixed_reference_all_starts_end_at_the_known_solution(algorithm):
    players, _ = play(algorithm, start(copies=5), 20_000)
    pi, rho = probabilities(players)
    first, answers = FIXED[algorithm]
    for c in (HARMFUL, BENIGN):
        assert (rho[:, T1, c, 0] - first[c]).abs().max() < 2e-3
    for x, want in answers.items():
        assert (pi[:, T1, PLACES[x]] - torch.tensor(want)).abs().max() < 2e-3, x
    if algorithm in FIXED_T2:
        first, shared = FIXED_T2[algorithm]
        for c in (HARMFUL, BENIGN):
            assert (rho[:, T2, c, 0] - first[c]).abs().max() < 2e-3
        assert (pi[:, T2, 1] - torch.tensor(shared)).abs().max() < 2e-3
    if algorithm == "dpo":
        assert exploitability(players)[:, T1].tolist() == pytest.approx([1.0135] * 6, abs=2e-3)


@pytest.mark.slow
def test_a_judge_that_never_contradicts_itself_leaves_dpo_without_a_solution_and_ipo_with_one():
    dpo, _ = play("dpo", start(), 20_000, deterministic=True)
    assert probabilities(dpo)[0][0, T1, 0, DEFLECT] > 0.98
    ipo, _ = play("ipo", start(copies=3), 20_000, deterministic=True)
    want = torch.tensor((0.3803, 0.2950, 0.3246))
    assert (probabilities(ipo)[0][:, T1, 0] - want).abs().max() < 2e-3
