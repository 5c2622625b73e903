"""Golden rows are worked out by hand in float64 from three pairs; see `SCORES`."""

import math

import pytest
import torch

from tempering.core import preference
from tempering.core.preference import LOSSES, LossOptions, PairScores, start_value


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


SCORES = PairScores(
    chosen=doubles(-20, -35.5, -12.25),
    rejected=doubles(-24, -30, -12.75),
    ref_chosen=doubles(-22, -35, -15.25),
    ref_rejected=doubles(-21, -31.5, -12),
    chosen_tokens=doubles(10, 17, 5),
    rejected_tokens=doubles(12, 15, 6),
)
"""Log-ratios: chosen 2, -0.5, 3; rejected -3, 1.5, -0.75; differences 5, -2, 3.75."""

GOLDEN = {
    "sigmoid": (0.474077, 0.798139, 0.523123),  # ln(1 + e^-0.5), ln(1 + e^0.2), ln(1 + e^-0.375)
    "robust": (0.411577, 0.823139, 0.476248),
    "ipo": (20.702500, 26.310865, 18.275625),  # (2/10 + 3/12 - 5)^2 = 4.55^2 = 20.7025
    "hinge": (0.5, 1.2, 0.625),  # 1 - 0.1 * (5, -2, 3.75)
    "apo_zero": (0.875723, 1.049927, 0.906816),
    "apo_down": (0.927375, 1.037337, 0.981776),
    "simpo": (1.313262, 1.445249, 1.825674),  # ln(1 + e^-(2 * (-2 + 2) - 1)) = ln(1 + e)
    "cpo": (0.513015, 1.005492, 0.668460),  # ln(1 + e^-0.4), ln(1 + e^0.55), ln(1 + e^-0.05)
    "orpo": (0.069315, 0.074511, 0.089041),  # both answers at -2 a token: 0.1 ln 2
}


def options(loss):
    return LossOptions(beta=2.0 if loss == "simpo" else 0.1, label_smoothing=0.1, gamma=1.0)


@pytest.mark.parametrize("loss", GOLDEN)
def test_losses_have_their_hand_derived_values(loss):
    assert LOSSES[loss](SCORES, options(loss)).tolist() == pytest.approx(GOLDEN[loss], abs=1e-6)


def test_every_loss_in_the_table_has_a_golden_row():
    assert set(GOLDEN) == set(LOSSES)


def test_kto_has_its_hand_derived_values():
    """Desirable, first row: 1 - sigma(0.1 (2 - 0.3)) = 1 - sigma(0.17); undesirable: 1 - sigma(0.1 (0.3 + 3))."""
    desirable = preference.kto_desirable(SCORES.delta_chosen, 0.3, 0.1)
    undesirable = preference.kto_undesirable(SCORES.delta_rejected, 0.3, 0.1)
    assert desirable.tolist() == pytest.approx((0.457602, 0.519989, 0.432907), abs=1e-6)
    assert undesirable.tolist() == pytest.approx((0.418241, 0.529964, 0.473774), abs=1e-6)
    both = preference.kto(SCORES, LossOptions(0.1), 0.3)
    assert both.tolist() == pytest.approx([(0.457602 + 0.418241) / 2, 0.5249765, 0.4533405], abs=1e-6)


def test_kto_kl_estimate_is_a_mean_that_is_never_negative():
    assert preference.kto_kl(total=6.0, rows=4) == 1.5
    assert preference.kto_kl(total=-6.0, rows=4) == 0.0


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - preference.REFERENCE_FREE))
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_policy_equal_to_reference_gives_the_start_value(loss, beta):
    same = SCORES._replace(chosen=SCORES.ref_chosen, rejected=SCORES.ref_rejected)
    values = LOSSES[loss](same, LossOptions(beta))
    assert values.tolist() == pytest.approx([start_value(loss, beta)] * 3, abs=1e-12)


def test_kto_starts_at_a_half():
    same = SCORES._replace(chosen=SCORES.ref_chosen, rejected=SCORES.ref_rejected)
    assert preference.kto(same, LossOptions(0.1), 0.0).tolist() == [0.5] * 3 == [start_value("kto", 0.1)] * 3


def test_known_start_values():
    assert start_value("sigmoid", 0.1) == start_value("robust", 0.1) == math.log(2)
    assert start_value("ipo", 0.1) == pytest.approx(25)
    assert [start_value(loss, 0.1) for loss in ("simpo", "cpo", "orpo")] == [None, None, None]


def test_swapping_the_sides_negates_the_margin():
    s = SCORES
    swapped = PairScores(s.rejected, s.chosen, s.ref_rejected, s.ref_chosen, s.rejected_tokens, s.chosen_tokens)
    assert torch.equal(swapped.delta, -s.delta)
    # -log sigma(-x) - -log sigma(x) = x: the two DPO losses differ by the margin.
    difference = preference.sigmoid(swapped, LossOptions(0.1)) - preference.sigmoid(s, LossOptions(0.1))
    assert difference.tolist() == pytest.approx((0.1 * s.delta).tolist(), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_permuting_the_pairs_permutes_the_values(loss):
    order = torch.tensor([2, 0, 1])
    permuted = PairScores(*(part[order] for part in SCORES))
    assert torch.equal(LOSSES[loss](permuted, options(loss)), LOSSES[loss](SCORES, options(loss))[order])


@pytest.mark.parametrize("loss", [*LOSSES, "kto"])
def test_gradients_are_finite_and_push_the_margin_up(loss):
    chosen, rejected = SCORES.chosen.clone().requires_grad_(), SCORES.rejected.clone().requires_grad_()
    s = SCORES._replace(chosen=chosen, rejected=rejected)
    values = preference.kto(s, options(loss), 0.3) if loss == "kto" else LOSSES[loss](s, options(loss))
    values.sum().backward()
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    assert (rejected.grad >= 0).all() and (rejected.grad > 0).any()
    if loss != "apo_down":  # it lowers both sides, the rejected one further
        assert (chosen.grad <= 0).all() and (chosen.grad < 0).any()


def test_log1mexp_is_exact_at_both_ends_and_its_gradient_finite():
    x = doubles(-1e-10, -1e-3, -math.log(2), -5, -50, -800).requires_grad_()
    y = preference.log1mexp(x)
    want = [math.log(-math.expm1(v)) if v > -0.7 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert y[1:].tolist() == pytest.approx(want[1:], rel=1e-12, abs=1e-300)
    assert math.isfinite(y[0].item())
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_shapes_are_checked():
    with pytest.raises(Exception, match="type"):
        preference.log1mexp(torch.zeros(2, 2))
