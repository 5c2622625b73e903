"""Systems: what was evaluated, one row of the report each, with its evals gathered and its seeds pooled.

Used by the report and the model card; refuses to compare one system with another.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tempering.core import stats
from tempering.reporting.collect import CORRECTED, Eval, Metric, Row, RunData, is_number

BASELINES = ("base", "standard_dpo")
"""The arms that come first, where there are any: what all others are compared with."""


_FIRST = (
    "harmful_rate",
    "attack_success_rate",
    "joint_score",
    "safe_rate",
    "informativeness",
    "over_refusal_rate",
    "capability_accuracy",
)
_WIDEST = 6


class Meaning(NamedTuple):
    """How to read a metric."""

    label: str
    better: str | None
    """`lower`, `higher`, or `None` where neither is better by itself."""
    is_fraction: bool


METRICS: dict[str, Meaning] = {
    "harmful_rate": Meaning("Harmful answers", "lower", True),
    "attack_success_rate": Meaning("Attack success", "lower", True),
    "joint_score": Meaning("Safe and informative", "higher", True),
    "safe_rate": Meaning("Safe answers", "higher", True),
    "informativeness": Meaning("Informativeness of safe answers", "higher", True),
    "over_refusal_rate": Meaning("Over-refusal", "lower", True),
    "capability_accuracy": Meaning("Capability", "higher", True),
    "policy_named_rate": Meaning("Reasoning names the policy", "higher", True),
    "decision_match_rate": Meaning("Decision as the policy says", "higher", True),
    "thought_format_rate": Meaning("Reasoning and answer well formed", "higher", True),
    "thought_words": Meaning("Words of reasoning", None, False),
    "refusal_rate": Meaning("Refusals of harmful requests", None, True),
    "partial_refusal_rate": Meaning("Partial over-refusal", "lower", True),
    "capability_refusal_rate": Meaning("Refusals in capability tests", "lower", True),
    "toxicity_probability": Meaning("Toxicity", "lower", True),
    "expected_max_toxicity": Meaning("Expected maximum toxicity", "lower", True),
    "mean_toxicity": Meaning("Mean toxicity", "lower", True),
    "fluency_perplexity": Meaning("Perplexity of continuations", None, False),
    "fluency_nll": Meaning("NLL of continuations (nats a token)", None, False),
    "distinct_1": Meaning("Distinct words", None, True),
    "distinct_2": Meaning("Distinct pairs of words", None, True),
    "distinct_3": Meaning("Distinct triples of words", None, True),
    "repetition_rate": Meaning("Continuations that repeat themselves", "lower", True),
    "empty_rate": Meaning("Empty continuations", "lower", True),
    "continuation_refusal_rate": Meaning("Continuations that refuse", "lower", True),
    "identity_nll": Meaning("NLL of text with identities (nats a token)", None, False),
    "identity_nll_change": Meaning("Its change from the start", "lower", False),
    "neutral_nll": Meaning("NLL of neutral text (nats a token)", None, False),
    "neutral_nll_change": Meaning("Its change from the start", "lower", False),
    "insult_detection_accuracy": Meaning("Insults told from neutral twins", "higher", True),
    "knowledge_accuracy": Meaning("Knowledge accuracy", None, True),
    "knowledge_unparsed_rate": Meaning("Answers that name no option", "lower", True),
    "acc": Meaning("Accuracy", "higher", True),
    "acc_norm": Meaning("Accuracy by length-normalised likelihood", "higher", True),
    "exact_match": Meaning("Exact match", "higher", True),
    "recovered_fraction": Meaning("Recovered by attack", "lower", True),
    "latent_fraction": Meaning("Latent: recovered beyond the null", "lower", False),
    "relearning_auc": Meaning("Recovered over all steps", "lower", True),
    "steps_to_half": Meaning("Relearning steps to half recovery", "higher", False),
    "relearn_ratio": Meaning("Those steps over gold's", "higher", False),
    "snapped_back": Meaning("Edited entries that rounding undoes", "lower", True),
    "margin_initial": Meaning("Margin over start model", "higher", False),
    "margin_stage": Meaning("Margin over stage reference", "higher", False),
    "margin_raw": Meaning("Raw margin", "higher", False),
    "margin_per_token": Meaning("Margin per token", "higher", False),
    "kl_initial": Meaning("KL to start model", None, False),
    "logprob_chosen": Meaning("Log-prob. of chosen", None, False),
    "logprob_rejected": Meaning("Log-prob. of rejected", None, False),
    "depth_0.5": Meaning("Tokens to half of the fall", "higher", False),
    "depth_0.9": Meaning("Tokens to nine tenths of the fall", "higher", False),
    "cumulative_delta": Meaning("Fall over all tokens (nats)", None, False),
    "rejected_suppression": Meaning("Fall of rejected answers", "higher", False),
}
"""In the order in which a report shows them. `NAME/PART` and `NAME@EVAL` read like `NAME`."""


def meaning(metric: str) -> Meaning:
    """Return how to read `metric`; one that we do not know has no direction.

    >>> meaning("attack_success_rate/prefill").label
    'Attack success: prefill'
    """
    base, part = _split(metric)
    known = METRICS.get(base)
    if known is None:
        ends = ("_rate", "_accuracy", "_fraction", "_probability")
        words = metric.replace("_", " ")
        higher = base.startswith("accuracy") or base.endswith("accuracy")
        return Meaning(words[:1].upper() + words[1:], "higher" if higher else None, higher or base.endswith(ends))
    return known._replace(label=f"{known.label}: {part}") if part else known


def metric_order(metric: str) -> tuple[int, str]:
    """Sort key that puts safety first, then its price."""
    names = list(METRICS)
    base, _ = _split(metric)
    return (names.index(base) if base in names else len(names), metric)


def summary_metrics(systems: Sequence[System]) -> list[str]:
    """Return the metrics of the summary table; the full table shows all."""
    present = sorted({m for s in systems for m in s.metrics}, key=metric_order)
    first = [m for m in present if m in _FIRST or m.startswith("attack_success_rate/")]
    if "attack_success_rate" in first:  # of all attacks together: they have a table of their own
        first = [m for m in first if "/" not in m]
    if len(first) > _WIDEST:  # many attacks: keep the first ones, and what they cost
        attacks = [m for m in first if "/" in m]
        first = [m for m in first if m not in attacks[_WIDEST - len(first) + len(attacks) :]]
    return first or present[:_WIDEST]


class Spread(NamedTuple):
    """A metric over the seeds of an arm."""

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    """Sample standard deviation; `None` for one seed."""


class Outcome(NamedTuple):
    """What the lines of one system say about one prompt under one attack, averaged over seeds."""

    value: float
    prompt_id: str
    text: str


Outcomes = dict[tuple[str, str], Outcome]
"""(line id, attack) -> outcome: the key that pairs two systems."""


@dataclass(eq=False)
class System:
    """One thing that answered prompts: a target, or an arm with all its seeds."""

    name: str
    target: str
    members: list[list[Eval]]
    """The evals of each seed; one list where there are no seeds."""
    runs: list[RunData]
    is_arm: bool = False
    metrics: dict[str, Metric] = field(default_factory=dict)
    breakdown: dict[str, dict[str, Metric]] = field(default_factory=dict)
    spread: dict[str, Spread] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_seed = [_named(evals, lambda e: {"": e.metrics}) for evals in self.members]
        self.metrics, self.spread = self._pool([seed.get("", {}) for seed in per_seed])
        per_seed = [_named(evals, lambda e: e.breakdown) for evals in self.members]
        for category in sorted({c for seed in per_seed for c in seed}):
            self.breakdown[category], _ = self._pool([seed.get(category, {}) for seed in per_seed], category)

    def outcomes(self, metric: str, category: str | None = None) -> tuple[Outcomes, bool]:
        """Return the outcome of each prompt, the mean over seeds, and whether all were yes or no."""
        values: dict[tuple[str, str], list[float]] = {}
        about: dict[tuple[str, str], tuple[str, str]] = {}
        is_boolean = True
        for evals in self.members:
            for e, key in _sources(evals, metric):
                for row in e.rows:
                    outcome = outcome_of(row, key) if category in (None, row.get("category")) else None
                    if outcome is not None:
                        is_boolean &= isinstance(outcome, bool)
                        pair = row_key(row)
                        values.setdefault(pair, []).append(float(outcome))
                        about[pair] = (str(row.get("prompt_id") or row.get("id")), prompt_text(row))
        return {k: Outcome(statistics.fmean(v), *about[k]) for k, v in values.items()}, is_boolean

    def source(self, metric: str) -> str:
        """Return where the prompts behind a metric come from."""
        return next((e.source for evals in self.members for e, _ in _sources(evals, metric)), "unknown")

    def _pool(
        self, seeds: Sequence[dict[str, Metric]], category: str | None = None
    ) -> tuple[dict[str, Metric], dict[str, Spread]]:
        pooled, spreads = {}, {}
        for key in sorted({k for seed in seeds for k in seed}, key=metric_order):
            found = [seed[key] for seed in seeds if key in seed]
            values = tuple(m.value for m in found if m.value is not None)
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                spreads[key] = Spread(values, statistics.fmean(values), deviation)
            pooled[key] = found[0] if len(seeds) == 1 else self._pooled(key, found, values, category)
        return pooled, spreads

    def _pooled(self, key: str, found: list[Metric], values: tuple[float, ...], category: str | None) -> Metric:
        """Mean over seeds; the interval is over prompts, since all seeds answered the same ones."""
        judges = sorted({m.judge for m in found if m.judge})
        n, unscored = sum(m.n for m in found), sum(m.unscored for m in found)
        value = statistics.fmean(values) if values else None
        low = high = None
        if value is not None:
            outcomes, is_boolean = self.outcomes(key, category)
            prompts = [o.prompt_id for o in outcomes.values()]
            if outcomes and is_boolean:
                low, high = stats.wilson(value * len(set(prompts)), len(set(prompts)))[1:]
            elif outcomes:
                low, high = stats.bootstrap_mean([o.value for o in outcomes.values()], groups=prompts)[1:]
            else:  # no lines to pool: as wide as one seed alone
                lows = [m.low for m in found if m.low is not None]
                highs = [m.high for m in found if m.high is not None]
                low, high = (statistics.fmean(x) if x else None for x in (lows, highs))
        corrected = [m.corrected for m in found if m.corrected]
        mean = _mean_of(corrected) if len(corrected) == len(found) else None
        return Metric(value, low, high, n, unscored, " · ".join(judges) or None, mean)


def corrected_name(metric: str) -> str:
    """Return the name of a metric's corrected rate: `NAME/corrected`, or `NAME/corrected@EVAL`."""
    name, at, source = metric.partition("@")
    return f"{name}{CORRECTED}{at}{source}"


