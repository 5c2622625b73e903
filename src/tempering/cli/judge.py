"""`temper judge`: how far to trust a judge."""

from __future__ import annotations

from typing import Annotated

import typer

from tempering.cli.options import AsJson, CheckKeys, Debug, Overrides
from tempering.cli.shared import finish, read_config, tell, tokens_of

app = typer.Typer(no_args_is_help=True, help="Judges, and how far to trust them.")


@app.command("check")
def judge_check(
    judge: Annotated[
        str,
        typer.Argument(
            help="rules, openai:MODEL@URL, classifier:MODEL_ID, guard:MODEL_ID[#FORMAT], detoxify[:VARIANT], "
            "profanity_svm, lexicon, "
            "ensemble:JUDGE+JUDGE[+...] or pairwise:openai:MODEL@URL[#QUESTION]."
        ),
    ],
    items: Overrides = None,
    keys: CheckKeys = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hold a judge against human labels (`prompt`, `completion`, and boolean `refused`, `harmful` or `toxic` a line).

    A pairwise judge takes `prompt`, `chosen` and `rejected`, and is asked about each pair in both orders.

    Prints the judge's card and saves it, for `temper eval ... judge_card=FILE`. Settings: data=FILE out=FILE
    (default: a file in runs/judge-cards); of an endpoint (docs/endpoints.md): cache=DIR (a check that was cut short
    goes on from there) and endpoint.KEY=VALUE.

    Examples:
    temper judge check rules data=labels.jsonl

    temper judge check openai:MODEL@URL data=labels.jsonl cache=runs/judge endpoint.concurrency=32
    """
    from tempering.data.files import read_rows
    from tempering.judges.card import require_free, save_card
    from tempering.judges.check import CheckJudgeConfig, check

    settings = read_config(CheckJudgeConfig, None, items)
    require_free(settings.out)
    card = check(judge, read_rows(settings.data), source=settings.source, connect=settings.connect)
    if not as_json:
        unit = "pair" if card["kind"] == "pairwise" else "answer"
        tell(f"{card['judge']} on {card['n']} labelled {unit}s ({card['asks']}), {card['unscored']} unscored")
        for name in ("accuracy", "decided", "sensitivity", "specificity", "kappa", "position_consistency"):
            v = card.get(name)
            if v and v["value"] is not None:
                tell(f"  {name.replace('_', ' '):20} {v['value']:.3f}  [{v['low']:.3f}, {v['high']:.3f}]")
        tell(
            f"  {1000 * card[f'seconds_per_{unit}']:.3g} ms a{'n' * (unit == 'answer')} {unit}"
            + tokens_of(card["tokens"])
        )
    finish(card, as_json)
    tell(f"card: {save_card(card, settings.out)}")
