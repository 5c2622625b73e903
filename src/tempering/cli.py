"""The command `temper`: one literal table of commands; torch and the methods are imported when one runs."""

from __future__ import annotations

import errno
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

app = typer.Typer(
    name="temper",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make open-weight language models safe without making them useless, and prove it.\n\n"
    "Align, attack, measure. `temper demo` shows all of it on a small real model, offline, in minutes.",
)
data_app = typer.Typer(no_args_is_help=True, help="Public data sets by name, and your own data files.")
attribution_app = typer.Typer(no_args_is_help=True, help="Best-of-N by attribution: its controls, and by hand.")
judge_app = typer.Typer(no_args_is_help=True, help="Judges, and how far to trust them.")

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


def _keys(**classes: str) -> Any:
    """The option `--keys` of a command whose settings are of these classes, `module:Class`, under these headings."""

    def show(wanted: bool) -> None:
        if not wanted:
            return
        for heading, place in classes.items():
            module, _, name = place.partition(":")
            if len(classes) > 1:
                typer.echo(f"With {heading}:\n")
            _print_keys(getattr(importlib.import_module(f"tempering.{module}"), name))
        raise typer.Exit

    return typer.Option("--keys", is_eager=True, callback=show, help=KEYS_HELP)


EvalKeys = Annotated[bool, _keys(settings="evals:EvalConfig")]
RedteamKeys = Annotated[
    bool,
    _keys(
        **{
            "attacker=... and without attacks=...": "evals.redteam_settings:RedteamConfig",
            "attacks=[...], or neither": "evals:EvalConfig",
        }
    ),
]
CheckKeys = Annotated[bool, _keys(settings="judges.check:CheckJudgeConfig")]
ChatKeys = Annotated[bool, _keys(settings="chatting:ChatConfig")]
ServeKeys = Annotated[bool, _keys(settings="serving.settings:ServeConfig")]


DRY_RUN_KEY = "dry_run=true"
"""What is taken for `--dry-run` among the settings of `train`."""
EVALS_KEY = "evals="
"""How the setting of `train` begins that no method knows: what is measured afterwards."""


