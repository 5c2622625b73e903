"""What users of safemoe type wrong: one message with field and remedy, and exit code 2 (3: the release gate)."""

import json
import shutil
from pathlib import Path

import pytest
from safemoe_parts import LORA, safe_rows, unsafe_rows, write_rows
from safetensors.torch import load_file, save_file

from tempering import api
from tempering.cli import run

SFT = {"dtype": "float32", "unsafe": True, "lora": LORA.model_dump(), "epochs": 1, "split": {"share": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model_dir):
    """A folder with two experts, safe answers, the run of a gate over them, and that of a control."""
    root, model = tmp_path_factory.mktemp("typed"), str(tiny_model_dir("llama"))
    for domain in ("stone", "river"):
        data = {"train": write_rows(root / f"{domain}.jsonl", unsafe_rows(domain))}
        api.train("sft", {**SFT, "model": model, "out": str(root / domain), "domain": domain, "data": data})
    write_rows(root / "safe.jsonl", safe_rows())
    shared = {
        "model": model, "dtype": "float32", "backend": "eager", "epochs": 1, "router_data": str(root / "safe.jsonl"),
        "experts": [str(root / "stone.unsafe"), str(root / "river.unsafe")],
    }  # fmt: skip
    api.train("safemoe", {**shared, "out": str(root / "gate")})
    api.train("safemoe", {**shared, "out": str(root / "uniform"), "control": "uniform_gate"})
    return root


@pytest.fixture
def train(root, tiny_model_dir, tmp_path, capfd):
    """A function: settings -> (exit code, message) of `temper train safemoe`."""

    def call(*settings, out=tmp_path / "out", options=()):
        args = [f"model={tiny_model_dir('llama')}", "dtype=float32", "backend=eager", "epochs=1", f"out={out}"]
        args += [f"experts=[{root}/stone.unsafe,{root}/river.unsafe]", f"router_data={root}/safe.jsonl"]
        code = run(["train", "safemoe", *args, *settings, *options])
        return code, capfd.readouterr().err

    return call


def peft_folder(root, to, r=None, **fields):
    """Copy an expert into a plain PEFT folder, of another rank or with other fields."""
    final = root / "river.unsafe" / "final"
    config = json.loads((final / "adapter_config.json.unsafe").read_text()) | fields
    tensors = load_file(final / "adapter_model.safetensors.unsafe")
    if r is not None:
        config["r"] = r
        tensors = {n: (t[:r] if "lora_A" in n else t[:, :r]).contiguous() for n, t in tensors.items()}
    to.mkdir()
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def refused(code, message, *parts, expected=2):
    assert code == expected, message
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and "this is a bug" not in message
    assert message.count("error:") + message.count("gate not met:") == 1, message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["experts=[ROOT/stone.unsafe,ROOT/nowhere]"], ["nowhere", "no such folder", "temper train sft"]),
        (["experts=[ROOT/stone.unsafe]"], ["at least two"]),
        (["k=1"], ["k=1", "use k=2"]),
        (["router_data=null"], ["router_data: name a file"]),
        (["router_data=ROOT/nowhere.jsonl"], ["nowhere.jsonl"]),
        (["control=nul"], ["control"]),
        (["experts=[]", "expert_data={stone: ROOT/nowhere.jsonl, river: ROOT/nowhere2.jsonl}"], ["nowhere.jsonl"]),
        (["experts=[]", "expert_rows.domains=[stone, river]", "expert_rows.source=ROOT/nowhere"], ["ROOT/nowhere"]),
        (["experts=[]", "expert_rows.domains=[arson, river]"], ["no row of domain 'arson'", "it has "]),
        (["experts=[]", "expert_rows.n=2"], ["expert_rows.domains: name the domains"]),
    ],
)
def test_a_wrong_setting_of_the_gate_is_one_message(train, root, tmp_path, settings, parts):
    code, message = train(*(text.replace("ROOT", str(root)) for text in settings))
    refused(code, message, *(part.replace("ROOT", str(root)) for part in parts))
    assert not list(tmp_path.glob("out*"))


def test_a_safe_answer_that_is_missing_is_named_by_line(train, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*safe_rows(2), {"prompt": "may I?"}])
    refused(*train(f"router_data={file}"), "rows.jsonl", "line 3", "completion")


def test_an_expert_of_another_base_or_kind_is_refused_and_another_rank_is_mixed(
    train, root, tmp_path, tiny_model_dir
):
    refused(*train(f"model={tiny_model_dir('llama', seed=1)}"), "expert stone: base: it was trained on other base")
    dora = peft_folder(root, tmp_path / "dora", use_dora=True)
    refused(*train(f"experts=[{root}/stone.unsafe,{dora}]"), "expert dora: use_dora is True")
    assert not (tmp_path / "out").exists()
    small = peft_folder(root, tmp_path / "small", r=2)
    assert train(f"experts=[{root}/stone.unsafe,{small}]")[0] == 0


def test_a_folder_that_exists_is_kept(train, root):
    before = (root / "gate" / "final" / "experts.sealed").read_bytes()
    refused(*train(out=root / "gate"), "exists", "--resume", "out=DIR")
    refused(*train("lr=0.5", out=root / "gate", options=["--resume"]), "lr")
    assert (root / "gate" / "final" / "experts.sealed").read_bytes() == before


@pytest.mark.parametrize("command", [["chat"], ["eval", "harm"], ["export"]])
def test_an_expert_and_a_control_answer_nobody(command, root, tmp_path, capfd):
    name, *evals = command
    for target, why in ((root / "stone.unsafe", "stone.unsafe"), (root / "uniform", "uniform_gate")):
        out = [] if name == "chat" else [f"out={tmp_path}/out"]
        code = run([name, str(target), *evals, *out])
        refused(code, capfd.readouterr().err, why, "override", "TEMPER_ALLOW_UNSAFE_EXPERTS=1")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["safemoe.json", "routers.safetensors", "experts.sealed"])
def test_one_flipped_bit_and_nothing_answers(file, root, tmp_path, capfd):
    broken = tmp_path / "gate"
    shutil.copytree(root / "gate", broken)
    path = broken / "final" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for command in (["chat"], ["eval", "harm", f"out={tmp_path}/out"], ["export", f"out={tmp_path}/out"]):
        name, *rest = command
        code = run([name, str(broken), *rest])
        refused(code, capfd.readouterr().err, "bundle")
        assert not (tmp_path / "out").exists()


def test_a_gate_that_was_not_measured_is_not_released(root, tmp_path, capfd):
    code = run(["export", str(root / "gate"), f"out={tmp_path}/out"])
    refused(code, capfd.readouterr().err, "not exported", "force_reason", expected=3)
    assert not Path(tmp_path / "out").exists()
