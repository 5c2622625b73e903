"""Losses of the players at values worked out by hand."""

import math

import pytest
import torch

from tempering.core.preference import LOSSES, LossOptions
from tempering.methods.advgame import losses

NAN = float("nan")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def with_delta(delta):
    """Pairs whose Delta = (chosen - ref_chosen) - (rejected - ref_rejected) is this: half a side."""
    chosen = (doubles(*delta) / 2 - 20).requires_grad_()
    return chosen, losses.sums(chosen, -doubles(*delta) / 2 - 30, chosen.detach() * 0 - 20, chosen.detach() * 0 - 30)


def test_dpo_has_its_values_and_its_slope():
    """ln 2; ln(1 + e^-0.5); slope -beta sigma(-0.5) = -0.1 * 0.377541."""
    chosen, s = with_delta((0.0, 5.0))
    loss = losses.pair_loss("dpo", s, 0.1)
    assert loss.tolist() == pytest.approx((0.693147, 0.474077), abs=1e-6)
    loss.sum().backward()
    assert chosen.grad[1].item() == pytest.approx(-0.037754, abs=1e-6)


def test_ipo_has_its_values_and_its_slope():
    """(Delta - 5)^2: 25, 0, 4; slope at 7: 2 * 2."""
    chosen, s = with_delta((0.0, 5.0, 7.0))
    loss = losses.pair_loss("ipo", s, 0.1)
    assert loss.tolist() == pytest.approx((25, 0, 4), abs=1e-9)
    loss.sum().backward()
    assert chosen.grad[2].item() == pytest.approx(4)


def test_ipo_is_of_sums_also_where_lengths_are_given():
    _, s = with_delta((7.0,))
    assert losses.ipo(s._replace(chosen_tokens=doubles(10), rejected_tokens=doubles(3)), LossOptions(0.1)).item() == 4


def test_the_likelihood_of_the_chosen_side_is_per_token():
    _, s = with_delta((0.0,))
    longer = s._replace(chosen_tokens=doubles(10))
    assert losses.pair_loss("dpo", longer, 0.1, nll_scale=0.5).item() == pytest.approx(math.log(2) + 0.5 * 20 / 10)


def test_classes_weigh_alike_whatever_their_pairs():
    assert losses.class_weights({"harmful": 4, "benign": 1}, {"harmful": 1, "benign": 1}) == {
        "harmful": 1 / 8, "benign": 1 / 2,
    }  # fmt: skip
    assert losses.class_weights({"harmful": 2, "benign": 4}, {"harmful": 3, "benign": 1}) == {
        "harmful": 3 / 8, "benign": 1 / 16,
    }  # fmt: skip
    assert losses.class_weights({"harmful": 0, "benign": 0}, {"harmful": 1, "benign": 1}) == {}
    assert losses.class_weights({"harmful": 0, "benign": 3}, {"harmful": 1, "benign": 0}) == {}


def test_advantages_are_rewards_less_the_mean_of_the_valid():
    """(8 + 5 - 1) / 3 = 4 over the batch; by group 4 and then (6 + 2) / 2 = 4 of the second alone."""
    r = doubles((8, 5, NAN, -1), (6, 2, NAN, NAN))
    valid = ~r.isnan()
    assert losses.advantages(r[:1], valid[:1]).tolist() == [[4, 1, 0, -5]]
    assert losses.advantages(r, valid).tolist() == [[4, 1, 0, -5], [2, -2, 0, 0]]
    r[1, 0] = 10
    assert losses.advantages(r, valid, "group").tolist() == [[4, 1, 0, -5], [4, -4, 0, 0]]
    assert losses.advantages(r, valid, "none").tolist() == [[8, 5, 0, -1], [10, 2, 0, 0]]


def test_shares_are_means_within_groups_and_over_groups_that_have_rollouts():
    counted = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert losses.row_shares(counted).tolist() == [[0.25, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]


def grpo(lp, sampler=None, ref=None, advantage=(1.0,), mask=None, beta=0.0, **options):
    lp = torch.tensor(lp, dtype=torch.float64).requires_grad_()
    sampler, ref = (lp.detach() if x is None else torch.tensor(x, dtype=torch.float64) for x in (sampler, ref))
    mask = torch.ones_like(lp, dtype=torch.bool) if mask is None else torch.tensor(mask)
    share = torch.ones(len(lp), dtype=torch.float64) / len(lp)
    terms = losses.grpo(lp, sampler, ref, doubles(*advantage), share, mask, beta, **options)
    terms.loss.backward()
    return terms, lp.grad


def test_k3_has_its_values():
    """exp(.5) - .5 - 1 = .148721 and exp(-.5) + .5 - 1 = .106531, of reference minus policy; slope 1 - exp(r - p)."""
    for gap, want in ((0.5, 0.148721), (-0.5, 0.106531)):
        terms, slope = grpo([[-2.0]], ref=[[-2.0 + gap]], advantage=(0.0,), beta=2.0)
        assert terms.kl_nats.item() == pytest.approx(want, abs=1e-6)
        assert terms.loss.item() == pytest.approx(2 * want, abs=1e-6)
        assert slope.item() == pytest.approx(2 * (1 - math.exp(gap)))


def test_a_ratio_of_three_is_cut_to_two_and_not_differentiated():
    _, slope = grpo([[-1.0]], sampler=[[-1.0 - math.log(3)]], advantage=(5.0,))
    assert slope.item() == pytest.approx(-2 * 5.0)
    _, below = grpo([[-1.0]], sampler=[[-1.0 - math.log(1.5)]], advantage=(5.0,))
    assert below.item() == pytest.approx(-1.5 * 5.0)


def test_tokens_are_summed_and_rows_averaged():
    """Two rows of three and one token: the gradient of each token is -adv / 2."""
    _, slope = grpo([[-1.0] * 3, [-1.0] * 3], advantage=(2.0, -4.0), mask=[[True] * 3, [True, False, False]])
    assert slope.tolist() == [[-1.0] * 3, [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_masked_tokens_have_no_gradient_whatever_they_hold(estimator):
    mask = [[True, False]]
    terms, slope = grpo(
        [[-1.0, NAN]], [[-1.0, NAN]], [[-1.5, NAN]], advantage=(3.0,), mask=mask, beta=0.1, estimator=estimator
    )
    assert torch.isfinite(terms.loss) and slope[0, 1] == 0 and slope[0, 0] != 0


def test_micro_batches_add_up_to_the_step():
    draw = torch.Generator().manual_seed(0)
    lp, sampler, ref = (-torch.rand(5, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    advantage, share = (
        torch.arange(-2.0, 3.0, dtype=torch.float64),
        torch.rand(5, generator=draw, dtype=torch.float64),
    )
    mask = torch.rand(5, 4, generator=draw) > 0.3
    parts = (lp, sampler, ref, advantage, share, mask)
    whole = losses.grpo(*parts, 0.1).loss
    assert sum(losses.grpo(*(p[i : i + 2] for p in parts), 0.1).loss for i in (0, 2, 4)) == pytest.approx(
        float(whole)
    )


@pytest.mark.parametrize(("name", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_losses_are_those_of_core_where_every_completion_is_one_token(name, theirs):
    """There IPO of rates, which `tests/core/test_parity_trl.py` compares with TRL's, is IPO of sums; so is DPO."""
    draw = torch.Generator().manual_seed(0)
    s = losses.sums(*(-10 * torch.rand(6, generator=draw, dtype=torch.float64) for _ in range(4)))
    assert torch.equal(losses.pair_loss(name, s, 0.1), LOSSES[theirs](s, LossOptions(0.1)))
