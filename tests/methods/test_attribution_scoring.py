"""Scoring and the sampler: what is shared, skipped or batched changes no score; the choice is the argmin of it."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tempering.core.activations import blocks, capture
from tempering.core.logprobs import distribution_terms
from tempering.core.policy import LoraSettings, Policy
from tempering.core.records import Completion, Prompt, Thought, Verdict
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.core.think import Spans
from tempering.methods import attribution
from tempering.methods.attribution.best_of_n import AttributionSampler
from tempering.methods.attribution.card import settle
from tempering.methods.attribution.readout import READ_OUTS, readout_positions
from tempering.methods.attribution.scores import cosine
from tempering.methods.attribution.scoring import Pair, Response, measure, similarity
from tempering.methods.attribution.selection import select
from tempering.methods.attribution.settings import SelectionConfig

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")
PROMPT = list(range(20, 43))  # longer than the sliding window of the tiny Gemma
END = 2


def aligned(policy, scale=0.05, seed=1, targets="all-linear"):
    policy.add_adapter("a", LoraSettings(r=4, alpha=8, target_modules=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in policy.lora_layers():
        b = layer.lora_B["a"].weight
        b.data = torch.randn(b.shape, generator=generator) * scale
    return policy


@pytest.fixture
def pair(tiny_policy):
    def make(family="llama", **kwargs):
        return Pair(aligned(tiny_policy(family, scale=3.0), **kwargs))

    return make


def responses(seed=0, n=5, longest=24):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        content = rng.integers(5, 300, size=longest - 4 * i).tolist()
        spans = Spans((6, len(content)), (0, 4), (4, 6), True)
        out.append(Response([*content, END], len(content) + 1, spans))
    return out


def plain(pair, prompt, response, layers, kind):
    """Two full passes over one candidate alone: no cache, no sharing, no early stop. Also its mean KL."""
    ids = torch.tensor([[*prompt, *response.ids]])
    at = readout_positions(len(prompt), response.spans, len(response.ids), kind)
    states, logits = [], []
    for is_base in (False, True):
        with pair.side(is_base) as model, capture(model, layers) as found:
            logits.append(model(input_ids=ids).logits[0])
        states.append(torch.stack([found[layer][0, at].float().mean(0) for layer in layers]))
    rows = slice(len(prompt) - 1, len(prompt) + response.sampled - 1)
    terms = distribution_terms(logits[0][rows], logits[1][rows], torch.tensor(response.ids[: response.sampled]))
    return cosine(states[0], states[1]).tolist(), [float(t.mean()) for t in terms]


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_batching_and_stopping_change_nothing(family, pair):
    """One prompt pass for all, right padding, an early stop: 1e-5 from two full passes over each candidate alone."""
    pair = pair(family)
    group, layers = responses(), [0, 1, 2]
    found = measure(pair, PROMPT, group, layers=layers, readouts=READ_OUTS, likelihood=True)
    s = similarity(found.states, "cos")  # (N, read-outs, layers)
    for i, response in enumerate(group):
        for k, kind in enumerate(READ_OUTS):
            want, terms = plain(pair, PROMPT, response, layers, kind)
            np.testing.assert_allclose(s[i, k], want, atol=1e-5)
        logprob, base_logprob, kl, reverse_kl, certainty = terms
        got = [column[i] for column in found.likelihood]
        np.testing.assert_allclose(got, [-logprob, -base_logprob, kl, reverse_kl, certainty], atol=1e-5, rtol=1e-5)
    assert (found.likelihood.kl > 0).all() and len(set(np.round(s[:, 0, 2], 6))) > 1


def test_scores_do_not_depend_on_order_batch_or_company(pair):
    pair, group = pair(), responses()
    layers = [1, 2]
    whole = similarity(measure(pair, PROMPT, group, layers=layers).states, "cos")
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        found = measure(pair, PROMPT, [group[i] for i in order], layers=layers)
        np.testing.assert_allclose(similarity(found.states, "cos"), whole[order], atol=1e-5)
    for rows in (1, 2):
        found = measure(pair, PROMPT, group, layers=layers, rows=rows)
        np.testing.assert_allclose(similarity(found.states, "cos"), whole, atol=1e-5)
    alone = measure(pair, PROMPT, group[2:3], layers=layers)
    np.testing.assert_allclose(similarity(alone.states, "cos"), whole[2:3], atol=1e-5)


def test_no_block_runs_past_the_last_layer_and_the_prompt_runs_once_a_model(pair):
    pair = pair()
    seen = []
    for number, block in enumerate(blocks(pair.policy.model), 1):
        block.register_forward_hook(lambda _, args, __, number=number: seen.append((number, args[0].shape[:2])))
    measure(pair, PROMPT, responses(), layers=[1])
    assert seen == [(1, (1, 23)), (1, (5, 25))] * 2


def test_equal_models_tie_and_the_first_wins(tiny_policy):
    policy = tiny_policy()
    policy.add_adapter("zero", LoraSettings(r=2, alpha=4), seed=0)
    found = measure(Pair(policy), PROMPT, responses(), layers=[0, 1, 2], likelihood=True)
    s = similarity(found.states, "cos")[:, 0]
    np.testing.assert_allclose(s, 1, atol=1e-6)
    assert all(select(s[:, layer]) == 0 for layer in range(3))
    np.testing.assert_allclose(found.likelihood.kl, 0, atol=1e-6)
    assert select(-found.likelihood.kl) == 0


def test_adapters_inside_the_blocks_leave_the_embeddings_alone(pair):
    found = measure(pair(), PROMPT, responses(), layers=[0, 2])
    s = similarity(found.states, "cos")[:, 0]
    assert select(s[:, 0]) == 0 and np.ptp(np.round(s[:, 0], 6)) == 0 and np.ptp(s[:, 1]) > 1e-4


def test_the_base_may_be_another_model_in_memory(tiny_policy, pair):
    """The same weights, once as an adapter and once merged beside their base: equal scores."""
    one = pair()
    merged = aligned(tiny_policy("llama", scale=3.0))
    merged.merge()
    two = Pair(merged, tiny_policy("llama", scale=3.0))
    a, b = (similarity(measure(p, PROMPT, responses(), layers=[1, 2]).states, "cos") for p in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_adapters_flags_and_mode_are_as_before_also_after_an_error(pair):
    pair = pair()
    policy = pair.policy
    policy.train_only("a")
    policy.model.train()
    flags = [p.requires_grad for p in policy.model.parameters()]
    with pytest.raises(IndexError), pair.side(True):
        raise IndexError
    measure(pair, PROMPT, responses(n=2), layers=[1], likelihood=True)
    assert policy.model.training and flags == [p.requires_grad for p in policy.model.parameters()]
    assert policy._active() == ["a"]


def test_without_a_base_the_message_says_what_to_name(tiny_policy, tiny_model_dir):
    with pytest.raises(ValueError, match=r"has no adapter.*base=MODEL"):
        Pair(tiny_policy())
    shallow = tiny_policy("llama")
    other = Policy.load(str(tiny_model_dir("llama")), dtype="float32", device="cpu")
    other.tokenizer.add_tokens(["xyzzy"])
    with pytest.raises(ValueError, match="other tokenizers"):
        Pair(shallow, other)


def test_an_adapted_output_layer_is_refused_for_kl(tiny_policy):
    policy = aligned(tiny_policy(), targets=["q_proj", "lm_head"])
    pair = Pair(policy)
    measure(pair, PROMPT, responses(n=2), layers=[1])
    with pytest.raises(ValueError, match="output layer"):
        measure(pair, PROMPT, responses(n=2), likelihood=True)


def test_bfloat16_agrees_with_float32(tiny_policy):
    states = {}
    for dtype in ("float32", "bfloat16"):
        pair = Pair(aligned(tiny_policy("llama", dtype=dtype, scale=1.0), scale=0.3))
        states[dtype] = similarity(measure(pair, PROMPT, responses(), layers=[1, 2]).states, "cos")
    np.testing.assert_allclose(states["bfloat16"], states["float32"], atol=5e-3)


# --- the sampler --------------------------------------------------------------------------------------


def prompts(n=3):
    return [Prompt(({"role": "user", "content": f"how do I stone number {i}?"},)) for i in range(n)]


@pytest.fixture
def sampler(pair):
    def make(pair_=None, inner=None, card=None, means=None, **settings):
        pair_ = pair_ or pair()
        inner = inner or LocalSampler(pair_.policy)
        return AttributionSampler(inner, pair_, SelectionConfig(n=4, **settings), card, means)

    return make


def test_candidate_zero_is_the_inner_samplers_answer(sampler):
    made = sampler(scorer="first", validity=False)
    ask = {"max_new_tokens": 8, "temperature": 0.7, "seed": 3}
    assert [[c.text for c in g] for g in made(prompts(), **ask)] == [
        [c.text for c in g] for g in made.inner(prompts(), **ask)
    ]
    two = made(prompts(), n=2, **ask)
    assert [[c.text for c in g] for g in two] == [[c.text for c in g] for g in made.inner(prompts(), n=2, **ask)]


def test_four_candidates_are_a_prefix_of_eight(sampler):
    rows = {}
    for n in (4, 8):
        made = sampler()
        made.config = made.config.model_copy(update={"n": n})
        kept = rows[n] = []
        made.keep = kept.append
        made(prompts(), max_new_tokens=8, seed=1)
    for four, eight in zip(rows[4], rows[8], strict=True):
        for a, b in zip(four["candidates"], eight["candidates"], strict=False):
            assert a["token_ids"] == b["token_ids"] and a["risk"] == pytest.approx(b["risk"], abs=2e-6)


@pytest.mark.parametrize("scorer", ["latent", "kl", "perplexity", "self_certainty", "length", "rank_fusion", "guard"])
def test_the_winner_has_the_lowest_risk_of_the_valid(scorer, sampler):
    made = sampler(scorer=scorer, guard="rules" if scorer == "guard" else None)
    kept = []
    made.keep = kept.append
    answers = made(prompts(6), max_new_tokens=12, temperature=1.0)
    assert any(len({c["risk"] for c in row["candidates"]}) > 1 for row in kept)
    for [answer], row in zip(answers, kept, strict=True):
        group = row["candidates"]
        allowed = [c for c in group if c["valid"]] or group
        best = min(allowed, key=lambda c: (c["risk"], c["draw"]))
        assert group[row["winner"]] == best and answer.text == best["text"]


def test_scorers_share_one_pass_and_their_order_is_nothing(sampler):
    """The risk of a fusion is the sum of what its parts give alone."""
    from tempering.methods.attribution.scores import ranks

    prompt = prompts(1)[0]
    made = sampler(scorer="latent")
    [group] = made.inner([prompt], n=4, max_new_tokens=10, temperature=1.0)
    alone = {name: sampler(scorer=name).rank(prompt, group).risk for name in ("latent", "kl", "length")}
    for order in itertools.permutations(alone):
        fused = sampler(scorer="rank_fusion", fuse=order).rank(prompt, group).risk
        np.testing.assert_allclose(fused, sum(ranks(r) for r in alone.values()))


@pytest.mark.parametrize("readout", ["eos", "last_content"])
def test_states_kept_while_drawing_give_the_scores_of_two_passes(readout, sampler, pair):
    """The decode path is the prefill path to 1e-5; the aligned model is run over no candidate again."""
    made = sampler(readout=readout, layers=(1, 2))
    made.policy.base.generation_config.eos_token_id = [2, *range(5, 45)]
    passes, kept = [], []
    made.keep = kept.append
    handle = blocks(made.policy.model)[0].register_forward_hook(lambda *_: passes.append(bool(made.policy._active())))
    asked = prompts(5)
    made.inner(asked, n=4, max_new_tokens=12, temperature=0.7)
    drawing = sum(passes)
    passes.clear()
    made(asked, max_new_tokens=12)
    handle.remove()
    assert sum(passes) == drawing + 1, "one more step for the rows that end last"
    assert passes.count(False) == 2 * len(asked), "the prompt, and its candidates"
    groups = made.inner(asked, n=4, max_new_tokens=12, temperature=0.7)
    for prompt, group, row in zip(asked, groups, kept, strict=True):
        again = made.rank(prompt, group)
        assert again.winner == row["winner"]
        np.testing.assert_allclose([c["risk"] for c in row["candidates"]], again.risk, atol=1e-5)
    assert len({c["risk"] for row in kept for c in row["candidates"]}) > 5


def test_what_was_kept_is_used_for_the_very_tokens_only(sampler):
    """A candidate that was cut afterwards, or is read behind another prompt, is computed anew."""
    made = sampler(layers=(1, 2))
    [prompt, other] = prompts(2)
    local = made.inner
    with local.keeping_ends(made.layers, made._end) as kept:
        [group] = local([prompt], n=3, max_new_tokens=10, temperature=1.0)
    wrong = {key: ended._replace(states=ended.states * torch.randn(32)) for key, ended in kept.items()}
    assert not np.allclose(made.rank(prompt, group, kept=wrong).risk, made.rank(prompt, group).risk, atol=1e-4)
    cut = [replace(c, token_ids=c.token_ids[:5], finish="length") for c in group]
    moved = [replace(c, prompt_id=other.id) for c in group]
    elsewhere = {(seed, other.id, i): ended for (seed, _, i), ended in wrong.items()}
    for asked, found, states in ((prompt, cut, wrong), (other, moved, elsewhere)):
        a, b = made.rank(asked, found, kept=states).risk, made.rank(asked, found).risk
        np.testing.assert_array_equal(a, b)


def test_states_are_kept_in_float32_and_where_that_is_asked_for(sampler, pair, tiny_policy):
    """Below float32 the rounding of a pass over the whole is the base's too, and equal models stay equal."""
    half = Pair(aligned(tiny_policy("llama", dtype="bfloat16")))
    for made, keeps in (
        (sampler(), True), (sampler(path="prefill"), False),
        (sampler(half), False), (sampler(half, path="decode"), True),
        (sampler(scorer="kl"), False), (sampler(readout="cot_mean"), False),
        (sampler(inner=ScriptedSampler(["yes"])), False), (sampler(inner=LocalSampler(tiny_policy())), False),
    ):  # fmt: skip
        assert made._decoder() is (made.inner if keeps else None)
    with pytest.raises(ValueError, match=r"path=decode: the card was fitted with prefill in bfloat16"):
        settle(SelectionConfig(path="decode"), card(dtype="bfloat16"))
    assert settle(SelectionConfig(path="decode"), card()).path == "decode"


