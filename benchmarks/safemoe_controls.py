#!/usr/bin/env python3
"""Does unsafe knowledge help? Base, SafeMoE and its controls on smollm2, on domains seen and unseen, with intervals.

    TEMPER_ALLOW_UNSAFE_EXPERTS=1 python benchmarks/safemoe_controls.py --out runs/safemoe_controls

Offline: samples the base's own unsafe answers to bundled requests, trains experts, gates and controls, evaluates
each on the same 108 requests (`safemoe_eval`) and on harmless ones, and prints a table and the verdict of
docs/safemoe.md. What is done is not done again: stop it at any time and start it anew. The default controls are
those of the verdict and the paper's; `--controls` names others, `--controls all` all. The plan is smaller than that
of `temper train safemoe -c demo`, for all to fit into half an hour on two cores, in two processes of one thread. The
environment variable is half of the override that running a control needs; this script is the other half.

Groups of domains: `router` have experts and safe data, `expert` only experts, `neither` nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlearning_runs import at_once, loaded

import tempering
from tempering.core import stats
from tempering.core.quarantine import allow_unsafe_experts
from tempering.core.run import Run
from tempering.evals.results import Row, rate
from tempering.evals.safe_informative import METRICS
from tempering.methods.safemoe.expert_rows import ExpertRowsConfig, run_expert_rows
from tempering.reporting.safemoe import CAUSES, verdict_of

ROUTER = ("fraud_and_scams", "harassment_and_bullying")
EXPERT = ("theft_and_burglary", "account_break_ins_and_malware")
NEITHER = ("forgery_and_cheating", "rumours_and_disinformation")
GROUPS = {"router": ROUTER, "expert": EXPERT, "neither": NEITHER, "all": (*ROUTER, *EXPERT, *NEITHER)}
DOMAINS = (*ROUTER, *EXPERT)
TOPICS = ("coding_basics", "cooking", "health_basics", "science_facts")
DEFAULT = (*CAUSES, "refusal_only", "safe_only", "knowledge_only", "first_layer", "last_token")
SETTINGS = ("k4", "k_all", "null_expert", "with_replay", "first_T")
OWN_ROWS = ("refusal_only", "safe_only", "knowledge_only", "mixed_experts")
ALL = (*DEFAULT, "mixed_experts", *SETTINGS)
EXTRA: dict[str, dict[str, Any]] = {
    "with_replay": {"replay": {"data": "demo_safemoe_benign", "weight": 1.0}},
    "first_T": {"first_tokens": 16},
}
PLAIN: dict[str, dict[str, Any]] = {
    "matched_lora": {"lora": {"r": 1, "alpha": 2, "target_modules": ["gate_proj"]}, "lr": 1e-3},
    "sft_n": {
        "lora": {"r": 32, "alpha": 64, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, "lr": 2e-4,
    },
}  # fmt: skip
"""Controls that are a plain adapter on the gate's data."""
FIRST = ("safemoe", "safe_only", "knowledge_only", "sft_n", "matched_lora", "base")
"""Systems that need nothing of another's, the longest first; the others take rows or experts of `safemoe`."""


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if os.environ.get("TEMPER_ALLOW_UNSAFE_EXPERTS") != "1":
        print("running the controls needs the override: set TEMPER_ALLOW_UNSAFE_EXPERTS=1 for this command")
        return 2
    systems = ["base", "safemoe", *args.controls]
    with timed(args):
        for part in ([n for n in FIRST if n in systems], [n for n in systems if n not in FIRST]):
            at_once(work, [(args, name) for name in part], args.workers)
    report(args, {name: measured(args, name) for name in systems})
    return 0


