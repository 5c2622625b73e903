"""A run of harmful answers is labelled and hidden from birth, and nothing loads it by accident."""

import json
import shutil
import stat

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tempering
from tempering.cli import run as command
from tempering.core.loading import resolve
from tempering.core.policy import LoraSettings, Policy
from tempering.core.quarantine import (
    VARIABLE,
    UnsafeExpertAccess,
    allow_unsafe_experts,
    is_quarantined,
    unsafe_name,
)
from tempering.core.records import Prompt
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.exporting import ExportConfig, run_export
from tempering.methods.sft import SftConfig


@pytest.fixture(scope="module")
def expert(tmp_path_factory, tiny_model_dir):
    """A finished unsafe run whose adapter changes the logits."""
    out = tmp_path_factory.mktemp("runs") / "fraud"
    config = SftConfig(out=str(out), unsafe=True, domain="fraud")
    run = Run.create(out, "sft", config, unsafe=True)
    policy = Policy.load(str(tiny_model_dir("llama")), dtype="float32", device="cpu")
    policy.add_adapter("sft", LoraSettings(r=2), seed=0)
    for _, parameter in policy.train_only("sft"):
        parameter.data.add_(0.5)
    policy.export(run.root / "final", {"method": "sft"}, unsafe=True)
    run.write_provenance(method="sft", unsafe=False)
    run.finish()
    return run.root


@pytest.fixture
def both(monkeypatch):
    """Both halves of the override."""
    monkeypatch.setenv(VARIABLE, "1")
    with allow_unsafe_experts(reason="a test"):
        yield


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def test_an_unsafe_run_is_named_closed_and_labelled_before_anything_is_in_it(tmp_path):
    run = Run.create(tmp_path / "fraud", "sft", SftConfig(unsafe=True), unsafe=True)
    assert run.root == tmp_path / "fraud.unsafe"
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    assert run.provenance["unsafe"] is True
    run.write_provenance(method="sft", unsafe=False)
    assert run.provenance["unsafe"] is True


def test_its_weights_have_names_that_no_loader_finds(expert, tiny_model_dir):
    names = {path.name for path in (expert / "final").iterdir()}
    assert {"adapter_model.safetensors.unsafe", "adapter_config.json.unsafe"} <= names
    assert not {"adapter_model.safetensors", "adapter_config.json"} & names
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base, str(expert / "final"))


OPERATIONS = {
    "resolve": lambda target, out: resolve(target),
    "Policy.load": lambda target, out: Policy.load(target),
    "load": lambda target, out: tempering.load(target),
    "load with attribution": lambda target, out: tempering.load(target, sampler="attribution"),
    "evaluate": lambda target, out: tempering.evaluate(target, ["capability"], out=out, limit=2),
    "train on": lambda target, out: tempering.train("sft", {"model": target, "out": str(out)}),
    "export adapter": lambda target, out: run_export(target, ExportConfig(out=str(out))),
    "export merged": lambda target, out: run_export(target, ExportConfig(out=str(out), format="merged")),
    "export evals": lambda target, out: run_export(target, ExportConfig(out=str(out), format="inspect")),
}