def demo(items: Overrides = None, resume: Resume = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """Align SmolLM2 with Staged-Competence, measure before and after, write a report. Offline, in minutes.

    Example: temper demo out=runs/demo
    """
    from tempering.demo import DemoConfig, run_demo

    _finish(run_demo(_config(DemoConfig, None, items), resume=resume), as_json)


def train(
    method: Annotated[
        str,
        typer.Argument(
            help="staged_competence, deliberative, safemoe, unlearn_knowledge, unlearn_toxicity, advgame, teach, "
            "sft, or attribution (a card)."
        ),
    ],
    items: Overrides = None,
    config: Recipe = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check data and model, print the plan, do nothing.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help=KEYS_HELP)] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model with a method; with a recipe of arms, compare several.

    `evals` in a recipe, or evals=... here, is measured afterwards: a list of evals, or a recipe of `temper eval`.
    The methods of unlearning are attacked by themselves; evals=[] leaves that out.

    Examples:
    temper train staged_competence out=runs/mine model=smollm2 data.train=pairs.jsonl

    temper train staged_competence -c tiny out=runs/tiny curriculum.stages=2

    temper train staged_competence -c compare out=runs/compare --resume

    temper train deliberative -c demo out=runs/deliberative

    temper train safemoe -c demo out=runs/safemoe

    temper train safemoe experts=[runs/fraud.unsafe,runs/theft.unsafe] router_data=safe.jsonl out=runs/safemoe

    temper train attribution model=runs/mine out=runs/card

    temper train unlearn_knowledge objective=cosine_rmu out=runs/unlearned

    temper train advgame out=runs/game

    temper train advgame -c one_gpu_7b judges.default=openai:MODEL@URL --dry-run

    temper train staged_competence --keys
    """
    from tempering.api import METHODS, evaluate, method_module
    from tempering.api import train as train_
    from tempering.core.config import read_yaml
    from tempering.core.progress import IS_SECOND

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    module = method_module(method)
    file = _recipe(method, config)
    if keys:
        _print_keys(module.CONFIG)
        return
    if file is not None and "arms" in read_yaml(file):
        from tempering.compare import CompareConfig, run_compare

        _finish(run_compare(_config(CompareConfig, file, items), method, resume=resume), as_json)
        return
    given = items or []
    own = [item for item in given if item != DRY_RUN_KEY and not item.startswith(EVALS_KEY)]
    settings = _config(module.CONFIG, file, own, without=("evals",))
    usual = module.evals_after(settings) if hasattr(module, "evals_after") else None
    names, measured = _evals_after(file, given, usual)
    if dry_run or DRY_RUN_KEY in given:
        _finish(module.dry_run(settings), as_json)
        return
    run = train_(method, settings, resume=resume)
    given_out = {"out": run.root, **measured}
    results = evaluate(str(run.root), names, resume=resume, **given_out) if names and not IS_SECOND else {}
    if results and not as_json:
        _print_metrics(results)
    made = {"run": str(run.root), "final": str(run.root / "final")}
    _finish({**made, "evals": results} if results else made, as_json)
    _require_gates(results, measured)


def eval_(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Annotated[
        list[str] | None, typer.Argument(metavar="EVAL ... [key=value ...]", help="Evals, then settings.")
    ] = None,
    config: Recipe = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    keys: EvalKeys = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure harm, over_refusal, capability, safe_informative, attack_success, toxicity, knowledge and more.

    Also separation, depth, policy_retrieval and lm_eval (docs/evals.md), and of unlearning over_erasure, collapse and
    the attacks that may undo it: relearning, quantisation, direction_ablation.

    Settings: data=FILE limit=N seed=N max_new_tokens=N out=DIR judge=rules attacks=[direct,prefill,templates]
    templates=FILE judge_card=FILE (also rates corrected for the judge's error) gate.METRIC=LIMIT (exit code 3
    where a limit is not met, or the metric not measured); sampler=attribution attribution.KEY=VALUE
    (docs/attribution.md); of lm_eval: tasks=[NAME,...] num_fewshot=N include_path=DIR. --keys lists all.

    Of endpoints (docs/endpoints.md): cache=DIR, and for the target endpoint.KEY=VALUE, for judges
    judge_endpoint.KEY=VALUE, where KEY is api_key_env, concurrency, timeout_s, retries, backoff_s, max_wait_s,
    stream, price_in, price_out, budget or max_tokens_total.

    Examples:
    temper eval runs/demo harm data=advbench.jsonl out=runs/advbench

    temper eval smollm2 harm over_refusal capability out=runs/base

    temper eval smollm2 over_refusal data=xstest out=runs/base-xstest

    temper eval runs/mine harm gate.harmful_rate=0.1

    temper eval runs/unlearned -c recipes/eval/unlearning.yaml gold=runs/gold

    temper eval runs/mine lm_eval tasks=[gsm8k,arc_easy] limit=100 out=runs/mine-lm-eval

    temper eval runs/mine harm over_refusal sampler=attribution attribution.n=8

    temper eval openai:MODEL@URL harm endpoint.price_in=1 endpoint.price_out=4 endpoint.budget=5 --dry-run
    """
    from tempering.api import estimate, evaluate
    from tempering.evals import EVALS

    given = items or []
    out, settings = _eval_settings([item for item in given if "=" in item], config)
    of_recipe = settings.pop("evals", [])
    names = [item for item in given if "=" not in item] or of_recipe
    if not names:
        raise ValueError(f"name at least one eval of {', '.join(EVALS)}, or a recipe with `evals`")
    if dry_run:
        _print_estimate(estimate(target, names, out=out, **settings), as_json)
        return
    results = evaluate(target, names, out=out, resume=resume, **settings)
    if not as_json:
        _print_metrics(results)
    _finish(results, as_json)
    _require_gates(results, settings)


