import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from tempering.core.config import Config
from tempering.core.run import Run, atomic_write, file_hash, redact, replace_folder


class Settings(Config):
    """Anything."""

    lr: float = 1e-4
    """A number."""
    name: str | None = None
    """A name."""
    inner: dict[str, int] | None = None
    """More."""


def new(tmp_path, **kwargs):
    return Run.create(tmp_path / "run", "sft", Settings(**kwargs))


def test_an_existing_run_is_never_overwritten(tmp_path):
    new(tmp_path)
    with pytest.raises(FileExistsError, match="run exists; add --resume to go on, or out=DIR"):
        new(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        Run.require_free(tmp_path / "file", resume=True)


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    assert new(tmp_path).config == {"method": "sft", "lr": 1e-4, "name": None, "inner": None}


def test_resume_needs_the_same_configuration_and_names_what_differs(tmp_path):
    new(tmp_path, inner={"a": 1})
    Run.create(tmp_path / "run", "sft", Settings(inner={"a": 1}), resume=True)
    with pytest.raises(ValueError, match=r"lr is 0.0001 in its config.yaml, but 0.1 now"):
        Run.create(tmp_path / "run", "sft", Settings(lr=0.1, inner={"a": 1}), resume=True)
    with pytest.raises(ValueError, match=r"inner.a is 1 in its config.yaml, but 2 now"):
        Run.create(tmp_path / "run", "sft", Settings(inner={"a": 2}), resume=True)
    with pytest.raises(ValueError, match="method is 'sft'"):
        Run.create(tmp_path / "run", "safemoe", Settings(inner={"a": 1}), resume=True)


def test_a_run_from_before_a_field_existed_goes_on_where_the_field_has_its_default(tmp_path):
    class Inner(Config):
        """More."""

        steps: int = 3
        """A number."""

    class Newer(Settings):
        """With fields of later."""

        rounds: int = 1
        """A number."""
        part: Inner = Inner()
        """More."""

    run = new(tmp_path, inner={"a": 1})
    Run.create(run.root, "sft", Newer(inner={"a": 1}), resume=True)
    for later in ({"rounds": 2}, {"part": {"steps": 4}}, {"inner": {"a": 1, "b": 2}}):
        with pytest.raises(ValueError, match="resume with the same configuration"):
            Run.create(run.root, "sft", Newer(**{"inner": {"a": 1}, **later}), resume=True)


def test_resume_of_a_run_that_was_killed_before_its_first_write_starts_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").write_text("")
    assert Run.create(tmp_path / "run", "sft", Settings(), resume=True).config["method"] == "sft"


def test_only_the_main_process_writes(tmp_path):
    Run.create(tmp_path / "run", "sft", Settings(), is_main=False)
    assert not (tmp_path / "run").exists()


def test_rows_go_round_and_a_torn_last_line_is_left_out(tmp_path):
    run = new(tmp_path)
    rows = [{"step": i, "text": "überall\n\u2028"} for i in range(3)]
    for row in rows:
        run.append_row("metrics.jsonl", row)
    assert run.read_rows("metrics.jsonl") == rows
    with (run.root / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "te')
    assert run.read_rows("metrics.jsonl") == rows
    run.truncate_rows("metrics.jsonl", lambda row: row["step"] <= 1)
    run.append_row("metrics.jsonl", rows[2])
    assert run.read_rows("metrics.jsonl") == [rows[0], rows[1], rows[2]]


def test_many_rows_are_not_held_in_memory_to_be_written(tmp_path):
    run = new(tmp_path)
    tracemalloc.start()
    try:
        run.write_rows("rows.jsonl", ({"text": "x" * 100_000} for _ in range(100)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (run.root / "rows.jsonl").stat().st_size > 10**7 > 5 * peak


def test_truncating_what_is_not_there_is_fine(tmp_path):
    new(tmp_path).truncate_rows("metrics.jsonl", lambda row: True)


def test_nan_is_refused_and_leaves_the_old_file(tmp_path):
    run = new(tmp_path)
    run.write_json("evals/harm.json", {"a": 1})
    with pytest.raises(ValueError):
        run.write_json("evals/harm.json", {"a": float("nan")})
    assert run.read_json("evals/harm.json") == {"a": 1}


def test_a_failed_write_leaves_neither_a_torn_nor_a_temporary_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a.json", b"old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_files_are_readable_by_others(tmp_path):
    assert atomic_write(tmp_path / "a.json", b"x").stat().st_mode & 0o777 == 0o644


def test_replacing_a_folder_leaves_only_the_new_one(tmp_path):
    for name in ("final", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["new"]


def test_done_comes_last_and_a_run_opens_without_it(tmp_path):
    run = new(tmp_path)
    assert not Run.open(run.root).is_done
    run.finish()
    assert Run.open(run.root).is_done
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        Run.open(tmp_path)


def test_provenance_has_versions_and_what_the_caller_adds(tmp_path):
    run = new(tmp_path)
    assert run.provenance == {}
    run.write_provenance(unsafe=False, judges=[])
    assert run.provenance["versions"]["torch"] and run.provenance["unsafe"] is False
    json.dumps(run.provenance)


def test_hash_is_of_the_content(tmp_path):
    a, b = atomic_write(tmp_path / "a", b"x" * 10), atomic_write(tmp_path / "b", b"x" * 10)
    assert file_hash(a) == file_hash(b) != file_hash(atomic_write(tmp_path / "c", b"y"))


def test_secrets_do_not_appear():
    assert redact("key is hunter2, again hunter2", ["hunter2", ""]) == "key is ***, again ***"


class Bare(Config):
    """No settings."""


HOLD = """
import sys, time
from tempering.core.config import Config
from tempering.core.run import Run


class Settings(Config):
    pass


run = Run.create(sys.argv[1], "m", Settings(), share=sys.argv[2] == "share")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("share", [False, True])
def test_one_process_writes_to_a_run_and_a_killed_one_lets_go(tmp_path, share):
    out = tmp_path / "run"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), "share" if share else "alone"], stdout=subprocess.PIPE
    )
    try:
        assert held.stdout.readline() == b"held\n"
        if share:
            Run.create(out, "m", Bare(), resume=True, share=True)
        else:
            with pytest.raises(BlockingIOError, match=f"another process is writing to {out}"):
                Run.create(out, "m", Bare(), resume=True)
    finally:
        held.kill()
        held.communicate()
    Run.create(out, "m", Bare(), resume=True).finish()


def test_a_full_disk_names_the_file_that_was_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = new(tmp_path)
    monkeypatch.setattr("tempering.core.run.os.fsync", full)
    with pytest.raises(OSError) as error:
        run.write_json("provenance.json", {})
    assert error.value.filename == str(run.root / "provenance.json")
    monkeypatch.setattr("tempering.core.run._line", full)
    with pytest.raises(OSError) as error:
        run.append_row("metrics.jsonl", {})
    assert error.value.filename == str(run.root / "metrics.jsonl")
