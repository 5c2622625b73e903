"""The page: what each section of `report.html` shows, in the order of reading.

Used by the report. The template escapes everything but the plots made here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from tempering.reporting import plots, unlearning, wording
from tempering.reporting.attacks import ranking
from tempering.reporting.attribution import attack_panels, attribution_panels, gap_panels
from tempering.reporting.card import base_model, licences_of
from tempering.reporting.cautions import judges_of
from tempering.reporting.collect import RunData, phase_seconds, texts
from tempering.reporting.compare import CLAIM, Compared, Refutation
from tempering.reporting.probe_signal import probe_signals
from tempering.reporting.reconstruction import called
from tempering.reporting.redteam import redteam_panels
from tempering.reporting.safemoe import ribbons
from tempering.reporting.systems import System, corrected_name, judge_cards, meaning, metric_order, summary_metrics
from tempering.reporting.training import arms_plot, difficulty_note, training_plots
from tempering.reporting.transcripts import examples

_PHASES = ("scoring", "reference", "training", "evaluation", "report")


def page(
    runs: Sequence[RunData],
    systems: Sequence[System],
    comparisons: Sequence[Compared],
    refutation: Sequence[Refutation],
    warnings: Sequence[str],
    *,
    title: str | None = None,
) -> str:
    """Return the HTML of the report."""
    import jinja2
    from markupsafe import Markup

    here = resources.files("tempering.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(meaning=meaning, show=wording.show, show_interval=wording.show_interval, forest=forest)
    template = environment.from_string((here / "report.html.j2").read_text(encoding="utf-8"))
    main = wording.main_system(systems)
    shown = list(dict.fromkeys([*systems[:1], *([main] if main else [])]))
    ranked = dict.fromkeys([*shown, *systems])
    series = {s.name: i for i, s in enumerate(ranked)}
    return template.render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        title=title or _title(runs, main),
        verdict=_unbroken(_verdict(systems, main, comparisons)),
        systems=systems,
        main=main,
        series=series,
        summary=summary_metrics(systems),
        correction=wording.correction_note(judge_cards(systems)),
        corrected_name=corrected_name,
        correction_of=lambda key: any(s.metrics[key].corrected for s in systems if key in s.metrics),
        judged_by=lambda key: sorted({s.metrics[key].judge or "" for s in systems if key in s.metrics} - {""}),
        metrics=sorted({m for s in systems for m in s.metrics}, key=metric_order),
        safety=[Markup(svg) for svg in _safety(systems, series)],
        comparisons=_comparisons(comparisons),
        refutation=refutation,
        has_claim=any(s.is_arm and s.name == CLAIM for s in systems),
        arms=[s for s in systems if s.is_arm],
        arms_svg=Markup(_arms_svg(runs, series)),
        attacks=[(s, ranking(s)) for s in systems if len(ranking(s)) > 1],
        attribution=[
            {**panel, "plots": [Markup(svg) for svg in panel["plots"]]} for panel in attribution_panels(runs)
        ],
        attribution_attacks=attack_panels(runs),
        gaps=gap_panels(runs),
        redteams=redteam_panels(runs),
        unlearned=[
            {**panel, "plots": [Markup(svg) for svg in panel["plots"]]} for panel in unlearning.panels(systems)
        ],
        pareto=Markup(unlearning.pareto(systems, series)),
        signals=probe_signals(runs, systems),
        categories=_categories(systems),
        training=_training(runs),
        cost=_cost(runs),
        examples=examples(shown),
        provenance=[_provenance(run) for run in runs],
        warnings=warnings,
    )


def _verdict(systems: Sequence[System], main: System | None, comparisons: Sequence[Compared]) -> str:
    """What unlearning came to where the main system was made to forget, else what changed."""
    of_main = [u for u in unlearning.unlearned_of(systems) if u.system is main]
    return unlearning.headline(of_main[0]) if of_main else wording.verdict(systems, comparisons)


def _comparisons(comparisons: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return one table a reference system, with the scale of its little plots (points at either end)."""
    tables = []
    for against, group in itertools.groupby(comparisons, key=lambda c: c.b):
        rows = list(group)
        shares = [c.result for c in rows if meaning(c.metric).is_fraction]
        widest = max([0.1, *(max(abs(r.low), abs(r.high)) for r in shares)])
        tables.append({"against": against, "rows": rows, "scale": math.ceil(10 * widest) / 10})
    return tables


