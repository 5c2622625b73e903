"""`temper train unlearn_toxicity`: what is trained falls, nothing else moves, and what cannot be shown is refused."""

import json

import numpy as np
import pytest
import torch

from tempering.core.activations import blocks as choosing_blocks
from tempering.core.activations import masked_mean
from tempering.core.bank import make_bank
from tempering.core.config import build
from tempering.core.editing import clones
from tempering.core.policy import Policy, load_tensors
from tempering.core.run import Run
from tempering.core.text_rows import read_states
from tempering.core.training import Processes
from tempering.judges import toxicity
from tempering.methods import unlearn_toxicity as method
from tempering.methods.unlearn_toxicity import checks, choosing
from tempering.methods.unlearn_toxicity.settings import UnlearnToxicityConfig
from tempering.methods.unlearn_toxicity.texts import identity_auroc, openings, read_corpus, read_labelled

RUDE = ("you stone", "he is a stone", "stone you are", "that stone again")
CIVIL = ("you river", "he is a river", "river you are", "that river again")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tmp_path, tiny_model_dir):
    """A function: overrides -> configuration with small files: `stone` is rude, `river` is not."""
    probe = [
        {"text": f"{text}{'!' * (i % 5)}", "toxic": toxic, "group": f"{split}{i}", "split": split}
        for split, count in (("train", 16), ("validation", 6), ("test", 6))
        for i in range(count)
        for toxic, text in ((True, f"{i} {RUDE[i % 4]}"), (False, f"{i} {CIVIL[i % 4]}"))
    ]
    train = [
        {"prompt": f"so they said {i},", "rejected": f" {RUDE[i % 4]}", "chosen": f" {CIVIL[i % 4]}"}
        for i in range(12)
    ]
    retain = [
        {"text": f"the apple {i} is glass and paper", "kind": "identity" if i % 3 == 0 else "general"}
        for i in range(40)
    ]
    files = {
        "data.probe": write(tmp_path / "probe.jsonl", probe),
        "data.train": write(tmp_path / "train.jsonl", train),
        "data.retain": write(tmp_path / "retain.jsonl", retain),
    }

    def make(**overrides):
        tree = {
            "model": str(tiny_model_dir()), "out": str(tmp_path / "run"), "dtype": "float32", "layers": [0, 1],
            "steps": 6, "batch_rows": 6, "retain_rows": 4, "lr": 1e-2, "alpha": 1.0, "beta_kl": 0.0, "refits": 2,
            "permutations": 2, "measure_every": 3, "probe_every": 3, "checkpoint_every": 2, "check": {"prompts": 0},
            "data": {key.split(".")[1]: value for key, value in files.items()},
        }  # fmt: skip
        tree["data"] |= overrides.pop("data", {})
        return build(UnlearnToxicityConfig, tree | overrides, "test")

    return make


def unlearning(config):
    """What `train` makes before its loop, without a run folder."""
    policy = Policy.load(config.model, dtype="float32", device="cpu")
    corpus = read_corpus(config, policy)
    bank = None
    if config.objective == "probe":
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            bank = make_bank(
                policy,
                corpus.labelled,
                Path(folder),
                seed=0,
                skip_first=1,
                batch_tokens=256,
                refits=2,
                permutations=2,
            )
    settled = method.plan(config, bank, 2)
    return method.Unlearning(config, policy, settled, bank, corpus, Processes(policy.device))


def projections(run):
    """Mean distance of toxic texts along each layer's direction, in standard units; and how much all else moved."""
    rows = [r.tokens for r in run.corpus.labelled if r.has_attribute and r.split == "validation"]
    batch = run.batch(rows)
    with torch.no_grad():
        states = read_states(run.policy, batch, run.layers)
    found = []
    for layer, h in zip(run.layers, states, strict=True):
        p = run.probes[layer]
        z = ((h @ p.direction) - p.projection) / p.spread
        found.append(float(masked_mean(z, batch.mask)))
    return found


@pytest.mark.parametrize("mode", ["cos_hinge", "proj_hinge", "cos_steer", "mse_steer", "erase_target"])
def test_every_mode_lowers_the_projection_of_toxic_text(settings, mode):
    run = unlearning(settings(mode=mode, lr=3e-3, alpha=0.0))
    before = projections(run)
    optimiser = method.EditOptimiser(run.parameters, run.processes, 3e-3)
    for t in range(12):
        optimiser.step(run.step_gradient(t)[0], t)
    assert np.mean(projections(run)) < np.mean(before) - 0.1


