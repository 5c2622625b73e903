import math

import numpy as np
import pytest

from tempering.core import encoder
from tempering.core.chat import encode
from tempering.core.records import PreferencePair, Prompt, as_messages
from tempering.methods.staged_competence import difficulty as dif
from tempering.methods.staged_competence.difficulty import Difficulty, Logprobs, PairTokens, score_pairs


def pair(chosen="no", rejected="yes", prompt="how?", **extra):
    return PreferencePair(as_messages(prompt), chosen, rejected, extra=extra)


@pytest.fixture
def own_answers(monkeypatch):
    """Make the start model answer what the test says, by prompt."""

    def script(by_prompt):
        def answers(policy, prompts, settings):
            return [
                {"id": f"{p.id}{k}", "prompt_id": p.id, "text": text, "token_ids": [], "seed": 0, "finish": "stop"}
                for p in prompts
                for k, text in enumerate(by_prompt[p.text])
            ]

        monkeypatch.setattr(dif, "_own_answers", answers)

    return script


def one_hot(texts):
    """Each different text is its own direction: cosine 1 with itself, 0 with any other."""
    return np.eye(len(texts))


def scores(pairs, settings=None, encode_texts=one_hot):
    settings = settings or Difficulty(scorer="embedding_margin")
    return score_pairs(None, pairs, settings, {}, encode_texts)


def test_margin_is_one_where_the_model_says_the_chosen_answer_and_minus_one_where_the_rejected(own_answers):
    own_answers({"a?": ["no"], "b?": ["yes"]})
    pairs = [pair(prompt="a?"), pair(prompt="b?")]
    scored = scores(pairs)
    assert [scored.scores[p.id] for p in pairs] == [1.0, -1.0]
    assert scored.sims[pairs[0].id] == {"chosen": 1.0, "rejected": 0.0} and len(scored.generations) == 2


def test_margins_of_several_answers_are_averaged(own_answers):
    own_answers({"a?": ["no", "yes", "no", "maybe"], "b?": ["yes"] * 4})
    pairs = [pair(prompt="a?"), pair(prompt="b?")]
    assert scores(pairs).scores[pairs[0].id] == (1 - 1 + 1 + 0) / 4


def test_pairs_of_one_prompt_share_its_answers(own_answers):
    own_answers({"a?": ["no"]})
    pairs = [pair(prompt="a?"), pair(prompt="a?", chosen="never")]
    scored = scores(pairs)
    assert len(scored.generations) == 1 and [scored.scores[p.id] for p in pairs] == [1.0, 0.0]


def test_similarity_and_ratio(own_answers):
    own_answers({"a?": ["no"], "b?": ["yes"]})
    pairs = [pair(prompt="a?"), pair(prompt="b?")]
    similarity = scores(pairs, Difficulty(scorer="embedding_similarity")).scores
    ratio = scores(pairs, Difficulty(scorer="embedding_ratio")).scores
    assert [similarity[p.id] for p in pairs] == [1.0, 0.0]
    assert [ratio[p.id] for p in pairs] == pytest.approx([2 / (1 + 1e-6), 1 / (2 + 1e-6)], rel=1e-9)


def test_logprob_margin_is_per_token():
    """-10 nats over 5 tokens against -30 over 10: -2 against -3."""
    assert dif.logprob_margin(Logprobs(-10, -30, 5, 10)) == 1.0


def test_a_score_that_is_no_number_names_its_pairs(own_answers):
    own_answers({"a?": ["no"], "b?": ["yes"]})
    pairs = [pair(prompt="a?"), pair(prompt="b?")]

    def broken(texts):
        e = np.eye(len(texts))
        e[texts.index("yes")] = np.nan
        return e

    with pytest.raises(ValueError, match=f"not a finite number for pair .*{pairs[1].id}"):
        scores(pairs, encode_texts=broken)


def test_equal_scores_order_nothing(own_answers):
    own_answers({"a?": ["no"], "b?": ["no"]})
    with pytest.raises(ValueError, match="the same for all pairs"):
        scores([pair(prompt="a?"), pair(prompt="b?")])


