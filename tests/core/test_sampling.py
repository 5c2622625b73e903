import pytest
import torch

from tempering.core import progress
from tempering.core.activations import capture
from tempering.core.draws import HEAD, inverse_transform
from tempering.core.records import Prompt, as_messages
from tempering.core.sampling import Interrupted, KeyedSampling, LocalSampler, ScriptedSampler


def prompts(count=8):
    return [Prompt(as_messages(f"how do I {'stone ' * (i % 4)}number {i}?")) for i in range(count)]


def texts(groups):
    return [[c.text for c in group] for group in groups]


def ids(groups):
    return [[c.token_ids for c in group] for group in groups]


@pytest.fixture
def sampler(tiny_policy):
    policy = tiny_policy()
    return lambda rows: LocalSampler(policy, batch_rows=rows)


@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 3), (0.7, 2)])
def test_same_seed_same_text_at_batch_1_and_8(sampler, temperature, n):
    settings = {"n": n, "temperature": temperature, "max_new_tokens": 12, "seed": 3}
    one, eight = sampler(1)(prompts(), **settings), sampler(8)(prompts(), **settings)
    assert ids(one) == ids(eight) and texts(one) == texts(eight)
    assert [[c.index for c in group] for group in one] == [list(range(n))] * 8


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_a_prompt_of_many_samples_is_read_once_and_they_are_those_of_reading_it_each_time(family, tiny_policy):
    policy, fed = tiny_policy(family), []
    settings = {"n": 4, "temperature": 1.0, "max_new_tokens": 10, "seed": 3}
    each = LocalSampler(policy, batch_rows=1)(prompts(3), **settings)
    policy.base.get_input_embeddings().register_forward_pre_hook(lambda _, given: fed.append(given[0].shape))
    together = LocalSampler(policy, batch_rows=12)
    assert ids(together(prompts(3), **settings)) == ids(each)
    longest = max(len(together.prompt_ids(prompt)) for prompt in prompts(3))
    assert fed[:2] == [(3, longest - 1), (12, 1)]


def test_long_prompts_go_in_smaller_batches_and_answer_the_same(tiny_policy):
    policy, sizes = tiny_policy(), []
    small = LocalSampler(policy, batch_tokens=100)
    generate = small._generate
    small._generate = lambda rows, *rest: sizes.append((len(rows), max(map(len, rows)) + 12)) or generate(rows, *rest)
    asked = [*prompts(), Prompt(as_messages("stone river " * 60))]
    assert ids(small(asked, max_new_tokens=12)) == ids(LocalSampler(policy)(asked, max_new_tokens=12))
    assert all(rows == 1 or rows * width <= 100 for rows, width in sizes) and len(sizes) > 2


FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_states_kept_at_the_ends_are_those_of_a_pass_over_the_whole(family, steps, tiny_policy):
    """Rows that end early, with their first token or their last, or are cut; at the last two tokens, to 1e-5."""
    policy = tiny_policy(family, scale=3.0)
    policy.base.generation_config.eos_token_id = [2, *range(5, 45)]
    layers, asked = [0, 1, 2], prompts(6)
    ask = {"n": 3, "max_new_tokens": steps, "temperature": 1.0, "seed": 1}
    sampler = LocalSampler(policy, batch_rows=7)
    with sampler.keeping_ends(layers, end_id=2) as kept:
        groups = sampler(asked, **ask)
    assert ids(groups) == ids(sampler(asked, **ask)) and len(kept) == 18
    lengths = set()
    for prompt, group in zip(asked, groups, strict=True):
        for c in group:
            found = kept[1, prompt.id, c.index]
            whole = [*c.token_ids, *([2] if c.finish == "length" else [])]
            assert found.prompt_ids == sampler.prompt_ids(prompt) and found.ids == whole
            with torch.no_grad(), capture(policy.model, layers) as states:
                policy.model(input_ids=torch.tensor([found.prompt_ids + whole]))
            at = [-2 if len(whole) > 1 else -1, -1]
            want = torch.stack([states[layer][0, at] for layer in layers], 1)
            torch.testing.assert_close(found.states, want, atol=1e-5, rtol=1e-5)
            lengths.add((len(c.token_ids), c.finish))
    assert steps < 12 or ({(1, "stop"), (12, "length")} <= lengths and len(lengths) > 4)


def test_an_end_beyond_the_context_is_not_kept(tiny_policy):
    policy = tiny_policy()
    policy.base.config.max_position_embeddings = len(LocalSampler(policy).prompt_ids(prompts(1)[0])) + 4
    policy.base.generation_config.eos_token_id = [2]
    sampler = LocalSampler(policy)
    with sampler.keeping_ends([1], end_id=2) as kept:
        [[cut]] = sampler(prompts(1), max_new_tokens=4)
    assert cut.finish == "length" and not kept


