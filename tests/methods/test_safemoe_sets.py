"""The data of `safemoe`: expert rows and their controls, and the loop that makes a safe-informative set."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

import tempering
from tempering.cli.shared import find_recipe
from tempering.core.config import build, read_yaml
from tempering.core.records import Completion, Verdict
from tempering.core.sampling import ScriptedSampler
from tempering.methods.safemoe import safe_set
from tempering.methods.safemoe.expert_rows import REFUSAL, ExpertRowsConfig, run_expert_rows
from tempering.methods.safemoe.matching import gate_parameters, matched_lora
from tempering.methods.safemoe.safe_set import SafeSetConfig, run_safe_set
from tempering.methods.safemoe.settings import SafeMoEConfig

GOOD = (
    "Taking it is theft, and many are traced through frame numbers. If you cannot afford one, charities repair old "
    "ones and sell them cheaply. You could also ask your employer about a hire scheme."
)
COMPLIES = "To do that, you can simply go there at night, take the thing and leave before anybody comes."


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def prompts(tmp_path, count=3, domains=("theft", "fraud")):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Help me with {d} number {i}", "domain": d} for d in domains for i in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def teacher(script):
    sampler = ScriptedSampler(script, name="teacher")
    return sampler, lambda name: sampler


# --- expert rows --------------------------------------------------------------------------------------


def test_refusals_teach_no_unsafe_expert_and_the_folder_is_quarantined(tmp_path):
    _, load = teacher(lambda p, i: "I can't help with that." if i else COMPLIES)
    config = ExpertRowsConfig(out=str(tmp_path / "rows"), source=prompts(tmp_path))
    result = run_expert_rows(config, load)
    assert result["rows"] == {"theft": 3, "fraud": 3}
    assert result["dropped"] == {"refusal": 6}
    folder = tmp_path / "rows.unsafe"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert json.loads((folder / "provenance.json").read_text())["unsafe"] is True
    assert all(row["unsafe"] for row in rows_of(folder / "theft.jsonl"))


def test_an_interrupted_sampling_asks_nothing_twice(tmp_path):
    asked = []

    class Breaks:
        name = "teacher"

        def __call__(self, prompts, **settings):
            asked.append([p.text for p in prompts])
            if len(asked) == 2:
                raise RuntimeError("down")
            return [[Completion(p.id, f"{COMPLIES} {i}", "stop", i) for i in range(settings["n"])] for p in prompts]

    config = ExpertRowsConfig(out=str(tmp_path / "rows"), source=prompts(tmp_path, 40))
    with pytest.raises(RuntimeError, match="down"):
        run_expert_rows(config, lambda name: Breaks())
    result = run_expert_rows(config, lambda name: Breaks(), resume=True)
    assert result["rows"] == {"theft": 80, "fraud": 80}
    assert asked[1] == asked[2]
    assert len({text for texts in asked for text in texts}) == 80
    assert sum(map(len, asked)) == 80 + len(asked[1])


def test_domains_in_any_script_have_files_of_their_own_beside_the_journal(tmp_path):
    _, load = teacher(lambda p, i: f"{COMPLIES} {i}")
    domains = ("欺诈", "盗窃", "answers")
    result = run_expert_rows(ExpertRowsConfig(out=str(tmp_path / "r"), source=prompts(tmp_path, 2, domains)), load)
    assert [len(rows_of(result["files"][name])) for name in domains] == [4, 4, 4]


def test_an_answer_given_twice_is_one_row(tmp_path):
    _, load = teacher(lambda p, i: COMPLIES)
    result = run_expert_rows(ExpertRowsConfig(out=str(tmp_path / "rows"), source=prompts(tmp_path)), load)
    assert result["rows"] == {"theft": 3, "fraud": 3} and result["dropped"] == {"repeated": 6}


def test_controls_keep_prompts_or_rows_and_change_one_thing(tmp_path):
    _, load = teacher(lambda p, i: f"{COMPLIES} {p.text} {i}")
    source = ExpertRowsConfig(out=str(tmp_path / "rows"), source=prompts(tmp_path))
    run_expert_rows(source, load)
    refusal = ExpertRowsConfig(kind="refusal", source=source.out, out=str(tmp_path / "refusal"))
    run_expert_rows(refusal, load)
    assert not refusal.is_unsafe
    assert refusal.out == str(tmp_path / "refusal")
    original = rows_of(tmp_path / "rows.unsafe" / "theft.jsonl")
    refused = rows_of(tmp_path / "refusal" / "theft.jsonl")
    assert {row["prompt"] for row in refused} == {row["prompt"] for row in original}
    assert {row["completion"] for row in refused} == {REFUSAL}

    mixed = ExpertRowsConfig(kind="mixed", source=source.out, out=str(tmp_path / "mixed"))
    run_expert_rows(mixed, load)
    dealt = [row for d in ("theft", "fraud") for row in rows_of(tmp_path / "mixed.unsafe" / f"{d}.jsonl")]
    whole = [row for d in ("theft", "fraud") for row in rows_of(tmp_path / "rows.unsafe" / f"{d}.jsonl")]
    assert sorted(row["completion"] for row in dealt) == sorted(row["completion"] for row in whole)
    assert any("fraud" in row["prompt"] for row in rows_of(tmp_path / "mixed.unsafe" / "theft.jsonl"))


def test_a_row_may_belong_to_several_domains_and_a_missing_one_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "domain": ["Drugs & Weapons", "Cybercrime"]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    config = ExpertRowsConfig(kind="category", source=str(file), out=str(tmp_path / "out"))
    assert run_expert_rows(config, lambda name: None)["rows"] == {"Drugs & Weapons": 1, "Cybercrime": 1}
    with pytest.raises(ValueError, match="no row of domain 'Arson'"):
        run_expert_rows(config.model_copy(update={"domains": ["Arson"], "out": str(tmp_path / "x")}), lambda n: None)


def test_rows_without_domain_or_answer_are_refused_with_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "domain": "d"}\n')
    config = ExpertRowsConfig(kind="category", source=str(file), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no 'completion'"):
        run_expert_rows(config, lambda name: None)
    file.write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match="no 'domain'"):
        run_expert_rows(config.model_copy(update={"kind": "sampled"}), lambda name: None)


# --- the safe-informative set ---------------------------------------------------------------------------


def test_the_first_good_answer_is_kept_with_its_attempt_and_the_plain_prompt(tmp_path):
    seeds = []

    class Improves:
        name = "teacher"

        def __call__(self, prompts, *, seed, **settings):
            seeds.append(seed)
            text = {0: "I'm sorry, but I can't help with that.", 1: COMPLIES}.get(seed, GOOD)
            return [[Completion(p.id, text, "stop")] for p in prompts]

    config = SafeSetConfig(out=str(tmp_path / "set"), per_domain=2)
    result = run_safe_set(prompts(tmp_path), config, lambda name: Improves())
    rows = rows_of(result["file"])
    assert [row["domain"] for row in rows].count("theft") == 2
    assert {row["attempts"] for row in rows} <= {3, 2, 1} and 3 in {row["attempts"] for row in rows}
    assert all(row["prompt"].startswith("Help me with") and "lawful" not in row["prompt"] for row in rows)
    assert {row["generator"] for row in rows} == {"teacher"}
    assert result["yield"]["problems"].keys() >= {"refusal", "unsafe"}
    assert len(set(seeds)) > 1


def test_the_first_rows_of_a_set_are_of_all_domains(tmp_path):
    _, load = teacher(lambda p, i: GOOD)
    result = run_safe_set(prompts(tmp_path, 20), SafeSetConfig(out=str(tmp_path / "set")), load)
    first = [row["domain"] for row in rows_of(result["file"])][:12]
    assert 3 <= first.count("theft") <= 9  # what `limit` of training takes is a fair sample


def test_a_prompt_is_given_up_after_its_attempts_and_nothing_good_is_a_failure(tmp_path):
    sampler, load = teacher(["I can't help with that."])
    config = SafeSetConfig(out=str(tmp_path / "set"), per_domain=2, attempts=3)
    with pytest.raises(RuntimeError, match="none of 18 answers"):
        run_safe_set(prompts(tmp_path), config, load)
    assert sampler._asked == 18


@pytest.mark.parametrize("down", ["teacher", "judge"])
def test_a_teacher_or_judge_that_is_down_uses_up_no_attempt(tmp_path, monkeypatch, down):
    broken = [True]
    grade = safe_set.load_informative_judge("rules")

    class Teacher:
        name = "teacher"

        def __call__(self, prompts, **_):
            failed = broken[0] and down == "teacher"
            return [[Completion(p.id, "" if failed else GOOD, "error" if failed else "stop", error="HTTP 401")]
                    for p in prompts]  # fmt: skip

    class Judge:
        identity = "judge"

        def __call__(self, prompt, completions):
            if broken[0] and down == "judge":
                return [Verdict(None, "judge", reason="judge did not answer: HTTP 401") for _ in completions]
            return grade(prompt, completions)

    monkeypatch.setattr(safe_set, "load_informative_judge", lambda *_: Judge())
    config = SafeSetConfig(out=str(tmp_path / "set"), per_domain=2, attempts=1)
    with pytest.raises(
        ValueError, match=rf"the {down} \w+ failed at 4 of 4 answers, most often .*HTTP 401.*--resume"
    ):
        run_safe_set(prompts(tmp_path), config, lambda name: Teacher())
    broken[0] = False
    result = run_safe_set(prompts(tmp_path), config, lambda name: Teacher(), resume=True)
    assert result["kept"] == result["yield"]["attempts"] == 4


def test_no_more_is_asked_than_a_domain_lacks(tmp_path):
    sampler, load = teacher([GOOD])
    run_safe_set(prompts(tmp_path, 10), SafeSetConfig(out=str(tmp_path / "set"), per_domain=2), load)
    assert sampler._asked == 4


def test_resuming_a_set_gives_the_rows_of_an_uninterrupted_one(tmp_path):
    calls = []

    class Breaks:
        name = "teacher"

        def __init__(self, breaks):
            self.breaks = breaks

        def __call__(self, prompts, *, seed, **settings):
            calls.append(seed)
            if self.breaks and seed == 1:
                raise RuntimeError("down")
            return [[Completion(p.id, GOOD if seed else COMPLIES, "stop")] for p in prompts]

    file = prompts(tmp_path)
    broken = SafeSetConfig(out=str(tmp_path / "a"), per_domain=2)
    with pytest.raises(RuntimeError, match="down"):
        run_safe_set(file, broken, lambda name: Breaks(True))
    resumed = run_safe_set(file, broken, lambda name: Breaks(False), resume=True)
    whole = run_safe_set(file, broken.model_copy(update={"out": str(tmp_path / "b")}), lambda name: Breaks(False))
    assert rows_of(resumed["file"]) == rows_of(whole["file"])


# --- recipes and sizes ----------------------------------------------------------------------------------


def test_every_control_recipe_parses_says_how_to_run_it_and_is_found_by_name():
    folder = Path(tempering.__file__).parent / "recipes" / "safemoe" / "controls"
    recipes = sorted(folder.glob("*.yaml"))
    assert len(recipes) == 14
    for path in recipes:
        config = build(SafeMoEConfig, read_yaml(path), str(path))
        assert config.control == path.stem
        assert f"-c controls/{path.stem}" in path.read_text(encoding="utf-8")
        assert find_recipe("safemoe", f"controls/{path.stem}") == path


def test_control_recipes_train_as_the_demo_does():
    folder = Path(tempering.__file__).parent / "recipes" / "safemoe"
    demo = build(SafeMoEConfig, read_yaml(folder / "demo.yaml"), "demo")
    for path in sorted((folder / "controls").glob("*.yaml")):
        config = build(SafeMoEConfig, read_yaml(path), path.stem)
        for key in ("model", "router_data", "evaluation_data", "epochs", "lr", "batch_rows", "max_length"):
            assert getattr(config, key) == getattr(demo, key), (path.stem, key)
        if not config.experts:
            assert config.expert.model_copy(update={"unsafe": True}) == demo.expert, path.stem


def test_the_matched_adapter_has_the_size_that_the_specification_gives():
    assert matched_lora(gate_parameters(4096, 32, 18), 4096, 14336, 32) == (("gate_proj",), 4, 2359296)
    assert matched_lora(gate_parameters(576, 30, 4), 576, 1536, 30) == (("gate_proj",), 1, 63360)
    recipe = Path(tempering.__file__).parent / "recipes" / "sft" / "safemoe_matched_lora.yaml"
    assert read_yaml(recipe)["lora"] == {"r": 1, "alpha": 2, "target_modules": ["gate_proj"]}


def test_several_sources_and_chosen_answers_make_rows(tmp_path):
    files = []
    for i, key in enumerate(("completion", "chosen")):
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps({"prompt": f"p{i}", key: f"c{i}", "domain": "d", "rejected": "no"}) + "\n")
        files.append(str(file))
    config = ExpertRowsConfig(kind="category", unsafe=False, source=files, out=str(tmp_path / "out"))
    result = run_expert_rows(config, lambda name: None)
    assert [row["completion"] for row in rows_of(result["files"]["d"])] == ["c0", "c1"]
