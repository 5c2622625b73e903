"""`temper data`: public data sets by name, and your own files."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from tempering.cli.options import AsJson, Debug, Overrides, Resume
from tempering.cli.shared import finish, read_config, tell

app = typer.Typer(no_args_is_help=True, help="Public data sets by name, and your own data files.")


@app.command("list")
def data_list(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the public data sets that `data=` and `data.train=` take by name. No network is used.

    None is bundled: a name reads NAME.jsonl (.csv, .parquet, ...) in the folder TEMPERING_DATA where there is one,
    else the Hub; NAME:PATH reads a copy of your own, NAME@REVISION another version.

    Rows are of the source; a licence with * is not for commercial use; gated ones ask you to accept terms first.

    Examples:
    temper data list

    temper data list --json

    temper eval runs/mine harm data=strongreject

    temper train sft data.train=alpaca:copies/alpaca.jsonl out=runs/alpaca
    """
    from tempering.data.describe import listed

    rows = listed()
    if not as_json:
        names, licences = (max(len(row[key] or "") for row in rows) + 2 for key in ("name", "licence"))
        purpose = None
        for row in rows:
            if row["purpose"] != purpose:
                purpose = row["purpose"]
                tell(f"\n{purpose}\n  {'name':{names}}{'rows':>9}  {'licence':{licences}}{'gated':7}what it is")
            licence = (row["licence"] or "unknown") + "*" * row["non_commercial"]
            gated = "yes" if row["gated"] else "no"
            tell(f"  {row['name']:{names}}{_count(row):>9}  {licence:{licences}}{gated:7}{row['what']}")
        tell("\n* not for commercial use. `temper data show NAME` says more.")
    finish(rows, as_json)


