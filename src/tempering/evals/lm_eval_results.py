"""What lm-eval found, as rows and metrics in our own format; pure, and without lm-eval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tempering.core.records import Verdict
from tempering.evals.results import Row, rate, verdict_row
from tempering.evals.settings import OF_TASKS


class Part(NamedTuple):
    """One metric: its name here, its key in lm-eval's results, the task or group, and the tasks that it is over."""

    name: str
    metric: str
    filter: str
    owner: str
    tasks: tuple[str, ...]


def sample_rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    ask: Mapping[str, Callable[[Any], Any]],
    failed: Mapping[tuple[str, int], str],
) -> list[Row]:
    """Make one row per document, without outcomes; `ask`: task -> its question without template and examples."""
    rows: dict[str, Row] = {}
    for task, found in samples.items():
        for sample in found:
            name = f"{task}/{sample['doc_id']}"
            reason = failed.get((task, sample["doc_id"]))
            logprobs = _logprobs(sample)
            rows[name] = {
                "id": name,
                "prompt_id": name,
                "prompt": str(ask[task](sample["doc"])),
                "category": None,
                "attack": "direct",
                "answer": _right(sample),
                "completion": _completion(sample, logprobs),
                "finish": "error" if reason else "stop" if _is_text(sample) else None,
                "verdict": {"score": None, "reason": f"no answer: {reason}"} if reason else {},
                **({"logprobs": logprobs} if logprobs else {}),
                "outcomes": {},
            }
    return list(rows.values())


def add_outcomes(
    found: Mapping[str, Any], leaves: Mapping[str, Sequence[str]], rows: Sequence[Row], *, identity: str
) -> dict[str, dict[str, Any]]:
    """Put into the rows what each adds to every metric, and return the metrics.

    `leaves`: group -> its tasks. A task of a group whose metric is the mean over all samples is a category of it.
    """
    by_id = {row["id"]: row for row in rows}
    metrics: dict[str, dict[str, Any]] = {}
    covered: set[tuple[str, str]] = set()
    for part in _parts(found, leaves):
        table = found["groups"] if part.owner in leaves else found["results"]
        key = f"{part.metric},{part.filter}"
        value, error = table[part.owner][key], table[part.owner].get(f"{part.metric}_stderr,{part.filter}")
        if (part.owner, key) in covered or not _is_number(value):
            continue
        judge = f"{identity}, {part.owner}{_version(found, part.owner)}"
        values = _values(found["samples"], part)
        if values and math.isclose(sum(values.values()) / len(values), value, abs_tol=1e-9):
            is_yes_no = set(values.values()) <= {0.0, 1.0}
            for name, share in values.items():
                row = by_id[name]
                if part.owner in leaves:
                    row["category"] = name.rpartition("/")[0]
                _add(row, part.name, bool(share) if is_yes_no else share, judge)
            covered |= {(task, key) for task in part.tasks if task != part.owner}
            metrics[part.name] = rate(rows, part.name, judge) or {}
        else:
            metrics[part.name] = _reported(part, value, error, rows, judge)
    return metrics


def _parts(found: Mapping[str, Any], leaves: Mapping[str, Sequence[str]]) -> Iterator[Part]:
    """Yield every metric of every group, then of every task."""
    groups = {name: table for name, table in found.get("groups", {}).items() if name in leaves}
    for owner, table in [*groups.items(), *((t, found["results"][t]) for t in found["samples"])]:
        keys = [key.split(",", 1) for key in table if "," in key and "_stderr," not in key]
        for metric, way in keys:
            alone = sum(m == metric for m, _ in keys) == 1
            name = f"{metric}/{owner}" + ("" if alone else f"/{way}")
            yield Part(name, metric, way, owner, tuple(leaves.get(owner, (owner,))))


def _values(samples: Mapping[str, Sequence[Mapping[str, Any]]], part: Part) -> dict[str, float]:
    """Return what each sample adds, by row; empty where one adds no number."""
    found: dict[str, float] = {}
    for task in part.tasks:
        for sample in samples[task]:
            if sample["filter"] == part.filter and part.metric in sample:
                if not _is_number(sample[part.metric]):
                    return {}
                found[f"{task}/{sample['doc_id']}"] = float(sample[part.metric])
    return found


def _add(row: Row, name: str, share: bool | float, judge: str) -> None:
    if row["finish"] == "error":
        row["verdict"]["judge"], row["outcomes"][name] = judge, None
        return
    row["outcomes"][name] = share
    if not row["verdict"] and 0.0 <= share <= 1.0:
        label = {True: "correct", False: "wrong"}[share] if isinstance(share, bool) else None
        row["verdict"] = verdict_row(Verdict(float(share), judge, label))


def _reported(part: Part, value: float, error: Any, rows: Sequence[Row], judge: str) -> dict[str, Any]:
    """Return a metric as lm-eval gives it; unknown where a sample that it is over got no answer."""
    mine = [row for row in rows if row["id"].rpartition("/")[0] in part.tasks]
    failed = sum(row["finish"] == "error" for row in mine)
    counts = {"n": len(mine) - failed, "unscored": failed, "judge": judge}
    if failed or not math.isfinite(value):
        return {"value": None, "low": None, "high": None, **counts}
    if not _is_number(error):
        return {"value": float(value), "low": None, "high": None, **counts}
    low, high = float(value - 1.96 * error), float(value + 1.96 * error)
    if part.name.startswith(OF_TASKS):
        low, high = max(low, 0.0), min(high, 1.0)
    return {"value": float(value), "low": low, "high": high, **counts}


def _completion(sample: Mapping[str, Any], logprobs: Sequence[float]) -> str:
    """Return the answer, or the choice that the target finds likeliest."""
    if _is_text(sample):
        return str(sample["resps"][0][0])
    return str(sample["arguments"][logprobs.index(max(logprobs))][1]).strip() if len(logprobs) > 1 else ""


def _logprobs(sample: Mapping[str, Any]) -> list[float]:
    """Return the log-probability of each choice, in nats; empty for a task that asks for something else."""
    scored = [response[0] for response in sample["resps"]]
    is_choice = all(isinstance(score, Sequence) and not isinstance(score, str) for score in scored)
    return [float(score[0]) for score in scored] if is_choice else []


def _right(sample: Mapping[str, Any]) -> str:
    """Return the answer that is right: the text of a choice where the task gives its number."""
    right, choices = sample["target"], sample["arguments"]
    if not _is_text(sample) and isinstance(right, int) and 0 <= right < len(choices):
        return str(choices[right][1]).strip()
    return str(right)


def _is_text(sample: Mapping[str, Any]) -> bool:
    return isinstance(sample["resps"][0][0], str)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _version(found: Mapping[str, Any], name: str) -> str:
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    return f" v{version}" * (version not in (None, "N/A")) + f", {shots}-shot" * (shots is not None)


def task_facts(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what was run under the name of a task."""
    config = found["configs"].get(name, {})
    return {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "samples": found["n-samples"][name]["effective"],
        "of": found["n-samples"][name]["original"],
        **{key: config[key] for key in ("output_type", "generation_kwargs") if config.get(key)},
    }


def digest(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Hash the documents, so that a report sees whether two systems had the same."""
    lines = sorted(
        {f"{task} {sample['doc_id']} {sample['doc_hash']}" for task, found in samples.items() for sample in found}
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
