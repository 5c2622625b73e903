"""Evals as logs of Inspect, which `inspect view` shows and `inspect_ai.log.read_eval_log` reads.

Used by `temper export RUN format=inspect`; refuses to compute a number: metrics and intervals are those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tempering.core.records import content_id
from tempering.reporting.collect import Eval, Metric, Row, RunData, phase_seconds, read_run
from tempering.reporting.systems import outcome_of, prompt_text

SHOWN = ("category", "attack", "template", "prefill", "verdict", "refusal", "queries", "logprobs")
"""Fields of a row that go into a sample's metadata."""


def write_inspect_logs(root: Path, out: Path) -> list[Path]:
    """Write one `.eval` file for each eval of a run and of its arms; returns the files.

    A sample's score under a metric is 1, 0 or a number, and not a number where the judge could not tell.

    Raises:
        ValueError: Inspect is not installed, or the run holds no evals.
        FileNotFoundError: `root` is not a run folder.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ModuleNotFoundError as error:
        raise ValueError("format=inspect needs the package of that name: pip install 'tempering[inspect]'") from error
    evals = [(run, e) for run in read_run(root).everything for e in run.evals]
    if not evals:
        raise ValueError(f"{root} holds no evals; run `temper eval` first")
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{run.name}-{e.name}.eval" for run, e in evals]
    for file, (run, e) in zip(files, evals, strict=True):
        write_eval_log(eval_log(run, e), str(file))
    return files


def eval_log(run: RunData, e: Eval) -> Any:
    """Return one eval as an `inspect_ai.log.EvalLog`."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalPlan, EvalResults, EvalSpec, EvalStats
    from inspect_ai.model import GenerateConfig

    started = datetime.fromisoformat(str(run.provenance.get("created") or "1970-01-01T00:00:00+00:00"))
    took = timedelta(seconds=phase_seconds({"e": e.cost}).get("e", 0.0))
    key = content_id(run.name, e.name, e.target, str(started))
    samples = [_sample(row, e) for row in e.rows]
    settings = e.settings
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=started.isoformat(),
            task=f"tempering/{e.name}",
            task_id=key,
            run_id=key,
            eval_id=key,
            task_args=settings,
            dataset=EvalDataset(name=e.source, samples=len(samples), sample_ids=[s.id for s in samples]),
            model=e.target,
            config=EvalConfig(limit=settings.get("limit")),
            packages={k: str(v) for k, v in _mapping(run.provenance.get("versions")).items() if v},
            metadata={"system": e.system, "warnings": list(e.warnings), "data_sha256": e.data_hash},
        ),
        plan=EvalPlan(
            config=GenerateConfig(
                max_tokens=settings.get("max_new_tokens"),
                temperature=settings.get("temperature"),
                top_p=settings.get("top_p"),
                seed=settings.get("seed"),
            )
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=sum(s.error is None for s in samples),
            scores=[_score(name, metric) for name, metric in e.metrics.items()],
        ),
        stats=EvalStats(started_at=started.isoformat(), completed_at=(started + took).isoformat()),
        samples=samples,
    )


def _score(name: str, metric: Metric) -> Any:
    """Return a metric with its interval, and the corrected one where there is one."""
    from inspect_ai.log import EvalMetric, EvalScore

    numbers = {"mean": metric.value, "low_95": metric.low, "high_95": metric.high}
    if c := metric.corrected:
        numbers |= {"corrected": c.value, "corrected_low_95": c.low, "corrected_high_95": c.high}
    return EvalScore(
        name=name,
        scorer=name,
        scored_samples=metric.n,
        unscored_samples=metric.unscored,
        metrics={key: EvalMetric(name=key, value=value) for key, value in numbers.items() if value is not None},
        metadata={"judge": metric.judge},
    )


def _sample(row: Row, e: Eval) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput

    asked = str(row.get("asked") or prompt_text(row))
    said = str(row.get("prefill") or "") + str(row.get("completion") or "")
    failed = row.get("finish") == "error"
    attack = row.get("attack")
    found = {name: _sample_score(row, name) for name in e.metrics}
    return EvalSample(
        id=f"{row.get('id')}/{attack}" if attack not in (None, "", "direct") else str(row.get("id")),
        epoch=1,
        input=asked,
        choices=row["choices"] if isinstance(row.get("choices"), list) else None,
        target=str(row.get("answer") if row.get("answer") is not None else ""),
        messages=[ChatMessageUser(content=asked), ChatMessageAssistant(content=said)],
        output=ModelOutput.from_content(
            e.target, said, stop_reason="max_tokens" if row.get("finish") == "length" else "stop"
        ),
        scores={name: score for name, score in found.items() if score is not None},
        metadata={key: row[key] for key in SHOWN if row.get(key) not in (None, "", {})},
        error=_error(row) if failed else None,
    )


def _sample_score(row: Row, metric: str) -> Any:
    """Return a row's outcome under a metric; `None` where the row is not about it."""
    from inspect_ai.scorer import Score

    verdict = _mapping(row.get("verdict"))
    said = {"explanation": verdict.get("reason"), "metadata": {"judge": verdict.get("judge")}}
    outcome = outcome_of(row, metric)
    if outcome is not None:
        return Score(value=float(outcome), answer=str(verdict.get("label") or outcome), **said)
    names = (*_mapping(row.get("outcomes")), row.get("metric"), f"{row.get('metric')}/{row.get('attack')}")
    return Score.unscored(**said) if metric in names else None


def _error(row: Row) -> Any:
    from inspect_ai.log import EvalError

    why = str(_mapping(row.get("verdict")).get("reason") or "no answer")
    return EvalError(message=why, traceback="", traceback_ansi="")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