def test_an_empty_answer_names_the_pair(own_answers):
    own_answers({"a?": ["no"], "b?": [" \n"]})
    pairs = [pair(prompt="a?"), pair(prompt="b?")]
    with pytest.raises(ValueError, match=f"answers nothing to the prompt of pair {pairs[1].id}"):
        scores(pairs)


def test_answers_survive_a_kill_batch_by_batch_and_are_those_of_one_batch(tiny_policy, monkeypatch, tmp_path):
    policy = tiny_policy()
    prompts = [Prompt(as_messages(f"how {'stone ' * (i % 3)}{i}?")) for i in range(5)]
    settings = Difficulty(scorer="embedding_margin", max_new_tokens=4, n_samples=2)

    def answers(cache, rows):
        monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(dif, "ROWS", {"cpu": rows})
        return dif._own_answers(policy, prompts, settings)

    whole = answers("whole", 64)
    asked = []

    class Killed(dif.LocalSampler):
        def __call__(self, batch, **kw):
            if len(asked) == 1:
                raise KeyboardInterrupt
            asked.append(len(batch))
            return super().__call__(batch, **kw)

    class Counted(dif.LocalSampler):
        def __call__(self, batch, **kw):
            asked.append(len(batch))
            return super().__call__(batch, **kw)

    monkeypatch.setattr(dif, "LocalSampler", Killed)
    with pytest.raises(KeyboardInterrupt):
        answers("parts", 4)
    monkeypatch.setattr(dif, "LocalSampler", Counted)
    assert answers("parts", 4) == whole and asked == [2, 2, 1]
    assert not list(tmp_path.rglob("*.partial*"))


def test_column_scores_need_a_direction_and_numbers():
    pairs = [pair(prompt="a?", hard=1), pair(prompt="b?", hard="2.5")]
    high = scores(pairs, Difficulty(scorer="column", column="hard", easy="high")).scores
    low = scores(pairs, Difficulty(scorer="column", column="hard", easy="low")).scores
    assert list(high.values()) == [1.0, 2.5] and list(low.values()) == [-1.0, -2.5]
    with pytest.raises(ValueError, match="easy=high or low"):
        scores(pairs, Difficulty(scorer="column", column="hard"))
    for wrong in (None, "hard", [1]):
        bad = pair(prompt="c?", hard=wrong)
        with pytest.raises(ValueError, match=f"pair {bad.id} .*: column 'hard' is .*, not a number"):
            scores([*pairs, bad], Difficulty(scorer="column", column="hard", easy="low"))
    with pytest.raises(ValueError, match="has no column 'harrd'; it has: hard"):
        scores(pairs, Difficulty(scorer="column", column="harrd", easy="low"))
    with pytest.raises(ValueError, match="not a finite number"):
        scores([*pairs, pair(prompt="c?", hard="nan")], Difficulty(scorer="column", column="hard", easy="low"))


def test_random_scores_depend_on_id_and_seed_alone():
    pairs = [pair(prompt=f"{i}?") for i in range(4)]
    first = scores(pairs, Difficulty(scorer="random")).scores
    assert first == {i: first[i] for i in scores(pairs[::-1], Difficulty(scorer="random")).scores}
    assert first != scores(pairs, Difficulty(scorer="random", seed=1)).scores


def test_summary_warns_where_there_is_nothing_to_order():
    flat = {str(i): 0.5 + i * 1e-4 for i in range(8)}
    gap = {i: 3 for i in flat}
    assert "may be aligned already" in dif.summary(flat, gap)["warnings"][0]
    spread = {str(i): float(i) - 3.5 for i in range(8)}
    facts = dif.summary(spread, {i: int(i) for i in spread})
    assert not facts["warnings"] and facts["share_negative"] == 0.5
    assert facts["spearman_length"] == pytest.approx(1.0) and facts["quantiles"]["0.5"] == 0.0