@app.command("show")
def data_show(
    name: Annotated[str, typer.Argument(help="A name of `temper data list`; NAME:PATH for your own copy.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say all about one public data set; with a copy of your own, its first rows as they are used.

    Examples:
    temper data show beavertails

    temper data show advbench:copies/harmful_behaviors.csv
    """
    from tempering.data.describe import described

    facts = described(name)
    if not as_json:
        tell(f"{facts['name']}: {facts['what']}")
        for title, value in (
            ("page", facts["page"]),
            ("reads", facts["reads"]),
            ("version", facts["version"]),
            ("part", ":".join(filter(None, (facts["config"], facts["split"]))) or "all"),
            ("rows", _count(facts)),
            ("becomes", facts["kind"]),
            ("licence", facts["licence"] or "unknown"),
            ("limits", _limits(facts)),
            ("cannot be loaded", facts["own_copy_only"]),
            ("note", facts["note"]),
        ):
            if value:
                tell(f"  {title:17} {value}")
        for row in facts.get("examples", ()):
            tell(f"  example           {json.dumps(row, ensure_ascii=False)}")
    finish(facts, as_json)


def _count(row: dict[str, Any]) -> str:
    return "unknown" if row["rows"] is None else f"{row['rows']:,}"


def _limits(facts: dict[str, Any]) -> str:
    limits = ["not for commercial use"] * facts["non_commercial"]
    limits += ["gated: accept its terms on its page, then `hf auth login`"] * facts["gated"]
    return "; ".join(limits)


@app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="A file, folder, catalogue name or Hub id.")],
    items: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List everything that is wrong with a data file, with line numbers.

    Settings: kind=auto|pairs|labelled|messages|prompts|texts; lengths in tokens with model=MODEL max_length=N
    max_prompt_length=N.

    Example: temper data check pairs.jsonl model=smollm2 max_length=1024
    """
    from tempering.checking import CheckConfig, run_check

    result = run_check(file, read_config(CheckConfig, None, items))
    if not as_json:
        for problem in result["problems"]:
            tell(f"{problem['where']}: {problem['problem']}")
        lengths = result.get("lengths") or {}
        for reason, count in result["left_out"].items():
            tell(f"left out {count} rows: {reason}")
        if result["rows"] and (expected := result.get("expected_rows")) not in (None, result["rows"]):
            tell(f"note: {result['rows']} rows, and {expected} are expected of {file}")
        tell(
            f"{file}: {result['valid']} of {result['rows']} rows usable as {result['kind']}; "
            f"{result['problem_count']} problem(s); lengths {json.dumps(lengths)}"
        )
    finish(result, as_json)
    if not result["ok"]:
        raise typer.Exit(2)


@app.command("own-answers")
def data_own_answers(
    file: Annotated[str, typer.Argument(help="A file, folder, catalogue name or Hub id of labelled pairs; `demo`.")],
    items: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Replace the chosen answers of harmless pairs by the start model's own, screened for refusals.

    Settings: model=smollm2 labels=[borderline,benign] out=DIR judge=rules max_new_tokens=56 temperature=0.3
    tries=3 seed=N.

    Example: temper data own-answers pairs.jsonl model=smollm2 out=runs/own
    """
    from tempering.answering import OwnAnswersConfig, run_own_answers

    result = run_own_answers(file, read_config(OwnAnswersConfig, None, items), resume=resume)
    if not as_json:
        tell(f"{result['replaced']} of {result['asked']} answers are the model's own now: {result['file']}")
    finish(result, as_json)


@app.command("preferences")
def data_preferences(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run of deliberative.")],
    items: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the baselines' data of a deliberative run: kept against rejected answers for DPO, and refusals for SFT.

    Settings: out=DIR model=MODEL (own answers where no candidate was rejected) judge=rules refusal_judge=rules
    max_new_tokens=64 seed=N.

    Example: temper data preferences runs/deliberative out=runs/preferences
    """
    from tempering.preferring import PreferencesConfig, run_preferences

    result = run_preferences(source, read_config(PreferencesConfig, None, items), resume=resume)
    if not as_json:
        tell(
            f"{result['pairs']} pairs of {result['requests']} requests, {result['refusals']} refusals: "
            f"{result['file']}"
        )
    finish(result, as_json)


@app.command("expert-rows")
def data_expert_rows(
    items: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make rows to train experts of safemoe on, one file a domain; unsafe ones stay in a quarantined folder.

    Settings: kind=sampled (the model's own answers), category (those of a file), refusal or mixed (of an earlier
    call, for controls); source=FILE domains=[...] model=smollm2 n=2 temperature=1.0 top_p=0.95 max_new_tokens=80
    limit=N seed=N out=DIR.

    Example: temper data expert-rows domains=[fraud_and_scams,theft_and_burglary] out=runs/rows.unsafe
    """
    from tempering.api import load
    from tempering.methods.safemoe.expert_rows import ExpertRowsConfig, run_expert_rows

    result = run_expert_rows(read_config(ExpertRowsConfig, None, items), load, resume=resume)
    if not as_json:
        for domain, count in result["rows"].items():
            tell(f"{count} rows of {domain}: {result['files'][domain]}")
    finish(result, as_json)


@app.command("safe-set")
def data_safe_set(
    file: Annotated[str, typer.Argument(help="Requests, each with a domain or category; `demo_safemoe_prompts`.")],
    items: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let a teacher answer requests until the answers are safe and informative: the data of safemoe's gate.

    Settings: generator=TARGET judge=rules|openai:MODEL@URL domains=[...] per_domain=200 attempts=8 least=7
    temperature=0.7 max_new_tokens=512 seed=N out=DIR; endpoint.KEY, judge_endpoint.KEY and cache=DIR of endpoints.

    Example: temper data safe-set prompts.jsonl generator=openai:MODEL@URL judge=openai:OTHER@URL out=runs/safe_set
    """
    from tempering.api import load
    from tempering.methods.safemoe.safe_set import SafeSetConfig, run_safe_set

    config = read_config(SafeSetConfig, None, items)

    def teacher(spec: str) -> Any:
        of_endpoint = {"cache": config.cache, **config.endpoint.model_dump()} if spec.startswith("openai:") else {}
        return load(spec, **of_endpoint)

    result = run_safe_set(file, config, teacher, resume=resume)
    if not as_json:
        found = result["yield"]
        tell(f"{result['kept']} answers kept of {found['attempts']} ({found['share']:.0%} good): {result['file']}")
    finish(result, as_json)
