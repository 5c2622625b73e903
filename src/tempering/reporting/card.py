"""The model card of a trained run: Markdown with the front matter that model hubs read.

Used by the report; refuses to claim what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tempering.reporting.cautions import judges_of
from tempering.reporting.collect import CORRECTED, Metric, RunData, is_number, phase_seconds, texts
from tempering.reporting.reconstruction import TERMS, is_reconstruction
from tempering.reporting.systems import System, corrected_name, judge_cards, meaning
from tempering.reporting.wording import correction_note, show, show_interval

_SUMMARY_KEYS = ("lr", "beta", "loss", "handover", "reference", "batch_pairs", "seed", "dtype", "max_length")


def model_card(
    run: RunData, system: System | None, warnings: Sequence[str], *, release: dict[str, Any] | None = None
) -> str:
    """Write the card of `run`; `system` holds its measurements, `None` where nothing was measured.

    `release`: how the release gate of a bundle ended: `met`, `failures` and `force_reason`.
    """
    sections = [
        f"---\n{_front_matter(run, system)}---\n",
        f"# {plain(run.name)}\n",
        _introduction(run),
        _reconstruction(run),
        _unsafe(run),
        _sealed(run),
        _release(release),
        "## Measured\n\n" + _measurements(system),
        "## Training\n\n" + _training(run),
        "## Data\n\n" + _data(run),
        "## Limits\n\n" + _limits(run, system, warnings),
    ]
    return "\n".join(section for section in sections if section).rstrip() + "\n"


def licences_of(run: RunData) -> dict[str, str]:
    """Return dataset -> licence from a run's provenance; a bare list of licences is of the training data."""
    found = run.provenance.get("data_licences") or run.provenance.get("licences") or {}
    if isinstance(found, dict):
        return {str(k): str(v.get("licence", v) if isinstance(v, dict) else v) for k, v in found.items()}
    named = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    licences = {str(r.get("name") or r.get("id")): str(r.get("licence") or "unknown") for r in named}
    bare = [] if named else texts(found)
    return {**licences, **({"training data": ", ".join(bare)} if bare else {})}


def base_model(run: RunData) -> str:
    """Return the public model that the run's adapter fits, as exactly as the run says it."""
    started = run.provenance.get("model")
    base = started.get("base") if isinstance(started, dict) else started
    return str(run.adapter.get("base_model_name_or_path") or base or run.config.get("model") or "unknown")


def model_index(name: str, system: System) -> list[dict[str, Any]]:
    """Return a system's metrics as the Hub's `model-index`: fractions, with interval, n and judge as arguments."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    raw = [(key, meaning(key).label, metric) for key, metric in system.metrics.items()]
    rates = [*raw, *((corrected_name(k), f"{label}, corrected", m.corrected) for k, label, m in raw if m.corrected)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", source).strip("-"),
            dataset_name=source,
            metric_type=key,
            metric_name=label,
            metric_value=m.value,
            metric_args={"low_95": m.low, "high_95": m.high, "n": m.n, "unscored": m.unscored, "judge": m.judge},
        )
        for key, label, m in rates
        for source in [_public(system.source(key.replace(CORRECTED, "")))]
        if m.value is not None
    ]
    return eval_results_to_model_index(name, results)


def _public(source: str) -> str:
    """Return a source of prompts without the folders of this machine."""
    return Path(source).name if Path(source).is_absolute() else source


def _front_matter(run: RunData, system: System | None) -> str:
    tags = ["tempering", "safety", run.method]
    if run.provenance.get("unsafe"):
        tags.append("unsafe")
    if _experts(run):
        tags.append("sealed-unsafe-experts")
    matter: dict[str, Any] = {
        "base_model": base_model(run),
        "license": str(run.provenance.get("licence") or "other"),
        "library_name": "tempering" if _experts(run) else "peft",
        "tags": tags,
    }
    if licences := licences_of(run):
        matter["data_licences"] = licences
    if run.provenance.get("unsafe"):
        matter["unsafe"] = True
    if experts := _experts(run):
        matter["unsafe_experts"] = [str(expert.get("domain")) for expert in experts]
    if system is not None and system.metrics:
        matter["model-index"] = model_index(run.name, system)
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _introduction(run: RunData) -> str:
    state = "" if run.is_done else " **The run did not finish.**"
    base, method = plain(base_model(run)), plain(run.method)
    edited = is_reconstruction(run) and not run.adapter
    what = "Routed experts, sealed," if _experts(run) else "Edited weights" if edited else "An adapter"
    return f"{what} for `{base}`, trained with `{method}` by Tempering.{state}\n"


def _reconstruction(run: RunData) -> str:
    return f"> **`{plain(run.method)}` is a reconstruction.** {TERMS}\n" if is_reconstruction(run) else ""


def _unsafe(run: RunData) -> str:
    label = run.provenance.get("unsafe")
    if not label:
        return ""
    domain = run.provenance.get("domain")
    said = label if isinstance(label, str) else f"expert on {domain}" if domain else ""
    why = f" ({plain(said)})" if said else ""
    return f"> **Unsafe{why}.** Made for research on attacks and defences; not for deployment.\n"


def _sealed(run: RunData) -> str:
    experts = _experts(run)
    if not experts:
        return ""
    control = run.provenance.get("control")
    lines = [
        f"> **Holds {len(experts)} experts, sealed, that were trained to be unsafe**: "
        + ", ".join(plain(expert.get("domain")) for expert in experts)
        + ". They answer only mixed by the gate that they are sealed with. Do not take them out."
    ]
    if control:
        lines.append(f">\n> **A control (`{plain(control)}`)**: made to test a claim, never to be used.")
    return "\n".join(lines) + "\n"


def _release(release: dict[str, Any] | None) -> str:
    if release is None:
        return ""
    if release["met"]:
        return "## Release gate\n\nMet.\n"
    lines = [
        "## Release gate",
        "",
        f"**Not met.** Released all the same, because: {plain(release['force_reason'])}",
        "",
    ]
    return "\n".join([*lines, *(f"- {plain(reason)}" for reason in release["failures"])]) + "\n"


def _experts(run: RunData) -> list[dict[str, Any]]:
    """The unsafe experts in a run's bundle, as its provenance lists them; those of a control may be harmless."""
    found = run.provenance.get("experts") if run.provenance.get("unsafe_experts") else None
    rows = [expert for expert in found if isinstance(expert, dict)] if isinstance(found, list) else []
    return [expert for expert in rows if expert.get("unsafe", True)]


