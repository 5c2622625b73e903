"""The command `temper`: one literal table of commands, and how their errors end."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any

import typer
from typer.exceptions import TyperException

from tempering.cli import attribution, commands, data, judge
from tempering.cli.shared import tell

app = typer.Typer(
    name="temper",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make open-weight language models safe without making them useless, and prove it.\n\n"
    "Align, attack, measure. `temper demo` shows all of it on a small real model, offline, in minutes.",
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer catches and returns."""

COMMANDS: dict[str, Any] = {
    "demo": commands.demo,
    "train": commands.train,
    "eval": commands.eval_,
    "redteam": commands.redteam,
    "report": commands.report,
    "export": commands.export,
    "chat": commands.chat,
    "serve": commands.serve,
    "doctor": commands.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
for _group in (data, judge, attribution):
    app.add_typer(_group.app, name=_group.__name__.rpartition(".")[2])


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 wrong input, 3 gate not met, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; every error becomes one message on stderr."""
    try:
        result = app(args=argv, prog_name="temper", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        return _interrupted() if code == INTERRUPTED else code
    except typer.Exit as stop:
        return stop.exit_code
    except TyperException as error:  # wrong words on the command line
        if text := error.format_message():
            tell(f"error: {text} (temper --help lists what there is)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BaseException as error:
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else 1
        if "--debug" in argv:
            traceback.print_exc()
        return _explain(error)


def _interrupted() -> int:
    tell("interrupted; the same command with --resume goes on where it has that")
    return INTERRUPTED


def _explain(error: BaseException) -> int:
    text = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        tell(
            f"error: the disk is full ({_file(error)}); free some space, then run the same command again "
            "(with --resume where it has that)"
        )
        return 2
    if isinstance(error, PermissionError):
        tell(f"error: no permission for {_file(error)}; give another folder with out=DIR")
        return 2
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        tell(f"error: {_file(error)}: {error.strerror}; give another path (out= says where results go)")
        return 2
    if isinstance(error, UnicodeError) or not isinstance(error, ValueError | OSError | RuntimeError):
        tell(f"error: {type(error).__name__}: {text} (this is a bug; --debug shows where)")
        return 1
    tell(f"error: {text}")
    return 1 if isinstance(error, RuntimeError) else 2


def _file(error: BaseException) -> str:
    return str(getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing a file")
