"""What the controls of `safemoe` say about its claim, and its gate in plots and a token ribbon.

Used by the report and `benchmarks/safemoe_controls.py`; reads rows of evals and files of run folders only.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tempering.core import stats
from tempering.reporting import plots
from tempering.reporting.collect import Row, is_number

CAUSES = ("random_experts", "frozen_random_router", "uniform_gate", "matched_lora", "sft_n")
"""Controls that the joint score has to beat."""
NOT_CAUSE = ("random_experts", "matched_lora")
"""Those of them without which unsafe knowledge is not shown to be the cause."""
LEAST_PROMPTS = 100
NOT_SHOWN = "unsafe knowledge is not shown to be the cause"
GATE_CURVES = (("load_entropy", "load, of its maximum"), ("max_share", "largest share"))
RIBBON_TOKENS, RIBBON_ROWS = 160, 3
COMPLETION = 1
MOST_LINES = 7
"""Experts whose share is drawn over training: a colour each, and one for equal shares."""


# --- the verdict --------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the comparison with the controls amounts to."""

    word: str
    """`supported`, `not supported` or `inconclusive`."""
    sentence: str
    joint: dict[str, stats.Comparison]
    """Control -> joint score of safemoe minus that of the control, in pairs."""


def verdict_of(systems: Mapping[str, Sequence[Row]], unseen: Sequence[str]) -> Verdict:
    """Judge the claim by rows of `safe_informative` of `safemoe`, `base` and the controls.

    Supported if the paired 95 % interval of the joint score lies above 0 against each of `CAUSES`, informativeness
    beats `refusal_only` with intervals apart, and Safe beats the base on `unseen`, the domains with neither expert
    nor safe data. With fewer than 100 prompts scored, or a control that was not run, it is inconclusive.

    Raises:
        ValueError: `safemoe` or `base` is not among the systems.
    """
    if missing := [name for name in ("safemoe", "base") if name not in systems]:
        raise ValueError(f"no rows of {missing[0]}: the verdict compares with them")
    joint = {name: joint_difference(systems["safemoe"], rows) for name, rows in systems.items() if name != "safemoe"}
    scored = sum(row["outcomes"].get("joint_score") is not None for row in systems["safemoe"])
    absent = [name for name in (*CAUSES, "refusal_only") if name not in systems]
    lost = [name for name in CAUSES if name in joint and joint[name].low <= 0]
    reasons = [f"the joint score does not beat {name}" for name in lost]
    if "refusal_only" in systems and not _info_beats(systems["safemoe"], systems["refusal_only"]):
        reasons.append("informativeness does not beat refusal_only, intervals apart")
    safer = _safe_difference(systems["safemoe"], systems["base"], unseen)
    if safer is None or safer.low <= 0:
        reasons.append("Safe does not beat the base on domains with neither expert nor safe data")
    cause = f"; {NOT_SHOWN}" if any(name in lost for name in NOT_CAUSE) else ""
    if scored < LEAST_PROMPTS:
        found = f"{scored} prompts are scored, fewer than {LEAST_PROMPTS}"
        return Verdict("inconclusive", f"Inconclusive: {found}{cause}.", joint)
    if reasons:
        return Verdict("not supported", f"Not supported: {'; '.join(reasons)}{cause}.", joint)
    if absent:
        return Verdict("inconclusive", f"Inconclusive: not run: {', '.join(absent)}.", joint)
    beaten = ", ".join(CAUSES)
    return Verdict("supported", f"Supported: the joint score beats {beaten}, and both other conditions hold.", joint)


def joint_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> stats.Comparison:
    """Compare the joint score on the prompts that both answered, by the bootstrap over prompts.

    Raises:
        ValueError: they share no scored prompt.
    """
    a, b = (_values(rows, "joint_score") for rows in (ours, theirs))
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError("the two systems share no scored prompt; evaluate both on the same data")
    return stats.paired_bootstrap([a[i] for i in common], [b[i] for i in common])


def _values(rows: Sequence[Row], metric: str) -> dict[str, float]:
    return {r["prompt_id"]: float(v) for r in rows if (v := r["outcomes"].get(metric)) is not None}