def forest(compared: Compared, scale: float) -> dict[str, float] | None:
    """Return where to draw a difference between -100 and 100; `None` for what is no fraction."""
    if not meaning(compared.metric).is_fraction:
        return None
    r = compared.result
    places = {"low": r.low, "high": r.high, "at": r.difference}
    return {name: round(100 * x / scale, 2) for name, x in places.items()}


def _unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r" (?=%|pp\b|=)|(?<==) ", "\u00a0", text)


def _title(runs: Sequence[RunData], main: System | None) -> str:
    return main.name if main else runs[0].name


def _safety(systems: Sequence[System], series: dict[str, int]) -> list[str]:
    metric = next((m for m in ("harmful_rate", "attack_success_rate") if any(m in s.metrics for s in systems)), None)
    if metric is None:
        return []
    panels = []
    for price, label, title in (
        ("over_refusal_rate", "over-refusal (lower is better)", "Safety against over-refusal"),
        ("capability_accuracy", "capability (higher is better)", "Safety against capability"),
    ):
        points = [
            plots.Point(s.name, series[s.name], x, (1 - harm[0], 1 - harm[2], 1 - harm[1]))
            for s in systems
            if (x := _interval(s, price)) and (harm := _interval(s, metric))
        ]
        if points:
            panels.append((title, label, points))
    names = {"harmful_rate": "harmless answers", "attack_success_rate": "attacks withstood"}
    return [plots.safety_plot(panels, names[metric])] if panels else []


def _interval(system: System, metric: str) -> tuple[float, float, float] | None:
    m = system.metrics.get(metric)
    if m is None or m.value is None:
        return None
    return (m.value, m.value if m.low is None else m.low, m.value if m.high is None else m.high)


def _arms_svg(runs: Sequence[RunData], series: dict[str, int]) -> str:
    arms = dict(itertools.chain.from_iterable(run.arms.items() for run in runs))
    return arms_plot(arms, series) or ""


def _categories(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Return one table a metric: categories by systems, the worst of the first system on top."""
    tables = []
    keys = sorted({m for s in systems for c in s.breakdown.values() for m in c}, key=metric_order)
    for key in keys:
        having = [s for s in systems if any(key in m for m in s.breakdown.values())]
        names: list[str] = sorted({c for s in having for c, m in s.breakdown.items() if key in m})
        first = {c: m[key].value or 0.0 for c, m in having[0].breakdown.items() if key in m}
        names.sort(key=lambda c: first.get(c, math.inf), reverse=meaning(key).better != "higher")
        tables.append({"metric": key, "systems": having, "categories": names})
    return tables


def _training(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the plots of each trained run; of arms, those of the claim's first seed (else the first arm's)."""
    from markupsafe import Markup

    sections: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        candidates = [(run.name, run)] if run.is_trained else []
        if run.arms:
            members = run.arms.get(CLAIM) or next(iter(run.arms.values()))
            candidates.append((members[0].name, members[0]))
        for name, one in candidates:
            svgs = training_plots(one, prefix=f"t{number}-{len(sections)}-")
            if svgs:
                sections.append(
                    {
                        "name": name,
                        "method": called(one),
                        "plots": [Markup(svg) for svg in svgs],
                        "difficulty": difficulty_note(one),
                        "ribbons": [Markup(ribbon) for ribbon in ribbons(one.root, one.config)],
                    }
                )
    return sections


def _cost(runs: Sequence[RunData]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    phases: set[str] = set()
    for run in itertools.chain.from_iterable(r.everything for r in runs):
        cost = run.provenance.get("cost")
        seconds = phase_seconds(cost if isinstance(cost, dict) else {})
        measured = [s for e in run.evals for s in [phase_seconds({"e": e.cost}).get("e")] if s is not None]
        if measured and "evaluation" not in seconds:
            seconds["evaluation"] = sum(measured)
        if seconds:
            rows.append({"name": run.name, "seconds": seconds, "total": sum(seconds.values())})
            phases |= seconds.keys()
    return {"phases": [*_PHASES, *sorted(phases - set(_PHASES))], "rows": rows}


def _provenance(run: RunData) -> dict[str, Any]:
    p = run.provenance
    command, versions = p.get("command"), p.get("versions")
    return {
        "name": run.name,
        "method": called(run),
        "model": base_model(run),
        "command": " ".join(map(str, command)) if isinstance(command, list) else str(command or "unknown"),
        "created": str(p.get("created") or "unknown"),
        "versions": {k: v for k, v in versions.items() if v} if isinstance(versions, dict) else {},
        "parents": texts(p.get("parents")),
        "judges": list(judges_of(run)),
        "licences": licences_of(run),
        "unsafe": p.get("unsafe"),
    }
