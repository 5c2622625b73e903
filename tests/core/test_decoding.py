import pytest
import torch

from tempering.core.decoding import Decoding, Row
from tempering.core.records import Prompt, as_messages
from tempering.core.sampling import LocalSampler


def prompts(count=8):
    return [Prompt(as_messages(f"how do I {'stone ' * (i % 4)}number {i}?")) for i in range(count)]


def row_of(sampler, prompt, index=0, **settings):
    ask = {"max_new_tokens": 10, "temperature": 0.0, "seed": 3} | settings
    return Row(sampler.prompt_ids(prompt), (ask.pop("seed"), prompt.id, index), **ask)


def drawn(sampler, prompt, index=0, **settings):
    ask = {"max_new_tokens": 10, "temperature": 0.0, "seed": 3} | settings
    return list(sampler([prompt], n=index + 1, **ask)[0][index].token_ids)


def run_out(decoding):
    while not all(row.is_done for row in decoding.rows):
        decoding.step()


SETTINGS = [
    {"max_new_tokens": 3},
    {"max_new_tokens": 14, "temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "seed": 9},
    {},
    {"temperature": 1.0, "index": 2},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_rows_of_any_settings_are_what_the_sampler_draws_alone(family, tiny_policy):
    policy = tiny_policy(family, scale=3.0)
    policy.base.generation_config.eos_token_id = [2, *range(5, 25)]
    sampler = LocalSampler(policy)
    rows = [row_of(sampler, p, **s) for p, s in zip(prompts(6), SETTINGS, strict=True)]
    decoding = Decoding(sampler)
    decoding.add(rows)
    run_out(decoding)
    assert [row.tokens for row in rows] == [drawn(sampler, p, **s) for p, s in zip(prompts(6), SETTINGS, strict=True)]
    assert len({len(row.tokens) for row in rows}) > 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_rows_that_join_and_leave_change_no_other(family, tiny_policy):
    """One joins every second step, a long prompt among them; what has ended is taken out at once."""
    policy = tiny_policy(family, scale=3.0)
    policy.base.generation_config.eos_token_id = [2, *range(5, 15)]
    sampler, decoding = LocalSampler(policy), Decoding(LocalSampler(policy))
    asked = [*prompts(5), Prompt(as_messages("stone river " * 20)), *prompts(8)[5:]]
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(len(asked))]
    rows = [row_of(sampler, p, **s) for p, s in zip(asked, settings, strict=True)]
    widths, left = [], list(rows)
    while left or decoding.rows:
        if left:
            decoding.add([left.pop(0)])
        decoding.step()
        decoding.step()
        widths.append(decoding.width)
        decoding.drop(at_once=True)
    assert [row.tokens for row in rows] == [drawn(sampler, p, **s) for p, s in zip(asked, settings, strict=True)]
    assert max(widths) > 60 > widths[-1]  # columns of the long prompt go with it


def test_a_sliding_window_takes_no_one_in_while_rows_are_under_way(tiny_policy):
    sampler = LocalSampler(tiny_policy("gemma3"))
    decoding = Decoding(sampler)
    decoding.add([row_of(sampler, prompts(1)[0])])
    assert not decoding.can_join
    with pytest.raises(RuntimeError, match="nothing can join"):
        decoding.add([row_of(sampler, prompts(2)[1])])


def test_rows_of_a_sliding_window_can_leave(tiny_policy):
    sampler = LocalSampler(tiny_policy("gemma3", scale=3.0))
    asked = [Prompt(as_messages("river " * 9 + str(i))) for i in range(3)]
    rows = [row_of(sampler, p, max_new_tokens=n) for p, n in zip(asked, (2, 20, 9), strict=True)]
    decoding = Decoding(sampler)
    decoding.add(rows)
    while decoding.rows:
        decoding.step()
        decoding.drop(at_once=True)
    assert [row.tokens for row in rows] == [
        drawn(sampler, p, max_new_tokens=n) for p, n in zip(asked, (2, 20, 9), strict=True)
    ]


def test_whoever_asked_can_end_a_row(tiny_policy):
    sampler = LocalSampler(tiny_policy())
    rows = [row_of(sampler, p) for p in prompts(3)]
    decoding = Decoding(sampler)
    decoding.add(rows)
    rows[1].is_done = True
    run_out(decoding)
    assert [len(row.tokens) for row in rows] == [10, 1, 10]
    decoding.drop()
    assert decoding.rows == [] and decoding.width == 0


def test_scores_are_those_of_the_model_in_nats(tiny_policy):
    sampler, prompt = LocalSampler(tiny_policy()), prompts(1)[0]
    row = row_of(sampler, prompt, max_new_tokens=3, top_logprobs=2, temperature=1.0)
    decoding = Decoding(sampler)
    decoding.add([row])
    run_out(decoding)
    for i, score in enumerate(row.scores):
        with torch.no_grad():
            logits = sampler.policy.model(input_ids=torch.tensor([row.ids + row.tokens[:i]])).logits[0, -1]
        want = torch.log_softmax(logits.double(), -1)
        assert score.token == row.tokens[i]
        assert score.logprob == pytest.approx(want[row.tokens[i]].item(), abs=1e-4)
        assert [token for token, _ in score.top] == want.topk(2).indices.tolist()
        assert [p for _, p in score.top] == pytest.approx(want.topk(2).values.tolist(), abs=1e-4)


def test_rows_end_at_the_context_and_ended_ones_may_be_fed_on(tiny_policy):
    policy = tiny_policy("gpt_neox")
    sampler = LocalSampler(policy)
    policy.base.config.max_position_embeddings = len(sampler.prompt_ids(prompts(1)[0])) + 2
    decoding = Decoding(sampler)
    decoding.add([row_of(sampler, prompts(1)[0], max_new_tokens=2), row_of(sampler, prompts(1)[0], max_new_tokens=2)])
    for _ in range(5):
        decoding.step()
    assert [len(row.tokens) for row in decoding.rows] == [2, 2]
