import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempering.core import preference
from tempering.core.policy import Policy
from tempering.core.run import Run
from tempering.methods import staged_competence as sc
from tempering.methods.staged_competence import StagedCompetenceConfig, kto, train

LOSSES = ["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "kto"]

SMALL = {
    "dtype": "float32", "batch_pairs": 4, "lr": 5e-3, "max_length": 128, "max_prompt_length": 96, "eval_every": 3,
    "checkpoint_every": 2, "lora": {"r": 4}, "difficulty": {"scorer": "logprob_margin"},
    "curriculum": {"stages": 2, "epochs": 1},
}  # fmt: skip


@pytest.fixture
def settings(tiny_model_dir, tmp_path, pairs_file):
    """A function: changes -> configuration of a run of a few steps on a tiny model."""

    def make(out="run", family="llama", **changes):
        tree = {**SMALL, "model": str(tiny_model_dir(family)), "data": {"train": pairs_file}, **changes}
        return StagedCompetenceConfig(**tree, out=str(tmp_path / out))

    return make


def steps(run):
    return [row for row in run.read_rows("metrics.jsonl") if "event" not in row]


def heldout(run):
    return [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "heldout"]


def weights(run):
    name = "adapter_model.safetensors" if run.has("final/adapter_model.safetensors") else "model.safetensors"
    return (run.root / "final" / name).read_bytes()


def logits(policy):
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


# --- whole runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_from_its_start_value_to_an_adapter(settings, loss):
    config = settings(loss=loss, **({"beta": 2.0} if loss == "simpo" else {}))
    run = train(config)
    assert run.is_done and (run.root / "final" / "adapter_config.json").is_file()
    rows = steps(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    start = preference.start_value(loss, config.beta)
    if start is not None:
        first = [row["pair_loss"] for row in rows if row["stage_step"] == 0]
        assert first == pytest.approx([start, start], rel=1e-4)
    assert any(row["margin"] != 0 for row in rows)
    policy = Policy.load(str(run.root), dtype="float32")
    assert not torch.allclose(logits(policy), logits(Policy.load(config.model, dtype="float32")))


@pytest.mark.parametrize("scorer", ["random", "column"])
def test_other_scorers_order_the_stages(settings, scorer):
    column = {"column": "hardness", "easy": "low"} if scorer == "column" else {}
    run = train(settings(difficulty={"scorer": scorer, **column}))
    plan = run.read_rows("data/plan.jsonl")
    score = {row["id"]: row["score"] for row in run.read_rows("data/scored.jsonl") if row["split"] == "train"}
    order = [i for stage in plan for i in stage["ids"]]
    assert order == sorted(score, key=lambda i: (-score[i], i))


def test_the_paper_split_raw_format_and_merging_run_together(settings):
    changes = {"split": {"by": "margin_rows"}, "prompt_format": "raw", "handover": "merge"}
    run = train(settings(**changes, curriculum={"stages": 2, "epochs": 1, "min_pool": 1}))
    split = [row["split"] for row in run.read_rows("data/scored.jsonl")]
    assert split.count("held_out") == 4 and split.count("train") == 16
    assert (run.root / "final" / "config.json").is_file()  # plain weights, no adapter


def test_what_it_learned_shows_on_held_out_pairs_and_a_tiny_step_does_not(settings, write_pairs):
    data = {"train": str(write_pairs(48, "more.jsonl"))}
    curriculum = {"stages": 2, "epochs": 4}
    run = train(settings("learned", data=data, curriculum=curriculum, eval_every=50))
    control = train(settings("control", data=data, curriculum=curriculum, eval_every=50, lr=1e-9))
    learned, still = heldout(run)[-1], heldout(control)[-1]
    assert learned["margin_initial"] > 0.2 > abs(still["margin_initial"]) * 100
    assert learned["accuracy"] >= still["accuracy"]
    assert heldout(run)[-1]["margin_initial"] > heldout(run)[-1]["margin_stage"]  # two stages, two hand-overs


def test_run_folder_holds_what_was_decided(settings):
    run = train(settings())
    rows = run.read_rows("data/scored.jsonl")
    held = {row["id"] for row in run.read_rows("data/heldout.jsonl")}
    assert {row["id"] for row in rows if row["split"] == "held_out"} == held
    plan = run.read_rows("data/plan.jsonl")
    assert not held & {i for stage in plan for i in stage["ids"]}
    assert run.config["difficulty"]["scorer"] == "logprob_margin" and run.config["dtype"] == "float32"
    assert run.provenance["unsafe"] is False and run.provenance["cost"]["training"]["tokens"] > 0
    assert [p.name for p in (run.root / "checkpoints").iterdir()] == [f"step-{len(steps(run))}"]


# --- the claims of the algorithm ----------------------------------------------------------------------


def test_only_the_newest_adapter_trains_and_older_ones_keep_every_byte(settings, monkeypatch):
    seen = []
    begin = sc.begin_stage

    def watch(config, policy, k, **kwargs):
        before = policy.adapter_state()
        begin(config, policy, k, **kwargs)
        seen.append((k, before, {n for n, p in policy.model.named_parameters() if p.requires_grad}))
        watched.append(policy)

    watched: list[Policy] = []
    monkeypatch.setattr(sc, "begin_stage", watch)
    train(settings(curriculum={"stages": 3, "epochs": 1}))
    end = watched[-1].adapter_state()
    for k, before, trainable in seen:
        assert trainable and all(f".stage_{k}." in name for name in trainable)
        assert all(torch.equal(end[name], tensor) for name, tensor in before.items())
    assert len(seen) == 3 and set(end) > set(seen[-1][1])


def test_a_wrong_reference_is_stopped_at_the_first_step_of_a_stage(settings, monkeypatch):
    """Adapters off at stage 1: the start model's log-probabilities instead of the policy's."""
    own = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda self, **kwargs: own(self, initial=True))
    with pytest.raises(RuntimeError, match=r"first loss of stage 1 is \d.*, expected 0.693147: the reference is not"):
        train(settings())


def test_a_loss_that_is_not_a_number_is_stopped(settings):
    config = settings()
    with pytest.raises(RuntimeError, match="first loss of stage 0 is nan"):
        sc.check_first_loss(config, 0, float("nan"), torch.float32)


def test_reference_passes_are_never_more_than_the_distinct_pairs_drawn(settings, monkeypatch):
    asked = []
    score = sc.pair_logprobs

    def count(policy, tokens, what, **kwargs):
        asked.append((what, len(tokens)))
        return score(policy, tokens, what, **kwargs)

    monkeypatch.setattr(sc.reference, "pair_logprobs", count)
    run = train(settings())
    exposure = run.read_rows("data/exposure.jsonl")
    drawn = sum(row["stage"] == 1 and row["draws"] > 0 for row in exposure)
    assert [n for what, n in asked if what.startswith("reference")] == [drawn]


def test_one_shuffled_stage_is_standard_dpo_whatever_the_difficulty(settings):
    """The order of difficulty must not matter: same passes over the same pairs, cut from the same set."""

    def multiset(run):
        config, plan = sc.StagedCompetenceConfig(**{k: v for k, v in run.config.items() if k != "method"}), None
        stage = run.read_rows("data/plan.jsonl")[0]
        rows = sc.cur.stage_schedule(stage["n"], 4, 2, config.curriculum, config.seed, 0)
        assert plan is None and all(len(set(row)) == len(row) for row in rows)
        return sorted(stage["ids"]), [len(row) for row in rows]

    one = {"stages": 1, "epochs": 2, "sampling": "shuffled"}
    dpo = train(settings("dpo", curriculum=one, reference="initial"))
    same = train(settings("same", curriculum=one, reference="previous"))
    assert weights(dpo) == weights(same)  # one stage: its reference is the start model
    assert multiset(dpo) == multiset(same)
    assert {row["draws"] for row in dpo.read_rows("data/exposure.jsonl")} == {2}


def test_by_hand_one_step_of_standard_dpo(settings, tiny_policy):
    """The first update equals AdamW on the DPO loss, written out with full logits."""
    config = settings(curriculum={"stages": 1, "epochs": 1, "sampling": "shuffled"}, batch_pairs=32)
    run = train(config)
    got = load_file(run.root / "final" / "adapter_model.safetensors")

    policy = tiny_policy()
    policy.add_adapter("stage_0", config.lora, config.seed)
    named = policy.train_only("stage_0")
    plan = run.read_rows("data/plan.jsonl")[0]
    assert (plan["T"], len(plan["ids"])) == (1, 16)
    pairs = {p.id: p for p in sc.read_pairs(config)[0]}

    def logprob(pair, text):
        start = policy.tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, tokenize=False)
        prompt = policy.tokenizer(start, add_special_tokens=False)["input_ids"]
        answer = policy.tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        table = torch.log_softmax(policy.model(input_ids=torch.tensor([prompt + answer])).logits[0].float(), -1)
        return sum(table[len(prompt) - 1 + t, token] for t, token in enumerate(answer))

    losses = []
    for i in plan["ids"]:
        chosen, rejected = logprob(pairs[i], pairs[i].chosen), logprob(pairs[i], pairs[i].rejected)
        margin = config.beta * ((chosen - chosen.detach()) - (rejected - rejected.detach()))
        losses.append(-torch.nn.functional.logsigmoid(margin))
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], config.clip)
    torch.optim.AdamW([p for _, p in named], lr=config.lr, weight_decay=0.0).step()
    assert steps(run)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    scale = config.lora.alpha / config.lora.r
    for name, parameter in named:
        key = f"{name.removesuffix('.stage_0.weight')}.weight"
        want = parameter.detach() * (scale if "lora_A" in name else 1)
        assert torch.allclose(got[key], want, atol=2e-4), name


