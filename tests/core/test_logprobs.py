import random

import pytest
import torch

from tempering.core import logprobs
from tempering.core.chat import Encoded, collate
from tempering.core.logprobs import projection_matches, score_groups
from tempering.core.policy import LoraSettings

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")


def rows(count=6, seed=1):
    r = random.Random(seed)
    lengths = [r.randrange(4, 40) for _ in range(count)]
    return [Encoded([r.randrange(3, 300) for _ in range(n)], n // 2) for n in lengths]


def siblings(prompt=9, lengths=(4, 7, 1), seed=2):
    """Completions of one prompt."""
    r = random.Random(seed)
    start = [r.randrange(3, 300) for _ in range(prompt)]
    return [Encoded([*start, *(r.randrange(3, 300) for _ in range(n))], prompt) for n in lengths]


def score(scorer, sample, max_tokens=10_000):
    """Score rows that share nothing: a group each."""
    return [
        one for group in score_groups(scorer, [[r] for r in sample], pad_id=0, max_tokens=max_tokens) for one in group
    ]


def by_hand(model, row):
    """log_softmax over full logits, one unpadded row, one token after the other."""
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([row.ids])).logits[0].double(), -1)
    return sum(table[t - 1, row.ids[t]].item() for t in range(max(1, row.prompt_tokens), len(row.ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_log_softmax_over_full_logits(tiny_policy, family):
    policy, sample = tiny_policy(family), rows()
    got = score(policy.scorer, sample)
    assert [nats for nats, _ in got] == pytest.approx([by_hand(policy.model, row) for row in sample], abs=2e-3)
    assert [tokens for _, tokens in got] == [row.completion_tokens for row in sample]


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_a_prompt_does_not_change_logprobs(tiny_policy, family):
    policy = tiny_policy(family)
    for group in (siblings(), siblings(prompt=3, lengths=(2, 5)), siblings(prompt=30, lengths=(20, 20))):
        got = [one for row in score_groups(policy.scorer, policy.groups(group), pad_id=0) for one in row]
        assert [nats for nats, _ in got] == pytest.approx([by_hand(policy.model, row) for row in group], abs=2e-3)


def test_a_sliding_window_is_not_overrun_by_sharing(tiny_policy):
    """A batch has one mask: with it, a longer row beside a short shared one would lose its window."""
    policy = tiny_policy("gemma3")
    groups = [*policy.groups(siblings(prompt=5, lengths=(4, 3))), *([row] for row in rows(4))]
    got = [one for group in score_groups(policy.scorer, groups, pad_id=0) for one in group]
    want = [by_hand(policy.model, row) for group in groups for row in group]
    assert [nats for nats, _ in got] == pytest.approx(want, abs=2e-3)
    # A window that no row can outgrow (mistral: 4096, context 512) does not matter.
    assert len(policy.groups(siblings())) == 3 and len(tiny_policy("mistral").groups(siblings())) == 1


def test_different_prompts_never_share(tiny_policy):
    assert len(tiny_policy().groups([Encoded([5, 6, 7], 2), Encoded([5, 7, 7], 2)])) == 2


def test_padding_does_not_change_logprobs(tiny_policy):
    scorer, sample = tiny_policy().scorer, rows()
    with torch.no_grad():
        padded = scorer(collate([[row] for row in sample], 5)).logprob
        longer = scorer(collate([*([row] for row in sample), [Encoded([7] * 60, 1)]], 5)).logprob[:-1]
    assert torch.allclose(padded, longer, atol=1e-4)


def test_splitting_and_reordering_do_not_change_logprobs(tiny_policy):
    scorer, sample = tiny_policy().scorer, rows(9)
    together = score(scorer, sample)
    for other in (score(scorer, sample, 1), score(scorer, sample[::-1], 80)[::-1]):
        assert [x for x, _ in other] == pytest.approx([x for x, _ in together], abs=1e-3)


def test_chunks_change_neither_scores_nor_gradients(tiny_policy, monkeypatch):
    def run(chunk):
        monkeypatch.setattr(logprobs, "POSITIONS_PER_CHUNK", chunk)
        policy = tiny_policy()
        policy.add_adapter("a", LoraSettings(r=3), seed=1)
        named = policy.train_only("a")
        out = policy.scorer(collate([[row] for row in rows()], 0)).logprob
        out.sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in named}

    scores, gradients = run(1024)
    for chunk in (1, 7):
        other, other_gradients = run(chunk)
        assert torch.allclose(scores, other, atol=1e-4)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, other_gradients[name], atol=1e-3, rtol=1e-4)


def test_an_empty_completion_scores_zero(tiny_policy):
    scores = tiny_policy().scorer(collate([[Encoded([4, 5, 6], 3)], [Encoded([4, 5, 6], 2)]], 0))
    assert scores.logprob.tolist()[0] == 0.0 and scores.tokens.tolist() == [0.0, 1.0]


def test_on_done_counts_every_group(tiny_policy):
    done = []
    score_groups(tiny_policy().scorer, [[row] for row in rows(7)], pad_id=0, max_tokens=50, on_done=done.append)
    assert sum(done) == 7 and len(done) > 1


def test_soft_capped_logits_are_scored_as_the_model_gives_them(tiny_policy):
    policy, row = tiny_policy("gemma3"), rows(1)[0]
    policy.base.config.final_logit_softcapping = 2.0
    assert projection_matches(policy.model)
    assert score(policy.scorer, [row])[0][0] == pytest.approx(by_hand(policy.model, row), abs=2e-3)


def test_a_model_with_another_head_is_noticed(tiny_policy, monkeypatch):
    policy = tiny_policy()
    head = policy.model.lm_head.forward
    assert projection_matches(policy.model)
    scaled = type("Out", (), {})

    def forward(**kwargs):
        out = scaled()
        out.logits = 3 * head(policy.model.model(**kwargs)[0])
        return out

    monkeypatch.setattr(policy.model, "forward", forward)
    assert not projection_matches(policy.model)
