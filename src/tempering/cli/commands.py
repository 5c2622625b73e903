"""The commands of `temper` that are no group; torch and the methods are imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.options import (
    KEYS_HELP,
    AsJson,
    ChatKeys,
    Debug,
    DryRun,
    EvalKeys,
    Overrides,
    Recipe,
    RedteamKeys,
    Resume,
    ServeKeys,
)
from tempering.cli.shared import (
    eval_settings,
    find_recipe,
    finish,
    print_by_attacker,
    print_estimate,
    print_keys,
    print_metrics,
    read_config,
    require_gates,
    tell,
)

DRY_RUN_KEY = "dry_run=true"
"""What is taken for `--dry-run` among the settings of `train`."""
EVALS_KEY = "evals="
"""How the setting of `train` begins that no method knows: what is measured afterwards."""


def demo(items: Overrides = None, resume: Resume = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """Align SmolLM2 with Staged-Competence, measure before and after, write a report. Offline, in minutes.

    Example: temper demo out=runs/demo
    """
    from tempering.demo import DemoConfig, run_demo

    finish(run_demo(read_config(DemoConfig, None, items), resume=resume), as_json)


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

    temper train advgame -c one_gpu_7b data.train=demo --dry-run

    temper train staged_competence --keys
    """
    from tempering.api import METHODS, evaluate, method_module
    from tempering.api import train as train_
    from tempering.core.config import read_yaml
    from tempering.core.progress import IS_SECOND

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    module = method_module(method)
    file = find_recipe(method, config)
    if keys:
        print_keys(module.CONFIG)
        return
    if file is not None and "arms" in read_yaml(file):
        from tempering.compare import CompareConfig, run_compare

        finish(run_compare(read_config(CompareConfig, file, items), method, resume=resume), as_json)
        return
    given = items or []
    own = [item for item in given if item != DRY_RUN_KEY and not item.startswith(EVALS_KEY)]
    settings = read_config(module.CONFIG, file, own, without=("evals",))
    usual = module.evals_after(settings) if hasattr(module, "evals_after") else None
    names, measured = _evals_after(file, given, usual)
    if dry_run or DRY_RUN_KEY in given:
        finish(module.dry_run(settings), as_json)
        return
    run = train_(method, settings, resume=resume)
    given_out = {"out": run.root, **measured}
    results = evaluate(str(run.root), names, resume=resume, **given_out) if names and not IS_SECOND else {}
    if results and not as_json:
        print_metrics(results)
    made = {"run": str(run.root), "final": str(run.root / "final")}
    finish({**made, "evals": results} if results else made, as_json)
    require_gates(results, measured)


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

    temper eval runs/unlearned -c recipes/eval/unlearning.yaml gold=runs/gold out=runs/attacked

    temper eval runs/mine lm_eval tasks=[gsm8k,arc_easy] limit=100 out=runs/mine-lm-eval

    temper eval runs/mine harm over_refusal sampler=attribution attribution.n=8

    temper eval openai:MODEL@URL harm endpoint.price_in=1 endpoint.price_out=4 endpoint.budget=5 --dry-run
    """
    from tempering.api import estimate, evaluate
    from tempering.evals import EVALS

    given = items or []
    out, settings = eval_settings([item for item in given if "=" in item], config)
    of_recipe = settings.pop("evals", [])
    names = [item for item in given if "=" not in item] or of_recipe
    if not names:
        raise ValueError(f"name at least one eval of {', '.join(EVALS)}, or a recipe with `evals`")
    if dry_run:
        print_estimate(estimate(target, names, out=out, **settings), as_json)
        return
    results = evaluate(target, names, out=out, resume=resume, **settings)
    if not as_json:
        print_metrics(results)
    finish(results, as_json)
    require_gates(results, settings)


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

    out, settings = eval_settings(items or [], config)
    if dry_run:
        print_estimate(estimate_redteam(target, out=out, **settings), as_json)
        return
    result = run_redteam(target, out=out, resume=resume, **settings)
    if by_attackers(settings):
        if not as_json:
            print_by_attacker(result["metrics"])
        finish(result, as_json)
        if failures := failed_gates(result, settings.get("gate") or {}):
            tell("gate not met: " + "; ".join(failures))
            raise typer.Exit(3)
        return
    if not as_json:
        print_metrics({"attack_success": result})
    finish(result, as_json)
    settings.pop("authorised", None)
    require_gates({"attack_success": result}, settings)


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
    tell(f"wrote {where / 'report.html'}")
    finish(content, as_json)


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
        result = run_export(run, read_config(ExportConfig, None, items))
    except GateNotMet as error:
        tell(f"gate not met: {error}")
        raise typer.Exit(3) from None
    finish(result, as_json)


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

    run_chat(target, read_config(ChatConfig, None, items))


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

    serve_(target, read_config(ServeConfig, None if config is None else Path(config), items))


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what is installed, what is missing, and the command that mends it. No network is used."""
    from tempering.doctor import examine

    findings = examine()
    for finding in findings:
        mark = {"ok": "ok     ", "missing": "MISSING", "optional": "-      "}[finding.state]
        tell(f"{mark} {finding.what}: {finding.detail}" + (f"\n        mend: {finding.mend}" if finding.mend else ""))
    finish([f._asdict() for f in findings], as_json)
    if any(f.state == "missing" for f in findings):
        raise typer.Exit(1)


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
        _, settings = eval_settings([], wanted)
        wanted = settings.pop("evals", [])
    if not isinstance(wanted, list):
        raise ValueError(f"evals: expected a list of evals, or a recipe of `temper eval`, got {wanted!r}")
    eval_config(wanted, settings)
    return wanted, settings