def test_the_loss_is_the_same_however_texts_are_cut_into_batches(settings):
    run = unlearning(settings(beta_kl=0.5, nll_weight=0.1))
    whole, facts, _ = run.step_gradient(0)
    run.config = run.config.model_copy(update={"batch_tokens": 30})
    parts, again, _ = run.step_gradient(0)
    assert facts == pytest.approx(again, rel=1e-4, abs=1e-6)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-5)


def test_prompts_count_in_no_loss(settings):
    run = unlearning(settings())
    [row, *_] = run.corpus.forget
    assert row.prompt_tokens > 1
    batch = run.batch([row])
    assert int(batch.mask.sum()) == len(row.ids) - row.prompt_tokens


def test_before_the_first_step_nothing_has_drifted(settings):
    run = unlearning(settings(beta_kl=0.5))
    assert float(run.retain(run.retained(0), 4.0).detach()) == pytest.approx(0, abs=1e-6)
    assert run.neutral_kl() == pytest.approx(0, abs=1e-6)


def test_kinds_of_text_to_keep_have_their_shares(settings):
    run = unlearning(settings(retain_rows=3, data={"mix": {"general": 0.75, "identity": 0.25}}))
    kept = [row.id for t in range(8) for row in run.retained(t)]
    identity = {row.id for row in run.corpus.retain["identity"]}
    assert len(kept) == 24 and sum(i in identity for i in kept) == 6


def test_going_back_meets_the_kl_and_keeps_the_direction(settings):
    run = unlearning(settings())
    optimiser = method.EditOptimiser(run.parameters, run.processes, 1e-1)
    for t in range(4):
        optimiser.step(run.step_gradient(t)[0], t)
    far, goal = clones(run.parameters), run.neutral_kl() / 4
    share, kl = run.step_back(goal)
    assert 0 < share < 1 and 0.8 * goal < kl <= goal and run.neutral_kl() == pytest.approx(kl, rel=1e-4)
    for name, p in run.parameters.items():
        line = run.policy.before[name] + share * (far[name] - run.policy.before[name])
        assert torch.allclose(p, line, atol=1e-6)


@pytest.mark.parametrize("objective", ["cosine_rmu", "rmu", "dpo"])
def test_every_baseline_lowers_its_own_loss(settings, objective):
    run = unlearning(settings(objective=objective, layers=[1]))
    optimiser = method.EditOptimiser(run.parameters, run.processes, 3e-3)
    losses = []
    for t in range(10):
        gradient, facts, _ = run.step_gradient(t)
        losses.append(facts["forget"])
        optimiser.step(gradient, t)
    assert losses[-1] < losses[0]
    if objective == "dpo":
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)


def test_controls_differ_in_direction_and_in_nothing_else(settings):
    own = unlearning(settings())
    for kind in ("random", "shuffled", "diff_of_means"):
        other = unlearning(settings(directions=kind))
        assert list(other.parameters) == list(own.parameters) and other.layers == own.layers
        assert not torch.allclose(other.probes[1].direction, own.probes[1].direction)
        assert torch.allclose(other.probes[1].mean, own.probes[1].mean, atol=1e-5)
        assert other.probes[1].threshold != own.probes[1].threshold


# --- runs ------------------------------------------------------------------------------------------------


def test_a_run_changes_the_selected_tensors_alone_and_can_be_taken_out(settings, tmp_path, capsys):
    config = settings()
    run = method.train(config)
    assert run.is_done and run.provenance["reconstruction"] is True and run.provenance["start"]["claim"] == "none"
    edit = load_tensors(run.root / "final" / "edit.safetensors")
    assert sorted(edit) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    base, now = Policy.load(config.model, dtype="float32"), Policy.load(str(run.root), dtype="float32")
    start = base.state()
    changed = {name for name, value in now.state().items() if not torch.equal(value, start[name])}
    assert changed == set(edit)
    now.revert_edit()
    assert all(torch.equal(value, start[name]) for name, value in now.state().items())
    measured = [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "measured"]
    assert [row["step"] for row in measured] == [3, 6] and set(measured[-1]["readable"]) == {"0", "1"}
    assert all(row["held_forget"] >= 0 for row in measured)
    assert not list(run.root.glob(".states-*"))
    told = capsys.readouterr()
    written = "".join(p.read_text() for p in run.root.rglob("*.json*") if "tokenizer" not in p.name)
    assert not any(text in told.out + told.err + written for text in RUDE)