def test_candidates_made_elsewhere_are_encoded_once_and_flagged(sampler):
    made = sampler()
    prompt = prompts(1)[0]
    [group] = made.inner([prompt], n=3, max_new_tokens=10, temperature=1.0)
    texts = [Completion(prompt.id, c.text, "stop", c.index) for c in group]
    found = made.rank(prompt, texts)
    assert all("reencoded" in f for f in found.flags) and np.isfinite(found.risk).all()
    assert made.rerank([prompt], [texts])[0].winner == found.winner


def test_truncated_failed_and_overlong_candidates(sampler):
    made = sampler(scorer="latent")
    prompt = prompts(1)[0]
    ids = (10, 11, 12)
    group = [
        Completion(prompt.id, "cut", "length", 0, ids),
        Completion(prompt.id, "", "error", 1, error="down"),
        Completion(prompt.id, "long", "stop", 2, (*[9] * 600, END)),
        Completion(prompt.id, "", "stop", 3, (END,)),
        Completion(prompt.id, "fine", "stop", 4, (*ids, END)),
    ]
    found = made.rank(prompt, group)
    assert found.valid == [False, False, False, False, True] and found.winner == 4
    assert "truncated" in found.flags[0] and "over_context" in found.flags[2] and np.isnan(found.risk[[1, 2]]).all()
    assert found.risk[0] == pytest.approx(found.risk[4], abs=1e-6), "one end token is appended, for scoring only"
    none = made.rank(prompt, group[:2])
    assert none.winner == 0 and "no_valid_candidate" in none.flags[0]
    assert sampler(validity=False).rank(prompt, group[:2]).flags[0] == ["truncated"]