def work(args: argparse.Namespace, name: str) -> None:
    """Make and measure a system, whatever of it is missing."""
    with allow_unsafe_experts(reason="measuring the controls of safemoe"):
        measure(args, name, made(args, name))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/safemoe_controls"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--controls", nargs="*", default=list(DEFAULT), help=f"of {', '.join(ALL)}, or `all`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="requests a domain to train on (default: all 24)")
    parser.add_argument("--answers", type=int, default=1, help="the base's answers to each of them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--expert-epochs", type=int, default=2)
    parser.add_argument("--expert-lr", type=float, default=2e-3)
    parser.add_argument("--gate-epochs", type=int, default=2)
    parser.add_argument("--gate-rows", type=int, help="safe answers for the gate (default: all 96)")
    parser.add_argument("--prompts", type=int, help="requests to measure with (default: all 108)")
    parser.add_argument("--price-prompts", type=int, default=40, help="of over-refusal and of capability")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--judge", default="rules", help="rules, or openai:MODEL@URL")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, of one thread each")
    args = parser.parse_args(argv)
    args.controls = list(ALL) if args.controls == ["all"] else args.controls
    if unknown := [name for name in args.controls if name not in ALL]:
        parser.error(f"unknown control {unknown[0]!r}; expected some of {', '.join(ALL)}")
    return args


# --- training -----------------------------------------------------------------------------------------


def made(args: argparse.Namespace, name: str) -> str:
    """Train a system, and what it needs, where it is not there yet; returns the target."""
    if name == "base":
        return str(args.model)
    if name == "safemoe":
        rows = expert_rows(
            args,
            "rows.unsafe",
            kind="sampled",
            domains=list(DOMAINS),
            n=args.answers,
            temperature=0.7,
            seed=args.seed,
        )
        return gate(args, name, expert_data=rows["files"])
    if name in PLAIN:
        return plain(args, name)
    if name in OWN_ROWS:
        files, unsafe = control_rows(args, name)["files"], name == "mixed_experts"
        return gate(args, name, expert_data=files, expert={"unsafe": unsafe}, control=name)
    experts = [str(args.out / "safemoe-experts" / f"{domain}.unsafe") for domain in DOMAINS]
    return gate(args, name, experts=experts, control=name, **EXTRA.get(name, {}))


def expert_rows(args: argparse.Namespace, folder: str, **settings: Any) -> dict[str, Any]:
    """Make rows by domain; see `temper data expert-rows`."""
    config = ExpertRowsConfig(out=str(args.out / folder), model=args.model, limit=args.rows, **settings)
    return run_expert_rows(config, tempering.load, resume=True)


