import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tempering.core.config import build
from tempering.core.logprobs import nll_share
from tempering.core.policy import Policy, load_tensors
from tempering.core.training import Optimisation, schedule
from tempering.methods import sft
from tempering.methods.sft import SftConfig, answer_from_row
from tempering.methods.staged_competence.plan import read_pairs
from tempering.methods.staged_competence.settings import StagedCompetenceConfig

ANSWERS = ["no", "I can't.", "I won't help with that.", "Sorry, no."]


def rows(n=20):
    return [{"prompt": f"question {i}?", "completion": f"{ANSWERS[i % 4]} {i}"} for i in range(n)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    def make(items=None, **fields):
        tree = {
            "model": str(tiny_model_dir("llama")),
            "out": str(tmp_path / fields.pop("name", "run")),
            "data": {
                "train": write(tmp_path / f"{fields.pop('file', 'train')}.jsonl", rows() if items is None else items)
            },
            "dtype": "float32",
            "epochs": 2,
            "batch_rows": 4,
            "eval_every": 3,
            "lr": 1e-3,
            "lora": {"r": 4, "alpha": 8},
            **fields,
        }
        return build(SftConfig, tree, "test")

    return make


def steps(run):
    return [row for row in run.read_rows("metrics.jsonl") if "event" not in row]


def without_seconds(found):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def test_shares_of_micro_batches_add_up_to_the_token_mean():
    """Log-probabilities -2, -4 over 3 tokens and -6 over 1: -(-12) / 4 = 3, not the mean of means (2 + 6) / 2."""
    first, second = nll_share(torch.tensor([-2.0, -4.0]), 4), nll_share(torch.tensor([-6.0]), 4)
    assert float(first + second) == pytest.approx(3.0)


def test_every_epoch_shows_every_answer_once_in_an_order_of_its_own():
    order = schedule(10, 4, 3, seed=1)
    assert [len(row) for row in order] == [4, 4, 2] * 3
    epochs = [[i for row in order[3 * e : 3 * e + 3] for i in row] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert schedule(10, 4, 3, seed=1) == order != schedule(10, 4, 3, seed=2)
    assert schedule(10, 4, 2, seed=1) == order[:6]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "completion": "b"}, "b"),
        ({"prompt": "a", "completion": "b", "label": True}, "b"),
        ({"prompt": "a", "chosen": "good", "rejected": "bad"}, "good"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "b"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, "b"),
    ],
)
def test_every_usual_format_is_read(row, text):
    assert sft.text_of(answer_from_row(row)) == text


def test_an_undesirable_completion_is_refused():
    with pytest.raises(ValueError, match="label is false"):
        answer_from_row({"prompt": "a", "completion": "b", "label": False})


def test_training_lowers_the_loss_on_answers_and_leaves_the_run_complete(config):
    cfg = config(epochs=8, lr=5e-3, adaptation="full")  # a random model leaves little to an adapter
    run = sft.train(cfg)
    losses = [row["loss"] for row in steps(run)]
    held = [row["loss"] for row in run.read_rows("metrics.jsonl") if row.get("event") == "heldout"]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert held[-1] < held[0]
    assert run.is_done
    assert run.config["method"] == "sft"
    assert {"training", "held-out", "export"} <= set(run.provenance["cost"])
    assert len(run.read_rows("data/heldout.jsonl")) == 4
    assert steps(run)[-1]["tokens"] == run.provenance["cost"]["training"]["tokens"]


def test_the_first_loss_is_that_of_the_start_model(config):
    """A fresh adapter adds nothing: the loss of step 1 is the base's own."""
    cfg = config()
    run = sft.train(cfg)
    policy = Policy.load(cfg.model, dtype="float32")
    read = [answer_from_row(json.loads(line)) for line in Path(cfg.data.train).read_text().splitlines()]
    data = sft.tokenize(cfg, policy, read, {})
    held = {row["id"] for row in run.read_rows("data/heldout.jsonl")}
    ids = sorted(set(data.answers) - held)
    first = [data.tokens[ids[i]] for i in schedule(len(ids), 4, 2, cfg.seed)[0]]
    assert steps(run)[0]["loss"] == pytest.approx(sft.measure(cfg, policy, first), abs=1e-5)