@pytest.mark.parametrize("handover", ["merge", "full"])
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_other_hand_overs_train_and_make_plain_weights(settings, handover, reference):
    run = train(settings(handover=handover, reference=reference, lr=1e-3))
    rows = steps(run)
    first = [row["pair_loss"] for row in rows if row["stage_step"] == 0]
    assert first[0] == pytest.approx(0.693147, abs=1e-4)
    if reference == "previous":
        assert first[1] == pytest.approx(0.693147, abs=1e-4)
    else:
        assert abs(first[1] - 0.693147) > 1e-4  # the reference stayed: the policy has moved away from it
    assert not (run.root / "final" / "adapter_config.json").exists()
    # What is in final/ is what was measured last: same log-probability of a held-out answer.
    policy = Policy.load(str(run.root), dtype="float32")
    config = StagedCompetenceConfig(**{k: v for k, v in run.config.items() if k != "method"})
    data = sc.tokenize_pairs(config, policy, *sc.read_pairs(config))
    held = sorted(row["id"] for row in run.read_rows("data/heldout.jsonl"))
    scored = sc.pair_logprobs(policy, {i: data.tokens[i] for i in held}, "test", batch_tokens=4096, cached=False)
    mean = sum(s.chosen for s in scored.values()) / len(scored)
    assert mean == pytest.approx(heldout(run)[-1]["logprob_chosen"], abs=2e-3)