def test_reasoning_that_was_opened_must_be_closed(sampler, tiny_tokenizer):
    made = sampler()

    def completion(text, index):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completion("p", text, "stop", index, (*ids, END))

    texts = ["<think>hm</think>no", "<think>hm", "<think>hm</think>  ", "no"]
    assert made.rank(prompts(1)[0], [completion(t, i) for i, t in enumerate(texts)]).valid == [
        True, False, False, True
    ]  # fmt: skip
    opened = Prompt(({"role": "user", "content": "how?"}, {"role": "assistant", "content": "<think>\n"}))
    texts = ["hm</think>no", "hm"]
    assert made.rank(opened, [completion(t, i) for i, t in enumerate(texts)]).valid == [True, False]


def test_above_tau_it_falls_back(sampler):
    prompt = prompts(1)
    refused = sampler(tau=-2.0, fallback="refuse")(prompt, max_new_tokens=6)
    assert refused[0][0].text == SelectionConfig().refusal
    kept = []
    made = sampler(tau=-2.0, fallback="resample")
    made.keep = kept.append
    [[again]] = made(prompt, max_new_tokens=6)
    assert again.seed == 1 and kept[0]["fallback"] == "resample"
    assert sampler(tau=2.0, fallback="refuse")(prompt, max_new_tokens=6)[0][0].text != SelectionConfig().refusal
    assert sampler(tau=-2.0, fallback="guard", guard="rules")(prompt, max_new_tokens=6)


