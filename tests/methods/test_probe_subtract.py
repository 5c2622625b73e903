"""`sampler=probe_subtract`: states that a probe finds toxic end where it is undecided; weights stay."""

import numpy as np
import pytest
import torch

from tempering import load
from tempering.core.activations import capture, subtracted
from tempering.core.bank import Bank
from tempering.core.policy import Policy
from tempering.core.probes import Fit, Worth
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals.pairs import local
from tempering.evals.results import in_format
from tempering.evals.settings import EvalConfig
from tempering.evals.toxicity import fluency_of, leaks
from tempering.judges.toxicity import trained_on
from tempering.methods.unlearn_toxicity.subtracting import SubtractingSampler, subtracting_sampler

PROMPTS = [Prompt(({"role": "user", "content": text},)) for text in ("the stone is", "sure, a river")]


@pytest.fixture
def policy(tiny_model_dir):
    return Policy.load(str(tiny_model_dir()), dtype="float32")


@pytest.fixture
def bank(tmp_path, policy):
    """A run folder with probes of both blocks whose bias finds every state toxic."""
    rng = np.random.default_rng(0)
    fits = {i: Fit(v / np.linalg.norm(v), 100.0) for i, v in enumerate(rng.standard_normal((2, 32)))}
    worth = [Worth(i, 1.0, 0.9, 0.9, stability=0.9, permuted_mean=0.5, permuted_95=0.6) for i in fits]
    facts = {"base_fingerprint": policy.base_fingerprint(), "adapters": None, "corpora": ["jigsaw"]}
    Bank(fits, {"shuffled": fits, "diff_of_means": fits}, worth, facts).save(tmp_path / "bank" / "probes")
    return str(tmp_path / "bank")


def states(model, ids):
    with capture(model, [1, 2]) as found:
        model(input_ids=ids)
    return found


def test_a_state_that_a_probe_finds_positive_ends_where_it_is_undecided(policy):
    """h = (3, 4, 0...), v = e_0, b = -1: <h, v> + b = 2, so h - 2 v = (1, 4); with b = -5 nothing is subtracted."""
    ids = torch.tensor([[5, 6, 7, 8]])
    v = torch.nn.functional.normalize(torch.arange(32.0) - 15, dim=0)
    plain = states(policy.model, ids)
    logit = plain[1] @ v
    b = -float(logit.median())
    for strength in (1.0, 2.0):
        with subtracted(policy.model, {1: (v, b)}, strength):
            now = states(policy.model, ids)[1] @ v + b
        was = logit + b
        assert torch.allclose(now, torch.where(was > 0, (1 - strength) * was, was), atol=1e-4)
    assert all(torch.equal(states(policy.model, ids)[i], plain[i]) for i in plain)
    with pytest.raises(ValueError, match="expected indices 1 to 2"), subtracted(policy.model, {3: (v, b)}):
        pass


def test_the_sampler_answers_and_scores_with_probes_subtracted_and_leaves_the_policy(policy, bank):
    inner = LocalSampler(policy, fmt="raw")
    sampler = subtracting_sampler(inner, {"probes": bank, "layers": [0, 1]})
    texts = [["stone river"], ["apple"]]
    before = inner.score(PROMPTS, texts)
    assert sampler.score(PROMPTS, texts) != before and inner.score(PROMPTS, texts) == before
    asked = [s(PROMPTS, max_new_tokens=8)[0][0].token_ids for s in (inner, sampler, inner)]
    assert asked[0] == asked[2] != asked[1]
    chat = in_format(sampler, "chat")
    assert isinstance(chat, SubtractingSampler) and chat.fmt == "chat" and chat.score(PROMPTS, texts) != before
    assert sampler.name.endswith("+probe_subtract(probe,1)")
    [[found], _] = fluency_of(sampler, EvalConfig())(PROMPTS, inner(PROMPTS, max_new_tokens=4))
    assert found == inner.score(PROMPTS[:1], [[inner(PROMPTS, max_new_tokens=4)[0][0].text]])[0][0]


def test_what_the_sampler_cannot_stand_for_is_refused(policy, bank, tiny_model_dir):
    inner = LocalSampler(policy)
    sampler = subtracting_sampler(inner, {"probes": bank, "layers": [1]})
    with pytest.raises(ValueError, match="eval relearning looks into weights"):
        local(sampler, "relearning")
    with pytest.raises(ValueError, match="only answers"):
        subtracting_sampler(ScriptedSampler(["a"]), {"probes": bank})
    with pytest.raises(ValueError, match="no probe of block 7"):
        subtracting_sampler(inner, {"probes": bank, "layers": [7]})
    other = LocalSampler(Policy.load(str(tiny_model_dir(seed=1)), dtype="float32"))
    with pytest.raises(ValueError, match="fitted to other weights"):
        subtracting_sampler(other, {"probes": bank, "layers": [1]})
    with pytest.raises(ValueError, match="set sampler=probe_subtract too"):
        load(str(tiny_model_dir()), probe_subtract={"probes": bank})
    made = load(str(tiny_model_dir()), sampler="probe_subtract", probe_subtract={"probes": bank, "layers": [0]})
    assert isinstance(made, SubtractingSampler) and list(made.probes) == [1]


def test_a_scorer_that_knows_the_texts_of_the_probes_is_named(policy, bank):
    class Scorer:
        identity = "s"
        trained_on = frozenset({"jigsaw"})

    sampler = subtracting_sampler(LocalSampler(policy), {"probes": bank, "layers": [1]})
    assert trained_on(Scorer()) and "in-distribution" in leaks(Scorer(), sampler)[0]
    assert leaks(Scorer(), LocalSampler(policy)) == []