def test_stacking_and_merging_train_the_same_policy(settings):
    """Equal adapters, equal draws: in float32 the two hand-overs are one algorithm."""
    stacked, merged = train(settings("stack")), train(settings("merge", handover="merge"))
    for a, b in zip(steps(stacked), steps(merged), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
    a, b = (logits(Policy.load(str(run.root), dtype="float32")) for run in (stacked, merged))
    assert (a - b).abs().max() < 2e-2 * a.abs().max()


def test_a_run_is_a_start_model(settings):
    first = train(settings("first"))
    for handover in ("stack", "merge", "full"):
        second = train(settings(f"second_{handover}", handover=handover, lr=1e-9, model=str(first.root)))
        a, b = (logits(Policy.load(str(run.root), dtype="float32")) for run in (first, second))
        assert torch.allclose(a, b, atol=1e-3), handover


def test_an_early_stop_ends_the_stage_and_the_next_one_begins(settings):
    run = train(settings(early_stop=1, eval_every=1, lr=1e-12, curriculum={"stages": 2, "epochs": 4}))
    taken = {k: sum(row["stage"] == k for row in steps(run)) for k in (0, 1)}
    assert taken[0] < 8 and taken[1] < 8
    check_exposure(run, taken)


def check_exposure(run, taken=None):
    """The exposure file equals the draws of the plan's schedule."""
    config = StagedCompetenceConfig(**{k: v for k, v in run.config.items() if k != "method"})
    scored = {row["id"]: row["score"] for row in run.read_rows("data/scored.jsonl") if row["split"] == "train"}
    plan = sc.make_plan(config, scored, [])
    drawn: dict[tuple[int, str], int] = {}
    for k, rows in enumerate(plan.rows):
        for row in rows[: taken[k] if taken else None]:
            for i in row:
                drawn[k, i] = drawn.get((k, i), 0) + 1
    rows = run.read_rows("data/exposure.jsonl")
    assert {(row["stage"], row["id"]): row["draws"] for row in rows if row["draws"]} == drawn
    for k in range(len(plan.stages)):
        of_stage = [row for row in rows if row["stage"] == k]
        assert sum(row["expected"] for row in of_stage) == pytest.approx(sum(row["draws"] for row in of_stage))
    for row in run.read_rows("data/plan.jsonl"):
        assert row["schedule_sha256"] == sc.cur.schedule_hash(plan.rows[row["stage"]])


@pytest.mark.parametrize("sampling", ["with_replacement", "coverage", "weights_only", "shuffled", "sequential"])
def test_the_exposure_file_equals_the_draws(settings, sampling):
    check_exposure(train(settings(curriculum={"stages": 2, "epochs": 2, "sampling": sampling})))


def test_replayed_pairs_are_drawn_counted_and_start_at_their_reference(settings):
    run = train(settings(curriculum={"stages": 2, "epochs": 2, "replay": 0.5}))
    check_exposure(run)
    first = set(run.read_rows("data/plan.jsonl")[0]["ids"])
    replayed = [row for row in run.read_rows("data/exposure.jsonl") if row["stage"] == 1 and row["id"] in first]
    assert sum(row["draws"] for row in replayed) == 2 * 4 and len(replayed) == len(first)


def test_boundaries_cut_the_stages_by_score(settings):
    column = {"scorer": "column", "column": "hardness", "easy": "low"}
    run = train(settings(difficulty=column, curriculum={"boundaries": [-3.0, -6.0], "epochs": [1, 2, 1]}))
    scores = {row["id"]: row["score"] for row in run.read_rows("data/scored.jsonl")}
    stages = [[scores[i] for i in row["ids"]] for row in run.read_rows("data/plan.jsonl")]
    assert min(stages[0]) >= -3.0 > max(stages[1]) and min(stages[1]) >= -6.0 > max(stages[2])


def test_hard_first_reverses_the_stages(settings):
    forwards = train(settings("a", curriculum={"stages": 2, "epochs": 1}))
    backwards = train(settings("b", curriculum={"stages": 2, "epochs": 1, "direction": "hard_first"}))
    ids = [[i for row in run.read_rows("data/plan.jsonl") for i in row["ids"]] for run in (forwards, backwards)]
    assert ids[0] == ids[1][::-1]


def test_shuffling_the_file_changes_nothing(settings, write_pairs):
    data = [{"train": str(write_pairs(20, f"{order}.jsonl", order=order))} for order in (1, -1)]
    a, b = (train(settings(f"run{n}", data=one)) for n, one in enumerate(data))
    assert weights(a) == weights(b)
    assert a.read_rows("data/plan.jsonl") == b.read_rows("data/plan.jsonl")


def test_micro_batches_do_not_change_the_run(settings):
    a, b = train(settings("a", batch_tokens=8192)), train(settings("b", batch_tokens=1))
    for x, y in zip(steps(a), steps(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-3)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-2, abs=1e-4)


def test_gradient_checkpointing_does_not_change_the_run(settings):
    a, b = train(settings("a")), train(settings("b", gradient_checkpointing=True))
    for x, y in zip(steps(a), steps(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)


def test_sft_weight_adds_the_likelihood_of_the_chosen_answers(settings):
    plain, added = train(settings("a")), train(settings("b", sft_weight=0.5))
    first = [steps(run)[0] for run in (plain, added)]
    assert first[0]["pair_loss"] == pytest.approx(first[1]["pair_loss"], abs=1e-6)
    assert first[1]["loss"] - first[0]["loss"] > 0.5  # half of several nats a token


def test_a_share_of_the_pairs_is_nested_in_all(settings):
    whole, half = train(settings("a")), train(settings("b", data={"train": settings().data.train, "share": 0.5}))
    ids = [{i for row in run.read_rows("data/plan.jsonl") for i in row["ids"]} for run in (whole, half)]
    assert ids[1] < ids[0] and len(ids[1]) == 8


# --- wrong input --------------------------------------------------------------------------------------


def test_more_stages_than_pairs_is_refused(settings):
    with pytest.raises(ValueError, match=r"curriculum.stages is 17, but there are only 16 training pairs"):
        train(settings(curriculum={"stages": 17}))


def test_epochs_of_another_length_than_the_stages_are_refused(settings):
    with pytest.raises(ValueError, match=r"curriculum.epochs has 3 entries for 2 stages"):
        train(settings(curriculum={"stages": 2, "epochs": [1, 2, 3]}))


def test_a_pair_that_does_not_fit_is_named_or_dropped(settings, write_pairs):
    rows = [json.loads(line) for line in Path(settings().data.train).read_text().splitlines()]
    rows[2] |= {"prompt": "stone " * 200, "id": "[/not markup]"}
    path = str(write_pairs(rows=rows, name="long.jsonl"))
    with pytest.raises(ValueError, match=r"pair 3 \(id \[/not markup\]\): the prompt has \d+ .*data.invalid=drop"):
        train(settings(data={"train": path}))
    run = train(settings(data={"train": path, "invalid": "drop"}))
    assert run.provenance["dropped"] == {"unusable as tokens": 1}


def test_an_existing_run_is_refused_before_the_model_is_loaded(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        train(settings(model="org/does-not-exist"))


# --- kto ----------------------------------------------------------------------------------------------


def test_kto_partners_have_another_prompt_and_depend_on_seed_and_stage_alone():
    prompts = {f"id{i}": f"prompt {i // 3}" for i in range(12)}
    found = kto.partners(prompts, 1, 0)
    assert set(found) == set(prompts)
    for i, rows in found.items():
        assert all(prompts[j] != prompts[i] for j, _ in rows)
    assert found == kto.partners(dict(reversed(prompts.items())), 1, 0)
    assert found != kto.partners(prompts, 2, 0) and found != kto.partners(prompts, 1, 1)
    with pytest.raises(ValueError, match="two different prompts"):
        kto.partners({"a": "x", "b": "x"}, 1, 0)


def test_kto_partner_is_the_next_row_with_another_prompt():
    """Where all prompts differ but a row's two sides, partners are one shift of the order, sides skipped."""
    prompts = {f"id{i}": f"{i}" for i in range(6)}
    order = sorted(((i, s) for i in prompts for s in ("chosen", "rejected")), key=lambda row: kto._key(4, 2, row))
    found = kto.partners(prompts, 4, 2)
    for at, (i, side) in enumerate(order):
        after = [row for row in order[at + 1 :] + order[:at] if row[0] != i]
        assert found[i][0 if side == "chosen" else 1] == after[0]


def test_kto_logs_its_kl_which_starts_at_zero_and_is_never_negative(settings):
    run = train(settings(loss="kto", curriculum={"stages": 2, "epochs": 3}, lr=2e-2))
    kl = [row["kl_nats"] for row in steps(run)]
    starts = [row["kl_nats"] for row in steps(run) if row["stage_step"] == 0]
    assert starts == pytest.approx([0, 0], abs=1e-4) and min(kl) >= 0
    assert run.has("data/reference_kto.jsonl")


def test_kto_with_the_start_model_as_reference_runs(settings):
    run = train(settings(loss="kto", reference="initial"))
    assert steps(run)[0]["pair_loss"] == pytest.approx(0.5, abs=1e-4)


# --- resuming -----------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


MOMENTS = [
    "tokenize_pairs", "prepare", "begin_stage", "stage_reference", "micro_scores", "check_first_loss", "measure",
    "save_checkpoint", "write_exposure", "Policy.export", "Run.write_provenance", "Run.finish",
]  # fmt: skip


def interrupt(monkeypatch, moment, at, after):
    """Fail at the `at`-th call of something, before or after it did its work."""
    owner, _, name = moment.rpartition(".")
    holder = {"Policy": Policy, "Run": Run, "": sc}[owner]
    original, calls = getattr(holder, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and not after:
            raise KilledError
        result = original(*args, **kwargs)
        if len(calls) == at:
            raise KilledError
        return result

    monkeypatch.setattr(holder, name, call)


@pytest.mark.parametrize("changes", [{}, {"handover": "merge"}, {"handover": "full", "lr": 1e-3}, {"loss": "kto"}])
def test_a_resumed_run_equals_the_uninterrupted_one_byte_for_byte(settings, monkeypatch, changes):
    changes |= {"early_stop": 3, "eval_every": 1, "checkpoint_every": 1}
    whole = train(settings("whole", **changes))
    want, rows = weights(whole), steps(whole)
    r = random.Random(str(changes))
    moments = [(m, r.randrange(1, 4), r.random() < 0.5) for m in MOMENTS]
    for n, (moment, at, after) in enumerate(moments):
        at = at if moment in ("micro_scores", "measure", "save_checkpoint") else min(at, 2) if n == 2 else 1
        config = settings(f"killed{n}", **changes)
        with monkeypatch.context() as patch:
            interrupt(patch, moment, at, after)
            with pytest.raises(KilledError):
                train(config)
        assert Run(Path(config.out)).is_done == (moment == "Run.finish" and after)
        resumed = train(config, resume=True)
        assert weights(resumed) == want, (moment, at, after)
        again = steps(resumed)
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == [
            {k: v for k, v in row.items() if k != "seconds"} for row in rows
        ], (moment, at, after)
        assert heldout(resumed) == heldout(whole)


def test_resuming_with_another_configuration_is_refused(settings):
    train(settings())
    with pytest.raises(ValueError, match=r"beta is 0.1 in its config.yaml, but 0.2 now"):
        train(settings(beta=0.2), resume=True)


def test_resuming_a_finished_run_does_nothing(settings):
    run = train(settings())
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file()}
    assert train(settings(), resume=True).is_done
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file()} == before


DRIVER = """
import json, sys, warnings
import torch
torch.set_num_threads(1)
from tempering.methods.staged_competence import StagedCompetenceConfig, train
train(StagedCompetenceConfig(**json.load(open(sys.argv[1]))), resume="--resume" in sys.argv)
"""


@pytest.fixture
def command(tmp_path):
    """A function: configuration, launcher and flags -> arguments of a process that trains it."""

    def make(config, *flags, launcher=()):
        driver, tree = tmp_path / "driver.py", tmp_path / f"{Path(config.out).name}.json"
        driver.write_text(DRIVER)
        tree.write_text(config.model_dump_json())
        return [sys.executable, *launcher, str(driver), str(tree), *flags]

    return make


def run_process(arguments, timeout=240):
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def stamp(folder):
    """What changes when a process writes its first step: the metrics file, rewritten on resume."""
    file = folder / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.slow
def test_a_process_killed_at_random_moments_resumes_to_the_same_bytes(settings, command):
    changes = {"curriculum": {"stages": 3, "epochs": 6}, "checkpoint_every": 3, "eval_every": 1, "batch_pairs": 2}
    run_process(command(settings("whole", **changes)))
    want = Run(Path(settings("whole").out))
    spent = steps(want)[-1]["seconds"]
    config, r, kills = settings("killed", **changes), random.Random(5), 0
    flags: list[str] = []
    for _ in range(5):
        process = subprocess.Popen(command(config, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Importing takes most of the time: wait until the run moves, then for a random part of the training.
        seen = stamp(Path(config.out))
        while process.poll() is None and stamp(Path(config.out)) == seen:
            time.sleep(0.005)
        time.sleep(r.random() * 0.4 * spent)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        flags = ["--resume"]
    run_process(command(config, "--resume"))
    assert kills >= 3
    killed = Run(Path(config.out))
    assert killed.is_done and weights(killed) == weights(want)
    assert [row["loss"] for row in steps(killed)] == [row["loss"] for row in steps(want)]
    assert killed.read_rows("data/exposure.jsonl") == want.read_rows("data/exposure.jsonl")


def launcher(processes):
    """`accelerate launch --cpu` starts one process whatever it is told (it leaves more to mpirun)."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


@pytest.mark.slow
def test_one_process_hands_a_run_over_to_two(settings, command, monkeypatch):
    one, config = train(settings("one")), settings("two")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        interrupt(patch, "save_checkpoint", 1, after=True)
        train(config)
    run_process(command(config, "--resume", launcher=launcher(2)))
    two = Run(Path(config.out))
    a, b = (load_file(run.root / "final" / "adapter_model.safetensors") for run in (one, two))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert [row["step"] for row in steps(two)] == [row["step"] for row in steps(one)]


FSDP2 = """
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tempering.core import training
from tempering.methods import staged_competence as sc

init, loop = training.Processes.__init__, sc._loop

def on_cpu(self, *args):
    # Accelerate reads its FSDP settings on accelerators only; the rest of it shards on a CPU as well.
    init(self, *args)
    self.accelerator.state.distributed_type = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    self.accelerator.state.fsdp_plugin = plugin

def counted(config, policy, *rest):
    loop(config, policy, *rest)
    layers = [p for n, p in policy.model.named_parameters() if ".layers." in n and ".lora_" not in n]
    assert policy.is_sharded and all(hasattr(p, "full_tensor") for p in layers), "nothing was sharded"

training.Processes.__init__, sc._loop = on_cpu, counted
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"loss": "kto"}, {"handover": "full"}])
def test_a_base_sharded_by_fsdp2_trains_the_same_adapter(settings, command, tmp_path, changes):
    config = settings("two", batch_tokens=256, **changes)
    arguments = command(config, launcher=launcher(2))
    (tmp_path / "driver.py").write_text(FSDP2 + DRIVER)
    if changes.get("handover"):
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
        assert done.returncode and "handover=full changes weights that FSDP2 shards" in done.stderr
        return
    run_process(arguments)
    one, two = train(settings("one", batch_tokens=256, **changes)), Run(Path(config.out))
    a, b = (load_file(run.root / "final" / "adapter_model.safetensors") for run in (one, two))
    assert set(a) == set(b) and all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"handover": "merge"}, {"handover": "full", "lr": 1e-3}, {"loss": "kto"}])