def tokens(policy, prompt="how?", chosen="no", rejected="yes sure"):
    sides = [
        encode(policy.tokenizer, as_messages(prompt), text, max_length=200, max_prompt_length=100)
        for text in (chosen, rejected)
    ]
    return PairTokens(*sides)


def test_log_probabilities_are_computed_once_and_again_for_other_content_or_weights(
    tiny_policy, monkeypatch, tmp_path
):
    monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path))
    policy, computed = tiny_policy(), []
    score = dif.score_groups
    monkeypatch.setattr(dif, "score_groups", lambda *a, **k: computed.append(1) or score(*a, **k))

    def ask(policy, **sides):
        return dif.pair_logprobs(policy, {"x": tokens(policy, **sides)}, "test", batch_tokens=99, cached=True)

    first = ask(policy)
    assert ask(policy) == first and len(computed) == 1
    assert ask(policy, chosen="no no") != first and len(computed) == 2
    assert ask(tiny_policy(seed=1)) != first and len(computed) == 3
    from tempering.core.policy import LoraSettings

    policy.add_adapter("a", LoraSettings(r=2), seed=1)
    assert ask(policy) == first and len(computed) == 4  # a zero adapter: same numbers, but it was asked


def test_own_answers_are_cached_by_weights_prompts_and_sampling(tiny_policy, monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path))
    policy, made = tiny_policy(), []
    sampler = dif.LocalSampler
    monkeypatch.setattr(dif, "LocalSampler", lambda p: made.append(1) or sampler(p))
    pairs = [pair(prompt=f"{i}?", chosen=f"no {i}") for i in range(3)]

    def ask(policy=policy, order=1, **settings):
        both = Difficulty(scorer="embedding_margin", max_new_tokens=6, **settings)
        return score_pairs(policy, pairs[::order], both, {}, lambda t: np.array([[len(x), 1.0] for x in t]))

    first = ask()
    assert ask().scores == first.scores and len(made) == 1
    assert ask(order=-1).scores == first.scores
    done = len(made)
    assert ask(seed=1).generations != first.generations and len(made) == done + 1
    ask(n_samples=2)
    ask(temperature=1.0)
    ask(policy=tiny_policy(seed=1))
    assert len(made) == done + 4


def test_the_start_models_answers_do_not_depend_on_the_order_of_pairs(tiny_policy, monkeypatch, tmp_path):
    pairs = [pair(prompt=f"{i}?", chosen=f"no {i}") for i in range(3)]
    settings = Difficulty(scorer="embedding_margin", max_new_tokens=6)

    def ask(order, cache):
        monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path / cache))
        out = score_pairs(tiny_policy(), pairs[::order], settings, {}, lambda t: np.array([[len(x), 1.0] for x in t]))
        return out.scores

    assert ask(1, "a") == ask(-1, "b")


def test_auto_is_resolved_by_what_is_installed(monkeypatch):
    monkeypatch.setattr(encoder, "encoder_folder", lambda: None)
    assert dif.resolve_scorer("auto") == "logprob_margin" and dif.resolve_scorer("random") == "random"


def test_a_missing_encoder_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "has_encoder_code", lambda: False)
    with pytest.raises(ValueError, match="pip install"):
        encoder.load_encoder()


def test_logprobs_of_sides_keep_their_order_and_length(tiny_policy):
    policy = tiny_policy()
    data = {i: tokens(policy, chosen="no" * n, rejected="yes" * (5 - n)) for n, i in enumerate("cab", 1)}
    out = dif.pair_logprobs(policy, data, "test", batch_tokens=64, cached=False)
    for i, t in data.items():
        assert (out[i].chosen_tokens, out[i].rejected_tokens) == (
            t.chosen.completion_tokens,
            t.rejected.completion_tokens,
        )
        alone = dif.pair_logprobs(policy, {i: t}, "test", batch_tokens=64, cached=False)[i]
        assert alone == pytest.approx(out[i], abs=1e-3) and math.isfinite(alone.chosen)
