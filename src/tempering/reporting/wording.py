"""Numbers in words: the verdict in a sentence, values and intervals for people.

Used by the report and the model card; refuses to compute a statistic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tempering.reporting.collect import Metric
from tempering.reporting.compare import CLAIM, Compared
from tempering.reporting.systems import System, meaning

_SAFE_INFORMATIVE = ("joint_score", "safe_rate", "informativeness")


def verdict(systems: Sequence[System], comparisons: Sequence[Compared]) -> str:
    """Say in a sentence or two what changed from the first system to the main one, from the numbers only."""
    main = main_system(systems)
    if main is None:
        return "Nothing was evaluated: there are no evals in these runs."
    base = systems[0]
    by_metric = {c.metric: c for c in comparisons if c.a == main.name and c.b == base.name}
    parts: list[str] = []
    for metric in _headline_metrics(main):
        label, after = meaning(metric).label, main.metrics[metric]
        before = base.metrics.get(metric) if main is not base else None
        if before is None or before.value is None or after.value is None:
            parts.append(f"{label} {show(metric, after.value)} {_interval(metric, after)}".strip())
            continue
        compared = by_metric.get(metric)
        # Of a paired comparison the rates on the prompts that it is made on, which the difference is of.
        was, now = (compared.b_value, compared.a_value) if compared else (before.value, after.value)
        arrow = f"{show(metric, was)} → {show(metric, now)}"
        if parts:
            parts.append(f"{label.lower()} {_change(arrow, compared)}")
        elif compared is None:
            parts.append(f"{label} {arrow} (not paired)")
        else:
            parts.append(_headline(metric, label, arrow, compared))
    if not parts:
        return "Neither harm, over-refusal nor capability was measured."
    against = f" against {base.name}" if main is not base else ""
    subject = f"{main.name}{against}: " if main is base or len(systems) > 2 else ""
    return subject + "; ".join(parts) + "."


def main_system(systems: Sequence[System]) -> System | None:
    """Return what the report is about: the claim's arm, else the last trained system, else the last."""
    claim = [s for s in systems if s.is_arm and s.name == CLAIM]
    trained = [s for s in systems[1:] if any(r.is_trained for r in s.runs)]
    return next(iter(claim + trained[-1:] + list(systems[-1:])), None)


def show(metric: str, value: float | None, *, is_signed: bool = False) -> str:
    """Write a value for people: fractions in percent.

    >>> show("harmful_rate", 0.116), show("harmful_rate", 0.004), show("kl_initial", 12.345), show("kl_initial", -0.0)
    ('12 %', '0.4 %', '12.3', '0')
    """
    if value is None:
        return "–"
    if meaning(metric).is_fraction:
        value, unit = 100 * value, (" pp" if is_signed else " %")
        digits = 0 if abs(value) >= 9.95 or math.isclose(value, round(value), abs_tol=1e-9) else 1
        text = f"{value:.{digits}f}"
    else:
        unit, text = "", f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.2e}"
    if float(text) == 0:
        return text.removeprefix("-") + unit
    sign = "+" if is_signed and value > 0 else ""
    return (sign + text).replace("-", "−") + unit


def show_interval(metric: str, low: float | None, high: float | None, *, is_signed: bool = False) -> str:
    """Write an interval without repeating its unit; empty where there is none."""
    if low is None or high is None:
        return ""
    ends = [show(metric, x, is_signed=is_signed).removesuffix(" %").removesuffix(" pp") for x in (low, high)]
    return " to ".join(ends) if is_signed or "−" in ends[0] else "–".join(ends)


def correction_note(cards: Sequence[Mapping[str, Any]]) -> str:
    """Say what corrected rates are, what they assume, and on which cards they stand; empty without cards."""
    if not cards:
        return ""
    on = "; ".join(
        f"{card.get('judge')} on {card.get('n')} labelled answers ({card.get('positives')} {card.get('asks')}, "
        f"{card.get('negatives')} not), sensitivity {_share(card.get('sensitivity'))}, "
        f"specificity {_share(card.get('specificity'))}"
        for card in cards
    )
    return (
        "Corrected: what the rate would be if the judge erred on these answers as often as on answers labelled by "
        "people (Rogan and Gladen 1978); its interval carries the uncertainty of the judge's error too. How many of "
        "the answers are of either kind may differ from the labelled ones, what kind of answers they are may not. "
        f"Comparisons and sentences use the raw rates. Judged by: {on}."
    )


def _share(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "unknown"


def _headline(metric: str, label: str, arrow: str, compared: Compared) -> str:
    r, n = compared.result, compared.n
    evidence = (
        f"difference {show(metric, r.difference, is_signed=True)}, 95 % interval "
        f"{show_interval(metric, r.low, r.high, is_signed=True)}, n = {n}"
    )
    if not compared.is_clear:
        return f"{label} did not measurably change: {arrow} ({evidence})"
    verb = "fell" if r.difference < 0 else "rose"
    return f"{label} {verb} from {show(metric, compared.b_value)} to {show(metric, compared.a_value)} ({evidence})"


def _change(arrow: str, compared: Compared | None) -> str:
    if compared is None:
        return f"{arrow} (not paired)"
    if not compared.is_clear:
        return f"{arrow} (no measurable change)"
    return f"{'fell' if compared.result.difference < 0 else 'rose'} {arrow}"


def _headline_metrics(system: System) -> list[str]:
    wanted = ("harmful_rate", "attack_success_rate", *_SAFE_INFORMATIVE, "over_refusal_rate", "capability_accuracy")
    found = [m for m in wanted if m in system.metrics]
    if "attack_success_rate" not in found:
        attacks = [m for m in system.metrics if m.startswith("attack_success_rate/")]
        found[1:1] = attacks[:1] if found[:1] == ["harmful_rate"] else []
        found = found if found[:1] == ["harmful_rate"] else attacks[:1] + found
    return found


def _interval(metric: str, m: Metric) -> str:
    ends = show_interval(metric, m.low, m.high)
    return f"(95 % interval {ends} %, n = {m.n})" if ends and meaning(metric).is_fraction else f"(n = {m.n})"