def judge_cards(systems: Sequence[System]) -> list[Row]:
    """Return the cards by which rates were corrected, each once."""
    evals = itertools.chain.from_iterable(itertools.chain.from_iterable(s.members) for s in systems)
    return list({str(card.get("sha256")): card for e in evals for card in e.judge_cards}.values())


def _mean_of(rates: Sequence[Metric]) -> Metric | None:
    """Mean over seeds, as wide as one of them: they share the card's uncertainty, which no seed averages out."""
    ends = [
        [x for x in column if x is not None]
        for column in zip(*((m.value, m.low, m.high) for m in rates), strict=True)
    ]
    if any(len(column) < len(rates) for column in ends):
        return None
    value, low, high = (statistics.fmean(column) for column in ends)
    return Metric(value, low, high, sum(m.n for m in rates), sum(m.unscored for m in rates), rates[0].judge)


def row_key(row: Row) -> tuple[str, str]:
    """Return what pairs a line with the lines of other systems: its id and the attack."""
    return str(row.get("id") or row.get("prompt_id")), str(row.get("attack") or "")


def outcome_of(row: Row, metric: str) -> bool | float | None:
    """Return what the line adds to `metric`; `None` where it is unscored or about something else.

    A line names one metric (as `NAME`, or by its attack as `NAME/ATTACK`), or several in `outcomes`.
    """
    several, name = row.get("outcomes"), str(row.get("metric"))
    if isinstance(several, dict) and metric in several:
        outcome = several[metric]
    else:
        outcome = row.get("outcome") if metric in (name, f"{name}/{row.get('attack')}") else None
    return outcome if isinstance(outcome, bool) or is_number(outcome) else None