def test_an_interrupted_run_ends_like_one_that_was_not(settings, tmp_path, monkeypatch):
    whole = method.train(settings(out=str(tmp_path / "whole")))
    step = method.EditOptimiser.step

    def dies(self, gradients, t):
        if t == 3:
            raise KeyboardInterrupt
        return step(self, gradients, t)

    config = settings(out=str(tmp_path / "cut"))
    monkeypatch.setattr(method.EditOptimiser, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        method.train(config)
    monkeypatch.undo()
    cut = method.train(config, resume=True)
    for name in ("edit.safetensors", "directions.safetensors"):
        assert (whole.root / "final" / name).read_bytes() == (cut.root / "final" / name).read_bytes()


def test_probes_of_a_run_serve_another_and_those_of_another_model_do_not(settings, tmp_path, tiny_model_dir):
    bank = method.train(settings(probes_only=True, out=str(tmp_path / "bank")))
    assert bank.is_done and not bank.has("final") and not bank.has("checkpoints")
    run = method.train(settings(probes=str(bank.root), out=str(tmp_path / "second"), steps=2))
    assert (run.root / "probes/probes.json").read_bytes() == (bank.root / "probes/probes.json").read_bytes()
    with pytest.raises(ValueError, match="fitted to other weights"):
        other = str(tiny_model_dir(seed=1))
        method.train(settings(probes=str(bank.root), model=other, out=str(tmp_path / "third")))


def test_max_kl_ends_the_run_at_that_kl(settings):
    run = method.train(settings(lr=1e-1, max_kl=1e-3, steps=30))
    last = [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "measured"][-1]
    assert last["step"] < 30 and 0 < last["kl"] <= 1e-3 and 0 < last["back"] < 1


def test_rounds_fit_new_probes_and_an_interrupted_run_takes_up_the_same(settings, tmp_path, monkeypatch):
    shared = {"rounds": 2, "steps": 4, "measure_every": 4, "probe_every": 100}
    whole = method.train(settings(out=str(tmp_path / "whole"), **shared))
    [probed] = [row for row in whole.read_rows("metrics.jsonl") if row.get("event") == "probed"]
    assert probed["step"] == 5 and probed["round"] == 2 and set(probed["auroc"]) == {"0", "1"}
    saved = load_tensors(whole.root / "final" / "directions.safetensors")
    assert float(saved["1.direction"] @ saved["1.round1.direction"]) < 0.999
    assert len([row for row in whole.read_rows("metrics.jsonl") if "event" not in row]) == 8
    step = method.EditOptimiser.step

    def dies(self, gradients, t):
        if t == 5:
            raise KeyboardInterrupt
        return step(self, gradients, t)

    config = settings(out=str(tmp_path / "cut"), **shared)
    monkeypatch.setattr(method.EditOptimiser, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        method.train(config)
    monkeypatch.undo()
    cut = method.train(config, resume=True)
    for name in ("edit.safetensors", "directions.safetensors"):
        assert (whole.root / "final" / name).read_bytes() == (cut.root / "final" / name).read_bytes()


def test_the_norm_guard_holds_norms_that_the_loss_leaves_free(settings):
    ratios = []
    for guard in (0.0, 10.0):
        run = unlearning(settings(mode="mse_steer", alpha=0.0, norm_guard=guard))
        assert run.norm_ratios() == pytest.approx({"norm_ratio_forget": 1.0, "norm_ratio_retain": 1.0}, abs=1e-3)
        with torch.no_grad():
            for p in run.parameters.values():
                p.mul_(12)
        grown = run.norm_ratios()["norm_ratio_forget"]
        optimiser = method.EditOptimiser(run.parameters, run.processes, 1e-1)
        for t in range(8):
            optimiser.step(run.step_gradient(t)[0], t)
        assert grown > 2
        ratios.append(run.norm_ratios()["norm_ratio_forget"])
    assert ratios[1] < ratios[0]


# --- layers by their effect ------------------------------------------------------------------------------


def test_layers_whose_direction_matters_most_are_chosen_by_fall_per_rise(settings):
    """Falls .2, .1, .1 of toxicity at rises of 100 %, 10 % and less than 1 %, which counts as 1 %: .2, 1, 10."""
    before = (0.5, 20.0)
    found = [(2, 0.3, 40.0), (3, 0.4, 22.0), (5, 0.4, 20.1), (6, 0.6, 20.0)]
    effects = [choosing.Effect(i, t, p, choosing.score(t, p, before)) for i, t, p in found]
    assert [e.score for e in effects] == pytest.approx([0.2, 1.0, 10.0, -10.0])
    assert choosing.most_effective(effects, 2) == [3, 5] and choosing.most_effective(effects, 8) == [2, 3, 5]
    config = settings(layers="single", select="causal")
    assert list(method.plan(config, None, 8, effects).weights) == [5]
    with pytest.raises(ValueError, match="no probe's direction lowers toxicity"):
        choosing.most_effective(effects[-1:], 2)


def test_the_effect_of_a_layer_is_measured_with_its_direction_taken_out_and_nothing_stays(settings, monkeypatch):
    run = unlearning(settings(causal_prompts=3))
    seen = []

    def toxicity(policy, prompts, scorer, config):
        hooks = [i for i, block in enumerate(choosing_blocks(policy.model)) if block._forward_hooks]
        seen.append((hooks, len(prompts)))
        return [0.5 - 0.1 * len(hooks)] * len(prompts)

    monkeypatch.setattr(choosing, "expected_maximum", toxicity)
    found = choosing.measured_effects(run.config, run.policy, run.bank, run.corpus.neutral, Scorer([]), [0, 1])
    assert seen == [([], 3), ([0], 3), ([1], 3)]
    assert [row["toxicity"] for row in found["layers"]] == pytest.approx([0.4, 0.4]) and found["toxicity"] == 0.5
    assert all(row["perplexity"] != found["perplexity"] for row in found["layers"])
    assert not any(block._forward_hooks for block in choosing_blocks(run.policy.model))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"select": "causal"}, "layers names them"),
        ({"objective": "rmu", "rounds": 2}, "has no probes"),
        ({"probes_only": True, "rounds": 2}, "stops before"),
        ({"objective": "dpo", "norm_guard": 1}, "which dpo does not read"),
    ],
)
def test_options_that_contradict_each_other_are_named(settings, overrides, told):
    with pytest.raises(ValueError, match=told):
        settings(**overrides)