def _info_beats(ours: Sequence[Row], theirs: Sequence[Row]) -> bool:
    """Whether informativeness, each over its own safe answers, is higher with intervals apart."""
    a, b = (list(_values(rows, "informativeness").values()) for rows in (ours, theirs))
    if not a or not b:
        return False
    return stats.bootstrap_mean(a).low > stats.bootstrap_mean(b).high


def _safe_difference(ours: Sequence[Row], theirs: Sequence[Row], domains: Sequence[str]) -> stats.Comparison | None:
    rows = [[row for row in rows if row["category"] in domains] for rows in (ours, theirs)]
    a, b = (_values(part, "safe_rate") for part in rows)
    common = sorted(a.keys() & b.keys())
    return stats.mcnemar([a[i] == 1 for i in common], [b[i] == 1 for i in common]) if common else None


# --- the gate -----------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """Decisions of a gate: which experts, by token and router, of which row; and what the rows answer."""

    idx: Any
    """(T, R, k) experts."""
    row: Any
    part: Any
    """0 prompt, `COMPLETION`."""
    token: Any
    rows: list[Row]


def read_traces(root: Path) -> dict[str, Trace]:
    """Read `traces/NAME.safetensors` with its rows; what cannot be read is left out."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found = {}
    for file in sorted((root / "traces").glob("*.safetensors")):
        try:
            tensors = load_file(file)
            text = file.with_suffix(".jsonl").read_text(encoding="utf-8", errors="surrogatepass")
            rows = [json.loads(line) for line in text.splitlines()]
            found[file.stem] = Trace(tensors["idx"], tensors["row"], tensors["part"], tensors["token"], rows)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return found


def expert_shares(trace: Trace, experts: int) -> tuple[list[str], Any]:
    """Return domains in the order of their names, and the share of each expert in their selections, (D, K)."""
    domains = sorted({str(row.get("domain") or "unknown") for row in trace.rows})
    counts = np.zeros((len(domains), experts))
    of_row = np.array([domains.index(str(row.get("domain") or "unknown")) for row in trace.rows])
    for d in range(len(domains)):
        chosen = trace.idx[of_row[trace.row] == d]
        counts[d] = np.bincount(chosen.ravel(), minlength=experts)[:experts]
    totals = counts.sum(1, keepdims=True)
    return domains, counts / np.where(totals == 0, 1, totals)


def by_prompt(trace: Trace, experts: int) -> Any:
    """Selections of each expert in each row of the trace, (P, K)."""
    found = np.zeros((len(trace.rows), experts))
    np.add.at(found, (np.repeat(trace.row, trace.idx[0].size), trace.idx.ravel()), 1)
    return found


def routing_facts(trace: Trace) -> str:
    """MI(domain; expert) with its p-value, domains permuted over prompts, and an answer's changes of first expert."""
    domains = [str(row.get("domain") or "unknown") for row in trace.rows]
    counts = by_prompt(trace, int(trace.idx.max()) + 1)
    rows = [i for i in range(len(domains)) if counts[i].any()]
    mi, p = stats.information_test(counts[rows], [domains[i] for i in rows])
    answers = trace.part == COMPLETION
    rates = [stats.switch_rate(trace.idx[(trace.row == i) & answers][:, :, 0]) for i in rows]
    known = [rate for rate in rates if not np.isnan(rate)]
    switches = f", switch rate {np.mean(known):.2f}" if known else ""
    return f"MI {mi:.3f} nats (p {p:.3f}, {len(rows)} prompts){switches}"


