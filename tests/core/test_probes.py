import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tempering.core.activations import capture
from tempering.core.bank import Bank, make_bank
from tempering.core.probe_losses import STATE_LOSSES
from tempering.core.probes import (
    Labelled,
    Probe,
    Worth,
    assess,
    auroc,
    candidates,
    choose_strength,
    difference_of_means,
    fit,
    locate,
    mean_states,
    permuted_aurocs,
    random_direction,
    select_layers,
    stability,
)
from tempering.core.text_rows import Tokens


def planted(n=400, width=24, share=0.5, seed=0, strength=3.0):
    """Noise of unequal scale in each coordinate, and an attribute along one direction; groups of five rows."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(width)
    v /= np.linalg.norm(v)
    y = rng.random(n) < share
    x = rng.standard_normal((n, width)) + strength * y[:, None] * v
    return x, y, v, [f"g{i // 5}" for i in range(n)]


def test_a_planted_direction_is_found_with_its_sign():
    x, y, v, _ = planted(2000)
    assert fit(x, y, 0.01).direction @ v > 0.98
    assert difference_of_means(x, y).direction @ v > 0.98
    assert fit(x, ~y, 0.01).direction @ v < -0.98


def test_nine_to_one_classes_find_the_same_direction():
    x, y, v, _ = planted(4000, share=0.1)
    found = fit(x, y, 0.01)
    assert found.direction @ v > 0.98
    # Balanced: the border is at the middle of the classes, not beyond the small one.
    middle = (x[y].mean(0) + x[~y].mean(0)) / 2
    assert abs(middle @ found.direction + found.bias) < 0.2


def test_scores_in_raw_space_are_those_of_the_regression_over_the_norm():
    x, y, _, _ = planted()
    x[:, 3] = 7.0  # a coordinate that never changes has no scale
    found = fit(x, y, 0.1)
    a, sd = x.mean(0), x.std(0)
    sd[sd == 0] = 1
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit((x - a) / sd, y)
    norm = np.linalg.norm(model.coef_[0] / sd)
    assert np.allclose(x @ found.direction + found.bias, model.decision_function((x - a) / sd) / norm)
    assert np.linalg.norm(found.direction) == pytest.approx(1)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="with the attribute and texts without it"):
        fit(np.ones((3, 2)), np.array([True] * 3), 1.0)


def test_probes_of_permuted_labels_are_at_chance_and_the_real_one_is_above_them():
    x, y, _, groups = planted()
    null = permuted_aurocs(x[:300], y[:300], groups[:300], x[300:], y[300:], 0.1, 20, seed=0)
    assert np.mean(null) == pytest.approx(0.5, abs=0.12)
    assert auroc(fit(x[:300], y[:300], 0.1), x[300:], y[300:]) > np.quantile(null, 0.95)


def test_stability_tells_a_signal_from_noise():
    x, y, _, groups = planted()
    noise = np.random.default_rng(1).standard_normal(x.shape)
    strength = choose_strength(x[:300], y[:300], x[300:], y[300:])
    assert stability(x, y, groups, strength, 5, 0) > 0.8 > 0.7 > stability(noise, y, groups, 0.01, 5, 0)


def rows_of(policy, count=24):
    words = ("stone river", "apple glass", "here is how", "the safe answer is no I cannot")
    rows = []
    for i in range(count):
        has = i % 2 == 0
        ids = list(policy.tokenizer(words[i % 4] + (" yes sure" if has else " no no") + "." * (i % 5))["input_ids"])
        split = ("train", "train", "validation", "test")[(i // 2) % 4]
        rows.append(Labelled(Tokens(f"t{i}", f"g{i // 4}", ids), has, split))
    return rows


def test_streamed_features_are_those_in_memory(tiny_policy, tmp_path):
    policy = tiny_policy()
    rows = [row.tokens for row in rows_of(policy)]
    found = mean_states(policy, rows, [0, 1], tmp_path, skip_first=1, batch_tokens=40)
    for i, row in enumerate(rows):
        with torch.no_grad(), capture(policy.model, [1, 2]) as states:
            policy.model(input_ids=torch.tensor([row.ids]))
        for layer in (0, 1):
            expected = states[layer + 1][0, 1:].mean(0).half().numpy()
            np.testing.assert_allclose(found[layer][i], expected, rtol=2e-3, atol=2e-3)


def test_statistics_are_over_tokens_of_texts_without_the_attribute(tiny_policy):
    policy = tiny_policy()
    rows = [row.tokens for row in rows_of(policy)]
    v = random_direction(32, 0, 1)
    [probe] = locate(policy, rows, {1: v}, skip_first=1, batch_tokens=60).values()
    states = []
    for row in rows:
        with torch.no_grad(), capture(policy.model, [2]) as found:
            policy.model(input_ids=torch.tensor([row.ids]))
        states.append(found[2][0, 1:])
    h, direction = torch.cat(states), torch.tensor(v, dtype=torch.float32)
    assert torch.allclose(probe.mean, h.mean(0), atol=1e-4)
    assert probe.projection == pytest.approx(float((h @ direction).mean()), abs=1e-4)
    assert probe.spread == pytest.approx(float((h @ direction).std(correction=0)), rel=1e-4)
    angles = torch.cosine_similarity(h - h.mean(0), direction[None])
    assert probe.threshold == pytest.approx(float(angles.median()), abs=1e-4)
    assert probe.norm == pytest.approx(float(h.norm(dim=-1).mean()), rel=1e-4)


def test_a_bank_is_read_back_as_it_was(tiny_policy, tmp_path):
    policy = tiny_policy()
    bank = make_bank(
        policy, rows_of(policy), tmp_path / "x", seed=0, skip_first=1, batch_tokens=64, refits=2, permutations=2
    )
    bank.save(tmp_path / "bank")
    again = Bank.load(tmp_path / "bank")
    assert again.worth == bank.worth and set(again.controls) == {"shuffled", "diff_of_means"}
    for kind in ("probe", "shuffled", "diff_of_means", "random"):
        assert np.array_equal(again.direction(kind, 1, 7), bank.direction(kind, 1, 7))
    assert bank.worth[0].stability is None and bank.worth[1].stability is not None  # block 0 of 2 is too early


def test_assessment_keeps_another_data_set_apart():
    x, y, _, groups = planted(200)
    splits = ["train"] * 120 + ["validation"] * 30 + ["test"] * 30 + ["other"] * 20
    rows = [
        Labelled(Tokens(str(i), g, [1]), bool(k), s)
        for i, (g, k, s) in enumerate(zip(groups, y, splits, strict=True))
    ]
    _, worth = assess(4, x, rows, seed=0, refits=2, permutations=3)
    assert worth.layer == 4 and worth.other_auroc > 0.8 and worth.auroc > 0.8
    assert worth.permuted_95 < worth.auroc


def table(aurocs, stabilities=None):
    stabilities = stabilities or {}
    return [Worth(i, 1.0, a, a, None, stabilities.get(i, 0.9), 0.5, 0.6) for i, a in aurocs.items()]


def test_layers_are_good_and_far_apart():
    """Of 30 blocks 6 to 24 may be chosen. The best is 10; farthest from it 24, then 17 (7 from both)."""
    aurocs = dict.fromkeys(range(30), 0.95) | {10: 0.96, 3: 0.99, 20: 0.93}
    assert candidates(30) == list(range(6, 25))
    assert select_layers(table(aurocs), 30, 3) == [10, 17, 24]


def test_unstable_layers_and_those_no_better_than_permuted_labels_are_left_out():
    aurocs = dict.fromkeys(range(30), 0.95)
    assert 24 not in select_layers(table(aurocs, {24: 0.6}), 30, 8)
    with pytest.raises(ValueError, match=r"0 layer\(s\) .* name layers="):
        select_layers(table(dict.fromkeys(range(30), 0.55)), 30)


# --- losses: hand-derived -------------------------------------------------------------------------------

PROBE = Probe(0, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]), 1.0, 0.5, 0.2, 5.0)


def loss(name, h, h0=None):
    return float(STATE_LOSSES[name](torch.tensor([[h]]), None if h0 is None else torch.tensor([[h0]]), PROBE))


def test_cos_hinge_is_cosine_beyond_the_threshold():
    """h - mu = (1, 1): 1/sqrt 2 - .2 = .5071; (-1, 1) is on the other side: 0."""
    assert loss("cos_hinge", (3.0, 4.0)) == pytest.approx(0.50711, abs=1e-5)
    assert loss("cos_hinge", (1.0, 4.0)) == 0


def test_proj_hinge_is_squared_standard_units():
    """(3 - 1) / .5 = 4, squared 16."""
    assert loss("proj_hinge", (3.0, 9.0)) == pytest.approx(16)
    assert loss("proj_hinge", (0.5, 9.0)) == 0


def test_erase_target_moves_along_the_direction_only():
    """From (3, 4) the goal is (1, 4): at the start 4 / 25 = .16."""
    assert loss("erase_target", (3.0, 4.0), (3.0, 4.0)) == pytest.approx(0.16)
    assert loss("erase_target", (1.0, 4.0), (3.0, 4.0)) == 0


def test_steers_pull_against_the_direction():
    """cos((3,4), -v) = -.6: 1.6. ||(3,4) + 5 (1,0)||^2 / 2 = 80 / 2 = 40."""
    assert loss("cos_steer", (3.0, 4.0)) == pytest.approx(1.6)
    assert loss("mse_steer", (3.0, 4.0)) == pytest.approx(40)


@pytest.mark.parametrize("mode", ["cos_hinge", "proj_hinge", "erase_target"])
def test_a_planted_attribute_falls_and_little_else_moves(mode):
    """States with the attribute, as free variables: drift beside v stays under 5 % of the norm; at the goal no
    gradient."""
    draw = torch.Generator().manual_seed(0)
    v = torch.zeros(64)
    v[5] = 1.0
    plain = torch.randn(256, 64, generator=draw)
    along, away = plain @ v, plain - plain.mean(0)
    cosines = (away @ v) / away.norm(dim=-1)
    probe = Probe(
        0, v, plain.mean(0), float(along.mean()), float(along.std()), float(cosines.median()),
        float(plain.norm(dim=-1).mean()),
    )  # fmt: skip
    h0 = (torch.randn(32, 64, generator=draw) + 1.5 * v)[None]
    h = h0.clone().requires_grad_()
    optimiser = torch.optim.SGD([h], lr={"cos_hinge": 20.0, "proj_hinge": 2.0, "erase_target": 200.0}[mode])
    for _ in range(200):
        optimiser.zero_grad()
        STATE_LOSSES[mode](h, h0, probe).mean().backward()
        optimiser.step()
    moved = (h - h0).detach()
    assert float((h.detach() @ v).mean()) < 0.2 < 1.2 < float((h0 @ v).mean())
    beside = moved - (moved @ v)[..., None] * v
    assert float((beside.norm(dim=-1) / h0.norm(dim=-1)).mean()) < 0.05
    done = h.detach() - 5 * v if mode != "erase_target" else h0 - ((h0 @ v) - probe.projection)[..., None] * v
    done = done.clone().requires_grad_()
    STATE_LOSSES[mode](done, h0, probe).sum().backward()
    assert float(done.grad.abs().max()) < 1e-6