def test_each_of_n_choices_falls_back_to_candidates_of_its_own(sampler):
    prompt = prompts(1)
    made = sampler(tau=-2.0, fallback="resample", scorer="first")
    drawn = made.inner(prompt, n=8, max_new_tokens=6, temperature=0.7, seed=1)[0]
    assert [c.text for c in made(prompt, n=2, max_new_tokens=6)[0]] == [c.text for c in drawn[:2]]
    kept = []
    made.keep = kept.append
    made(prompt, max_new_tokens=6)
    assert [c["text"] for c in kept[0]["resampled"]["candidates"]] == [
        c.text for c in made.inner(prompt, n=4, max_new_tokens=6, temperature=0.7, seed=1)[0]
    ]


def test_the_guards_choice_is_among_the_eligible():
    """The safe answer was cut: it is taken only where validity is off. A failed one is never taken."""

    class Inner(ScriptedSampler):
        def __call__(self, asked, **ask):
            texts = (
                ("Sorry, I can't help with that.", "length"),
                ("", "error"),
                ("Sure. First take a hammer.", "stop"),
            )
            return [[Completion(p.id, t, f, i) for i, (t, f) in enumerate(texts)] for p in asked]

    for validity, said in ((True, "Sure"), (False, "Sorry")):
        config = SelectionConfig(
            n=3, scorer="length", tau=0.0, fallback="guard", guard="rules", validity=validity
        )  # fmt: skip
        [[answer]] = AttributionSampler(Inner([]), None, config)(prompts(1))
        assert answer.text.startswith(said)