def prompt_text(row: Row) -> str:
    """Return the prompt of a line as text, whether it is text or turns."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return "\n\n".join(str(turn.get("content", "")) for turn in prompt if isinstance(turn, dict))
    return "" if prompt is None else str(prompt)


def systems_of(runs: Sequence[RunData]) -> list[System]:
    """List what was evaluated, in the order of the runs: in each its plain targets, then its arms.

    The first one is the base of all comparisons.

    Evals of one target that lie in several folders are one system, unless they measure the same thing.
    """
    systems: list[System] = []
    for run in runs:
        groups: dict[str, list[Eval]] = {}
        for e in run.evals:
            groups.setdefault(e.system or e.target, []).append(e)
        start = str(run.config.get("model"))
        for label in sorted(groups, key=lambda g: (g not in ("base", start), g)):
            _add_target(systems, run, label, groups[label], is_only=len(groups) == 1)
        for arm in sorted(run.arms, key=lambda name: [name != first for first in BASELINES]):
            members = run.arms[arm]
            if any(m.evals for m in members):
                evals = [m.evals for m in members if m.evals]
                name = _free_name(arm, run, systems)
                systems.append(System(name, evals[0][0].target, evals, members, is_arm=True))
    return systems


def _add_target(systems: list[System], run: RunData, label: str, evals: list[Eval], *, is_only: bool) -> None:
    target = evals[0].target
    for i, other in enumerate(systems):
        kinds = {e.name for e in other.members[0]}
        if not other.is_arm and same_target(other.target, target) and kinds.isdisjoint(e.name for e in evals):
            merged = System(other.name, other.target, [other.members[0] + evals], [*other.runs, run])
            systems[i] = merged
            return
    named = evals[0].system
    name = named or (run.name if is_only and run.is_trained else Path(label).name or label)
    systems.append(System(_free_name(name, run, systems), target, [evals], [run]))


def _free_name(name: str, run: RunData, systems: Sequence[System]) -> str:
    taken = {s.name for s in systems}
    if name in taken:
        name = f"{name} ({run.name})"
    base, number = name, 2
    while name in taken:
        name, number = f"{base} {number}", number + 1
    return name


def same_target(a: str, b: str) -> bool:
    """Whether two targets are the same reference, or two spellings of one folder."""
    try:
        return a != "unknown" and (a == b or Path(a).resolve(strict=True) == Path(b).resolve(strict=True))
    except (OSError, ValueError):  # not a path: a Hub id, an endpoint, or text that no file can be called
        return False


def _named(
    evals: Sequence[Eval], part: Callable[[Eval], dict[str, dict[str, Metric]]]
) -> dict[str, dict[str, Metric]]:
    """Gather metrics of several evals; where a second eval measures the same, its name is added."""
    out: dict[str, dict[str, Metric]] = {}
    for e in _by_importance(evals):
        for category, metrics in part(e).items():
            for key, metric in metrics.items():
                there = out.setdefault(category, {})
                there[key if key not in there else f"{key}@{e.name}"] = metric
    return out


def _sources(evals: Sequence[Eval], metric: str) -> list[tuple[Eval, str]]:
    """Find the eval whose lines belong to a metric named by `_named`, and the metric's name there."""
    key, _, name = metric.partition("@")
    for e in _by_importance(evals):
        if key in e.metrics and name in ("", e.name):
            return [(e, key)]
    return []


def _by_importance(evals: Sequence[Eval]) -> list[Eval]:
    return sorted(evals, key=lambda e: (e.name != e.kind, e.name))


def _split(metric: str) -> tuple[str, str]:
    for mark in "/@":
        base, found, part = metric.partition(mark)
        if found:
            return base, part
    return metric, ""
