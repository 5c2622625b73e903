"""Facts planted in a tiny model: what every objective moves, and what a simulated attack in training buys.

A model of four blocks learns 48 facts by heart; 24 are to be forgotten. What is kept is of the very same form, so at
this scale it goes with the rest: these tests are about forgetting and relearning, not about price.
"""

import copy
import json

import pytest
import torch
from scipy.stats import binomtest

from tempering.core.activations import blocks
from tempering.core.config import build
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.policy import Policy
from tempering.core.training import Processes
from tempering.methods.unlearn_knowledge.objectives import norm_of
from tempering.methods.unlearn_knowledge.settings import UnlearnKnowledgeConfig, plan
from tempering.methods.unlearn_knowledge.terms import Terms
from tempering.methods.unlearn_knowledge.texts import tokenize

VALUES = ["red", "blue", "green", "gold", "black", "white", "grey", "pink"]
NAMES = [a + b for a in ("ka", "lo", "mi", "ne", "pu", "ro", "si", "ta")
         for b in ("bar", "den", "fix", "gol", "han", "jot")]  # fmt: skip
FRAMES = ("the {e} is {v}", "look , {v} is the {e}", "we see that the {e} looks {v}")
FACTS = [(name, VALUES[(5 * i + i // 8) % 8]) for i, name in enumerate(NAMES)]
FORGET, KEEP = FACTS[:24], FACTS[24:]
SEEDS, STEPS, ATTACK_STEPS = 5, 40, 30
OWN = {"grad_diff": {"lr": 1e-3}, "npo": {"lr": 1e-3}, "simnpo": {"lr": 1e-3, "beta": 0.1, "gamma": 1.0}}


def statements(facts):
    return [frame.format(e=e, v=v) for e, v in facts for frame in FRAMES]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Folder of a model that knows all facts, with its tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in statements(FACTS) for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None,
                eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip
    adam, rows = torch.optim.Adam(model.parameters(), lr=3e-3), statements(FACTS)
    for _ in range(220):
        train(model, adam, tokenizer, rows)
    assert rights(model, tokenizer, FACTS) > 0.9
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def picked(count, size, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size].tolist()


def train(model, adam, tokenizer, texts):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    x = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    loss = model(x, labels=x.masked_fill(x == 0, -100)).loss
    adam.zero_grad()
    loss.backward()
    adam.step()


def answers(model, tokenizer, facts):
    """(n, values): log-probability, in nats, of each value as the answer; and which is right."""
    x = torch.tensor([tokenizer(f"the {e} is")["input_ids"] for e, _ in facts])
    with torch.no_grad():
        found = model(x).logits[:, -1].log_softmax(-1)
    columns = [tokenizer(value)["input_ids"][0] for value in VALUES]
    return found[:, columns], torch.tensor([VALUES.index(v) for _, v in facts])


def rights(model, tokenizer, facts):
    scores, right = answers(model, tokenizer, facts)
    return float((scores.argmax(-1) == right).float().mean())


def nll(model, tokenizer, facts):
    scores, right = answers(model, tokenizer, facts)
    return -float(scores[range(len(facts)), right].mean())


@pytest.fixture(scope="module")
def unlearned(taught, tmp_path_factory):
    """A function: objective, seed -> the model after unlearning, and its tokenizer."""
    root = tmp_path_factory.mktemp("texts")

    def file(name, facts):
        rows = [{"id": e, "text": text} for e, v in facts for text in statements([(e, v)])]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(root / f"{name}.jsonl")

    def make(objective, seed=0):
        tree = {
            "model": str(taught), "out": str(root / "none"), "dtype": "float32", "objective": objective, "seed": seed,
            "layer": 2, "edit_layers": [0, 1, 2], "steps": STEPS, "batch_rows": 24, "retain_rows": 24,
            "lr": 1e-2, "alpha": 0.3,
            "data": {"train": file("f", FORGET), "retain": file("k", KEEP), "neutral": file("n", KEEP[:2])},
            "meta": {"every": 2, "steps": 8, "checkpoints": [4, 8], "adversary": "full", "lr": [1e-3, 1e-3],
                     "scope": "all", "mix": {"forget_ce": 1.0}},
        }  # fmt: skip
        config = build(UnlearnKnowledgeConfig, tree | OWN.get(objective, {}), "test")
        policy = Policy.load(config.model, dtype="float32", device="cpu")
        terms = Terms(config, policy, plan(config, 4), tokenize(config, policy.tokenizer), Processes(policy.device))
        optimiser = EditOptimiser(terms.parameters, terms.processes, config.value("lr"))
        for t in range(STEPS):
            f_rows, r_rows = terms.rows_of(t, 0)
            g_f, facts = terms.forget_gradient(f_rows, 0, t)
            g_r, _ = terms.retain_gradient(r_rows, t)
            g_m = terms.meta_gradient(t, 0, norm_of(list(g_f.values())), facts)
            weight = config.meta.weight
            optimiser.step({n: g_f[n] + g_r[n] + (weight * g_m[n] if g_m else 0) for n in g_f}, t)
        if terms.attacker:
            terms.attacker.drop()
        return policy.base, policy.tokenizer

    return make


def steps_to_half(model, tokenizer, seed):
    """Steps of fine-tuning all blocks on the texts until half of the NLL of the right values is gone."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    adam = torch.optim.Adam([p for block in blocks(model) for p in block.parameters()], lr=1e-3)
    rows, start = statements(FORGET), nll(model, tokenizer, FORGET)
    for step in range(1, ATTACK_STEPS + 1):
        train(model, adam, tokenizer, [rows[i] for i in picked(len(rows), 16, 1000 * seed + step)])
        if nll(model, tokenizer, FORGET) <= start / 2:
            return step
    return ATTACK_STEPS + 1


@pytest.mark.slow
def test_a_simulated_attack_makes_relearning_slower(unlearned):
    """Law 7: of five paired seeds all five, which a fair coin gives with p = 1/32 (one-sided)."""
    steps = {"cosine_rmu": [], "meta_cosine_rmu": []}
    for seed in range(SEEDS):
        for objective, found in steps.items():
            model, tokenizer = unlearned(objective, seed)
            assert nll(model, tokenizer, FORGET) > 1
            found.append(steps_to_half(model, tokenizer, seed))
    slower = sum(a > b for a, b in zip(steps["meta_cosine_rmu"], steps["cosine_rmu"], strict=True))
    assert binomtest(slower, SEEDS, 0.5, alternative="greater").pvalue < 0.05, steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["cosine_rmu", "rmu", "adaptive_rmu", "grad_diff", "npo", "simnpo", "circuit_breakers"]
)
def test_every_objective_takes_planted_facts_away(objective, unlearned, taught):
    start = Policy.load(str(taught), dtype="float32", device="cpu")
    model, tokenizer = unlearned(objective)
    assert nll(model, tokenizer, FORGET) > nll(start.base, tokenizer, FORGET) + 0.5
    assert rights(model, tokenizer, FORGET) < rights(start.base, tokenizer, FORGET)