def test_how_much_sets_of_texts_share_stands_in_the_provenance_without_a_text(settings, tmp_path):
    run = method.train(settings(steps=1, probe_every=100))
    rows = {(row["of"], row["in"]): row for row in run.provenance["overlap"]}
    assert rows["forget", "retain"]["sharing"] == 0 and rows["eval", "probe"]["texts"] == 24
    assert not any(text in json.dumps(run.provenance["overlap"]) for text in (*RUDE, *CIVIL))


def test_dry_run_lists_tensors_and_writes_nothing(settings, tmp_path):
    facts = method.dry_run(settings(out=str(tmp_path / "dry")))
    assert len(facts["tensors"]) == 2 and not (tmp_path / "dry").exists()


# --- what is refused --------------------------------------------------------------------------------------


class Scorer:
    identity = "scorer"

    def __init__(self, corpora):
        self.trained_on = None if corpora is None else frozenset(corpora)


def test_a_scorer_that_knows_the_texts_of_the_probes_is_refused_before_anything_is_written(settings, monkeypatch):
    monkeypatch.setattr(checks.judges, "load_judge", lambda *_: Scorer({"jigsaw"}))
    config = settings(scorer="detoxify", data={"corpora": ["jigsaw"]})
    with pytest.raises(ValueError, match="trained on jigsaw, and so are the probes"):
        method.train(config)
    with pytest.raises(FileNotFoundError):
        Run.open(config.out)
    checks.load_scorer(settings(data={"corpora": ["toxigen"]}))