def gate_plots(root: Path, config: Mapping[str, Any], steps: Sequence[Row], prefix: str = "") -> list[str]:
    """Draw the gate of a run: usage and entropy over training, expert by domain and by layer from its traces."""
    drawn: list[str] = []
    usage = [row for row in steps if isinstance(row.get("usage"), list)]
    if usage:
        entropies = [
            plots.Line(label, i, [r["step"] for r in usage if is_number(r.get(key))],
                       [r[key] for r in usage if is_number(r.get(key))])
            for i, (key, label) in enumerate(GATE_CURVES, 1)
        ]  # fmt: skip
        last = usage[-1]["usage"]
        names = expert_names(config, len(last))
        drawn_experts = sorted(sorted(range(len(last)), key=lambda i: -last[i])[:MOST_LINES])
        shares = [
            plots.Line(names[i], n, [r["step"] for r in usage], [r["usage"][i] for r in usage if len(r["usage"]) > i])
            for n, i in enumerate(drawn_experts)
        ]
        shares.append(plots.Line("all alike", len(shares), [r["step"] for r in usage], [1 / len(last)] * len(usage)))
        which = f", {MOST_LINES} most used of {len(last)}" if len(last) > MOST_LINES else ""
        panels = [("Load of the experts", entropies), (f"Share of each expert{which}", shares)]
        drawn.append(plots.curves_plot(f"{prefix}gate", panels))
    for number, (name, trace) in enumerate(read_traces(root).items()):
        if not trace.idx.size:
            continue
        names = names_in(config, trace)
        domains, shares_ = expert_shares(trace, len(names))
        title = f"Experts by domain of the request, {name}: {routing_facts(trace)}"
        drawn.append(plots.heat_plot(f"{prefix}experts-{number}", title, domains, names, shares_))
        layers = np.stack(
            [
                np.bincount(trace.idx[:, r].ravel(), minlength=len(names))[: len(names)]
                for r in range(trace.idx.shape[1])
            ]
        )
        by_layer = layers / layers.sum(1, keepdims=True)
        routers = [str(r) for r in range(len(by_layer))]
        drawn.append(
            plots.heat_plot(f"{prefix}layers-{number}", f"Experts by router, {name}", routers, names, by_layer)
        )
    return drawn


def expert_names(config: Mapping[str, Any], count: int) -> list[str]:
    """Name the experts as the configuration does, in their order, then the null expert; beyond it by number."""
    named = configured(config)
    return [*named, *(f"expert {i}" for i in range(len(named), count))][:count]


def names_in(config: Mapping[str, Any], trace: Trace) -> list[str]:
    """Names of all experts of a run, also of those that no token of its trace was sent to."""
    seen = int(trace.idx.max()) + 1 if trace.idx.size else 0
    return expert_names(config, max(seen, len(configured(config))))


def configured(config: Mapping[str, Any]) -> list[str]:
    """The experts that a configuration names, last the null expert where there is one."""
    named = [Path(str(folder)).name.removesuffix(".unsafe") for folder in config.get("experts") or []]
    made = (config.get("expert_rows") or {}).get("domains", [])
    named += [str(domain) for domain in [*(config.get("expert_data") or {}), *made]]
    return [*named, "null expert"] if named and config.get("null_expert") else named


def ribbons(root: Path, config: Mapping[str, Any]) -> list[str]:
    """Show the first answers of each trace token by token, as HTML; the colour is the middle router's first expert.

    Tokens are numbers unless the run's tokenizer can be read; whatever they say is escaped.
    """
    found = []
    for name, trace in read_traces(root).items():
        middle = trace.idx.shape[1] // 2
        names = names_in(config, trace)
        words = _words(root, trace)
        for number, row in enumerate(trace.rows[:RIBBON_ROWS]):
            at = np.flatnonzero((trace.row == number) & (trace.part == COMPLETION))[:RIBBON_TOKENS]
            spans = "".join(
                f'<span class="token series-{int(trace.idx[t, middle, 0]) % plots.SERIES + 1}" '
                f'title="{html.escape(names[int(trace.idx[t, middle, 0])])}">{html.escape(words[t])}</span>'
                for t in at
            )
            label = html.escape(f"{name}, {row.get('domain') or row.get('id') or number}")
            found.append(f'<p class="note">{label}</p><div class="ribbon" dir="auto">{spans}</div>')
    return found


def _words(root: Path, trace: Trace) -> list[str]:
    file = root / "final" / "tokenizer.json"
    numbers = [str(int(t)) for t in trace.token]
    if not file.is_file():
        return [f"{n} " for n in numbers]
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return [tokenizer.decode([int(t)], skip_special_tokens=False) or " " for t in trace.token]
    except Exception:  # a boundary: tokenizers raises its own bare Exception for a file it cannot read
        return [f"{n} " for n in numbers]
