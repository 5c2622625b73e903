import pytest
from pydantic import Field

from tempering.core.config import Config, build, dump, field_table, load_config, merge, parse_overrides, read_yaml


class Inner(Config):
    """Inside."""

    stages: int = 3
    """How many stages."""
    share: float = Field(0.5, ge=0, le=1)
    """A share."""


class Outer(Config):
    """Outside."""

    name: str = "x"
    """A name."""
    beta: float = 0.1
    """A number."""
    inner: Inner = Inner()
    """More."""
    epochs: int | list[int] = 5
    """One or many."""


def recipe(tmp_path, text):
    path = tmp_path / "staged.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_key_names_the_nearest_one(tmp_path):
    file = recipe(tmp_path, "bta: 0.2\n")
    with pytest.raises(ValueError, match=r"^recipe .*staged.yaml: unknown field 'bta'; did you mean 'beta'\?$"):
        load_config(Outer, file)
    with pytest.raises(ValueError, match=r"unknown field 'inner.stagez'; did you mean 'inner.stages'\?"):
        load_config(Outer, None, ["inner.stagez=2"])


def test_an_unknown_key_like_none_suggests_nothing():
    with pytest.raises(ValueError, match=r"^command line: unknown field 'qqqqq'$"):
        load_config(Outer, None, ["qqqqq=2"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "+1e-4", "0.1e-3"])
def test_numbers_with_exponents_are_numbers_everywhere(tmp_path, text):
    assert load_config(Outer, None, [f"beta={text}"]).beta == 1e-4
    assert load_config(Outer, recipe(tmp_path, f"beta: {text}\n")).beta == 1e-4


def test_overrides_win_over_the_recipe_key_by_key(tmp_path):
    file = recipe(tmp_path, "name: a\ninner:\n  stages: 2\n  share: 0.25\n")
    config = load_config(Outer, file, ["inner.stages=4", "epochs=[1, 2]"])
    assert (config.name, config.inner.stages, config.inner.share, config.epochs) == ("a", 4, 0.25, [1, 2])


def test_types_and_ranges_are_held_with_field_and_value():
    with pytest.raises(ValueError, match=r"command line: inner.stages: .*integer.* \(got 'many'\)"):
        load_config(Outer, None, ["inner.stages=many"])
    with pytest.raises(ValueError, match=r"inner.share: .*less than or equal to 1 \(got 2\)"):
        load_config(Outer, None, ["inner.share=2"])
    with pytest.raises(ValueError, match=r"inner: .*\(got 3\)"):
        load_config(Outer, None, ["inner=3"])
    for number in (".nan", ".inf"):
        with pytest.raises(ValueError, match="finite number"):
            load_config(Outer, None, [f"beta={number}"])


def test_every_problem_is_reported_at_once():
    with pytest.raises(ValueError) as error:
        build(Outer, {"bta": 1, "inner": {"stages": "many"}}, "here")
    assert len(str(error.value).splitlines()) == 2


def test_bad_yaml_names_file_and_line(tmp_path):
    with pytest.raises(ValueError, match=r"^recipe .*staged.yaml: not valid YAML \(line 3: "):
        read_yaml(recipe(tmp_path, "name: a\ninner:\n\tstages: 2\n"))
    with pytest.raises(ValueError, match="expected keys and values, got list"):
        read_yaml(recipe(tmp_path, "- a\n"))
    with pytest.raises(FileNotFoundError, match=r"^recipe .*none.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_an_empty_recipe_is_all_defaults(tmp_path):
    assert load_config(Outer, recipe(tmp_path, "# nothing\n")) == Outer()


def test_bad_overrides_are_named():
    with pytest.raises(ValueError, match="expected key=value, got 'beta'"):
        parse_overrides(["beta"])
    with pytest.raises(ValueError, match=r"^beta: cannot read '\[1' as a value"):
        parse_overrides(["beta=[1"])
    with pytest.raises(ValueError, match=r"^inner.stages: inner already has the value 3"):
        parse_overrides(["inner=3", "inner.stages=2"])


def test_a_dump_reads_back_equal(tmp_path):
    config = load_config(Outer, None, ["beta=1e-5", "inner.share=0.125", "name=über"])
    assert load_config(Outer, recipe(tmp_path, dump(config))) == config


def test_merge_leaves_its_arguments_alone():
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def test_help_comes_from_the_fields():
    assert ("inner.stages", "3", "How many stages.") in field_table(Outer)
