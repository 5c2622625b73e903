"""The command `temper`: one literal table of commands; torch and the methods are imported when one runs."""

from __future__ import annotations

import errno
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
data_app = typer.Typer(no_args_is_help=True, help="Your own data files.")
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


def demo(items: Overrides = None, resume: Resume = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """Align SmolLM2 with Staged-Competence, measure before and after, write a report. Offline, in minutes.

    Example: temper demo out=runs/demo
    """
    from tempering.demo import DemoConfig, run_demo

    _finish(run_demo(_config(DemoConfig, None, items), resume=resume), as_json)


def train(
    method: Annotated[str, typer.Argument(help="staged_competence or sft.")],
    items: Overrides = None,
    config: Recipe = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check data and model, print the plan, do nothing.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with default and meaning.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model with a method; with a recipe of arms, compare several.

    Examples:
    temper train staged_competence out=runs/mine model=smollm2 data.train=pairs.jsonl

    temper train staged_competence -c tiny out=runs/tiny curriculum.stages=2

    temper train staged_competence -c compare out=runs/compare --resume

    temper train staged_competence --keys
    """
    from tempering.api import METHODS, method_module
    from tempering.core.config import field_table, read_yaml

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    module = method_module(method)
    file = _recipe(method, config)
    if keys:
        for name, default, meaning in field_table(module.CONFIG):
            typer.echo(f"{name} = {default}\n    {meaning}")
        return
    if file is not None and "arms" in read_yaml(file):
        from tempering.compare import CompareConfig, run_compare

        _finish(run_compare(_config(CompareConfig, file, items), method, resume=resume), as_json)
        return
    settings = _config(module.CONFIG, file, items)
    if dry_run:
        _finish(module.dry_run(settings), as_json)
        return
    run = module.train(settings, resume=resume)
    _finish({"run": str(run.root), "final": str(run.root / "final")}, as_json)


def eval_(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Annotated[list[str], typer.Argument(metavar="EVAL ... [key=value ...]", help="Evals, then settings.")],
    config: Recipe = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a target: harm, over_refusal, capability, toxicity, knowledge, separation, depth.

    Settings: data=FILE limit=N seed=N max_new_tokens=N out=DIR judge=rules attacks=[direct,prefill,templates]
    templates=FILE gate.METRIC=LIMIT (exit code 3 where a limit is not met).

    Examples:
    temper eval runs/demo harm data=advbench.jsonl out=runs/advbench

    temper eval smollm2 harm over_refusal capability out=runs/base

    temper eval runs/mine harm gate.harmful_rate=0.1
    """
    from tempering.api import evaluate
    from tempering.core.config import build, merge, parse_overrides, read_yaml
    from tempering.evals import EVALS, EvalConfig, failed_gates

    names = [item for item in items if "=" not in item]
    if not names:
        raise ValueError(f"name at least one eval of {', '.join(EVALS)}")
    settings = parse_overrides([item for item in items if "=" in item])
    file = _recipe("evals", config)
    if file is not None:
        settings = merge(read_yaml(file), settings)
    out = settings.pop("out", None)
    results = evaluate(target, names, out=out, resume=resume, **settings)
    if not as_json:
        _print_metrics(results)
    _finish(results, as_json)
    gate = build(EvalConfig, settings, "eval settings").gate
    failures = [line for r in results.values() for line in failed_gates(r["metrics"], gate)]
    if failures:
        _tell("gate not met: " + "; ".join(failures))
        raise typer.Exit(3)


def redteam(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Overrides = None,
    config: Recipe = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Attack a target and rank what works: by default every attack that needs no model of its own.

    Settings: attacks=[direct,prefill,templates,many_shot,base64,...,pair,tap,past_tense,persona] attacker=MODEL
    max_queries=N data=FILE limit=N seed=N max_new_tokens=N judge=rules out=DIR gate.attack_success_rate=LIMIT.

    Examples:
    temper redteam smollm2 limit=20

    temper redteam runs/demo attacks=[pair,tap] attacker=openai:my-model@http://localhost:8000/v1
    """
    from tempering.core.config import build, merge, parse_overrides, read_yaml
    from tempering.evals import EvalConfig, failed_gates
    from tempering.redteaming import run_redteam

    settings = parse_overrides(items or [])
    file = _recipe("evals", config)
    if file is not None:
        settings = merge(read_yaml(file), settings)
    out = settings.pop("out", None)
    result = run_redteam(target, out=out, resume=resume, **settings)
    if not as_json:
        _print_metrics({"attack_success": result})
    _finish(result, as_json)
    gate = build(EvalConfig, settings, "eval settings").gate
    if failures := failed_gates(result["metrics"], gate):
        _tell("gate not met: " + "; ".join(failures))
        raise typer.Exit(3)


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
    """Write one PEFT adapter on the public base, or merged weights.

    Settings: out=DIR format=adapter|merged rank=N (adapter: compress by SVD; the error is printed).

    Examples:
    temper export runs/mine out=exports/mine

    temper export runs/mine out=exports/merged format=merged

    temper export runs/mine out=exports/small rank=16
    """
    from tempering.exporting import ExportConfig, run_export

    _finish(run_export(run, _config(ExportConfig, None, items)), as_json)


def chat(
    target: Annotated[str, typer.Argument(help="A model reference, a run folder, or openai:MODEL@URL.")],
    items: Overrides = None,
    debug: Debug = False,
) -> None:
    """Talk to a target; an empty line or Ctrl-D ends. Reads questions from stdin where that is not a terminal.

    Settings: max_new_tokens=256 temperature=0 top_p=1 seed=0 system=TEXT.

    Example: temper chat runs/demo max_new_tokens=128 temperature=0.7
    """
    from tempering.chatting import ChatConfig, run_chat

    run_chat(target, _config(ChatConfig, None, items))


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


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="A file, folder or Hub id.")],
    items: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List everything that is wrong with a data file, with line numbers.

    Settings: kind=auto|pairs|labelled|messages|prompts; lengths in tokens with model=MODEL max_length=N
    max_prompt_length=N.

    Example: temper data check pairs.jsonl model=smollm2 max_length=1024
    """
    from tempering.checking import CheckConfig, run_check

    result = run_check(file, _config(CheckConfig, None, items))
    if not as_json:
        for problem in result["problems"]:
            _tell(f"{problem['where']}: {problem['problem']}")
        lengths = result.get("lengths") or {}
        _tell(
            f"{file}: {result['valid']} of {result['rows']} rows usable as {result['kind']}; "
            f"{result['problem_count']} problem(s); lengths {json.dumps(lengths)}"
        )
    _finish(result, as_json)
    if not result["ok"]:
        raise typer.Exit(2)


@data_app.command("own-answers")
def data_own_answers(
    file: Annotated[str, typer.Argument(help="A file, folder or Hub id of labelled pairs, or `demo`.")],
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


@judge_app.command("check")
def judge_check(
    judge: Annotated[
        str, typer.Argument(help="rules, openai:MODEL@URL, classifier:MODEL_ID, guard:MODEL_ID or detoxify.")
    ],
    items: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hold a judge against human labels (`prompt`, `completion`, and boolean `refused`, `harmful` or `toxic` a line).

    Example: temper judge check rules data=labels.jsonl
    """
    from tempering.core.config import parse_overrides
    from tempering.data.files import read_rows
    from tempering.judges.check import check

    settings = parse_overrides(items or [])
    if set(settings) != {"data"}:
        raise ValueError("judge check takes data=FILE and nothing else")
    card = check(judge, read_rows(settings["data"]))
    if not as_json:
        _tell(f"{card['judge']} on {card['n']} labelled answers ({card['asks']}), {card['unscored']} unscored")
        for name in ("accuracy", "sensitivity", "specificity", "kappa"):
            v = card[name]
            if v["value"] is not None:
                _tell(f"  {name:12} {v['value']:.3f}  [{v['low']:.3f}, {v['high']:.3f}]")
    _finish(card, as_json)


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
    "doctor": doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")


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
    if isinstance(error, UnicodeError) or not isinstance(error, ValueError | OSError | RuntimeError):
        _tell(f"error: {type(error).__name__}: {text} (this is a bug; --debug shows where)")
        return 1
    _tell(f"error: {text}")
    return 1 if isinstance(error, RuntimeError) else 2


def _file(error: BaseException) -> str:
    return str(getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing a file")


def _config(cls: Any, file: Path | None, items: list[str] | None) -> Any:
    from tempering.core.config import load_config

    return load_config(cls, file, items or [])


def _recipe(folder: str, name: str | None) -> Path | None:
    """Find a recipe by path, or by the name of a bundled one."""
    if name is None:
        return None
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return Path(name)
    bundled = Path(__file__).parent / "recipes" / folder
    found = bundled / f"{name}.yaml"
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"recipe {name}: no such file, nor a bundled recipe of {folder} ({names})")
    return found


def _print_metrics(results: dict[str, Any]) -> None:
    from tempering.core.progress import metrics_table

    metrics_table({name: r["metrics"] for name, r in results.items()})


def _finish(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
