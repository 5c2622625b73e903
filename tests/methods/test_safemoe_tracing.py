"""Statistics of routing against the paper's figures and by hand, and traces against a second pass."""

import numpy as np
import pytest
import torch
from safemoe_parts import routed

from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.methods.safemoe import tracing
from tempering.methods.safemoe.tracing import (
    TracingSampler,
    effective_experts,
    load_entropy,
    load_of,
    read_trace,
    usage_of,
)

PAPER_USAGE = [
    9.28,
    8.59,
    8.40,
    7.92,
    7.19,
    6.39,
    5.90,
    5.67,
    5.65,
    5.55,
    4.95,
    4.66,
    4.62,
    4.05,
    3.48,
    2.72,
    2.68,
    2.31,
]


def test_the_papers_usage_has_the_entropy_that_follows_from_it():
    load = load_of(PAPER_USAGE)
    assert load_entropy(PAPER_USAGE) == pytest.approx(2.82027, abs=1e-5)
    assert load.normalised == pytest.approx(0.97575, abs=1e-5)
    assert effective_experts(PAPER_USAGE) == pytest.approx(15.841, abs=1e-3)
    assert load.max_over_uniform == pytest.approx(1.6702, abs=1e-4)
    assert load.alarms == ()


def test_a_collapsed_gate_raises_every_alarm():
    assert len(load_of([0.97, 0.01, 0.01, 0.01]).alarms) == 3
    assert load_of([1, 1, 1, 1]).alarms == ()


def test_shares_count_selections_or_weigh_them():
    idx, w = np.array([[[0, 1]], [[0, 2]]]), np.array([[[0.75, 0.25]], [[0.5, 0.5]]])
    assert usage_of(idx, 4).tolist() == [0.5, 0.25, 0.25, 0]
    assert usage_of(idx, 4, w).tolist() == [0.625, 0.125, 0.25, 0]


def asked(*texts):
    return [Prompt(({"role": "user", "content": t},), category=f"c{i}") for i, t in enumerate(texts)]


def test_traces_hold_every_valid_tokens_decision_and_change_no_answer(tiny_policy, tmp_path):
    policy = tiny_policy()
    routing = routed(policy)
    plain = LocalSampler(policy)
    sampler = TracingSampler(LocalSampler(policy, batch_rows=2))
    prompts = asked("hello", "how do I do it, and why?", "no")
    settings = {"max_new_tokens": 6, "temperature": 0.7, "n": 2}
    groups = sampler(prompts, **settings)
    assert [[c.token_ids for c in g] for g in groups] == [
        [c.token_ids for c in g] for g in plain(prompts, **settings)
    ]
    sampler.write(tmp_path / "traces" / "test")
    tensors, lines = read_trace(tmp_path / "traces" / "test")
    assert [(line["domain"], line["index"]) for line in lines] == [(f"c{i}", j) for i in range(3) for j in range(2)]
    for name, dtype in [("idx", torch.uint8), ("w", torch.float16), ("token", torch.int32), ("part", torch.uint8)]:
        assert tensors[name].dtype is dtype
    assert torch.allclose(tensors["w"].float().sum(-1), torch.ones(()), atol=2e-3)
    for i, (prompt, completion) in enumerate((p, c) for p, g in zip(prompts, groups, strict=True) for c in g):
        mine = tensors["row"] == i
        ids = [*plain.prompt_ids(prompt), *completion.token_ids[:-1]]
        assert tensors["token"][mine].tolist() == ids and tensors["pos"][mine].tolist() == list(range(len(ids)))
        assert int((tensors["part"][mine] == 0).sum()) == lines[i]["prompt_tokens"]
        with torch.no_grad():
            policy.model(input_ids=torch.tensor([ids]))
        for r, name in enumerate(sampler.routers):
            assert torch.equal(tensors["idx"][mine][:, r].long(), routing.state.decisions[name].idx)
    assert routing.state.recorder is None


def test_nothing_is_recorded_while_gradients_are_on(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy)
    routing.state.recorder = tracing.Recorder()
    policy.model(input_ids=torch.arange(3, 9)[None])
    assert routing.state.recorder.rows() == []


def test_pads_enter_no_statistic(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy)
    ids = torch.randint(5, 300, (2, 9))
    found = []
    for valid in (None, torch.tensor([[1] * 9, [1] * 4 + [0] * 5]).bool()):
        routing.state.statistics = {}
        with torch.no_grad(), routing.state.batch(valid):
            policy.model(input_ids=ids)
        found.append(routing.state.statistics["model.layers.0.mlp"])
    assert (found[0].tokens, found[1].tokens) == (18, 13)
    assert (int(found[0].counts.sum()), int(found[1].counts.sum())) == (36, 26)