def test_a_guard_that_only_falls_back_is_asked_only_then(sampler):
    asked = []
    made = sampler(tau=2.0, fallback="guard", guard="rules")
    made.guard = lambda prompt, group: asked.append(prompt) or [Verdict(0.0, "g")] * len(group)
    made(prompts(2), max_new_tokens=4)
    assert not asked
    made.config = made.config.model_copy(update={"tau": -2.0})
    made(prompts(2), max_new_tokens=4)
    assert len(asked) == 2


@pytest.mark.parametrize("settings", [{"fallback": "refuse"}, {"enough": 1}])
def test_a_limit_that_is_not_there_is_an_error_not_ignored(settings, sampler):
    with pytest.raises(ValueError, match=r"needs a largest risk: set attribution.tau"):
        sampler(**settings)


# --- adaptive n ---------------------------------------------------------------------------------------


class Counted(ScriptedSampler):
    """Sample i of a prompt has the words that `script` says; keeps which samples were asked for."""

    def __init__(self, script):
        self.asked = []

        def text(prompt, index):
            self.asked.append((prompt.messages[0]["content"], index))
            return "word " * script[prompt.messages[0]["content"]][index]

        super().__init__(text)


def asking(**lengths):
    inner = Counted(lengths)
    return inner, [Prompt(({"role": "user", "content": name},)) for name in lengths]