def test_detoxify_says_what_it_was_trained_on(monkeypatch):
    monkeypatch.setattr(toxicity.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(toxicity.importlib.metadata, "version", lambda name: "0")
    known = {v: toxicity.trained_on(toxicity.DetoxifyJudge(v)) for v in ("original", "unbiased")}
    assert known["original"] == {"jigsaw"} and "civil_comments" in known["unbiased"]
    assert toxicity.trained_on(toxicity.ToxicityRules()) == frozenset()
    assert toxicity.trained_on(object()) is None


def test_a_start_model_no_more_toxic_than_after_neutral_text_is_refused():
    quiet, rude = [0.1, 0.0, 0.2, 0.0] * 6, [0.9, 0.4, 0.6, 0.0] * 6
    found = checks.judged_start(rude, quiet, allow_chance=False, scorer="s")
    assert found["claim"] == "toxicity" and found["expected_max_toxicity"] == 0.475
    with pytest.raises(ValueError, match="nothing to unlearn"):
        checks.judged_start(quiet, quiet, allow_chance=False, scorer="s")
    assert checks.judged_start(quiet, quiet, allow_chance=True, scorer="s")["claim"] == "none"


def test_texts_to_unlearn_and_to_keep_must_differ(settings, tmp_path):
    rows = [{"text": f"apple {i}"} for i in range(30)]
    both = write(tmp_path / "both.jsonl", rows)
    config = settings(data={"train": both, "retain": both})
    with pytest.raises(ValueError, match="that are to be unlearned: rows"):
        read_corpus(config, Policy.load(config.model, dtype="float32"))


def test_a_row_without_a_label_is_named(settings, tmp_path, tiny_tokenizer):
    path = write(tmp_path / "bad.jsonl", [{"text": "a b c", "toxic": True}, {"text": "d e f"}])
    with pytest.raises(ValueError, match=r"bad.jsonl:2: expected a row with a `text` and with `toxic`"):
        read_labelled(path, tiny_tokenizer, settings())


def test_edited_blocks_above_the_last_loss_layer_are_refused(settings):
    with pytest.raises(ValueError, match="block 1 is above the last loss layer 0"):
        method.plan(settings(layers=[0], edit_layers=[0, 1]), None, 2)


def test_switches_of_probes_are_refused_elsewhere(settings):
    with pytest.raises(ValueError, match="has no probes"):
        settings(objective="rmu", directions="random")


# --- bundled texts ----------------------------------------------------------------------------------------


def test_bundled_insults_share_neither_templates_nor_phrases_between_splits(settings, tiny_tokenizer):
    rows = read_labelled("demo", tiny_tokenizer, UnlearnToxicityConfig())
    assert len(rows) == 800 and sum(row.has_attribute for row in rows) == 400
    groups = {split: {r.tokens.record for r in rows if r.split == split} for split in ("train", "validation", "test")}
    assert not groups["train"] & groups["test"] and not groups["validation"] & groups["test"]


def test_identities_alone_do_not_tell_bundled_insults_from_their_twins():
    assert identity_auroc("demo") == pytest.approx(0.5, abs=0.05)


def test_rude_texts_of_the_check_are_held_against_their_civil_twins(tmp_path):
    rude, civil = openings(UnlearnToxicityConfig(), 10)
    assert len(rude) == len(civil) == 10 and not {p.text for p in rude} & {p.text for p in civil}
    assert all(a.text.split()[:4] == b.text.split()[:4] for a, b in zip(rude, civil, strict=True))
    own = write(tmp_path / "own.jsonl", [{"prompt": f"so they said {i}"} for i in range(5)])
    mine, plain = openings(UnlearnToxicityConfig(check={"data": own}), 4)
    assert len(mine) == len(plain) == 4 and all(p.text.startswith("so they said") for p in mine)


# --- processes ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tempering.core.config import build, read_yaml
from tempering.methods import unlearn_toxicity as m
torch.set_num_threads(1)
step, root = m.EditOptimiser.step, Path(sys.argv[1])

def die(self, gradients, t):
    if t == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, gradients, t)

m.EditOptimiser.step = die
m.train(build(m.CONFIG, read_yaml(root), "test"), resume=root.with_suffix("").exists())
"""


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(settings, tmp_path):
    import subprocess
    import sys

    import yaml

    (tmp_path / "die.py").write_text(KILLED)

    def run(name, die_at):  # all in processes of their own: two processes may round differently
        tree = settings(out=str(tmp_path / name), beta_kl=0.5).model_dump(mode="json")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        command = [sys.executable, str(tmp_path / "die.py"), str(tmp_path / f"{name}.yaml"), str(die_at)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert (run("want", -1), run("got", 3), run("got", -1)) == (0, -9, 0)
    for name in ("edit.safetensors", "directions.safetensors"):
        assert (tmp_path / "want/final" / name).read_bytes() == (tmp_path / "got/final" / name).read_bytes()


TWO = """
import sys, torch
from pathlib import Path
from tempering.core.config import build, read_yaml
from tempering.methods import unlearn_toxicity as m
torch.set_num_threads(1)
m.train(build(m.CONFIG, read_yaml(Path(sys.argv[1])), "test"))
"""


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    import subprocess
    import sys

    import yaml

    shared = {"beta_kl": 0.5, "nll_weight": 0.1, "lr": 1e-3, "steps": 3}
    one = method.train(settings(out=str(tmp_path / "one"), **shared))
    tree = settings(out=str(tmp_path / "two"), **shared).model_dump(mode="json")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29619"]
    subprocess.run([*command, str(tmp_path / "two.py"), str(tmp_path / "two.yaml")], check=True, capture_output=True)
    a, b = (load_tensors(tmp_path / name / "final" / "edit.safetensors") for name in ("one", "two"))
    start = Policy.load(one.config["model"], dtype="float32").base_parameters()
    for n in a:
        assert torch.allclose(a[n], b[n], atol=0.02 * float((a[n] - start[n]).abs().max()))


def test_bundled_files_are_what_their_script_writes():
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).parents[2] / "scripts" / "build_toxicity_data.py"
    found = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