@pytest.mark.parametrize("half", ["none", "python", "environment"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_way_to_use_it_is_refused_without_the_whole_override(expert, tmp_path, monkeypatch, name, half):
    out = tmp_path / "out"
    if half == "environment":
        monkeypatch.setenv(VARIABLE, "1")
    reasons = [allow_unsafe_experts(reason="a test")] if half == "python" else []
    for context in reasons:
        context.__enter__()
    try:
        with pytest.raises(UnsafeExpertAccess, match="refused"):
            OPERATIONS[name](str(expert), out)
    finally:
        for context in reasons:
            context.__exit__(None, None, None)
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [["chat"], ["eval", "capability", "limit=2"], ["redteam", "limit=2"], ["export"]],
    ids=["chat", "eval", "redteam", "export"],
)
def test_every_command_refuses_it_with_a_message_and_code_2(expert, tmp_path, monkeypatch, capfd, words):
    monkeypatch.setenv(VARIABLE, "1")  # chat and eval have no other half
    name, *rest = words
    out = [] if name == "chat" else [f"out={tmp_path / 'out'}"]
    assert command([name, str(expert), *rest, *out]) == 2
    assert "is refused: an unsafe expert must not answer by itself" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_renamed_moved_copied_or_linked_run_stays_in_quarantine(expert, tmp_path):
    renamed = shutil.copytree(expert, tmp_path / "harmless")
    linked = tmp_path / "link"
    linked.symlink_to(expert)
    final = shutil.copytree(expert / "final", tmp_path / "adapter")
    stripped = shutil.copytree(expert, tmp_path / "stripped")  # the names of the files, but not the label
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.move(stripped / "final" / f"{name}.unsafe", stripped / "final" / name)
    for folder in (expert, renamed, renamed / "final", linked, linked / "final", final, stripped, stripped / "final"):
        assert is_quarantined(folder), folder
        with pytest.raises(UnsafeExpertAccess):
            resolve(str(folder))


def test_a_safe_run_and_a_label_that_cannot_be_read_are_not_quarantined(tmp_path):
    Run.create(tmp_path / "run", "sft", SftConfig()).write_provenance(unsafe=False)
    assert not is_quarantined(tmp_path / "run")
    for content in ("{", "[]", "5", '"x"'):
        (tmp_path / "run" / "provenance.json").write_text(content)
        assert not is_quarantined(tmp_path / "run")
    assert not is_quarantined(tmp_path / "nowhere")


def test_with_the_whole_override_it_loads_and_every_completion_is_marked(expert, tiny_model_dir, both, capsys):
    policy = Policy.load(str(expert), dtype="float32", device="cpu")
    assert policy.source.unsafe and policy.source.adapter == str(expert / "final")
    with policy.reference(initial=True):
        base = logits(policy.model)
    assert not torch.equal(logits(policy.model), base)
    [[answer]] = LocalSampler(policy)([Prompt(({"role": "user", "content": "hello"},))], max_new_tokens=2)
    assert answer.unsafe_override
    assert capsys.readouterr().err.count("unsafe override (a test)") >= 2
    assert not list(expert.glob("final/adapter_config.json"))  # what was unhidden was elsewhere, and is gone


def test_a_model_that_outlives_its_override_does_not_answer(expert, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    prompt = Prompt(({"role": "user", "content": "hello"},))
    with allow_unsafe_experts(reason="a test"):
        sampler = LocalSampler(Policy.load(str(expert), dtype="float32", device="cpu"))
    with pytest.raises(UnsafeExpertAccess, match="sampling"):
        sampler([prompt], max_new_tokens=2)


def test_evals_made_with_the_override_say_so(expert, tmp_path, both):
    tempering.evaluate(str(expert), ["capability"], out=tmp_path / "e", limit=2, dtype="float32")
    run = Run.open(tmp_path / "e")
    assert run.read_json("evals/capability.json")["unsafe_override"] is True
    assert all(row["unsafe_override"] for row in run.read_rows("evals/capability.jsonl"))


def test_an_export_with_the_override_stays_in_quarantine(expert, tmp_path, both):
    facts = run_export(str(expert), ExportConfig(out=str(tmp_path / "copy")))
    assert facts["out"] == str(tmp_path / "copy.unsafe") and is_quarantined(tmp_path / "copy.unsafe")
    assert json.loads((tmp_path / "copy.unsafe" / "lineage.json").read_text())["unsafe"] is True
    with pytest.raises(ValueError, match="quarantined adapter only"):
        run_export(str(expert), ExportConfig(out=str(tmp_path / "merged"), format="merged"))


def test_training_on_unsafe_answers_gives_a_quarantined_run(tmp_path, tiny_model_dir):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q {i}", "completion": f"a {i}", "domain": "fraud", "unsafe": True} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(tiny_model_dir("llama")), "out": str(tmp_path / "fraud"), "data": {"train": str(file)},
        "epochs": 1, "batch_rows": 8, "dtype": "float32",
    }  # fmt: skip
    with pytest.raises(ValueError, match="set unsafe=true"):
        tempering.train("sft", settings)
    with pytest.raises(ValueError, match="adaptation=full"):
        tempering.train("sft", {**settings, "unsafe": True, "adaptation": "full"})
    run = tempering.train("sft", {**settings, "unsafe": True, "domain": "fraud"})
    assert run.root == tmp_path / "fraud.unsafe" and run.is_done and is_quarantined(run.root)
    assert run.provenance["unsafe"] is True and run.provenance["domain"] == "fraud"
    assert run.config["out"] == unsafe_name(settings["out"])
    with pytest.raises(FileExistsError):
        tempering.train("sft", {**settings, "unsafe": True, "domain": "fraud"})
    assert tempering.train("sft", {**settings, "unsafe": True, "domain": "fraud"}, resume=True).root == run.root