def test_drawing_stops_when_enough_candidates_are_below_the_limit():
    """Rounds of 2, 4, 8; at most 3 words are low enough. `a` needs one round, `b` two, `c` never has two."""
    inner, asked = asking(a=[3, 1, 9, 9, 9, 9, 9, 9], b=[9, 3, 9, 2, 9, 9, 9, 9], c=[9, 9, 9, 9, 9, 2, 9, 9])
    config = SelectionConfig(n=8, scorer="length", tau=3, enough=2)
    sampler = AttributionSampler(inner, None, config)
    kept, done = [], []
    sampler.keep = kept.append
    answers = sampler(asked, on_done=done.append)
    assert sampler.rounds() == [2, 4, 8]
    assert {name: [i for n, i in inner.asked if n == name] for name in "abc"} == {
        "a": [0, 1], "b": [0, 1, 2, 3], "c": [*range(8)]
    }  # fmt: skip
    assert [len(group[0].text.split()) for group in answers] == [1, 2, 2] and sum(done) == 3
    assert [[c["draw"] for c in row["candidates"]] for row in kept] == [[0, 1], [0, 1, 2, 3], [*range(8)]]


def test_invalid_candidates_do_not_count_as_enough():
    class Cut(Counted):
        def __call__(self, asked, *, first=0, **ask):
            groups = super().__call__(asked, first=first, **ask)
            return [[replace(c, finish="length") for c in group] for group in groups]

    inner, asked = Cut({"a": [1] * 4}), asking(a=[1])[1]
    AttributionSampler(inner, None, SelectionConfig(n=4, scorer="length", tau=3, enough=1))(asked)
    assert len(inner.asked) == 4
    inner.asked.clear()
    config = SelectionConfig(n=4, scorer="length", tau=3, enough=1, validity=False)
    AttributionSampler(inner, None, config)(asked)
    assert len(inner.asked) == 1


def test_several_choices_stop_each_by_itself():
    """Choice j of 2 is among samples j, 2 + j, ...: the first has enough in round one, and takes no more."""
    inner, asked = asking(a=[3, 9, 1, 9, 1, 2, 1, 1])
    config = SelectionConfig(n=4, scorer="length", tau=3, enough=1)
    [two] = AttributionSampler(inner, None, config)(asked, n=2)
    assert [len(c.text.split()) for c in two] == [3, 1]


def test_with_no_low_candidate_adaptive_n_is_plain_n(sampler):
    ask = {"max_new_tokens": 8, "seed": 2}
    rows = {}
    for name, settings in (("all", {}), ("rounds", {"tau": -2.0, "enough": 1})):
        made = sampler(layers=(1, 2), **settings)
        rows[name] = []
        made.keep = rows[name].append
        made(prompts(3), **ask)
    for a, b in zip(rows["all"], rows["rounds"], strict=True):
        assert a["winner"] == b["winner"]
        for x, y in zip(a["candidates"], b["candidates"], strict=True):
            assert x["token_ids"] == y["token_ids"] and x["risk"] == pytest.approx(y["risk"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enough": 9}, "above n=8"),
        ({"enough": 1, "aggregate": "median_rank"}, "ranks change"),
        ({"enough": 1, "scorer": "rank_fusion"}, "ranks change"),
    ],
)
def test_limits_that_cannot_be_held_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SelectionConfig(tau=1.0, **settings)


def test_a_sampler_without_further_samples_is_refused_by_name():
    class Plain:
        name = "plain"

        def __call__(self, prompts, *, n=1, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0, on_done=None):
            return []

    with pytest.raises(ValueError, match="plain cannot draw further samples"):
        AttributionSampler(Plain(), None, SelectionConfig(scorer="length", tau=1.0, enough=1))


def test_scorers_that_read_weights_need_weights():
    inner = ScriptedSampler(["no, I will not", "yes, do it"])
    with pytest.raises(ValueError, match="reads hidden states or logits, and scripted gives none"):
        AttributionSampler(inner, None, SelectionConfig())
    for scorer in ("length", "first", "random", "guard"):
        config = SelectionConfig(n=2, scorer=scorer, guard="rules" if scorer == "guard" else None)
        [[answer]] = AttributionSampler(inner, None, config)(prompts(1))
        assert answer.text
    with pytest.raises(ValueError, match="needs a card"):
        AttributionSampler(inner, None, SelectionConfig(scorer="first", centre=True))


def test_layers_that_are_not_there_are_refused(sampler):
    with pytest.raises(ValueError, match="3 is above 2"):
        sampler(layers=(3,))


# --- cards, saved layers, precision -------------------------------------------------------------------


