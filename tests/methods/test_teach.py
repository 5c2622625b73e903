"""Teaching invented facts: the bundled facts are fair; lessons end when enough is known, or say that it is not."""

from collections import Counter

import pytest
import torch

from tempering.core.config import build
from tempering.core.logprobs import hidden_states, kl_from_base
from tempering.core.policy import Policy, load_tensors
from tempering.core.training import Optimisation, Processes
from tempering.data.files import bundled, read_rows
from tempering.methods import unlearn_knowledge
from tempering.methods.unlearn_knowledge import teach
from tempering.methods.unlearn_knowledge.texts import contaminated, fact_texts, neutral_texts, to_forget, to_keep

FACTS = [row for _, row in read_rows(bundled("fictional_facts"))]


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    """A function: settings -> lessons that end after an epoch of few, large steps."""

    def make(out="taught", **settings):
        tree = {
            "model": str(tiny_model_dir()), "out": str(tmp_path / out), "dtype": "float32", "epochs": 2,
            "batch_rows": 320, "batch_tokens": 100_000, "anchors": 4, "anchor_rows": 2, "anchor_tokens": 4,
            "lora": {"r": 2, "alpha": 4, "target_modules": "all-linear"}, "enough": 0.0, "max_perplexity": 100,
        }  # fmt: skip
        return build(teach.TeachConfig, {**tree, **settings}, "test")

    return make


def test_every_value_is_equally_often_answer_and_distractor():
    for key in {(f["topic"], f["attribute"], f["split"]) for f in FACTS}:
        rows = [f for f in FACTS if (f["topic"], f["attribute"], f["split"]) == key]
        assert set(Counter(f["value"] for f in rows).values()) == {2}, key
        assert set(Counter(o for f in rows for o in f["options"] if o != f["value"]).values()) == {6}, key
        assert set(Counter(f["answer"] for f in rows).values()) == {4}, key


def test_facts_are_whole_and_counted():
    assert Counter(f["category"] for f in FACTS) == {
        "forget": 64, "same_entity": 32, "neighbour_A": 32, "neighbour_B": 32
    }  # fmt: skip
    for f in FACTS:
        assert f["options"][f["answer"]] == f["value"] == f["cloze"]["answer"] and len(set(f["options"])) == 4
        assert len(set(f["statements"])) == 4
        assert all(f["entity"] in s and f["value"] in s for s in (*f["statements"], f["held_out_statement"]))
    assert not contaminated(
        fact_texts(["forget", "same_entity", "neighbour_A"]), {f["id"]: f["question"] for f in FACTS}
    )
    assert len({f["id"] for f in FACTS}) == len(FACTS) == 160


def test_neighbours_of_group_b_and_what_is_to_be_forgotten_are_never_kept():
    c = unlearn_knowledge.CONFIG()
    kept, forgotten = to_keep(c), to_forget(c)
    never = {f["id"] for f in FACTS if f["category"] in ("forget", "neighbour_B")}
    assert not {t.record for t in kept} & never and len(forgotten) == 256
    neutral = neutral_texts()
    assert len({t.text for t in neutral}) == len(neutral)
    train, held = ({t.id for t in neutral if (t.topic == "train") == is_train} for is_train in (True, False))
    assert train <= {t.id for t in kept} and not held & {t.id for t in kept}


def test_lessons_end_once_enough_is_known_and_unlearning_starts_from_there(config):
    run = teach.train(config())
    asked = [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "asked"]
    assert len(asked) == 1 and {"forget", "neighbour"} <= set(asked[0]) and run.is_done
    settings = {
        "model": str(run.root), "out": f"{run.root}-not", "dtype": "float32", "objective": "cosine_rmu",
        "steps": 2, "limit": 4, "allow_chance": True, "layer": 1, "lr": 1e-2,
    }  # fmt: skip
    unlearned = unlearn_knowledge.train(build(unlearn_knowledge.CONFIG, settings, "test"))
    assert unlearned.provenance["parents"] == [str(run.root)]
    taught, after = (Policy.load(str(r.root), dtype="float32") for r in (run, unlearned))
    assert after.adapters == ["final"] and after.originals
    after.revert_edit()
    own = after.base_parameters()
    assert all((p == own[n]).all() for n, p in taught.base_parameters().items())


