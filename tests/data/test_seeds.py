import json
import tomllib
from pathlib import Path

import pytest

import tempering
from tempering.data.attacker import CATEGORIES, FORMATS, INSTRUCTIONS, attacker_message
from tempering.data.files import bundled, read_rows
from tempering.data.rewrites import TEMPLATES, rewrite_rows
from tempering.data.seeds import HELD_OUT, Seed, load_seeds, normalised, seeds_hash
from tempering.judges.tags import parse_attack


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, category="harmful", text="request"):
    return [{"prompt": f"{text} {i}", "category": category} for i in range(count)]


def test_demo_seeds_are_of_both_classes_and_none_is_held_out():
    seeds = load_seeds()
    for category in CATEGORIES:
        own = [seed.split for seed in seeds if seed.category == category]
        assert own.count("test") >= 50 and own.count("valid") >= 25 and own.count("train") > 450
    held = {normalised(row["prompt"]) for name in HELD_OUT for _, row in read_rows(bundled(name))}
    texts = [normalised(seed.prompt) for seed in seeds]
    assert held.isdisjoint(texts) and len(set(texts)) == len(texts) == len({seed.id for seed in seeds})
    assert seeds[0].source.startswith("pairs.jsonl:")


def test_a_text_is_one_seed_however_it_is_written_and_is_in_one_split(tmp_path):
    spelled = [
        {"prompt": text, "category": "harmful"}
        for i in range(200)
        for text in (f"Open Ⅳ lock {i}", f"  open IV  LOCK {i}\n", f"OPEN iv lock {i}")
    ]
    seeds = load_seeds(write(tmp_path / "s.jsonl", *spelled), classes=["harmful"])
    assert len(seeds) == 200 and [s.split for s in seeds].count("test") == 20
    assert {s.prompt for s in seeds} == {f"Open Ⅳ lock {i}" for i in range(200)}


def test_the_order_and_the_splits_do_not_depend_on_the_order_of_the_file(tmp_path):
    some = rows(50) + rows(30, "benign", "question")
    a = load_seeds(write(tmp_path / "a.jsonl", *some))
    b = load_seeds(write(tmp_path / "b.jsonl", *reversed(some)))
    assert [s._replace(source="") for s in a] == [s._replace(source="") for s in b]
    assert seeds_hash(a) == seeds_hash(list(reversed(b))) != seeds_hash(a[1:])
    assert [s.category for s in a] == ["harmful"] * 50 + ["benign"] * 30
    other = load_seeds(tmp_path / "a.jsonl", seed=7)
    assert [s.id for s in other] != [s.id for s in a] and seeds_hash(other) == seeds_hash(a)


def test_counts_of_held_out_seeds_and_a_limit_are_per_class(tmp_path):
    path = write(tmp_path / "s.jsonl", *rows(100), *rows(100, "benign", "question"))
    seeds = load_seeds(path, valid=3, test=4)
    assert [s.split for s in seeds if s.category == "benign"].count("test") == 4
    few = load_seeds(path, valid=3, test=4, limit=2)
    assert len(few) == 12 and set(few) <= set(seeds)


def test_a_file_that_says_its_splits_keeps_them(tmp_path):
    some = [{**row, "split": split} for row, split in zip(rows(3), ("train", "valid", "test"), strict=True)]
    seeds = load_seeds(write(tmp_path / "s.jsonl", *some), classes=["harmful"])
    assert {s.prompt: s.split for s in seeds} == {"request 0": "train", "request 1": "valid", "request 2": "test"}


def test_plain_requests_of_wildjailbreak_are_read_and_the_dressed_ones_dropped(tmp_path):
    published = [
        {"vanilla": "Open a lock", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"},
        {"vanilla": "open a  LOCK", "adversarial": "A play", "completion": "", "data_type": "adversarial_harmful"},
        {"vanilla": "Open a door", "adversarial": "", "completion": "Push.", "data_type": "vanilla_benign"},
    ]  # fmt: skip
    path = write(tmp_path / "wjb.jsonl", *published)
    for reference in (path, f"wildjailbreak:{path}"):
        assert [(s.prompt, s.category) for s in load_seeds(reference)] == [
            ("Open a lock", "harmful"), ("Open a door", "benign")
        ]  # fmt: skip


def test_a_text_in_both_classes_is_left_out(tmp_path, capsys):
    path = write(tmp_path / "s.jsonl", *rows(3), *rows(2, "benign", "question"), *rows(1, "benign"))
    assert "request 0" not in {s.prompt for s in load_seeds(path)}
    assert "1 texts stand in both classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("some", "classes", "message"),
    [
        (rows(2), CATEGORIES, r"no benign seed in it; give classes=\[harmful\]"),
        (
            [{"prompt": "x", "category": "odd"}],
            CATEGORIES,
            r"s.jsonl line 1: category 'odd'; expected harmful",
        ),
        ([{"text": "x"}], CATEGORIES, "line 1: no 'prompt'; found text"),
        ([{"prompt": "  ", "category": "harmful"}], CATEGORIES, "line 1: a seed is one request"),
        (rows(2), ["harmless"], "expected one or both of harmful, benign"),
    ],
)
def test_what_is_no_seed_is_named(tmp_path, some, classes, message):
    with pytest.raises(ValueError, match=message):
        load_seeds(write(tmp_path / "s.jsonl", *some), classes=classes)


def test_an_attacker_is_told_its_class_its_form_and_the_seed():
    for category in CATEGORIES:
        for fmt in FORMATS:
            message = attacker_message(INSTRUCTIONS[category], fmt, "Open a </SEED > lock")
            assert message.startswith(INSTRUCTIONS[category]) and message.endswith(
                "<seed>\nOpen a [/SEED ] lock\n</seed>"
            )
            assert ("<think>" in message) == (fmt == "think") and ("<prompt>" in message) == (fmt != "raw")
    assert INSTRUCTIONS["harmful"] != INSTRUCTIONS["benign"]
    with pytest.raises(ValueError, match="expected one of think"):
        attacker_message("x", "xml", "y")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_worked_rewrite_has_the_form_that_is_asked_for_and_keeps_the_seed(fmt):
    seeds = [Seed(str(i), f"request {i}", "benign" if i % 2 else "harmful", "x", "train") for i in range(20)]
    found = rewrite_rows([*seeds, seeds[0]._replace(split="test")], fmt=fmt, per_seed=2)
    assert len(found) == 40 and len({row["id"] for row in found}) == 40
    for row, seed in zip(found, [s for s in seeds for _ in range(2)], strict=True):
        assert row["prompt"] == attacker_message(INSTRUCTIONS[seed.category], fmt, seed.prompt)
        assert seed.prompt in parse_attack(row["completion"], fmt).prompt
    assert found == rewrite_rows(seeds, fmt=fmt, per_seed=2)


def test_every_file_beside_the_code_is_in_the_package():
    source = Path(tempering.__file__).parent
    project = source.parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a checkout: what is installed is the package")
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["tempering"]
    packed = {path for pattern in patterns for path in source.glob(pattern)}
    beside = {p for kind in ("md", "jsonl", "yaml", "j2", "css") for p in source.rglob(f"*.{kind}")}
    assert beside <= packed and any(p.name == "attacker_harmful.md" for p in packed)


def test_templates_are_checked():
    seed = Seed("s", "x", "harmful", "x", "train")
    for templates in ({}, {"harmful": ["no slot"]}, {"benign": TEMPLATES["benign"]}):
        with pytest.raises(ValueError, match="templates for the class 'harmful'"):
            rewrite_rows([seed], templates)
