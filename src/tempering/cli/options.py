"""Options that several commands have."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from tempering.cli.shared import print_keys

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings; nested keys have dots.")
]
Recipe = Annotated[
    str | None, typer.Option("--config", "-c", help="A recipe: a YAML file, or the name of a bundled one.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in an existing run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count requests, tokens and cost of endpoints; ask nobody.")]


KEYS_HELP = "List every setting with default and meaning."


def keys_option(**classes: str) -> Any:
    """The option `--keys` of a command whose settings are of these classes, `module:Class`, under these headings."""

    def show(wanted: bool) -> None:
        if not wanted:
            return
        for heading, place in classes.items():
            module, _, name = place.partition(":")
            if len(classes) > 1:
                typer.echo(f"With {heading}:\n")
            print_keys(getattr(importlib.import_module(f"tempering.{module}"), name))
        raise typer.Exit

    return typer.Option("--keys", is_eager=True, callback=show, help=KEYS_HELP)


EvalKeys = Annotated[bool, keys_option(settings="evals:EvalConfig")]
RedteamKeys = Annotated[
    bool,
    keys_option(
        **{
            "attacker=... and without attacks=...": "evals.redteam_settings:RedteamConfig",
            "attacks=[...], or neither": "evals:EvalConfig",
        }
    ),
]
CheckKeys = Annotated[bool, keys_option(settings="judges.check:CheckJudgeConfig")]
ChatKeys = Annotated[bool, keys_option(settings="chatting:ChatConfig")]
ServeKeys = Annotated[bool, keys_option(settings="serving.settings:ServeConfig")]