def test_two_processes_train_the_same_weights_as_one(settings, command, changes):
    one = train(settings("one", **changes))
    config = settings("two", **changes)
    run_process(command(config, launcher=launcher(2)))
    two = Run(Path(config.out))
    assert (one.provenance["processes"], two.provenance["processes"]) == (1, 2)
    name = "adapter_model.safetensors" if not changes.get("handover") else "model.safetensors"
    a, b = (load_file(run.root / "final" / name) for run in (one, two))
    assert set(a) == set(b)
    for key in a:
        assert torch.allclose(a[key], b[key], atol=2e-5), key  # AdamW magnifies the rounding of small gradients
    for x, y in zip(steps(one), steps(two), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)
    assert json.loads((two.root / "final" / "lineage.json").read_text())["method"] == "staged_competence"


# --- the mix of labels --------------------------------------------------------------------------------


def labelled(count):
    return [
        {"prompt": f"p {i}", "chosen": "good", "rejected": "bad", "label": "harmful" if i % 2 else "benign"}
        for i in range(count)
    ]


def test_a_smaller_mix_is_part_of_a_larger_and_other_labels_stay_whole(settings, write_pairs):
    data = {"train": str(write_pairs(name="mix.jsonl", rows=labelled(40)))}
    kept = {}
    for share in (1.0, 0.6, 0.3, 0.0):
        pairs, _ = sc.read_pairs(settings(data={**data, "mix": {"harmful": share}}))
        kept[share] = {pair.text for pair in pairs if pair.label == "harmful"}
        assert len(kept[share]) == 20 * share and len(pairs) == 20 + 20 * share
    assert kept[0.3] < kept[0.6] < kept[1.0]


@pytest.mark.parametrize("mix", [{"harmful": 1.5}, {"unheard": 0.5}])
def test_a_mix_that_cannot_be_names_the_label(settings, write_pairs, mix):
    data = {"train": str(write_pairs(name="mix.jsonl", rows=labelled(8))), "mix": mix}
    with pytest.raises(ValueError, match=rf"data.mix.{next(iter(mix))}=.* one of the labels benign, harmful"):
        sc.read_pairs(settings(data=data))
