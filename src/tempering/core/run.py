"""The run folder: all that one command produced, and the only way that commands hand work to each other.

Used by every command that writes; refuses to know what a method or an eval computes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import yaml
from pydantic import BaseModel

from tempering.core.quarantine import SUFFIX, unsafe_name

PACKAGES = ("tempering", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


class Run:
    """A folder with `config.yaml`, `provenance.json`, `metrics.jsonl`, `data/`, `checkpoints/`, `final/`,
    `evals/`, `LOCK` (empty) and, last of all, `DONE`. Writes are atomic: a reader sees a whole file or none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: filelock.BaseFileLock | None = None

    @staticmethod
    def require_free(out: str | Path, resume: bool) -> None:
        """Refuse an existing run early, before a model is loaded for it.

        Raises:
            FileExistsError: the folder holds something and `resume` is false.
        """
        root = Path(out)
        if root.exists() and not root.is_dir():
            raise FileExistsError(f"{root} is a file; give another folder with out=DIR")
        if not resume and root.exists() and any(root.iterdir()):
            raise FileExistsError(f"run folder {root} exists; add --resume to go on, or out=DIR for another")

    @classmethod
    def create(
        cls,
        out: str | Path,
        method: str,
        config: BaseModel,
        *,
        resume: bool = False,
        is_main: bool = True,
        share: bool = False,
        may_differ: Sequence[str] = (),
        unsafe: bool = False,
    ) -> Run:
        """Start a run folder, or with `resume` go on in one that was started with the same configuration.

        `may_differ`: dotted keys, and all below them, that may have other values now, such as a cap on spending.
        `unsafe`: the folder is quarantined, labelled and the owner's alone, before anything else is in it.
        Only the main process (`is_main`) writes. Until `finish` no other process may, unless all `share` it.

        Raises:
            FileExistsError: the folder holds something and `resume` is false.
            BlockingIOError: another process is writing to the folder.
            ValueError: `resume`, but method or configuration differ, with the first field that does.
        """
        run = cls(Path(unsafe_name(out) if unsafe else out))
        if not is_main:
            return run
        cls.require_free(run.root, resume)
        if unsafe:
            run.root.mkdir(parents=True, exist_ok=True)
            run.root.chmod(0o700)
        if not share:
            run._lock = _lock(run.path("LOCK"))
        wanted = {"method": method, **config.model_dump(mode="json")}
        config_file = run.root / "config.yaml"
        if config_file.is_file():
            old = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
            _require_equal(old, wanted, run.root, _defaults(config), free=("out", *may_differ))
            if not may_differ:
                return run
        if unsafe:
            run.write_provenance(method=method)
        run.write_text("config.yaml", yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, root: str | Path) -> Run:
        """Open an existing run folder for reading.

        Raises:
            FileNotFoundError: when it has no `config.yaml`.
        """
        run = cls(Path(root))
        if not (run.root / "config.yaml").is_file():
            raise FileNotFoundError(f"{root} is not a run folder (no config.yaml)")
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, with the key `method`."""
        config: dict[str, Any] = yaml.safe_load((self.root / "config.yaml").read_text(encoding="utf-8"))
        return config

    @property
    def provenance(self) -> dict[str, Any]:
        """What `write_provenance` wrote; empty before that."""
        return self.read_json("provenance.json") if self.has("provenance.json") else {}

    @property
    def is_done(self) -> bool:
        """Whether the command that made this folder ended well."""
        return self.has("DONE")

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is in the run."""
        return (self.root / name).exists()

    def path(self, name: str) -> Path:
        """Return the path of a file in the run, its folder made."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file or nothing."""
        return atomic_write(self.path(name), text.encode("utf-8", "surrogatepass"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write one JSON document; NaN is refused, since no other tool reads it."""
        return self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read one JSON document."""
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a JSONL file, whole or nothing."""
        return atomic_write(self.path(name), (_line(row) for row in rows))

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file; a last line that a killed process left half-written is left out."""
        return list(_complete_rows(self.root / name))

    def append_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line and flush it, so that a kill loses at most the line being written."""
        with _naming(self.path(name)) as path, path.open("ab") as file:
            file.write(_line(row))
            file.flush()

    def truncate_rows(self, name: str, keep: Any) -> None:
        """Keep only the rows for which `keep(row)` holds (before a resumed loop appends again)."""
        if self.has(name):
            self.write_rows(name, [row for row in self.read_rows(name) if keep(row)])

    def write_provenance(self, **facts: Any) -> None:
        """Write versions, device and command, and what the caller adds (input hashes, licences, `unsafe`).

        A quarantined run says `unsafe` whatever the caller says.
        """
        label = {"unsafe": True} if self.root.name.endswith(SUFFIX) else {}
        self.write_json("provenance.json", {**environment(), **facts, **label})

    def require_inputs(self, digest: str, source: object) -> None:
        """Keep a digest of the data that the run started with; with another one it cannot go on.

        Raises:
            ValueError: the data are not those that the run started with.
        """
        name = "data/inputs.json"
        if not self.has(name):
            self.write_json(name, {"source": str(source), "digest": digest})
        elif self.read_json(name)["digest"] != digest:
            raise ValueError(
                f"--resume {self.root}: {source} has changed since this run started; restore it, or give out=DIR"
            )

    def finish(self) -> None:
        """Mark the run complete. Nothing is written after this but evals and reports."""
        self.write_text("DONE", time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
        if self._lock is not None:
            self._lock.release()


def _lock(path: Path) -> filelock.BaseFileLock | None:
    """Keep other processes out; the system lets go of the lock when this one ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    lock = filelock.FileLock(path, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(f"another process is writing to {path.parent}; wait for it, or give out=DIR") from None
    except NotImplementedError:
        return None  # a file system without locks
    return lock


def environment() -> dict[str, Any]:
    """Return versions, machine and command line, with nothing secret in it."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> Path:
    """Write through a temporary file in the same folder, then rename; parts are written as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with _naming(path), os.fdopen(descriptor, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Put the file into an error of the system that names none, as a full disk raises it."""
    try:
        yield path
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a completely written folder in place of another (or of none)."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def redact(text: str, secrets: Sequence[str]) -> str:
    """Replace each secret in `text` by three asterisks."""
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    return text


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


def _complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                yield json.loads(line.decode("utf-8", "surrogatepass"))
            except ValueError:
                return  # a torn last line of a killed run: what follows it was never written


def _defaults(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> its default, as in a configuration file; nested configurations field by field."""
    found: dict[str, Any] = {}
    plain = type(config).model_construct().model_dump(mode="json", warnings=False)
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= _defaults(value, f"{prefix}{name}.")
        found[prefix + name] = plain.get(name)
    return found


def _require_equal(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    root: Path,
    defaults: Mapping[str, Any],
    prefix: str = "",
    free: Sequence[str] = (),
) -> None:
    for key in [*old, *(k for k in new if k not in old)]:
        # A run from before a field existed did what its default does.
        a, b = old.get(key) if key in old else defaults.get(prefix + key), new.get(key)
        if prefix + key in free:  # `out`: the folder may have been moved, or spelt otherwise
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            _require_equal(a, b, root, defaults, f"{prefix}{key}.", free)
        elif a != b:
            raise ValueError(
                f"--resume {root}: {prefix}{key} is {a!r} in its config.yaml, but {b!r} now; "
                "resume with the same configuration, or give out=DIR for a new run"
            )