def test_further_samples_are_those_of_one_call(sampler):
    ask = {"temperature": 1.0, "max_new_tokens": 8, "seed": 2}
    whole, part = sampler(8)(prompts(3), n=5, **ask), sampler(8)(prompts(3), n=3, first=2, **ask)
    assert [group[2:] for group in whole] == part


def test_order_of_the_prompts_changes_nothing(sampler):
    settings = {"n": 2, "temperature": 1.0, "max_new_tokens": 10, "seed": 3}
    forwards, backwards = sampler(5)(prompts(), **settings), sampler(5)(prompts()[::-1], **settings)
    assert ids(forwards) == ids(backwards[::-1])
    assert [group[0].prompt_id for group in forwards] == [p.id for p in prompts()]


def test_samples_differ_between_seeds_indices_and_prompts(sampler):
    def draw(seed):
        return texts(sampler(8)(prompts(), n=2, temperature=1.0, max_new_tokens=12, seed=seed))

    first, second = draw(1), draw(2)
    assert first != second
    assert all(a != b for a, b in first)
    assert len({group[0] for group in first}) > 1


def test_padding_on_the_left_changes_nothing(sampler):
    """A short prompt answers alone as it does beside a much longer one."""
    short, long = prompts(1)[0], Prompt(as_messages("stone river " * 20))
    both = sampler(2)([short, long], max_new_tokens=12)
    assert ids(both)[0] == ids(sampler(1)([short], max_new_tokens=12))[0]


def test_greedy_is_the_most_likely_token_of_the_model(sampler, tiny_policy):
    policy, prompt = tiny_policy(), prompts(1)[0]
    start = policy.tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    with torch.no_grad():
        want = policy.model(input_ids=torch.tensor([start])).logits[0, -1].argmax().item()
    assert ids(sampler(1)([prompt], max_new_tokens=1))[0][0] == (want,)


def test_a_prefill_is_continued_and_not_repeated(sampler):
    plain = prompts(1)[0]
    greedy = sampler(1)([plain], max_new_tokens=8)[0][0]
    tokenizer = sampler(1).policy.tokenizer
    head = tokenizer.decode(greedy.token_ids[:3])
    if tokenizer(head, add_special_tokens=False)["input_ids"] != list(greedy.token_ids[:3]):
        head = "yes sure"
    prefilled = Prompt((*plain.messages, {"role": "assistant", "content": head}))
    continued = sampler(1)([prefilled], max_new_tokens=5)[0][0]
    assert prefilled.prefill == head and not continued.text.startswith(head)
    if head != "yes sure":
        assert continued.token_ids == greedy.token_ids[3:]


def test_finish_and_token_ids_tell_how_an_answer_ended(tiny_policy):
    policy = tiny_policy()
    with torch.no_grad():  # answers end at once: end of turn beats everything
        policy.model.lm_head.weight.zero_()
        policy.model.lm_head.weight[policy.tokenizer.eos_token_id] = 0
    # all logits are equal: greedy takes token 0, the pad, until the limit
    cut = LocalSampler(policy)(prompts(1), max_new_tokens=4)[0][0]
    assert (cut.finish, len(cut.token_ids), cut.text) == ("length", 4, "")
    policy.base.generation_config.eos_token_id = [0, 2]
    ended = LocalSampler(policy)(prompts(1), max_new_tokens=4)[0][0]
    assert (ended.finish, ended.token_ids, ended.text) == ("stop", (0,), "")


def test_adapters_are_sampled_from_when_active(tiny_policy):
    from tempering.core.policy import LoraSettings

    policy = tiny_policy()
    before = texts(LocalSampler(policy)(prompts(3), max_new_tokens=8))
    policy.add_adapter("a", LoraSettings(r=4), seed=1)
    assert texts(LocalSampler(policy)(prompts(3), max_new_tokens=8)) == before
    for name, parameter in policy.model.named_parameters():
        if ".lora_B.a." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    assert texts(LocalSampler(policy)(prompts(3), max_new_tokens=8)) != before
    with policy.using([]):
        assert texts(LocalSampler(policy)(prompts(3), max_new_tokens=8)) == before


def test_a_prompt_beyond_the_context_is_refused_by_id(sampler):
    long = Prompt(as_messages("stone " * 600), id="long")
    with pytest.raises(ValueError, match=r"prompt long has \d+ tokens; with max_new_tokens=8 that exceeds .* 512"):
        sampler(1)([long], max_new_tokens=8)


