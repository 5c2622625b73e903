"""Averages of LoRA factors against dense ones, in float64."""

import pytest
import torch

from tempering.methods.advgame import ema
from tempering.methods.advgame.ema import Factors

D, E, R, G = 11, 7, 3, 0.95


def factors(seed, dtype=torch.float64, rank=R):
    draw = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype) for s in ((D, rank), (rank, E))))


def exact(old, new, decay=G):
    return decay * old.product + (1 - decay) * new.product


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
def test_averaged_factors_are_off_by_the_stated_error(decay):
    """(g B_e + h B)(g A_e + h A) - g B_e A_e - h B A = -g h (B - B_e)(A - A_e), with h = 1 - g."""
    old, new = factors(0), factors(1)
    found = ema.update({"q": old}, {"q": new}, decay)["q"]
    error = ema.factor_error(old, new, decay)
    assert torch.allclose(found.product - exact(old, new, decay), error, atol=1e-12, rtol=0)
    want = float(error.norm() / exact(old, new, decay).norm())
    assert ema.drift(old, new, decay) == pytest.approx(want, abs=1e-10)


def test_drift_over_layers_is_the_largest_and_the_mean():
    old, new = {"q": factors(0), "v": factors(2)}, {"q": factors(1), "v": factors(3)}
    each = [ema.drift(old[n], new[n], G) for n in old]
    assert ema.drift_over(old, new, G) == pytest.approx((max(each), sum(each) / 2))


def test_a_player_that_has_not_moved_has_no_drift_and_neither_has_an_adapter_of_zeros():
    player = factors(0)
    fresh = Factors(torch.zeros(D, R, dtype=torch.float64), player.a)
    assert ema.drift(player, player, G) == 0 and ema.drift(fresh, fresh, G) == 0


@pytest.mark.parametrize("rank", [1, R, 2 * R, 2 * R + 2])
def test_retruncate_is_the_truncated_svd_of_the_dense_average(rank):
    old, new = factors(0), factors(1)
    found = ema.retruncate(old, new, G, rank)
    u, s, vh = torch.linalg.svd(exact(old, new), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert found.factors.b.shape == (D, rank) and found.factors.a.shape == (rank, E)
    assert torch.allclose(found.factors.product, best, atol=1e-10, rtol=0)
    assert found.dropped == pytest.approx(float(s[rank:].norm()), abs=1e-10)
    assert torch.allclose(found.factors.b.norm(dim=0), found.factors.a.norm(dim=1), atol=1e-10)


def test_retruncate_of_adapters_that_are_zero_stays_zero():
    fresh = Factors(torch.zeros(D, R), torch.randn(R, E))
    found = ema.update({"q": fresh}, {"q": fresh}, G, "retruncate")["q"]
    assert torch.equal(found.product, torch.zeros(D, E)) and torch.isfinite(found.a).all()


def test_frozen_a_is_exact_over_a_hundred_steps_and_factors_are_not():
    player, draw = factors(0), torch.Generator().manual_seed(5)
    by_b, by_factors = {"q": player}, {"q": player}
    dense = player.product
    for _ in range(100):
        step = torch.randn(D, R, generator=draw, dtype=torch.float64) * 0.1
        player = Factors(player.b + step, player.a)
        moved = Factors(player.b, player.a + 0.1 * torch.randn(R, E, generator=draw, dtype=torch.float64))
        dense = ema.audit(dense, player, G)
        by_b = ema.update(by_b, {"q": player}, G, "frozen_a")
        by_factors = ema.update(by_factors, {"q": moved}, G)
    assert ema.accumulated_drift(dense, by_b["q"]) < 1e-12
    assert ema.accumulated_drift(dense, by_factors["q"]) > 1e-3


def test_the_first_average_is_the_player_itself_in_float32_and_apart_from_it():
    player = {"q": factors(0, torch.bfloat16)}
    start = ema.copy(player)
    assert start["q"].b.dtype == torch.float32 and torch.equal(start["q"].b, player["q"].b.float())
    player["q"].b.add_(1.0)
    assert not torch.equal(start["q"].b, player["q"].b.float())
    trained = {"q": Factors(*(t.float().requires_grad_() for t in player["q"]))}
    after = ema.update(start, trained, G)["q"]
    assert not after.b.requires_grad and not after.a.requires_grad


def test_small_updates_add_up_in_a_float32_average():
    """A change of 2^-9 of a bfloat16 value of one is lost when a twentieth of it is rounded to bfloat16."""
    old, new = torch.ones(4), torch.full((4,), 1 + 2**-7, dtype=torch.bfloat16)
    for _ in range(200):
        old = ema.average(old, new, G)
    assert torch.allclose(old, new.float(), atol=1e-6)


def test_wrong_input_is_named():
    a, b = {"q": factors(0)}, {"v": factors(0)}
    with pytest.raises(ValueError, match="one side only"):
        ema.update(a, b, G)
    with pytest.raises(ValueError, match=r"ema.decay is in \[0, 1\]"):
        ema.update(a, a, 1.5)
    with pytest.raises(ValueError, match="frozen_a"):
        ema.update(a, {"q": factors(1)}, G, "frozen_a")
