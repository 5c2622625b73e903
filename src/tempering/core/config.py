"""Strict configuration: pydantic models read from YAML and `key=value` overrides.

Used by every command and method; refuses to know what any field means.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """Base of all configurations: unknown keys are errors, the string under a field describes it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    SHORT: ClassVar[Mapping[str, str]] = {}
    """Keys that, with a text as value, are short for others, such as `teacher` for `teacher.model`."""

    @model_validator(mode="before")
    @classmethod
    def _in_long(cls, value: Any) -> Any:
        return long_forms(cls.SHORT, value) if cls.SHORT and isinstance(value, dict) else value


C = TypeVar("C", bound=BaseModel)
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def parse_overrides(items: Sequence[str], short: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Turn `["lr=1e-4", "curriculum.stages=2"]` into a nested dict; values are YAML. `short`: see `Config.SHORT`.

    >>> parse_overrides(["a.b=2", "a.c=[x, y]", "lr=1e-4"])
    {'a': {'b': 2, 'c': ['x', 'y']}, 'lr': 0.0001}
    >>> parse_overrides(["teacher=me", "teacher.price=2"], {"teacher": "teacher.model"})
    {'teacher': {'model': 'me', 'price': 2}}

    Raises:
        ValueError: when an item has no `=`, its value is not YAML, or one key is given in both of its forms.
    """
    tree: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"expected key=value, got {item!r}")
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}: cannot read {text!r} as a value ({_first_line(error)})") from error
        if isinstance(value, dict) and any(v is None and ":" in str(k) for k, v in value.items()):
            raise ValueError(f"{key}: {text!r} needs a space after each colon, as in '{key}={{name: 1}}'")
        key = key.strip()
        full = (short or {}).get(key, key) if isinstance(value, str) else key
        if typed.setdefault(full, key) != key:
            raise ValueError(f"{key} and {typed[full]} are the same setting; give one of them")
        *parents, leaf = full.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{key}: {parent} already has the value {node!r}")
        node[leaf] = value
    return tree


def parse_value(text: str) -> Any:
    """Read one YAML value; numbers such as `1e-4`, which YAML 1.1 calls text, are numbers."""
    return _numbers(yaml.safe_load(text))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe: one mapping.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming file and line where it is not YAML or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid YAML ({_first_line(error)})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {path}: expected keys and values, got {type(tree).__name__}")
    numbers: dict[str, Any] = _numbers(tree)
    return numbers


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, mapping by mapping.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def long_forms(short: Mapping[str, str], tree: dict[str, Any]) -> dict[str, Any]:
    """Write out the keys of a tree that are short for others.

    >>> long_forms({"teacher": "teacher.model"}, {"teacher": "me"})
    {'teacher': {'model': 'me'}}

    Raises:
        ValueError: a key is there in both of its forms.
    """
    for key, full in short.items():
        if not isinstance(tree.get(key), str):
            continue
        parent, _, leaf = full.partition(".")
        rest = {name: value for name, value in tree.items() if name != key}
        inner = rest.get(parent) or {}
        if not isinstance(inner, dict) or leaf in inner:
            raise ValueError(f"{key} is short for {full}; give one of them")
        tree = {**rest, parent: {**inner, leaf: tree[key]}}
    return tree


def build(cls: type[C], tree: dict[str, Any], source: str) -> C:
    """Validate `tree` as a `cls`.

    Raises:
        ValueError: one line a problem: source, field, what it got, the nearest known name.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_reword(cls, e, source) for e in error.errors())) from None


def load_config(
    cls: type[C], file: Path | None = None, overrides: Sequence[str] = (), *, without: Sequence[str] = ()
) -> C:
    """Build a `cls` from a recipe, but `without` keys that somebody else reads, and from overrides, which win."""
    tree = {key: value for key, value in (read_yaml(file) if file is not None else {}).items() if key not in without}
    source = f"recipe {file}" if file is not None else "command line"
    short: Mapping[str, str] = getattr(cls, "SHORT", {})
    return build(cls, merge(long_forms(short, tree), parse_overrides(overrides, short)), source)


def dump(config: BaseModel) -> str:
    """Write the complete, resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def field_table(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """List every key of a configuration: dotted name, default, description (for `--help`)."""
    rows = []
    for name, info in cls.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += field_table(inner, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else info.get_default(call_default_factory=True)
            rows.append((f"{prefix}{name}", str(default), " ".join((info.description or "").split())))
    return rows


def _reword(cls: type[BaseModel], error: Any, source: str) -> str:
    path = [str(p) for p in error["loc"]]
    name = ".".join(path) or "configuration"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known_names(cls, path[:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else ""
        return f"{source}: unknown field {name!r}{hint}"
    if error["type"] == "missing":
        return f"{source}: field {name!r} is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "secret":  # what was given may be one, and is not repeated
        return f"{source}: {name}: {message}"
    return f"{source}: {name}: {message} (got {error['input']!r:.80})"


def _known_names(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        info = cls.model_fields.get(part)
        inner = info.annotation if info else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        cls = inner
    return list(cls.model_fields)


def _numbers(value: Any) -> Any:
    """Turn the texts `1e-4` anywhere in a tree that YAML 1.1 has read into numbers."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + str(getattr(error, "problem", None) or error).splitlines()[0]