def test_micro_batches_do_not_change_the_loss(config):
    whole = sft.train(config(name="whole"))
    split = sft.train(config(name="split", batch_tokens=1))
    for a, b in zip(steps(whole), steps(split), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_order_of_the_file_does_not_matter(config):
    a = sft.train(config(rows(), name="a", file="a"))
    b = sft.train(config(rows()[::-1], name="b", file="b"))
    assert without_seconds(steps(a)) == without_seconds(steps(b))


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, adaptation, monkeypatch):
    want = sft.train(config(name="want", adaptation=adaptation, checkpoint_every=3))
    broken = config(name="got", adaptation=adaptation, checkpoint_every=3)
    step = Optimisation.step

    def fail_at_five(self, t):
        if t == 5:
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Optimisation, "step", fail_at_five)
    with pytest.raises(KeyboardInterrupt):
        sft.train(broken)
    monkeypatch.setattr(Optimisation, "step", step)
    with pytest.raises(FileExistsError):
        sft.train(broken)
    got = sft.train(broken, resume=True)
    assert without_seconds(got.read_rows("metrics.jsonl")) == without_seconds(want.read_rows("metrics.jsonl"))
    name = "adapter_model.safetensors" if adaptation == "lora" else "model.safetensors"
    a, b = load_tensors(want.root / "final" / name), load_tensors(got.root / "final" / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_run_is_a_model_and_answers_like_the_trained_policy(config, adaptation):
    cfg = config(adaptation=adaptation)
    policy = Policy.load(cfg.model, dtype="float32")
    run = sft.train(cfg, policy=policy)
    loaded = Policy.load(str(run.root), dtype="float32")
    assert loaded.adapters == (["final"] if adaptation == "lora" else [])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want, got = policy.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits
    assert torch.allclose(want, got, atol=1e-5)
    base = Policy.load(cfg.model, dtype="float32")
    with torch.no_grad():
        assert not torch.allclose(base.model(input_ids=ids).logits, got, atol=1e-4)


def test_full_fine_tuning_of_a_run_starts_from_its_adapter(config):
    first = sft.train(config(name="first", lr=1e-2))
    start = Policy.load(str(first.root), dtype="float32")
    second = sft.train(config(name="second", model=str(first.root), adaptation="full", epochs=1))
    policy = Policy.load(str(second.root), dtype="float32")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        near = (policy.model(input_ids=ids).logits - start.model(input_ids=ids).logits).abs().max()
        with start.reference(initial=True):
            far = (policy.model(input_ids=ids).logits - start.model(input_ids=ids).logits).abs().max()
    assert steps(second)[0]["loss"] < steps(first)[0]["loss"]
    assert near < far


def test_pairs_train_on_the_chosen_answer_and_hold_out_pairs(config):
    pairs = [{"prompt": f"question {i}?", "chosen": "no", "rejected": "yes"} for i in range(20)]
    single = [{"prompt": f"question {i}?", "completion": "no"} for i in range(20)]
    a, b = sft.train(config(pairs, name="a", file="a")), sft.train(config(single, name="b", file="b"))
    held = [{row["prompt"][0]["content"] for row in run.read_rows("data/heldout.jsonl")} for run in (a, b)]
    assert held[0] == held[1]
    assert all(row["rejected"] == "yes" for row in a.read_rows("data/heldout.jsonl"))
    # Ids differ, so the order does: but an epoch is the same answers.
    assert steps(a)[3]["tokens"] == steps(b)[3]["tokens"]


def test_wrong_input_names_the_row_and_writes_nothing(config):
    cfg = config([*rows(3), {"prompt": "long " * 200, "completion": "no"}], max_prompt_length=64, max_length=96)
    with pytest.raises(ValueError, match=r"row 4 .*max_prompt_length.*data\.invalid=drop"):
        sft.train(cfg)
    assert not Path(cfg.out).exists()
    dropped = cfg.model_copy(update={"data": cfg.data.model_copy(update={"invalid": "drop"})})
    assert sft.train(dropped).provenance["dropped"] == {"unusable as tokens": 1}


def test_nothing_left_to_train_on_is_an_error(config):
    with pytest.raises(ValueError, match="no answer is left"):
        sft.train(config(rows(1), split={"share": 0.9}))


def test_a_dry_run_says_the_steps_and_writes_nothing(config):
    cfg = config()
    facts = sft.dry_run(cfg)
    assert not Path(cfg.out).exists()
    run = sft.train(cfg)
    assert facts["steps"] == len(steps(run))
    assert facts["training_tokens"] == steps(run)[-1]["tokens"]


def test_the_mix_leaves_the_pairs_that_preference_training_leaves(config):
    pairs = [
        {"prompt": f"p {i}", "chosen": "good", "rejected": "bad", "label": "harmful" if i % 2 else "benign"}
        for i in range(20)
    ]
    settings = config(pairs)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"mix": {"harmful": 0.3}})})
    _, data, *_ = sft.prepare(settings)
    same = {"data": {"train": settings.data.train, "mix": {"harmful": 0.3}}}
    wanted, _ = read_pairs(build(StagedCompetenceConfig, same, "test"))
    assert set(data.answers) == {pair.id for pair in wanted} and len(wanted) == 13


def test_a_mix_of_rows_without_labels_is_an_error(config):
    settings = config()
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"mix": {"harmful": 0.3}})})
    with pytest.raises(ValueError, match="no row has a 'label'"):
        sft.prepare(settings)
