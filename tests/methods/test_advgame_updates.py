"""What an update may do beside its loss: keep log-probabilities from sampling, and add a bonus for entropy."""

import math

import pytest
import torch
from advgame_parts import Counting, judged_by, untimed

from tempering.core.chat import Encoded, collate
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.methods import advgame
from tempering.methods.advgame import updates
from tempering.methods.advgame.settings import ROLES


def test_log_probabilities_as_sampled_are_those_that_scoring_gives(tiny_policy):
    """Temperature and nucleus change what is drawn, not what the model says of it."""
    policy = tiny_policy()
    sampler = LocalSampler(policy, batch_rows=2)
    prompts = [Prompt(({"role": "user", "content": text},), id=text) for text in ("paint", "break the stone", "a")]
    with sampler.keeping_logprobs() as said:
        groups = sampler(prompts, n=2, max_new_tokens=5, temperature=0.7, top_p=0.9, seed=3)
    plain = sampler(prompts, n=2, max_new_tokens=5, temperature=0.7, top_p=0.9, seed=3)
    assert [[c.token_ids for c in g] for g in groups] == [[c.token_ids for c in g] for g in plain]
    assert len(said) == 6
    for prompt, group in zip(prompts, groups, strict=True):
        ids = sampler.prompt_ids(prompt)
        for completion in group:
            batch = collate([[Encoded([*ids, *completion.token_ids], len(ids))]], 0)
            with torch.no_grad():
                expected = policy.scorer.by_token(batch)
            found = torch.tensor(said[3, prompt.id, completion.index])
            assert torch.allclose(found, expected, atol=1e-4)


def test_entropies_come_with_log_probabilities_and_have_a_gradient(tiny_policy):
    """H = -sum_v p_v log p_v of the very distribution that the token's log-probability is of."""
    policy = tiny_policy()
    batch = collate([[Encoded([5, 6, 7, 8, 9], 2)]], 0)
    lp, entropy = policy.scorer.with_entropies(batch)
    assert torch.equal(lp, policy.scorer.by_token(batch))
    log_p = policy.base(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 1:4].float().log_softmax(-1)
    assert torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5)


def test_a_game_with_kept_log_probabilities_is_the_game_without(game, tmp_path):
    runs = {
        kept: advgame.train(
            game(out=str(tmp_path / str(kept)), rollout={"logprobs": kept}, kl_every=0, eval_every=0),
            make_judges=judged_by(Counting()),
        )
        for kept in (False, True)
    }
    plain, kept = (untimed(runs[which]) for which in (False, True))
    gaps = [row.pop(name) for row in kept for name in list(row) if name.endswith("sampled_gap_nats")]
    assert gaps and max(gaps) < 1e-4
    for a, b in zip(plain, kept, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith("accuracy"):  # which side rounding puts a Delta of 0 on
                continue
            assert b[name] == pytest.approx(a[name], abs=1e-3), name
    rows = runs[True].read_rows("data/rollouts.jsonl")
    assert all(len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert not any("logprobs" in row for row in runs[False].read_rows("data/rollouts.jsonl"))


def test_a_reference_that_is_kept_is_not_computed(game, monkeypatch):
    scored = []
    compute = updates._scored
    monkeypatch.setattr(
        updates, "_scored", lambda player, name, batches: scored.append(name) or compute(player, name, batches)
    )
    monkeypatch.setattr(updates, "CHECKED", 0.0)
    advgame.train(
        game(rollout={"logprobs": True}, kl_every=0, eval_every=0, steps=2), make_judges=judged_by(Counting())
    )
    assert set(scored) == {"ema"} and len(scored) <= 2  # the first update of each player, which is checked


def test_log_probabilities_that_are_not_those_of_the_sampler_stop_the_run(game, monkeypatch):
    monkeypatch.setattr(updates, "MOST_GAP", 0.0)
    with pytest.raises(RuntimeError, match=r"rollout\.logprobs=false"):
        advgame.train(game(rollout={"logprobs": True}, eval_every=0), make_judges=judged_by(Counting()))


def test_a_policy_gradient_that_plays_ahead_weighs_by_what_sampled(game):
    config = game(loss="grpo", judges={"kind": "pointwise"}, rollout={"staleness": 1, "logprobs": True}, eval_every=0)
    run = advgame.train(config, make_judges=judged_by(Counting()))
    assert [row["staleness"] for row in run.read_rows("metrics.jsonl")] == [0, 1, 1]


def test_a_bonus_for_entropy_is_its_mean_a_token(game, tmp_path):
    """The same trees in the first step, so that loss = loss without - scale H, with one H of at most log 320 nats."""
    loss = {
        scale: advgame.train(
            game(out=str(tmp_path / str(scale)), entropy_scale=scale, steps=1, eval_every=0, kl_every=0),
            make_judges=judged_by(Counting()),
        ).read_rows("metrics.jsonl")[0]
        for scale in (0.0, 0.5, 2.0)
    }
    for role in ROLES:
        name = f"{role}/loss"
        once, more = ((loss[0.0][name] - loss[scale][name]) / scale for scale in (0.5, 2.0))
        assert once == pytest.approx(more, rel=1e-3) and 0.5 < once < math.log(320)
