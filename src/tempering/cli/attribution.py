"""`temper attribution`: best-of-N by attribution, its controls, and by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from tempering.cli.options import AsJson, Debug, Overrides, Recipe, Resume
from tempering.cli.shared import find_recipe, finish, read_config

app = typer.Typer(no_args_is_help=True, help="Best-of-N by attribution: its controls, and by hand.")


@app.command("controls")
def attribution_controls(
    target: Annotated[str, typer.Argument(help="An aligned model, or a calibration run.")],
    items: Overrides = None,
    config: Recipe = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw one set of candidates and choose among them in every way: the paper's, and those that could refute it.

    Settings: data=FILE limit=N n=8 temperature=0.7 max_new_tokens=128 judge=rules guard=JUDGE base=MODEL out=DIR.

    With `-c controls` also those that need a training, a pair or an attack of their own (docs/attribution.md).

    Examples:
    temper attribution controls runs/mine n=8 out=runs/controls

    temper attribution controls runs/mine -c controls out=runs/controls
    """
    from tempering.attributing import ControlsConfig, run_controls

    settings = read_config(ControlsConfig, find_recipe("attribution", config), items)
    finish(run_controls(target, settings, resume=resume), as_json)


@app.command("attack")
def attribution_attack(
    target: Annotated[str, typer.Argument(help="An aligned model, or a calibration run.")],
    items: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Attack the first answer, and attribution's choice, with PAIR on the same goals; paired test.

    Settings: attacker=MODEL attacker_form=plain|json data=FILE limit=N streams=N rounds=N n=8 judge=rules
    similarity=true (also an attacker that is rewarded for low similarity) attribution.KEY=VALUE out=DIR.

    Example: temper attribution attack runs/mine attacker=smollm2 limit=10 out=runs/attack
    """
    from tempering.attributing import show_attack
    from tempering.refuting import AttackConfig, run_attack

    result = run_attack(target, read_config(AttackConfig, None, items), resume=resume)
    if not as_json:
        show_attack(result)
    finish(result, as_json)


@app.command("rerank")
def attribution_rerank(
    target: Annotated[str, typer.Argument(help="An aligned model, or a calibration run.")],
    items: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Rank candidates that were made elsewhere: a `prompt` with `completions` a row.

    Settings: data=FILE out=FILE attribution.KEY=VALUE.

    Example: temper attribution rerank runs/mine data=candidates.jsonl out=ranked.jsonl attribution.scorer=kl
    """
    from tempering.attributing import RerankConfig, run_rerank

    finish(run_rerank(target, read_config(RerankConfig, None, items)), as_json)


@app.command("gap")
def attribution_gap(items: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Tabulate teachers and students: safety gap, transfer and utility tax, from measured rates.

    Settings: data=FILE with `teacher`, `student`, `asr`, `teacher_asr`, ... a row, all fractions.

    Example: temper attribution gap data=configurations.jsonl --json
    """
    from tempering.attributing import GapConfig, run_gap

    finish(run_gap(read_config(GapConfig, None, items)), as_json)