def card(**fields):
    facts = {
        "layers": (1,), "aggregate": "mean", "readout": "eos", "distance": "cos", "centre": False, "n": 8,
        "scorer": "latent", "sampling": SimpleNamespace(temperature=0.7), "base": None, "tau": 0.9,
        "dtype": "float32", "path": "prefill",
    }  # fmt: skip
    return SimpleNamespace(**{**facts, **fields})


@pytest.mark.parametrize(
    ("settings", "tau"),
    [
        ({"fallback": "refuse"}, 0.9),
        ({"enough": 2}, 0.9),
        ({"enough": 2, "tau": 0.5}, 0.5),
        ({}, None),
        ({"fallback": "refuse", "scorer": "length"}, None),
        ({"fallback": "refuse", "reverse": True}, None),
        ({"fallback": "refuse", "residual": True}, None),
    ],
)
def test_a_cards_limit_is_for_the_risk_it_was_fitted_on(settings, tau):
    assert settle(SelectionConfig(**settings), card()).tau == tau


def test_a_saved_output_layer_is_refused_for_kl_and_off_with_the_adapter(tiny_policy, tmp_path):
    """The adapters of the paper bring an output layer of their own; PEFT keeps it outside the LoRA layers."""
    from peft import LoraConfig, get_peft_model

    whole = tiny_policy("llama", scale=3.0)
    with torch.no_grad():
        want = whole.model(input_ids=torch.tensor([PROMPT])).logits
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=False, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(whole.model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path)
    policy = tiny_policy("llama", scale=3.0)
    policy._load_adapter(tmp_path)
    pair = Pair(policy)
    with pair.side(True) as model:
        assert torch.equal(model(input_ids=torch.tensor([PROMPT])).logits, want)
    s = similarity(measure(pair, PROMPT, responses(n=2), layers=[0, 2]).states, "cos")[:, 0]
    assert (np.round(s[:, 0], 6) == 1).all() and (s[:, 1] < 1 - 1e-4).all()
    with pytest.raises(ValueError, match="output layer"):
        measure(pair, PROMPT, responses(n=2), likelihood=True)


def test_in_bfloat16_the_same_candidates_win(tiny_policy):
    """At least 95 % of the winners: from what drawing kept, and from passes, beside passes in float32."""
    made = {}
    for dtype in ("bfloat16", "float32"):
        pair = Pair(aligned(tiny_policy("llama", dtype=dtype, scale=1.0), scale=0.1))
        config = SelectionConfig(n=8, layers=(1, 2), validity=False)
        made[dtype] = AttributionSampler(LocalSampler(pair.policy), pair, config)
    half, asked = made["bfloat16"], prompts(100)
    with half.inner.keeping_ends(half.layers, half.policy.end_id) as kept:
        groups = half.inner(asked, n=8, max_new_tokens=6, temperature=1.0)
    winners = {"kept": [], "passes": [], "float32": []}
    for prompt, group in zip(asked, groups, strict=True):
        found = half.rank(prompt, group, kept=kept), half.rank(prompt, group), made["float32"].rank(prompt, group)
        for name, ranking in zip(winners, found, strict=True):
            winners[name].append(ranking.winner)
        np.testing.assert_allclose(found[0].risk, found[1].risk, atol=5e-3)
    assert len(kept) == 800 and len(set(winners["float32"])) > 3
    for name in ("kept", "passes"):
        assert np.mean(np.array(winners[name]) == winners["float32"]) >= 0.95


def test_reasoning_that_a_server_tells_apart_is_scored_too(sampler):
    """What a server draws comes as text: its reasoning goes in front, and the tag is opened once."""
    made = sampler()
    prompt = prompts(1)[0]
    apart = Completion(prompt.id, "no", "stop", 0, thought=Thought("hm", "ok"))
    whole = Completion(prompt.id, "<think>\nhm\n</think>\n\nno", "stop", 0)
    for opened in (False, True):
        a, b = (made.response_of(c, opened)[0] for c in (apart, whole))
        assert a == b and a.spans.is_well_formed and a.spans.cot
    text = made.policy.tokenizer.decode(made.response_of(whole, True)[0].ids)
    assert "<think>" not in text and "</think>" in text


