"""The suffix search lowers the loss it says it lowers, sends what it scored, and keeps to its budget."""

import pytest
import torch

from tempering.attacks.gcg import START, Budget, gcg
from tempering.core.chat import Encoded, encode_prompt, token_spans
from tempering.core.logprobs import token_gradients
from tempering.core.policy import Policy
from tempering.core.records import Prompt, as_messages
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, attack_success

REQUESTS = [Prompt(as_messages("Bake a loaf of bread")), Prompt(as_messages("Paint the fence"))]


@pytest.fixture(scope="module")
def sampler(tiny_model_dir):
    return LocalSampler(Policy.load(str(tiny_model_dir("llama")), dtype="float32"))


def test_token_gradients_are_the_derivative_of_the_loss(sampler):
    """Against a finite difference: move one slot's embedding a little towards another token's."""
    model = sampler.policy.model
    row, slot, other, step = Encoded([5, 6, 7, 8, 9], 3), 1, 11, 1e-2
    gradient = token_gradients(model, row, [slot])
    assert gradient.shape == (1, model.get_input_embeddings().weight.shape[0])

    def loss(towards):
        table = model.get_input_embeddings().weight
        embedded = table[torch.tensor([row.ids])].clone()
        embedded[0, slot] += towards * table[other]
        logits = model(inputs_embeds=embedded).logits[0, 2:-1].float().log_softmax(-1)
        return -logits.gather(1, torch.tensor(row.ids[3:])[:, None]).mean()

    with torch.no_grad():
        slope = (loss(step) - loss(-step)) / (2 * step)
    assert gradient[0, other].item() == pytest.approx(slope.item(), rel=0.05, abs=1e-4)


def test_spans_are_of_the_tokens_that_are_sent(sampler):
    tokenizer = sampler.policy.tokenizer
    ids, spans, text = token_spans(tokenizer, REQUESTS[0].messages)
    assert ids == encode_prompt(tokenizer, REQUESTS[0].messages)
    assert "Bake a loaf" in text and len(spans) == len(ids) and max(b for _, b in spans) <= len(text)


def test_the_loss_falls_and_is_the_loss_of_the_text_that_is_sent(sampler):
    for found, request in zip(gcg(REQUESTS, sampler, Budget(4, 8, 16)), REQUESTS, strict=True):
        assert found.loss < found.first_loss
        assert found.prompt.text.startswith(request.text) and found.prompt.text != request.text + START
        target = "Sure, here is how to " + request.text[0].lower() + request.text[1:] + ":"
        [[(logprob, tokens)]] = sampler.score([found.prompt], [[target]])
        assert found.loss == pytest.approx(-logprob / tokens, abs=1e-5)


def test_the_budget_and_the_early_stop_hold(sampler):
    [found] = gcg(REQUESTS[:1], sampler, Budget(3, 5, 16))
    assert found.scored <= 1 + 3 * 5
    [found] = gcg(REQUESTS[:1], sampler, Budget(3, 5, 16), enough=1e9)
    assert found.scored == 1 and found.prompt.text == REQUESTS[0].text + START


def test_the_same_seed_finds_the_same_whatever_else_is_attacked(sampler):
    together = gcg(REQUESTS, sampler, Budget(2, 4, 16), seed=3)
    alone = gcg(REQUESTS[1:], sampler, Budget(2, 4, 16), seed=3)
    assert together[1] == alone[0]


def test_parameters_keep_their_flags_and_get_no_gradient(sampler):
    before = [(p.requires_grad, p.grad) for p in sampler.policy.model.parameters()]
    gcg(REQUESTS[:1], sampler, Budget(1, 4, 16))
    assert [(p.requires_grad, p.grad) for p in sampler.policy.model.parameters()] == before


def test_a_target_without_weights_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Bake a loaf"}\n')
    with pytest.raises(ValueError, match="gcg needs the weights of its target, and scripted is not"):
        attack_success.evaluate(ScriptedSampler(["x"]), EvalConfig(data=str(path), attacks=["gcg"]))