def redteam(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Overrides = None,
    config: Recipe = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    keys: RedteamKeys = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Attack a target and rank what works: by default every attack that needs nothing but the target.

    Settings: attacks=[direct,prefill,templates,many_shot,base64,...,pair,tap,past_tense,persona,gcg] attacker=MODEL
    max_queries=N data=FILE limit=N seed=N max_new_tokens=N judge=rules out=DIR gate.attack_success_rate=LIMIT;
    --keys lists all.

    With attacker= and without attacks=, attackers make k attacks on each seed, harmful and benign, and all meet all:
    attacker=RUN (of `temper train advgame`), RUN@step-N, untrained, direct, template:NAME, templates, pair:MODEL, or
    a list of them; targets=[MODEL,...] beside the first; seeds=FILE k=8 limit=N filter=faithful judge=rules
    faithfulness=rules spend.max_queries=N spend.max_cost=N rate_per_minute=N concurrency=8 redact=true
    gate.attack_success_at_1=LIMIT.
    Where a cap is met it stops, and --resume goes on with a higher one.

    A target on another machine needs authorised=true and a cap; you give it where you may test that service.

    Examples:
    temper redteam smollm2 limit=20

    temper redteam runs/demo attacks=[pair,tap] attacker=openai:my-model@http://localhost:8000/v1

    temper redteam smollm2 attacker=runs/game limit=20 k=4 out=runs/attacked

    temper redteam runs/mine attacker=[runs/game,untrained,templates,direct] seeds=seeds.jsonl

    temper redteam smollm2 targets=[runs/game] attacker=[runs/game,runs/game@step-12,untrained] out=runs/matrix

    temper redteam openai:MODEL@https://example.org/v1 attacker=runs/game authorised=true spend.max_queries=1000
    """
    from tempering.redteaming import by_attackers, estimate_redteam, failed_gates, run_redteam

    out, settings = _eval_settings(items or [], config)
    if dry_run:
        _print_estimate(estimate_redteam(target, out=out, **settings), as_json)
        return
    result = run_redteam(target, out=out, resume=resume, **settings)
    if by_attackers(settings):
        if not as_json:
            _print_by_attacker(result["metrics"])
        _finish(result, as_json)
        if failures := failed_gates(result, settings.get("gate") or {}):
            _tell("gate not met: " + "; ".join(failures))
            raise typer.Exit(3)
        return
    if not as_json:
        _print_metrics({"attack_success": result})
    _finish(result, as_json)
    settings.pop("authorised", None)
    _require_gates({"attack_success": result}, settings)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN ...", help="Run folders; the first is the base of comparisons.")
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put runs side by side: report.html, report.md, report.json and model cards.

    Settings: out=DIR (default: the first run) title=TEXT.

    Example: temper report runs/base runs/mine out=runs/report
    """
    from tempering.api import report as make
    from tempering.core.config import parse_overrides

    settings = parse_overrides([r for r in runs if "=" in r])
    if unknown := set(settings) - {"out", "title"}:
        raise ValueError(f"report: unknown setting {sorted(unknown)[0]!r}; expected out=DIR or title=TEXT")
    folders = [r for r in runs if "=" not in r]
    content = make(folders, settings.get("out"), title=settings.get("title"))
    where = Path(settings.get("out") or folders[0])
    _tell(f"wrote {where / 'report.html'}")
    _finish(content, as_json)


def export(
    run: Annotated[str, typer.Argument(help="A run folder, adapter folder or model reference.")],
    items: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one PEFT adapter on the public base, merged weights, GGUF, sealed experts, or evals as logs of Inspect.

    For adapter and merged weights the exact command of vLLM is printed, and stands in the README beside them.

    Settings: out=DIR format=adapter|merged|gguf|bundle|inspect rank=N (adapter: compress by SVD; the error is
    printed) converter=FILE (llama.cpp's convert_hf_to_gguf.py) gguf_type=f32|f16|bf16|q8_0.
    A safemoe run gives a bundle, where what was measured meets the release gate (exit code 3 where not): baseline=DIR
    (evals of the base) force_reason=TEXT bundle.signing_key_env=NAME bundle.secret_env=NAME.

    Examples:
    temper export runs/mine out=exports/mine

    temper export runs/mine out=exports/merged format=merged

    temper export runs/mine out=exports/small rank=16

    temper export runs/mine out=exports/gguf format=gguf converter=llama.cpp/convert_hf_to_gguf.py

    temper export runs/safemoe out=exports/safemoe baseline=runs/base

    temper export runs/mine out=logs format=inspect
    """
    from tempering.exporting import ExportConfig, run_export
    from tempering.methods.safemoe.release import GateNotMet

    try:
        result = run_export(run, _config(ExportConfig, None, items))
    except GateNotMet as error:
        _tell(f"gate not met: {error}")
        raise typer.Exit(3) from None
    _finish(result, as_json)


def chat(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Overrides = None,
    keys: ChatKeys = False,
    debug: Debug = False,
) -> None:
    """Talk to a target; an empty line or Ctrl-D ends. Reads questions from stdin where that is not a terminal.

    Settings: against=TARGET (answers beside the first) show=[scores,routing,reasoning] max_new_tokens=256
    temperature=0 top_p=1 seed=0 system=TEXT sampler=attribution attribution.KEY=VALUE; --keys lists all.

    Examples:
    temper chat runs/demo max_new_tokens=128 temperature=0.7

    temper chat smollm2 against=runs/demo

    temper chat runs/mine sampler=attribution attribution.n=4 show=scores

    temper chat runs/safemoe show=routing < questions.txt
    """
    from tempering.chatting import ChatConfig, run_chat

    run_chat(target, _config(ChatConfig, None, items))


def serve(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Overrides = None,
    config: Recipe = None,
    keys: ServeKeys = False,
    debug: Debug = False,
) -> None:
    """Serve a target under OpenAI's protocol: chat completions, completions, models, health, metrics (docs/serve.md).

    Needs the extra `serve`: pip install 'tempering[serve]'. Ctrl-C or SIGTERM ends it: what runs may finish.

    Settings: host=127.0.0.1 port=8000 name=NAME token_env=TEMPER_SERVE_TOKEN token_file=FILE sampler=attribution
    attribution.KEY=VALUE dtype=float32 max_tokens=2048 max_queue=256 timeout_s=300 grace_s=30 unsafe_reason=TEXT;
    --keys lists all. A token is read from the environment or a file, and is needed for any host but this machine.

    Examples:
    temper serve smollm2

    temper serve runs/mine port=8080 name=mine

    temper serve runs/card attribution.n=8

    TEMPER_SERVE_TOKEN=$(openssl rand -hex 32) temper serve runs/mine host=0.0.0.0
    """
    from tempering.serving.running import serve as serve_
    from tempering.serving.settings import ServeConfig

    serve_(target, _config(ServeConfig, None if config is None else Path(config), items))


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what is installed, what is missing, and the command that mends it. No network is used."""
    from tempering.doctor import examine

    findings = examine()
    for finding in findings:
        mark = {"ok": "ok     ", "missing": "MISSING", "optional": "-      "}[finding.state]
        _tell(
            f"{mark} {finding.what}: {finding.detail}" + (f"\n        mend: {finding.mend}" if finding.mend else "")
        )
    _finish([f._asdict() for f in findings], as_json)
    if any(f.state == "missing" for f in findings):
        raise typer.Exit(1)


@data_app.command("list")
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
                _tell(f"\n{purpose}\n  {'name':{names}}{'rows':>9}  {'licence':{licences}}{'gated':7}what it is")
            licence = (row["licence"] or "unknown") + "*" * row["non_commercial"]
            gated = "yes" if row["gated"] else "no"
            _tell(f"  {row['name']:{names}}{_count(row):>9}  {licence:{licences}}{gated:7}{row['what']}")
        _tell("\n* not for commercial use. `temper data show NAME` says more.")
    _finish(rows, as_json)


@data_app.command("show")
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
        _tell(f"{facts['name']}: {facts['what']}")
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
                _tell(f"  {title:17} {value}")
        for row in facts.get("examples", ()):
            _tell(f"  example           {json.dumps(row, ensure_ascii=False)}")
    _finish(facts, as_json)


def _count(row: dict[str, Any]) -> str:
    return "unknown" if row["rows"] is None else f"{row['rows']:,}"


def _limits(facts: dict[str, Any]) -> str:
    limits = ["not for commercial use"] * facts["non_commercial"]
    limits += ["gated: accept its terms on its page, then `hf auth login`"] * facts["gated"]
    return "; ".join(limits)


@data_app.command("check")
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

    result = run_check(file, _config(CheckConfig, None, items))
    if not as_json:
        for problem in result["problems"]:
            _tell(f"{problem['where']}: {problem['problem']}")
        lengths = result.get("lengths") or {}
        for reason, count in result["left_out"].items():
            _tell(f"left out {count} rows: {reason}")
        if result["rows"] and (expected := result.get("expected_rows")) not in (None, result["rows"]):
            _tell(f"note: {result['rows']} rows, and {expected} are expected of {file}")
        _tell(
            f"{file}: {result['valid']} of {result['rows']} rows usable as {result['kind']}; "
            f"{result['problem_count']} problem(s); lengths {json.dumps(lengths)}"
        )
    _finish(result, as_json)
    if not result["ok"]:
        raise typer.Exit(2)


@data_app.command("own-answers")
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

    result = run_own_answers(file, _config(OwnAnswersConfig, None, items), resume=resume)
    if not as_json:
        _tell(f"{result['replaced']} of {result['asked']} answers are the model's own now: {result['file']}")
    _finish(result, as_json)


@data_app.command("preferences")
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

    result = run_preferences(source, _config(PreferencesConfig, None, items), resume=resume)
    if not as_json:
        _tell(
            f"{result['pairs']} pairs of {result['requests']} requests, {result['refusals']} refusals: "
            f"{result['file']}"
        )
    _finish(result, as_json)


@data_app.command("expert-rows")
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

    result = run_expert_rows(_config(ExpertRowsConfig, None, items), load, resume=resume)
    if not as_json:
        for domain, count in result["rows"].items():
            _tell(f"{count} rows of {domain}: {result['files'][domain]}")
    _finish(result, as_json)


@data_app.command("safe-set")
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

    config = _config(SafeSetConfig, None, items)

    def teacher(spec: str) -> Any:
        of_endpoint = {"cache": config.cache, **config.endpoint.model_dump()} if spec.startswith("openai:") else {}
        return load(spec, **of_endpoint)

    result = run_safe_set(file, config, teacher, resume=resume)
    if not as_json:
        found = result["yield"]
        _tell(f"{result['kept']} answers kept of {found['attempts']} ({found['share']:.0%} good): {result['file']}")
    _finish(result, as_json)


@judge_app.command("check")
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

    settings = _config(CheckJudgeConfig, None, items)
    require_free(settings.out)
    card = check(judge, read_rows(settings.data), source=settings.source, connect=settings.connect)
    if not as_json:
        unit = "pair" if card["kind"] == "pairwise" else "answer"
        _tell(f"{card['judge']} on {card['n']} labelled {unit}s ({card['asks']}), {card['unscored']} unscored")
        for name in ("accuracy", "decided", "sensitivity", "specificity", "kappa", "position_consistency"):
            v = card.get(name)
            if v and v["value"] is not None:
                _tell(f"  {name.replace('_', ' '):20} {v['value']:.3f}  [{v['low']:.3f}, {v['high']:.3f}]")
        _tell(
            f"  {1000 * card[f'seconds_per_{unit}']:.3g} ms a{'n' * (unit == 'answer')} {unit}"
            + _tokens(card["tokens"])
        )
    _finish(card, as_json)
    _tell(f"card: {save_card(card, settings.out)}")


@attribution_app.command("controls")
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

    settings = _config(ControlsConfig, _recipe("attribution", config), items)
    _finish(run_controls(target, settings, resume=resume), as_json)


@attribution_app.command("attack")
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

    result = run_attack(target, _config(AttackConfig, None, items), resume=resume)
    if not as_json:
        show_attack(result)
    _finish(result, as_json)


@attribution_app.command("rerank")
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

    _finish(run_rerank(target, _config(RerankConfig, None, items)), as_json)


@attribution_app.command("gap")
def attribution_gap(items: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Tabulate teachers and students: safety gap, transfer and utility tax, from measured rates.

    Settings: data=FILE with `teacher`, `student`, `asr`, `teacher_asr`, ... a row, all fractions.

    Example: temper attribution gap data=configurations.jsonl --json
    """
    from tempering.attributing import GapConfig, run_gap

    _finish(run_gap(_config(GapConfig, None, items)), as_json)


INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer catches and returns."""

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "eval": eval_,
    "redteam": redteam,
    "report": report,
    "export": export,
    "chat": chat,
    "serve": serve,
    "doctor": doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
app.add_typer(attribution_app, name="attribution")


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
            _tell(f"error: {text} (temper --help lists what there is)")
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
    _tell("interrupted; the same command with --resume goes on where it has that")
    return INTERRUPTED


def _explain(error: BaseException) -> int:
    text = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        _tell(
            f"error: the disk is full ({_file(error)}); free some space, then run the same command again "
            "(with --resume where it has that)"
        )
        return 2
    if isinstance(error, PermissionError):
        _tell(f"error: no permission for {_file(error)}; give another folder with out=DIR")
        return 2
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        _tell(f"error: {_file(error)}: {error.strerror}; give another path (out= says where results go)")
        return 2
    if isinstance(error, UnicodeError) or not isinstance(error, ValueError | OSError | RuntimeError):
        _tell(f"error: {type(error).__name__}: {text} (this is a bug; --debug shows where)")
        return 1
    _tell(f"error: {text}")
    return 1 if isinstance(error, RuntimeError) else 2


def _file(error: BaseException) -> str:
    return str(getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing a file")


def _config(cls: Any, file: Path | None, items: list[str] | None, *, without: tuple[str, ...] = ()) -> Any:
    from tempering.core.config import load_config

    return load_config(cls, file, items or [], without=without)


def _evals_after(file: Path | None, items: list[str], usual: str | None) -> tuple[list[str], dict[str, Any]]:
    """Return what to measure after a training, and its settings: `evals` of the command line, else of its recipe,
    else what is `usual`.

    Raises:
        ValueError, FileNotFoundError: no such evals, settings or recipe; nothing has been trained.
    """
    from tempering.api import eval_config
    from tempering.core.config import parse_overrides, read_yaml

    tree = read_yaml(file) if file is not None else {}
    tree |= parse_overrides([item for item in items if item.startswith(EVALS_KEY)])
    wanted = tree.get("evals", usual) or []
    settings: dict[str, Any] = {}
    if isinstance(wanted, str):
        _, settings = _eval_settings([], wanted)
        wanted = settings.pop("evals", [])
    if not isinstance(wanted, list):
        raise ValueError(f"evals: expected a list of evals, or a recipe of `temper eval`, got {wanted!r}")
    eval_config(wanted, settings)
    return wanted, settings


def _recipe(folder: str, name: str | None) -> Path | None:
    """Find a recipe by path, or by the name of a bundled one."""
    if name is None:
        return None
    bundled = Path(__file__).parent / "recipes" / folder
    found = bundled / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") or ("/" in name and not found.is_file()):
        return Path(name)
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"recipe {name}: no such file, nor a bundled recipe of {folder} ({names})")
    return found


def _eval_settings(items: list[str], recipe: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return `out=`, and the settings of an eval: those of a recipe, and over them those of the command line."""
    from tempering.core.config import merge, parse_overrides, read_yaml

    file = _recipe("eval", recipe)
    settings = merge(read_yaml(file) if file is not None else {}, parse_overrides(items))
    return settings.pop("out", None), settings


def _require_gates(results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Exit with code 3 where a gate is not met."""
    from tempering.core.config import build
    from tempering.evals import EvalConfig, failed_gates

    gate = build(EvalConfig, settings, "eval settings").gate
    measured = {name for result in results.values() for name in result["metrics"]}
    failures: dict[str, None] = {}
    for metrics in (result["metrics"] for result in results.values()):
        here = {name: bound for name, bound in gate.items() if name in metrics or name not in measured}
        failures |= dict.fromkeys(failed_gates(metrics, here))
    if failures:
        _tell("gate not met: " + "; ".join(failures))
        raise typer.Exit(3)


def _print_keys(config: Any) -> None:
    from tempering.core.config import field_table

    for name, default, meaning in field_table(config):
        typer.echo(f"{name} = {default}\n    {meaning}")


def _print_metrics(results: dict[str, Any]) -> None:
    from tempering.core.progress import metrics_table

    metrics_table({name: r["metrics"] for name, r in results.items()})


def _print_by_attacker(metrics: dict[str, dict[str, Any]]) -> None:
    """Print a table a target, with a column an attacker."""
    from tempering.core.progress import metrics_table

    for target, found in metrics.items():
        columns: dict[str, dict[str, Any]] = {}
        for key, metric in found.items():
            name, _, attacker = key.partition("/")
            columns.setdefault(attacker, {})[name] = metric
        metrics_table(columns, title=target)


def _tokens(used: dict[str, int] | None) -> str:
    return "" if used is None else f", {used['prompt_tokens']} tokens read and {used['completion_tokens']} written"


def _print_estimate(found: list[dict[str, Any]], as_json: bool) -> None:
    _finish(found, as_json)
    if as_json:
        return
    for row in found:
        cost = row["cost_at_most"]
        _tell(
            f"{row['eval']}, {row['role']}, {row['endpoint']}: {row['requests']:,} requests "
            f"({row['cached']:,} more are answered already), about {row['prompt_tokens_about']:,} prompt tokens, "
            f"at most {row['completion_tokens_at_most']:,} completion tokens, "
            + ("no prices given" if cost is None else f"cost at most about {cost:.4g}")
        )
    _tell(
        "prompt tokens are guessed at 4 bytes of UTF-8 each, plus 4 a turn; a judge's prompts with answers of full "
        "length; tries after a failure are not counted"
        if found
        else "nothing is asked of an endpoint"
    )


def _finish(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