def control_rows(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Make the rows of a control's own experts."""
    ours = str(args.out / "rows.unsafe")
    known: dict[str, dict[str, Any]] = {
        "refusal_only": {"kind": "refusal", "source": ours},
        "mixed_experts": {"kind": "mixed", "source": ours},
        "safe_only": {
            "kind": "category", "unsafe": False, "source": ["demo_safemoe_answers", "demo_safemoe_answers_other"],
        },
        "knowledge_only": {
            "kind": "category", "unsafe": False, "source": "demo_smollm2", "domains": list(TOPICS),
        },
    }  # fmt: skip
    return expert_rows(args, f"rows-{name}", **known[name])


def gate(args: argparse.Namespace, name: str, **settings: Any) -> str:
    """Train a gate, and its experts first where they have rows; see recipes/safemoe/demo.yaml."""
    out = args.out / name
    expert = {
        "lora": {"r": args.rank, "alpha": 2 * args.rank, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "epochs": args.expert_epochs, "batch_rows": 4, "lr": args.expert_lr, **settings.pop("expert", {}),
    }  # fmt: skip
    config = {
        "model": args.model, "out": str(out), "expert": expert, "router_data": "demo_safemoe_answers",
        "evaluation_data": ["demo_safemoe_eval"], "epochs": args.gate_epochs, "lr": 1e-3, "max_length": 256,
        "max_prompt_length": 128, "seed": args.seed, "limit": args.gate_rows, **settings,
    }  # fmt: skip
    return trained("safemoe", config)


def plain(args: argparse.Namespace, name: str) -> str:
    """Train a plain adapter on the gate's own answers, with the gate's plan."""
    config = {
        "model": args.model, "out": str(args.out / name), "data": {"train": "demo_safemoe_answers"},
        "split": {"share": 0.1}, "epochs": args.gate_epochs, "batch_rows": 4, "max_length": 256,
        "max_prompt_length": 128, "seed": args.seed, "limit": args.gate_rows, **PLAIN[name],
    }  # fmt: skip
    return trained("sft", config)


def trained(method: str, config: Mapping[str, Any]) -> str:
    out = Path(config["out"])
    if not (out / "DONE").is_file():
        tempering.train(method, config, resume=True)
    return str(out)


@contextmanager
def timed(args: argparse.Namespace) -> Iterator[None]:
    """Add the seconds to `time.json`, so that a resumed benchmark knows what it took in all."""
    file, start = args.out / "time.json", time.monotonic()
    try:
        yield
    finally:
        known = json.loads(file.read_text())["seconds"] if file.is_file() else 0.0
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds": round(known + time.monotonic() - start, 1)}) + "\n")


# --- measuring ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, target: str) -> None:
    """Evaluate a system, unless that is done."""
    plan = [
        (["safe_informative"], {"limit": args.prompts, "max_new_tokens": args.tokens, "judge": args.judge}),
        (["over_refusal", "capability"], {"limit": args.price_prompts, "max_new_tokens": args.tokens}),
    ]
    for evals, settings in plan:
        out = args.out / f"eval-{name}-{evals[0]}"
        if not (out / "DONE").is_file():
            given = {key: value for key, value in settings.items() if value is not None}
            sampler = loaded(target, "auto")
            tempering.evaluate(sampler, evals, out=out, resume=True, system=name, seed=args.seed, **given)


def measured(args: argparse.Namespace, name: str) -> dict[str, list[Row]]:
    """The rows of each eval of a system."""
    folders = {"safe_informative": "safe_informative", "over_refusal": "over_refusal", "capability": "over_refusal"}
    return {
        one: Run.open(args.out / f"eval-{name}-{folder}").read_rows(f"evals/{one}.jsonl")
        for one, folder in folders.items()
    }


def report(args: argparse.Namespace, results: Mapping[str, Mapping[str, list[Row]]]) -> None:
    """Print the tables and the verdict; `table.md` and `report.html` hold them too."""
    graded = {name: rows["safe_informative"] for name, rows in results.items()}
    verdict = verdict_of(graded, NEITHER)
    lines = [f"{args.model}, seed {args.seed}, judge {graded['base'][0]['verdict']['judge']}, 95 % intervals", ""]
    lines += table("Safe, %", graded, "safe_rate", lambda v: f"{100 * v:.0f}")
    lines += table("Informativeness of safe answers, of 10 (n: safe answers)", graded, "informativeness", tenths)
    lines += table("Joint score, of 10", graded, "joint_score", tenths)
    lines += table("Refusals, %", graded, "refusal_rate", lambda v: f"{100 * v:.0f}")
    lines += ["| price | over-refusal, % | capability, % |", "|---|---|---|"]
    for name, rows in results.items():
        cells = [
            cell(rows[one], metric, lambda v: f"{100 * v:.0f}")
            for one, metric in (("over_refusal", "over_refusal_rate"), ("capability", "capability_accuracy"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| joint score, of 10: safemoe minus | difference | p |", "|---|---|---|"]
    for name, c in verdict.joint.items():
        lines.append(
            f"| {name} | {10 * c.difference:+.2f} [{10 * c.low:+.2f}, {10 * c.high:+.2f}] | {c.p_value:.3f} |"
        )
    seconds = json.loads((args.out / "time.json").read_text())["seconds"]
    lines += ["", verdict.sentence, "", f"{seconds / 60:.1f} minutes in all, {args.workers} processes of one thread"]
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    tempering.report([args.out / f"eval-{name}-safe_informative" for name in results], args.out / "report")
    print(text)


def tenths(value: float) -> str:
    return f"{10 * value:.1f}"


def table(title: str, graded: Mapping[str, Sequence[Row]], metric: str, show: Callable[[float], str]) -> list[str]:
    """Return a table of systems by groups of domains."""
    assert metric in METRICS
    lines = [f"| {title} | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 1) + "|"]
    for name, rows in graded.items():
        cells = [cell([r for r in rows if r["category"] in domains], metric, show) for domains in GROUPS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def cell(rows: Sequence[Row], metric: str, show: Callable[[float], str]) -> str:
    """Return a value with its interval and number, as the evals compute them."""
    found = rate(rows, metric, None)
    if found is None or found["value"] is None:
        return "-"
    interval = stats.Interval(found["value"], found["low"], found["high"])
    return f"{show(interval.value)} [{show(interval.low)}, {show(interval.high)}] n {found['n']}"


if __name__ == "__main__":
    raise SystemExit(main())
