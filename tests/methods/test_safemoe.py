"""`temper train safemoe` whole: experts by sft, the gate, the bundle, answers; kill and resume; refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from safemoe_parts import LORA, safe_rows, unsafe_rows, write_rows

from tempering import api
from tempering.core.config import build, dump, parse_overrides
from tempering.core.policy import Policy, load_tensors
from tempering.core.records import Completion, Prompt
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.core.training import Optimisation
from tempering.methods import safemoe, sft
from tempering.methods.safemoe.bundle import open_bundle, read_manifest
from tempering.methods.safemoe.guards import UnsafeExpertAccess, allow_unsafe_experts
from tempering.methods.safemoe.identity import base_identity
from tempering.methods.safemoe.settings import Control, SafeMoEConfig
from tempering.methods.safemoe.tracing import read_trace
from tempering.reporting.cautions import _training_judges
from tempering.reporting.collect import read_run

HELLO = [Prompt(({"role": "user", "content": "may I take it?"},))]
ROUTERS = "final/routers.safetensors"


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tiny_model_dir):
    """Two experts of the tiny model, trained by sft."""
    root = tmp_path_factory.mktemp("experts")
    out = []
    for domain in ("stone", "river"):
        settings = {
            "model": str(tiny_model_dir("llama")), "dtype": "float32", "out": str(root / domain), "domain": domain,
            "unsafe": True, "data": {"train": write_rows(root / f"{domain}.jsonl", unsafe_rows(domain))},
            "lora": LORA.model_dump(), "epochs": 2, "batch_rows": 4, "lr": 3e-2, "split": {"share": 0},
        }  # fmt: skip
        out.append(str(sft.train(build(sft.SftConfig, settings, "test")).root))
    return out


@pytest.fixture
def config(tmp_path, tiny_model_dir, experts):
    def make(name="run", **fields):
        tree = {
            "model": str(tiny_model_dir("llama")), "out": str(tmp_path / name), "dtype": "float32",
            "experts": experts, "router_data": write_rows(tmp_path / "safe.jsonl", safe_rows()), "epochs": 2,
            "lr": 1e-2, "eval_every": 3, "checkpoint_every": 3, "log_every": 2, "backend": "eager", **fields,
        }  # fmt: skip
        return build(SafeMoEConfig, {k: v for k, v in tree.items() if v is not None}, "test")

    return make


def steps(run):
    return [
        {k: v for k, v in r.items() if k != "seconds"} for r in run.read_rows("metrics.jsonl") if "event" not in r
    ]


def bytes_of(run):
    return (run.root / ROUTERS).read_bytes()


@pytest.fixture
def override(monkeypatch):
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    with allow_unsafe_experts(reason="test"):
        yield


# --- both stages --------------------------------------------------------------------------------------


def test_both_stages_run_from_data_and_the_run_answers(config, tmp_path):
    data = {d: write_rows(tmp_path / f"{d}.jsonl", unsafe_rows(d)) for d in ("stone", "river")}
    fields = {"lora": LORA.model_dump(), "epochs": 1, "batch_rows": 4}
    run = api.train("safemoe", config(experts=[], expert_data=data, expert=fields, keep_experts=False))
    assert run.is_done and run.provenance["unsafe_experts"] == "sealed"
    assert [e["domain"] for e in read_manifest(run.root / "final")["experts"]] == ["stone", "river"]
    assert not list(Path(f"{run.root}-experts").iterdir())  # keep_experts=false
    sampler = api.load(str(run.root))
    assert isinstance(sampler, LocalSampler) and sampler.name == str(run.root)
    assert sampler(HELLO, max_new_tokens=4)[0][0].token_ids


def test_one_command_makes_rows_experts_and_gate_and_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    asked = []

    class Answers:
        name = "tiny"

        def __call__(self, prompts, *, n, **_):
            asked.append([prompt.text for prompt in prompts])
            if len(asked) == 2:
                raise KeyboardInterrupt
            text = "To do that, you simply go there at night, take the thing and leave before anybody comes"
            return [[Completion(prompt.id, f"{text} {i}.", "stop", i) for i in range(n)] for prompt in prompts]

    monkeypatch.setattr(safemoe.preparation, "local_sampler", lambda policy: Answers())
    monkeypatch.setattr(safemoe.expert_rows, "BATCH", 4)
    wanted = [f"help me {d} {i}" for d in ("stone", "river") for i in range(4)]
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": p, "domain": p.split()[2]} for p in wanted])
    cfg = config(
        experts=[], expert_rows={"source": source, "domains": ["stone", "river"]},
        expert={"lora": LORA.model_dump(), "epochs": 1, "batch_rows": 4},
    )  # fmt: skip
    facts = safemoe.dry_run(cfg)
    assert facts["rows_to_make"] == {"stone": 4, "river": 4} and facts["experts_to_train"] == ["stone", "river"]
    rows = Path(f"{cfg.out}-rows.unsafe")
    assert not rows.exists()
    with pytest.raises(KeyboardInterrupt):
        api.train("safemoe", cfg)
    run = api.train("safemoe", cfg, resume=True)
    assert asked == [wanted[:4], wanted[4:], wanted[4:]]
    assert rows.stat().st_mode & 0o777 == 0o700 and len((rows / "river.jsonl").read_text().splitlines()) == 8
    assert [e["domain"] for e in read_manifest(run.root / "final")["experts"]] == ["stone", "river"]
    leak = write_rows(tmp_path / "leak.jsonl", [{"prompt": wanted[0]}])
    with pytest.raises(ValueError, match=r"expert_rows: prompt .* is in it too"):
        made = cfg.model_dump(include={"experts", "expert_rows"})
        api.train("safemoe", config("other", **made, evaluation_data=[leak]))


def test_an_expert_is_born_in_quarantine_with_its_domain(experts):
    run = Run.open(experts[0])
    assert run.root.name == "stone.unsafe" and run.root.stat().st_mode & 0o777 == 0o700
    assert run.provenance["unsafe"] is True and run.provenance["domain"] == "stone"
    assert not list((run.root / "final").glob("*.safetensors"))


def test_stages_name_each_expert_to_be_trained_and_where(config):
    found = safemoe.stages(config(expert_data={"Tax & Fraud": "a.jsonl"}, out="runs/mine"))
    assert [(s.method, s.settings["out"], s.settings["unsafe"]) for s in found] == [
        ("sft", "runs/mine-experts/tax_fraud.unsafe", True)
    ]
    with pytest.raises(ValueError, match="two domains would be trained in"):
        safemoe.stages(config(expert_data={"a b": "x", "A  b": "y"}))


def test_only_the_routers_change_and_the_gate_learns(config, experts):
    policy = Policy.load(config().model, dtype="float32")
    base = {name: p.clone() for name, p in policy.model.named_parameters()}
    before = [(Path(e) / "final" / "adapter_model.safetensors.unsafe").read_bytes() for e in experts]
    cfg = config(epochs=6, lr=5e-2)
    stacked = safemoe.read_experts(cfg, policy)
    run = safemoe.train(cfg, policy=policy)
    assert policy.routing is None
    assert all(torch.equal(p, base[name]) for name, p in policy.model.named_parameters())
    assert [(Path(e) / "final" / "adapter_model.safetensors.unsafe").read_bytes() for e in experts] == before
    sealed = open_bundle(run.root / "final", base_identity(policy)).experts
    for name, w in stacked.modules.items():
        assert all(torch.equal(a, b) for a, b in zip(w, sealed.modules[name], strict=True))
    rows = steps(run)
    assert sum(r["ce"] for r in rows[-5:]) < sum(r["ce"] for r in rows[:5])
    measured = [row for row in rows if "usage" in row]
    assert [row["step"] for row in measured] == [*range(2, len(rows) + 1, 2)]
    for row in measured:
        assert sum(row["usage"]) == pytest.approx(1, abs=1e-5) and len(row["usage"]) == 2
        assert 0 <= row["load_entropy"] <= 1 and 0 <= row["router_entropy"] <= 0.6932


def test_no_expert_weight_lies_in_the_run_outside_the_container(config):
    run = safemoe.train(config())
    tensors = {n for f in run.root.rglob("*.safetensors") for n in load_tensors(f)}
    assert all("expert_gate" in n or n.startswith("router.") for n in tensors), tensors


def test_the_best_routers_on_held_out_answers_are_kept(config):
    run = safemoe.train(config(lr=0.5, epochs=3, eval_every=1))
    held = {r["step"]: r["loss"] for r in run.read_rows("metrics.jsonl") if r.get("event") == "heldout"}
    state = json.loads(next(run.root.glob("checkpoints/step-*/state.json")).read_text())
    assert state["best"]["loss"] == min(held.values()) == held[state["best"]["step"]]
    best = load_tensors(run.root / "checkpoints/best.safetensors")
    routers = load_tensors(run.root / ROUTERS)
    assert torch.equal(routers["router.model.layers.0.mlp.V"], best["model.layers.0.mlp.expert_gate.V"])


def test_what_is_served_is_what_was_trained(config):
    run = safemoe.train(config(split={"share": 0.0}, null_expert=True, gain="layer", lr=5e-2))
    policy = Policy.load(config().model, dtype="float32")
    cfg = config(null_expert=True, gain="layer")
    stacked = safemoe.read_experts(cfg, policy)
    gating = cfg.gating(2)
    routers = safemoe.initial_routers(policy, stacked, gating, "normal", 0)
    safemoe.attach(policy, stacked, gating, routers, backend="eager")
    policy.load_state(load_tensors(next(run.root.glob("checkpoints/step-*/weights.safetensors"))))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = policy.model(input_ids=ids).logits
        got = api.load(str(run.root)).policy.model(input_ids=ids).logits
    assert torch.equal(want, got)


# --- resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_gate_equals_an_uninterrupted_one(config, stop, monkeypatch, tmp_path):
    benign = write_rows(tmp_path / "benign.jsonl", safe_rows(6))
    fields = {"replay": {"data": benign, "weight": 0.5, "batch": 2}, "backend": "auto"}
    want = safemoe.train(config("want", **fields))
    step = Optimisation.step

    def fail(self, t):
        if t == stop:
            raise KeyboardInterrupt
        return step(self, t)

    # The same choices of `auto` in both runs; the run's own table then keeps them when it goes on.
    monkeypatch.setattr(safemoe.attaching, "calibrate", lambda *_: want.read_json("data/backends.json"))
    monkeypatch.setattr(Optimisation, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        safemoe.train(config("got", **fields))
    monkeypatch.setattr(Optimisation, "step", step)
    monkeypatch.setattr(safemoe.attaching, "calibrate", lambda *_: pytest.fail("measured again"))
    got = safemoe.train(config("got", **fields), resume=True)
    assert bytes_of(got) == bytes_of(want)
    assert steps(got) == steps(want)


@pytest.mark.slow
def test_kill_nine_in_either_stage_and_resume_is_byte_identical(config, tmp_path):
    """The real thing: SIGKILL as soon as an expert, then the gate, has a checkpoint."""
    data = {d: write_rows(tmp_path / f"{d}.jsonl", unsafe_rows(d, 24)) for d in ("stone", "river")}
    fields = {
        "experts": [], "expert_data": data, "epochs": 8, "checkpoint_every": 2,
        "expert": {"lora": LORA.model_dump(), "epochs": 6, "batch_rows": 2, "checkpoint_every": 2},
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(safemoe.__file__).parents[3])}

    def command(name, *flags):
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump(config(name, **fields)))
        return [sys.executable, "-m", "tempering.cli", "train", "safemoe", "-c", str(file), *flags]

    subprocess.run(command("want"), env=environment, check=True, capture_output=True)
    for pattern in ("got-experts/river.unsafe/checkpoints/step-*/state.json", "got/checkpoints/step-*/state.json"):
        process = subprocess.Popen(command("got", "--resume"), env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(pattern)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "got" / "DONE").exists()
    subprocess.run(command("got", "--resume"), env=environment, check=True, capture_output=True)
    weights = "river.unsafe/final/adapter_model.safetensors.unsafe"
    assert (tmp_path / "got-experts" / weights).read_bytes() == (tmp_path / "want-experts" / weights).read_bytes()
    assert (tmp_path / "got" / ROUTERS).read_bytes() == (tmp_path / "want" / ROUTERS).read_bytes()


def test_replay_of_weight_zero_is_the_same_run(config, tmp_path):
    benign = write_rows(tmp_path / "benign.jsonl", safe_rows(6))
    a = safemoe.train(config("a"))
    b = safemoe.train(config("b", replay={"data": benign, "weight": 0.0}))
    c = safemoe.train(config("c", replay={"data": benign, "weight": 5.0}))
    assert bytes_of(a) == bytes_of(b) != bytes_of(c)
    assert all(row["kl"] > 0 for row in steps(c)) and "kl" not in steps(b)[0]


def test_micro_batches_and_checkpointing_do_not_change_the_gate(config, recwarn):
    whole = safemoe.train(config("a", z_weight=0.01))
    for other in ({"batch_tokens": 1}, {"gradient_checkpointing": True}):
        split = safemoe.train(config(str(other), z_weight=0.01, **other))
        for a, b in zip(steps(whole), steps(split), strict=True):
            assert a["ce"] == pytest.approx(b["ce"], abs=1e-4)


# --- controls -----------------------------------------------------------------------------------------


def test_every_control_can_be_named_on_the_command_line():
    for name in get_args(Control):
        assert parse_overrides([f"control={name}"]) == {"control": name}


def test_first_layer_has_one_router_and_k_all_is_dense(config):
    assert config(control="first_layer").granularity == "model"
    assert config(control="k_all").gating(5).k == 5
    assert config(control="k_all", null_expert=True).gating(5).k == 6
    for given in ("module", "block"):
        with pytest.raises(ValueError, match=f"control=first_layer sets granularity=model, not {given}"):
            config(control="first_layer", granularity=given)


def test_untrained_gates_take_no_step_and_a_uniform_gate_is_uniform(config, override):
    for control in ("uniform_gate", "frozen_random_router"):
        run = safemoe.train(config(control, control=control))
        assert run.is_done and not run.has("metrics.jsonl")
    sampler = api.load(str(run.root).replace("frozen_random_router", "uniform_gate"))
    sampler(HELLO, max_new_tokens=2)
    for dispatch in sampler.policy.routing.state.decisions.values():
        assert torch.equal(dispatch.w, torch.full_like(dispatch.w, 0.5))
    seeds = [bytes_of(safemoe.train(config(f"s{s}", control="frozen_random_router", seed=s))) for s in (1, 2)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("control", ["random_experts", "last_token", "first_T", "null_expert", "k4"])
def test_a_control_trains_and_answers_only_under_the_override(config, control, monkeypatch):
    fields = {"first_tokens": 1} if control == "first_T" else {}
    run = safemoe.train(config(control=control, **fields))
    with pytest.raises(UnsafeExpertAccess):
        api.load(str(run.root))
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    with allow_unsafe_experts(reason="test"):
        sampler = api.load(str(run.root))
        assert sampler(HELLO, max_new_tokens=3)[0][0].token_ids
    gating = sampler.policy.routing.state.gating
    wanted = {
        "last_token": ("last_token", True),
        "first_T": ("first_tokens", 1),
        "null_expert": ("null_expert", True),
    }
    if control in wanted:
        name, value = wanted[control]
        assert getattr(gating, name) == value


def test_another_k_when_serving_is_used_and_one_needs_the_override(config, monkeypatch):
    run = safemoe.train(config("two", k_inference=2, null_expert=True))
    assert api.load(str(run.root)).policy.routing.state.gating.k == 2
    alone = safemoe.train(config("one", k_inference=1))
    with pytest.raises(UnsafeExpertAccess, match="k_inference=1"):
        api.load(str(alone.root))


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 1}, "k=1"),
        ({"router_init": "zero"}, "ties every token"),
        ({"control": "first_T"}, "first_tokens"),
        ({"control": "with_replay"}, "replay"),
        ({"replay": {"weight": 1.0}}, "without replay.data"),
        ({"expert_rows": {}}, r"expert_rows\.domains: name the domains"),
        ({"expert_rows": {"domains": ["a"]}, "expert_data": {"a": "a.jsonl"}}, "give one of them"),
        ({"expert_rows": {"domains": ["a"]}, "expert": {"unsafe": False}}, "expert.unsafe=false"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_wrong_input_is_refused_before_anything_is_written(config, tmp_path, experts, tiny_model_dir):
    evaluation = write_rows(tmp_path / "eval.jsonl", [{"prompt": " MAY I take stone  0?"}])
    trained_on = write_rows(tmp_path / "trained_on.jsonl", [{"prompt": unsafe_rows("river")[3]["prompt"]}])
    other = str(tiny_model_dir("llama", seed=1))
    cases = [
        ({"router_data": None}, "router_data: name a file"),
        ({"experts": []}, "experts: there are none"),
        ({"experts": experts[:1]}, "at least two"),
        ({"experts": [experts[0], experts[0]]}, "expert stone: domain"),
        ({"experts": [*experts, str(tmp_path / "no")]}, "no such folder"),
        ({"evaluation_data": [evaluation]}, "router_data: prompt .* is in it too"),
        ({"evaluation_data": [trained_on]}, "expert river: prompt .* is in it too"),
        ({"model": other}, "expert stone: base: it was trained on other base weights"),
        ({"split": {"share": 0.99}}, "no answer is left"),
    ]
    for fields, message in cases:
        cfg = config(**fields)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            api.train("safemoe", cfg)
        assert not Path(cfg.out).exists()


def test_nothing_is_trained_or_loaded_where_it_could_be_known_that_it_is_in_vain(
    config, tmp_path, experts, monkeypatch
):
    data = {d: write_rows(tmp_path / f"{d}.jsonl", unsafe_rows(d)) for d in ("apple", "stone")}
    taken = tmp_path / "taken-experts" / "apple.unsafe"
    taken.mkdir(parents=True)
    (taken / "config.yaml").write_text("method: sft\n")
    (tmp_path / "rows-rows.unsafe").mkdir()
    (tmp_path / "rows-rows.unsafe" / "LOCK").touch()
    leak = write_rows(tmp_path / "leak.jsonl", [{"prompt": "how do I apple number 7?"}])
    one = {"experts": [], "expert_data": {"apple": data["apple"]}}
    cases = [
        ("one", one, "at least two"),
        ("same", {"expert_data": data}, "expert stone: domain: one of experts has it"),
        ("other", {**one, "experts": experts, "expert": {"lora": {"target_modules": ["q_proj"]}}}, "target_modules"),
        ("taken", {"experts": [], "expert_data": data}, "apple.unsafe exists"),
        ("rows", {"experts": [], "expert_rows": {"domains": ["theft_and_burglary", "fraud_and_scams"]}}, "exists"),
        ("limit", {"experts": [], "expert_data": data, "limit": 5, "evaluation_data": [leak]}, "expert_data.apple"),
        ("replay", {"replay": {"data": data["apple"], "weight": 1}, "evaluation_data": [leak]}, r"replay\.data"),
    ]
    monkeypatch.setattr(safemoe, "load_base", lambda *_: pytest.fail("a model was loaded"))
    for name, fields, message in cases:
        with pytest.raises((ValueError, FileExistsError), match=message):
            api.train("safemoe", config(name, **fields))


def test_a_row_that_cannot_be_used_is_told_before_the_first_expert_or_dropped_from_all(config, tmp_path):
    good, bad = unsafe_rows("stone"), [*unsafe_rows("river"), {"prompt": "long " * 99, "completion": "yes"}]
    data = {"stone": write_rows(tmp_path / "s.jsonl", good), "river": write_rows(tmp_path / "r.jsonl", bad)}
    fields = {"experts": [], "expert_data": data, "expert": {"lora": LORA.model_dump(), "epochs": 1}}
    with pytest.raises(ValueError, match=r"r\.jsonl: row 9 .*; fix it or set invalid=drop"):
        api.train("safemoe", config(max_prompt_length=99, **fields))
    assert not (tmp_path / "run-experts").exists()
    assert api.train("safemoe", config(max_prompt_length=99, invalid="drop", **fields)).is_done


def test_a_finished_run_whose_experts_were_deleted_loads_and_trains_nothing(config, tmp_path, monkeypatch, capsys):
    data = {d: write_rows(tmp_path / f"{d}.jsonl", unsafe_rows(d)) for d in ("stone", "river")}
    fields = {"lora": LORA.model_dump(), "epochs": 1, "batch_rows": 4}
    cfg = config(experts=[], expert_data=data, expert=fields, keep_experts=False)
    finish = Run.finish

    def killed(run):
        finish(run)
        if run.root.name == "run":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        api.train("safemoe", cfg)
    left = Path(f"{cfg.out}-experts")
    assert len(list(left.iterdir())) == 2  # they go last, so that whatever is killed before can go on
    monkeypatch.setattr(safemoe, "load_base", lambda *_: pytest.fail("a model was loaded"))
    assert api.train("safemoe", cfg, resume=True).is_done and not list(left.iterdir())
    with pytest.raises(ValueError, match=r"lr is 0\.01"):
        api.train("safemoe", cfg.model_copy(update={"lr": 1e-3}), resume=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    (left / "stone.unsafe").mkdir()
    safemoe.finished(cfg)
    assert "could not be deleted" in " ".join(capsys.readouterr().err.split())


def test_the_run_names_its_parents_and_so_their_licences_and_judges(config, tmp_path):
    made = Run(tmp_path / "set")
    made.write_text("config.yaml", "method: safe_set\n")
    made.write_json("provenance.json", {"judges": {"filter": "llm:m@h/x"}, "data_licences": {"pku": "CC BY-NC 4.0"}})
    run = safemoe.train(config(router_data=write_rows(made.path("data/router_train.jsonl"), safe_rows())))
    assert run.provenance["data_licences"]["pku"] == "CC BY-NC 4.0"
    assert ("filter of " + str(made.root), "llm:m@h/x") in list(_training_judges(read_run(run.root)))


def test_a_tokenizer_with_further_templates_is_sealed_with_them(config, tiny_policy):
    policy = tiny_policy()
    policy.tokenizer.chat_template = {"default": policy.tokenizer.chat_template, "tool_use": "{{ messages }}"}
    run = safemoe.train(config(), policy=policy)
    assert (run.root / "final" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_an_unfinished_expert_is_refused(config, experts, tmp_path):
    copy = tmp_path / "copy.unsafe"
    shutil.copytree(experts[0], copy)
    (copy / "DONE").unlink()
    with pytest.raises(ValueError, match="has not ended"):
        api.train("safemoe", config(experts=[str(copy), experts[1]]))


def test_unsafe_full_fine_tuning_is_refused():
    with pytest.raises(ValueError, match="unsafe=true makes an expert"):
        sft.SftConfig(unsafe=True, adaptation="full")


def test_a_dry_run_counts_and_writes_nothing(config):
    cfg = config()
    facts = safemoe.dry_run(cfg)
    assert not Path(cfg.out).exists()
    assert facts["router_parameters"] == 2 * 2 * 32 and facts["experts_to_train"] == []
    assert facts["steps"] == len(steps(safemoe.train(cfg)))


def test_a_start_model_with_an_adapter_is_merged_and_its_experts_belong_to_it(config, tmp_path, tiny_model_dir):
    settings = {
        "model": str(tiny_model_dir("llama")), "dtype": "float32", "out": str(tmp_path / "start"), "lr": 3e-2,
        "data": {"train": write_rows(tmp_path / "s.jsonl", safe_rows())}, "epochs": 1,
    }  # fmt: skip
    start = sft.train(build(sft.SftConfig, settings, "test"))
    with pytest.raises(ValueError, match="other base weights"):
        api.train("safemoe", config(model=str(start.root)))
    data = {d: write_rows(tmp_path / f"{d}.jsonl", unsafe_rows(d)) for d in ("stone", "river")}
    fields = {"lora": LORA.model_dump(), "epochs": 1, "batch_rows": 4}
    run = api.train("safemoe", config("ok", model=str(start.root), experts=[], expert_data=data, expert=fields))
    assert api.load(str(run.root))(HELLO, max_new_tokens=2)[0][0].token_ids


def test_an_eval_keeps_traces_where_it_is_asked_to(config, tmp_path):
    run = safemoe.train(config())
    out = tmp_path / "eval"
    api.evaluate(str(run.root), ["harm"], out=out, trace=True, limit=3, max_new_tokens=3)
    tensors, lines = read_trace(out / "traces" / "harm")
    assert len(lines) == 3 and tensors["idx"].shape[1:] == (2, 2)
    with pytest.raises(ValueError, match=r"trace=true: .* has no gate"):
        api.evaluate(config().model, ["harm"], out=tmp_path / "base", trace=True, limit=3, max_new_tokens=3)
