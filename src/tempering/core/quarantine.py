"""Quarantine: what was trained to be unsafe is labelled from birth, and nothing loads it by accident.

Used by the run folder, by everything that resolves a model reference, and by the methods that make such models;
refuses to know why a model is unsafe. A leaf that must stay light: every command imports it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rich.markup import escape

from tempering.core.progress import say

SUFFIX = ".unsafe"
"""Ends the name of an unsafe run's folder, and of each file in it that a loader would look for."""
VARIABLE = "TEMPER_ALLOW_UNSAFE_EXPERTS"
BUNDLE = "safemoe.json"
"""The manifest of sealed experts (`methods/safemoe/bundle.py`): a folder with it is no model to load weights from."""
LOADABLE = ("adapter_model.safetensors", "adapter_config.json")
"""The files by which PEFT and transformers find an adapter."""
WHOLE = ("model.safetensors", "config.json")
"""The files by which transformers finds a model."""

_reason: ContextVar[str | None] = ContextVar("reason", default=None)


class UnsafeExpertAccess(ValueError):  # noqa: N818  (the operation that was refused, not a fault)
    """Something that could let an unsafe model answer by itself was asked for without the override."""


@contextmanager
def allow_unsafe_experts(*, reason: str) -> Iterator[None]:
    """Give the first half of the override, for research on the unsafe models themselves; the environment variable
    `TEMPER_ALLOW_UNSAFE_EXPERTS=1` is the other. A thread that is started inside does not inherit it.

    Raises:
        ValueError: the reason is empty.
    """
    if not reason.strip():
        raise ValueError("allow_unsafe_experts needs a reason, which is printed with everything that it allows")
    token = _reason.set(reason)
    try:
        yield
    finally:
        _reason.reset(token)


def override() -> str | None:
    """Return the reason that was given, where both halves of the override are there."""
    return _reason.get() if os.environ.get(VARIABLE) == "1" else None


def require_override(operation: str) -> None:
    """Go on only with both halves of the override, and then say so loudly.

    Raises:
        UnsafeExpertAccess: one half or both are missing, with what is missing.
    """
    if reason := override():
        say(f"[bold red]unsafe override[/] ({escape(reason)}): {escape(operation)}")
        return
    missing = ["`with allow_unsafe_experts(reason=...)` in Python"] * (_reason.get() is None)
    missing += [f"{VARIABLE}=1 in the environment"] * (os.environ.get(VARIABLE) != "1")
    raise UnsafeExpertAccess(
        f"{operation} is refused: an unsafe expert must not answer by itself; for research on it, the override "
        f"needs {' and '.join(missing)} too"
    )


def unsafe_name(out: str | Path) -> str:
    """Return the name of an unsafe run's folder.

    >>> unsafe_name("runs/fraud"), unsafe_name("runs/fraud.unsafe")
    ('runs/fraud.unsafe', 'runs/fraud.unsafe')
    """
    name = str(out).rstrip("/")
    return name if name.endswith(SUFFIX) else name + SUFFIX


def is_quarantined(folder: Path) -> bool:
    """Whether a folder is an unsafe run, or a part or a copy of one: by its name, its files, or its run's label."""
    here = Path(os.path.abspath(folder))
    if any(part.endswith(SUFFIX) for part in (*here.parts, *here.resolve().parts)):
        return True
    if any((place / (name + SUFFIX)).exists() for place in (here, here / "final") for name in (*LOADABLE, *WHOLE)):
        return True
    return any(_label(place) for place in (here, here.parent))


def require_safe(folder: Path, operation: str) -> None:
    """Refuse a quarantined folder without the override.

    Raises:
        UnsafeExpertAccess: naming the folder.
    """
    if is_quarantined(folder):
        require_override(f"{operation} the unsafe run {folder}")


def hide(folder: Path) -> None:
    """Rename the files of an adapter, or of a whole model, so that no loader finds it."""
    wanted = {*LOADABLE, WHOLE[1]}
    for file in list(folder.iterdir()):
        if file.name in wanted or file.match("model*.safetensors*"):
            os.replace(file, folder / (file.name + SUFFIX))


@contextmanager
def unhidden(folder: Path) -> Iterator[Path]:
    """A temporary folder in which loaders find the adapter that is hidden in `folder`; any other folder as it is.

    Raises:
        UnsafeExpertAccess: the adapter is hidden, and the override is not there.
    """
    if not (folder / (LOADABLE[0] + SUFFIX)).is_file():
        yield folder
        return
    require_override(f"loading the unsafe adapter {folder}")
    temporary = Path(tempfile.mkdtemp(prefix="unsafe-"))
    try:
        for name in LOADABLE:
            (temporary / name).symlink_to((folder / (name + SUFFIX)).resolve())
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _label(folder: Path) -> bool:
    """Whether the run's provenance says that it is unsafe; one that cannot be read says nothing."""
    try:
        return json.loads((folder / "provenance.json").read_text(encoding="utf-8")).get("unsafe") is True
    except (OSError, ValueError, AttributeError):
        return False