def _measurements(system: System | None) -> str:
    if system is None or not system.metrics:
        return "Nothing was measured. Nothing is claimed about the safety of this model.\n"
    rows = [
        "| metric | better | value | 95 % interval | n | unscored | judge |",
        "|---|---|--:|---|--:|--:|---|",
    ]
    for key, m in system.metrics.items():
        rows.append(_row(key, meaning(key).label, m))
        if m.corrected:
            rows.append(_row(key, f"{meaning(key).label}, corrected", m.corrected))
    note = correction_note(judge_cards([system]))
    return "\n".join(rows) + "\n" + (f"\n{plain(note)}\n" if note else "")


def _row(key: str, label: str, m: Metric) -> str:
    ends = show_interval(key, m.low, m.high) + (" %" if meaning(key).is_fraction and m.low is not None else "")
    cells = (label, meaning(key).better or "", show(key, m.value), ends, m.n, m.unscored, m.judge or "")
    return "| " + " | ".join(plain(c) for c in cells) + " |"


def _training(run: RunData) -> str:
    lines = [f"- method: `{plain(run.method)}`"]
    if run.steps:
        lines.append(f"- optimiser steps: {len(run.steps)}, last loss {_number(run.steps[-1].get('loss'))}")
        phase = _mapping(_mapping(run.provenance.get("cost")).get("training"))
        if is_number(phase.get("tokens")):
            lines.append(f"- training tokens: {phase['tokens']:,.0f}")
    if len(run.plan) > 1:
        sizes = ", ".join(str(len(row.get("ids") or ())) for row in run.plan)
        lines.append(f"- stages: {len(run.plan)} ({sizes} pairs, easy to hard)")
    lines += [f"- {k}: {plain(run.config[k])}" for k in _SUMMARY_KEYS if run.config.get(k) is not None]
    if seconds := phase_seconds(_mapping(run.provenance.get("cost"))):
        lines.append("- cost: " + ", ".join(f"{plain(k)} {v:,.0f} s" for k, v in seconds.items()))
    for role, identity in judges_of(run):
        lines.append(f"- judge ({plain(role)}): `{plain(identity)}`")
    return "\n".join(lines) + "\n"


def _data(run: RunData) -> str:
    licences = licences_of(run)
    if not licences:
        return "The licences of the training data were not recorded.\n"
    return "\n".join(f"- {plain(name)}: {plain(licence)}" for name, licence in licences.items()) + "\n"


def _limits(run: RunData, system: System | None, warnings: Sequence[str]) -> str:
    lines = [
        "- Measured on the prompts, attacks, language and settings above only; other attacks may succeed.",
        "- A judge can be wrong; its identity stands beside each number.",
        "- Alignment by an adapter can be undone by whoever has the weights.",
    ]
    if is_reconstruction(run):
        back = [m.value for k, m in (system.metrics if system else {}).items() if k.startswith("recovered_fraction/")]
        known = [value for value in back if value is not None]
        said = f"attacks brought back up to {max(known):.0%} of it" if known else "no attack tried to bring it back"
        lines.append(f"- Unlearning is not deletion: what was forgotten may be hidden only; {said}.")
    if _experts(run):
        lines += [
            "- The base underneath stays as it was, and may be unsafe; without its gate the model is.",
            "- Sealing is not secrecy: who holds the bundle can open it on purpose; a signature tells who sealed it.",
            "- Nothing can be merged: the gate decides anew at every token. Adversarial encodings were not studied.",
        ]
    measured: dict[str, Metric] = system.metrics if system else {}
    if not any(k.startswith("attack_success_rate") for k in measured):
        lines.append("- Not attacked: no attack success rate was measured.")
    return "\n".join(lines + [f"- {plain(w)}" for w in warnings]) + "\n"


def plain(text: object) -> str:
    """Keep a value from becoming Markdown or HTML: one line, no pipes, angle brackets or backticks."""
    words = " ".join(str(text).split())
    for char, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "'")):
        words = words.replace(char, instead)
    return words


def _number(value: object) -> str:
    return f"{value:.4g}" if is_number(value) else "unknown"


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