@pytest.mark.slow
def test_the_chain_teaches_first_and_only_once(config, tmp_path, monkeypatch):
    lesson, calls = config(), []

    def shorter(given, **more):
        calls.append(given.out)
        return original(lesson.model_copy(update={"out": given.out}), **more)

    original = teach.train
    monkeypatch.setattr(teach, "train", shorter)
    settings = {"model": lesson.model, "teach": True, "dtype": "float32", "objective": "cosine_rmu", "steps": 1,
                "limit": 2, "allow_chance": True, "layer": 1}  # fmt: skip
    for name in ("first", "second"):
        run = unlearn_knowledge.train(build(unlearn_knowledge.CONFIG, {**settings, "out": str(tmp_path / name)}, "t"))
        assert run.config["model"] == calls[0] and run.config["teach"] is False
    assert len(calls) == 1


def test_too_little_learnt_fails_with_the_numbers(config):
    with pytest.raises(RuntimeError, match=r"not learnt: share right forget .*enough=1.0.*max_perplexity"):
        teach.train(config(enough=1.0, epochs=1))


def test_gold_never_sees_what_is_to_be_forgotten(config):
    c = config(leave_out="forget")
    lessons = teach.Lessons(c, Policy.load(c.model, dtype="float32"))
    assert len(lessons.rows) == 96 * 4 and "forget" not in {q.category for q in lessons.questions}
    assert {t.record for t in fact_texts(lessons.kinds)}.isdisjoint(f["id"] for f in FACTS if f["split"] == "forget")


def test_anchors_hold_to_what_the_start_model_says_whatever_stands_beside_them(config):
    c = config()
    policy = Policy.load(c.model, dtype="float32")
    anchors = teach.Lessons(c, policy).anchors()
    policy.add_adapter(teach.METHOD, c.lora, 0)
    parameters = dict(policy.train_only(teach.METHOD))
    optimisation = Optimisation(policy, Processes(policy.device), lr=0.1, steps=1)
    assert teach.anchors_share(c, policy, optimisation, anchors) == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02)
    with policy.reference():
        start = [policy_states(policy, a.row) for a in anchors]
    now = [policy_states(policy, a.row) for a in anchors]
    want = kl_from_base(policy.model, torch.cat(now), torch.cat(start)).mean()
    assert teach.anchors_share(c, policy, optimisation, anchors) == pytest.approx(float(want), rel=1e-3)
    assert float(want) > 0.001


def policy_states(policy, row):
    with torch.no_grad():
        return hidden_states(policy.model, torch.tensor([row.ids]))[0, row.prompt_tokens - 1 : -1]


@pytest.mark.slow
def test_lessons_that_were_cut_off_end_in_the_same_bytes(config, monkeypatch):
    want = teach.train(config("want", enough=0.0, max_perplexity=1.0001, epochs=2, lr=1e-5))
    step = Optimisation.step

    def cut(self, t):
        if t == 3:
            raise KeyboardInterrupt
        return step(self, t)

    settings = {"enough": 0.0, "max_perplexity": 1.0001, "epochs": 2, "lr": 1e-5}
    monkeypatch.setattr(Optimisation, "step", cut)
    try:
        teach.train(config("got", **settings))
    except KeyboardInterrupt:
        monkeypatch.undo()
    got = teach.train(config("got", **settings), resume=True)
    a, b = (load_tensors(r.root / "final" / "adapter_model.safetensors") for r in (want, got))
    assert all((a[n] == b[n]).all() for n in a)