class Mute:
    """A guard that can tell of every k-th candidate only."""

    identity = "mute"

    def __init__(self, every):
        self.every, self.asked = every, 0

    def __call__(self, prompt, completions):
        out = []
        for _ in completions:
            self.asked += 1
            known = self.every and self.asked % self.every
            out.append(Verdict(0.1 if known else None, "mute", reason="" if known else "no verdict in reply"))
        return out


@pytest.mark.parametrize(
    ("every", "limit", "is_stopped"), [(0, 0.05, True), (8, 0.05, True), (8, 0.2, False), (100, 0.05, False)]
)
def test_a_guard_that_cannot_tell_of_too_many_stops_the_choice(every, limit, is_stopped):
    config = SelectionConfig(scorer="guard", guard="rules", n=4, max_unscored=limit)
    sampler = AttributionSampler(ScriptedSampler(lambda p, i: f"{i}"), None, config)
    sampler.guard = Mute(every)
    if is_stopped:
        with pytest.raises(RuntimeError, match=r'guard rules could not tell of .* of .*"no verdict in reply"; mend'):
            sampler(prompts(8))
    else:
        assert len(sampler(prompts(8))) == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": 0.1}, "tau is read by fallback or enough only"),
        ({"scorer": "kl", "layers": [99]}, "layers is read by scorer=latent only"),
        ({"scorer": "length", "readout": "answer_mean"}, "readout is read by scorer=latent"),
        ({"direction": "reverse"}, "direction is read by scorer=kl"),
        ({"guard": "rules"}, "guard is read by scorer=guard or fallback=guard"),
        ({"refusal": "No."}, "refusal is read by fallback=refuse"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        attribution.around(ScriptedSampler(["a"]), settings)


def test_settings_that_are_read_or_are_the_default_are_taken():
    for settings in (
        {"tau": 0.5, "fallback": "refuse", "refusal": "No."},
        {"scorer": "rank_fusion", "fuse": ["latent", "length"], "layers": [1]},
        {"scorer": "kl", "direction": "reverse"},
        {"scorer": "guard", "guard": "rules", "max_unscored": 0.5},
        {"scorer": "length", "readout": "eos"},
    ):
        SelectionConfig(**settings).require_read()


def test_a_guard_behind_an_endpoint_is_asked_as_connect_says():
    asked = []

    def connect(spec):
        asked.append(spec)
        return ScriptedSampler(["VERDICT: no"], name=spec)

    attribution.around(
        ScriptedSampler(["a"]), {"scorer": "guard", "guard": "openai:g@http://127.0.0.1:1/v1"}, connect
    )
    assert asked == ["openai:g@http://127.0.0.1:1/v1"]


def test_an_endpoint_does_as_a_target_where_no_weights_are_read():
    target = "openai:m@http://127.0.0.1:1/v1"
    made = attribution.sampler(target, {"scorer": "length"}, concurrency=2)
    assert made.inner.config.concurrency == 2 and made.pair is None
    with pytest.raises(ValueError, match="no hidden states"):
        attribution.sampler(target)


@pytest.mark.parametrize(
    ("settings", "guards"), [({}, False), ({"scorer": "guard"}, True), ({"fallback": "guard", "tau": 1.0}, True)]
)
def test_a_rehearsal_asks_what_the_choice_would_ask_at_most(settings, guards):
    asked = []

    def connect(spec):
        return ScriptedSampler(lambda p, i: asked.append(spec) or "x", name=spec)

    guard = {"guard": "openai:g@http://127.0.0.1:1/v1"} if guards else {}
    drawn = []
    inner = ScriptedSampler(lambda p, i: drawn.append(i) or "a")
    attribution.rehearsal("somewhere", inner, {"n": 4, **settings, **guard}, connect)(prompts(2))
    assert len(drawn) == 8 and len(asked) == (8 if guards else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_up_to_a_layer_need_nothing_behind_it(family, pair):
    pair, group = pair(family), responses()
    before = measure(pair, PROMPT, group, layers=[0, 1]).states
    pair.keep_only(1)
    assert torch.equal(measure(pair, PROMPT, group, layers=[0, 1]).states, before)
    with pytest.raises(RuntimeError, match="was freed"):
        measure(pair, PROMPT, group, layers=[1, 2])
    with pytest.raises(ValueError, match="expected 1 to 2"):
        pair.keep_only(3)