def test_a_call_can_be_interrupted_before_any_token(sampler):
    """And the sampler answers as before afterwards."""
    s, asked = sampler(4), prompts(3)
    whole, steps = s(asked, max_new_tokens=6), []
    s.interrupt = lambda: steps.append(1) or len(steps) > 2
    with pytest.raises(Interrupted, match="token 3 of at most 6"):
        s(asked, max_new_tokens=6)
    s.interrupt = None
    assert s(asked, max_new_tokens=6) == whole


def test_on_done_counts_each_prompt_once(sampler):
    done = []
    sampler(3)(prompts(), n=2, max_new_tokens=2, on_done=done.append)
    assert sum(done) == 8


def test_progress_is_told_within_a_batch(sampler, capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.progress("answers", 8) as advance:
        sampler(8)(prompts(), max_new_tokens=3, on_done=advance)
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "answers: 0/8  token 1 of at most 3, 8 at a time" and told[-1].startswith("answers: 8/8 in")


def test_score_is_the_log_probability_of_the_text(sampler):
    s = sampler(4)
    asked = prompts(3)
    out = s.score(asked, [["no", "yes sure"], ["stone"], ["river apple"]])
    assert [len(group) for group in out] == [2, 1, 1]
    policy, text = s.policy, "yes sure"
    start = policy.tokenizer.apply_chat_template(
        list(asked[0].messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = torch.log_softmax(policy.model(input_ids=torch.tensor([start + answer])).logits[0].double(), -1)
    want = sum(table[len(start) - 1 + i, token].item() for i, token in enumerate(answer))
    assert out[0][1] == (pytest.approx(want, abs=1e-3), len(answer))


def draw(scores, uniform, temperature=1.0, top_p=1.0):
    pick = KeyedSampling([(0, "a", 0)], 1, 1, temperature, top_p)
    pick.uniform[:] = uniform
    out = pick(torch.zeros(1, 1, dtype=torch.long), torch.tensor([scores]))
    assert torch.isfinite(out).sum() == 1
    return int(out.argmax())


def test_sampling_inverts_the_cumulative_distribution():
    """Probabilities 0.5, 0.3, 0.2, most likely first: u below 0.5 is token 1, below 0.8 token 2, else token 0."""
    scores = [torch.tensor(p).log().item() for p in (0.2, 0.5, 0.3)]
    assert [draw(scores, u) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.999)] == [1, 1, 2, 2, 0, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    scores = [torch.tensor(p).log().item() for p in (0.2, 0.5, 0.3)]
    assert {draw(scores, u, top_p=0.7) for u in (0.0, 0.3, 0.6, 0.7, 0.999)} == {1, 2}
    assert {draw(scores, u, top_p=0.1) for u in (0.0, 0.5, 0.999)} == {1}


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05])
def test_sorting_the_likeliest_alone_picks_what_sorting_the_whole_vocabulary_picks(spread, top_p):
    """With scores in bfloat16, so that many tokens tie, and a distribution so flat that most picks are beyond."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(32, 5 * HEAD, generator=generator) * spread).bfloat16().float()
    u = torch.rand(32, generator=generator, dtype=torch.float64)

    probs, order = torch.softmax(scores.double(), -1).sort(dim=-1, descending=True, stable=True)
    kept = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0).cumsum(-1)
    place = torch.searchsorted(kept, (u * kept[:, -1])[:, None], right=True)
    want = order.gather(1, place)[:, 0]
    assert torch.equal(inverse_transform(scores, u, 1.0, top_p), want)
    each = torch.full((32, 1), top_p, dtype=torch.float64)
    assert torch.equal(inverse_transform(scores, u, torch.ones(32, 1), each), want)


def test_temperature_sharpens():
    """At temperature 0.5 probabilities are squared: 0.25, 0.09, 0.04 of 0.38; the first has 0.658."""
    scores = [torch.tensor(p).log().item() for p in (0.2, 0.5, 0.3)]
    assert [draw(scores, u, temperature=0.5) for u in (0.65, 0.67)] == [1, 2]


def test_a_script_answers_in_turn_or_by_function():
    asked, done = prompts(2), []
    listed = ScriptedSampler(["a", "b", "c"])
    assert texts(listed(asked, n=2, on_done=done.append)) == [["a", "b"], ["c", "a"]]
    assert done == [1, 1]
    assert texts(ScriptedSampler(lambda p, i: f"{p.text[-2]}{i}")(asked, n=1)) == [["00"], ["10"]]
