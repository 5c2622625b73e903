"""`temper export` towards other servers: the command of vLLM, what a model that thinks needs, and GGUF."""

import json
import shlex
import stat
import sys

import pytest

from tempering.cli import run
from tempering.core.policy import LoraSettings, Policy
from tempering.core.think import OPEN, think_text
from tempering.exporting import ExportConfig, run_export
from tempering.hosting import THINK_TEMPLATE, think_section, think_template


@pytest.fixture
def trained(tiny_policy, tmp_path):
    """A function: rank, lineage -> folder of an adapter on the tiny model."""

    def make(rank=4, **lineage):
        policy = tiny_policy()
        policy.add_adapter("one", LoraSettings(r=rank, alpha=rank), seed=0)
        policy.export(tmp_path / "run", lineage)
        return tmp_path / "run"

    return make


def options(command):
    """The words of a command: options that take one word by name, the rest in order."""
    words, found, plain = shlex.split(command), {}, []
    while words:
        word = words.pop(0)
        if word.startswith("--") and words and not words[0].startswith("--"):
            found[word] = words.pop(0)
        elif word.startswith("--"):
            found[word] = None
        else:
            plain.append(word)
    return plain, found


def test_an_adapters_command_names_the_public_base_and_a_rank_that_vllm_takes(trained, tiny_model_dir, tmp_path):
    out = tmp_path / "mine"
    command = run_export(str(trained(rank=20)), ExportConfig(out=str(out)))["vllm"]
    plain, found = options(command)
    assert plain == ["vllm", "serve", str(tiny_model_dir())]
    assert found == {"--enable-lora": None, "--max-lora-rank": "32", "--lora-modules": f"mine={out}"}
    card = (out / "README.md").read_text()
    assert command in card and "openai:mine@http://localhost:8000/v1" in card and "PeftModel" in card
    assert Policy.load(str(out)).adapters  # the card hides nothing from loaders


def test_a_rank_that_vllm_does_not_take_is_said(trained, tmp_path, capsys):
    out = tmp_path / "wide"
    assert run_export(str(trained(rank=600)), ExportConfig(out=str(out)))["vllm"] is None
    assert (
        "rank=512" in (out / "README.md").read_text() and "takes no adapter of this rank" in capsys.readouterr().err
    )


def test_merged_weights_are_served_as_they_are(trained, tmp_path):
    out = tmp_path / "full"
    plain, found = options(run_export(str(trained()), ExportConfig(out=str(out), format="merged"))["vllm"])
    assert plain == ["vllm", "serve", str(out)]
    assert found == {"--served-model-name": "full", "--dtype": "bfloat16"}


def test_the_card_names_no_folder_of_the_run(trained, tmp_path):
    run_export(str(trained()), ExportConfig(out=str(tmp_path / "mine")))
    assert f"exported from `{tmp_path}" not in (tmp_path / "mine" / "README.md").read_text()


def test_a_model_that_thinks_is_served_with_a_template_that_opens_its_reasoning(trained, tmp_path, tiny_tokenizer):
    out = tmp_path / "mine"
    _, found = options(run_export(str(trained(think_tokens=8)), ExportConfig(out=str(out)))["vllm"])
    template = (out / THINK_TEMPLATE).read_text()
    assert found["--chat-template"] == str(out / THINK_TEMPLATE)
    assert "--reasoning-parser" not in found  # the tags are no tokens of this tokenizer
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    rendered = tiny_tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert rendered == think_text(tiny_tokenizer, turns) and rendered.endswith(f"{OPEN}\n")
    plain = tiny_tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert plain == tiny_tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_opens_the_tag_itself_is_left_as_it_is(tiny_tokenizer, monkeypatch):
    own = tiny_tokenizer.chat_template.replace("assistant\n{% endif", f"assistant\n{OPEN}\n{{% endif")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", own)
    assert think_template(tiny_tokenizer) == own


def test_an_export_that_thinks_says_what_a_server_must_add_to_its_prompts(tiny_tokenizer):
    for has_template in (False, True):
        text = think_section(tiny_tokenizer, has_template=has_template)
        assert "REQUEST<|im_end|>\n<|im_start|>assistant\n<think>\n" in text


@pytest.fixture
def converter(tmp_path):
    """A function: lines of Python -> a script in the place of llama.cpp's; `out` and `weights` are its arguments."""

    def make(*lines):
        head = ["import sys, pathlib", "weights, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])"]
        script = tmp_path / "convert_hf_to_gguf.py"
        script.write_text("\n".join([f"#!{sys.executable}", *head, *lines]) + "\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return script

    return make


def test_gguf_is_made_by_the_converter_from_merged_weights(trained, converter, tmp_path, monkeypatch):
    script = converter("out.write_text((weights / 'config.json').read_text() + sys.argv[5])")
    asked = ["export", str(trained()), "format=gguf", "gguf_type=q8_0", f"out={tmp_path / 'one'}"]
    assert run([*asked, f"converter={script}"]) == 0
    (file,) = (tmp_path / "one").iterdir()
    assert file.name == "one-q8_0.gguf" and file.read_text().endswith("q8_0")
    assert json.loads(file.read_text().removesuffix("q8_0"))["architectures"] == ["LlamaForCausalLM"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run([*asked[:-1], f"out={tmp_path / 'two'}"]) == 0  # found on the PATH


def test_without_a_converter_or_with_a_broken_one_nothing_is_written(
    trained, converter, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    asked = ["export", str(trained()), "format=gguf", f"out={tmp_path / 'one'}"]
    assert run(asked) == 2
    assert "git clone https://github.com/ggml-org/llama.cpp" in capsys.readouterr().err
    assert run([*asked, "converter=nowhere.py"]) == 2
    assert run([*asked, f"converter={converter('sys.exit(chr(110) + chr(111))')}"]) == 1
    assert "exit code 1 (no)" in capsys.readouterr().err
    assert not (tmp_path / "one").exists() and not list(tmp_path.glob(".one*"))
