"""The same work from Python as from the command line: `train`, `load`, `evaluate`, `report`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from tempering.core.config import Config, build
from tempering.core.loading import Dtype
from tempering.core.policy import Policy
from tempering.core.progress import Advance, progress, say
from tempering.core.quarantine import BUNDLE, require_safe
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.sampling import Sampler, load_sampler

if TYPE_CHECKING:
    from tempering.evals import EvalConfig
    from tempering.judges import Connect


_STARTED = {"config.yaml", "provenance.json", "LOCK"}
"""All that is in the run folder of an evaluation before its first row."""


class EvalRunConfig(Config):
    """What the run folder of an evaluation remembers."""

    target: str
    """What was evaluated; each eval's settings are in its own file."""


def method_module(name: str) -> ModuleType:
    """Import a training method by its command word.

    Raises:
        ValueError: there is none of this name.
    """
    if name == "sft":
        from tempering.methods import sft

        return sft
    if name == "attribution":
        from tempering.methods import attribution

        return attribution
    if name == "staged_competence":
        from tempering.methods import staged_competence

        return staged_competence
    if name == "deliberative":
        from tempering.methods import deliberative

        return deliberative
    if name == "safemoe":
        from tempering.methods import safemoe

        return safemoe
    if name == "unlearn_knowledge":
        from tempering.methods import unlearn_knowledge

        return unlearn_knowledge
    if name == "advgame":
        from tempering.methods import advgame

        return advgame
    if name == "teach":
        from tempering.methods.unlearn_knowledge import teach

        return teach
    if name == "unlearn_toxicity":
        from tempering.methods import unlearn_toxicity

        return unlearn_toxicity
    raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")


METHODS = (
    "sft", "staged_competence", "deliberative", "safemoe", "attribution", "unlearn_knowledge", "unlearn_toxicity",
    "advgame", "teach",
)  # fmt: skip


def train(
    method: str, config: Config | Mapping[str, Any], *, resume: bool = False, policy: Policy | None = None
) -> Run:
    """Train with a method and return its run; `config` is the method's `CONFIG` or a mapping of its fields.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: wrong input; nothing has been written.
    """
    module = method_module(method)
    settings = config if isinstance(config, Config) else build(module.CONFIG, dict(config), "configuration")
    if hasattr(module, "stages"):
        if resume and (done := module.finished(settings)):
            return done
        policy = _run_stages(module, settings, resume, policy)
    return module.train(settings, resume=resume, policy=policy)


def _run_stages(module: ModuleType, settings: Any, resume: bool, policy: Policy | None) -> Policy:
    """Do what a method needs other methods for, on one copy of the start model; methods do not import each other."""
    Run.require_free(settings.out, resume)
    module.check(settings, resume=resume)
    policy = policy or module.load_base(settings)
    module.make_rows(settings, policy, resume=resume)
    for stage in module.stages(settings):
        say(f"{stage.method}: {stage.settings['out']}")
        inner = method_module(stage.method)
        inner.train(build(inner.CONFIG, stage.settings, stage.method), resume=resume, policy=policy)
        policy.drop_adapters()
    return policy


def load(
    target: str,
    *,
    dtype: Dtype = "auto",
    sampler: Literal["attribution", "policy", "probe_subtract"] | None = None,
    attribution: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    probe_subtract: Mapping[str, Any] | None = None,
    connect: Connect | None = None,
    trace: bool = False,
    **endpoint: Any,
) -> Sampler:
    """Return something that answers: a model reference in this process, or `openai:MODEL@URL`.

    `sampler="attribution"` chooses each answer among several, as a calibration run does by itself, with the settings
    `attribution` (`SelectionConfig`). `sampler="policy"` puts policies before each request, with the settings
    `policy` (`InContextConfig`); `sampler="probe_subtract"` subtracts probes from states, with the settings
    `probe_subtract` (`SubtractConfig`). `trace`: a run of safemoe keeps every decision of its gate. `endpoint`:
    settings of an endpoint that answers, or draws candidates (`attribution={"generator": "openai:MODEL@URL"}`), such
    as `concurrency` or `cache`; `connect` makes the sampler of a guard behind one.

    Raises:
        ValueError, FileNotFoundError: wrong input; settings of a sampler that was not asked for.
    """
    if policy and sampler != "policy":
        raise ValueError(f"policy.{next(iter(policy))}: set sampler=policy too")
    if probe_subtract and sampler != "probe_subtract":
        raise ValueError(f"probe_subtract.{next(iter(probe_subtract))}: set sampler=probe_subtract too")
    if sampler == "probe_subtract":
        from tempering.methods.unlearn_toxicity.subtracting import subtracting_sampler

        return subtracting_sampler(load(target, dtype=dtype, connect=connect, **endpoint), probe_subtract)
    if sampler == "policy":
        from tempering.methods.deliberative.in_context import policy_sampler

        inner = load(target, dtype=dtype, attribution=attribution, connect=connect, **endpoint)
        return policy_sampler(inner, policy)
    if sampler == "attribution" or is_calibration(target):
        from tempering.methods import attribution as method

        return method.sampler(target, attribution, dtype=dtype, connect=connect, **endpoint)
    if _method_of(target) == "safemoe" or (Path(target) / BUNDLE).is_file():
        from tempering.methods import safemoe

        return safemoe.sampler(target, dtype=dtype, trace=trace)
    if attribution:
        raise ValueError(
            f"attribution.{next(iter(attribution))}: set sampler=attribution too, or name a calibration run"
        )
    return load_sampler(target, dtype=dtype, **endpoint)


def is_calibration(target: str) -> bool:
    """Whether a target is the run folder of `temper train attribution`."""
    return _method_of(target) == "attribution"


def _method_of(target: str) -> str | None:
    """What made a run folder; `None` for any other target."""
    return Run.open(target).config.get("method") if (Path(target) / "config.yaml").is_file() else None


def evaluate(
    target: str | Sampler,
    evals: Sequence[str],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    system: str | None = None,
    noted: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Run evals on a target; returns what each `evals/NAME.json` holds, under its name.

    `out` defaults to the target's own run folder for embedded data, and to a folder of its own, named by target and
    settings, in all other cases. `noted` is added to its provenance before anything is asked. With `resume`, a
    `judge_card` is applied to finished evals too, from their rows.

    Raises:
        ValueError, FileNotFoundError: wrong input.
        FileExistsError: the results are there already.
        RuntimeError: too many answers could not be judged.
        UnsafeExpertAccess: the target is quarantined, and the override is not there.
    """
    from tempering.core.endpoint import EndpointSampler
    from tempering.evals import correct_finished, require_judges, run_eval, with_cache

    config = eval_config(evals, settings)
    reference = target if isinstance(target, str) else target.name
    if isinstance(target, str) and Path(target).exists():
        require_safe(Path(target), "evaluating")
    folder = _eval_folder(reference, list(evals), config, out)
    _require_free(folder, reference, evals, resume)
    pending = [name for name in evals if not (resume and Run(folder).has(f"evals/{name}.json"))]
    require_judges(pending, config)
    sampler = _connect(target, with_cache(config, folder)) if isinstance(target, str) and pending else target
    if config.sampler and pending and not isinstance(target, str):
        sampler = _around(target, config)
    if pending and config.trace and not hasattr(sampler, "write"):
        raise ValueError(f"trace=true: {reference} has no gate whose decisions could be kept; a run of safemoe has")
    with _started(folder, reference, resume) as run:
        if noted:
            run.write_provenance(**{**run.provenance, **noted})
        for name in set(evals) - set(pending):
            _require_settings(run, name, config)
            if config.judge_card:
                correct_finished(name, run, config)
        for name in pending:
            assert not isinstance(sampler, str)
            with eval_progress(name) as advance:
                keep_candidates(sampler, run, name)
                run_eval(name, sampler, config, run, system=system, progress=advance, resume=resume)
            if config.trace:
                sampler.write(run.root / "traces" / name)  # type: ignore[attr-defined]  # `TracingSampler`, as made sure of
    if run.config.get("method") == "eval":
        run.finish()
    if isinstance(target, str):
        if isinstance(sampler, EndpointSampler):
            say(f"{sampler.name}: {sampler.ledger.summary()}")
        say(f"results in {run.root / 'evals'}")
    return {name: run.read_json(f"evals/{name}.json") for name in evals}


def estimate(
    target: str, evals: Sequence[str], *, out: str | Path | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Count the requests and tokens that `evaluate` would ask of endpoints, and their cost; nothing is asked.

    Raises:
        ValueError, FileNotFoundError: wrong input.
    """
    from tempering.evals import with_cache
    from tempering.evals.estimate import estimate

    config = eval_config(evals, settings)
    kept = with_cache(config, _eval_folder(target, list(evals), config, out))

    def chosen(inner: Sampler, connect: Connect) -> Sampler:
        from tempering.methods import attribution

        return attribution.rehearsal(target, inner, config.attribution, connect)

    around = chosen if config.sampler == "attribution" or is_calibration(target) else None
    return [found for name in evals for found in estimate(name, target, kept, around)]


def report(runs: Sequence[str | Path], out: str | Path | None = None, *, title: str | None = None) -> dict[str, Any]:
    """Write `report.html`, `report.md`, `report.json` and model cards for some runs (into the first, by default)."""
    from tempering.reporting.report import write_report

    paths = [Path(run) for run in runs]
    return write_report(paths, Path(out) if out is not None else paths[0], title=title)


def eval_config(evals: Sequence[str], settings: dict[str, Any]) -> EvalConfig:
    """Make sure that these evals are there and have these settings; nothing is loaded.

    Raises:
        ValueError, FileNotFoundError: wrong input.
    """
    from tempering.evals import EVALS, EvalConfig, load_cards
    from tempering.evals.lm_eval import require_tasks

    for name in evals:
        if name not in EVALS:
            raise ValueError(f"unknown eval {name!r}; expected one of {', '.join(EVALS)}")
    config = build(EvalConfig, settings, "eval settings")
    load_cards(config)  # a card of another judge is an error before a model is loaded
    if "lm_eval" in evals:
        require_tasks(config)
    return config


def _connect(target: str, config: EvalConfig) -> Sampler:
    if target.startswith("openai:") and config.sampler != "attribution":
        asked = config.ask_target(target)
        return asked if config.sampler is None else _around(asked, config)
    asks_endpoint = target.startswith("openai:") or str(config.attribution.get("generator")).startswith("openai:")
    return load(
        target, dtype=config.dtype, sampler=config.sampler, attribution=config.attribution, policy=config.policy,
        probe_subtract=config.probe_subtract, connect=config.ask_judge,
        **({"cache": config.cache, **config.endpoint.model_dump()} if asks_endpoint else {}),
        trace=config.trace,
    )  # fmt: skip


def _around(inner: Sampler, config: EvalConfig) -> Sampler:
    if config.sampler == "policy":
        from tempering.methods.deliberative.in_context import policy_sampler

        return policy_sampler(inner, config.policy)
    if config.sampler == "probe_subtract":
        from tempering.methods.unlearn_toxicity.subtracting import subtracting_sampler

        return subtracting_sampler(inner, config.probe_subtract)
    from tempering.methods import attribution

    return attribution.around(inner, config.attribution, config.ask_judge)


def keep_candidates(sampler: Sampler, run: Run, name: str) -> None:
    """Where a sampler chooses among candidates, keep them all in the run folder, under the name of the eval."""
    if hasattr(sampler, "keep"):
        sampler.keep = lambda row: run.append_row(f"data/candidates-{name}.jsonl", row)


def _eval_folder(reference: str, evals: list[str], config: EvalConfig, out: str | Path | None) -> Path:
    """Name the folder that the results go to."""
    from tempering.evals import HOW_ASKED, OWN_DEFAULTS, settled

    own = Path(reference)
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=HOW_ASKED)
    # What is the default of others is none of an eval with its own: there it may have been asked for.
    theirs = [
        settled(name, config).model_dump(mode="json", exclude_defaults=True, exclude=HOW_ASKED)
        for name in sorted(evals)
        if name in OWN_DEFAULTS
    ]
    if out is not None:
        return Path(out)
    if (own / "config.yaml").is_file() and settings.get("data") is None and config.sampler is None:
        return own
    stamp = content_id(reference, sorted(evals), settings, *theirs)
    evals = [*evals, *([config.sampler] if config.sampler else [])]
    name = own.name if own.exists() else reference.replace("/", "--").replace(":", "-").replace("@", "-")
    return Path("runs") / f"eval-{name}-{'-'.join(evals)}-{stamp[:8]}"


def _require_free(folder: Path, reference: str, evals: Sequence[str], resume: bool) -> None:
    """Refuse a folder that holds something else, or these results."""
    if not (folder / "config.yaml").is_file():
        Run.require_free(folder, resume)
        return
    run = Run.open(folder)  # more evals of one target go into one folder
    known = run.config.get("target", reference)
    if folder != Path(reference) and known != reference:
        raise ValueError(f"{folder} holds evals of {known}, not of {reference}; give another out=DIR")
    taken = [name for name in evals if run.has(f"evals/{name}.json")]
    if taken and not resume:
        raise FileExistsError(
            f"{run.root / 'evals' / taken[0]}.json exists; give out=DIR, or --resume to keep what is there"
        )


@contextmanager
def _started(folder: Path, reference: str, resume: bool) -> Iterator[Run]:
    """The run that the results go to; where it fails before anything is there to keep, nothing is left of it."""
    is_new, was_there = not (folder / "config.yaml").is_file(), folder.exists()
    if is_new:
        run = Run.create(folder, "eval", EvalRunConfig(target=reference), resume=resume)
        run.write_provenance(method="eval", target=reference, judges=[], unsafe=False)
    else:
        run = Run.open(folder)
    try:
        yield run
    except Exception:
        for partial in folder.glob("evals/*.partial.jsonl"):
            kept = run.read_rows(f"evals/{partial.name}")[1:]
            if all(None in row["outcomes"].values() for row in kept):  # a resumed eval asks those again
                partial.unlink()
        left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if is_new and left <= _STARTED:  # else there are rows, candidates, or answers that were paid for
            shutil.rmtree(folder)
            if was_there:
                folder.mkdir()
        raise


def _require_settings(run: Run, name: str, config: EvalConfig) -> None:
    """Refuse to pass off old results as those of other settings.

    Raises:
        ValueError: a result that is there was made with other settings.
    """
    from tempering.evals import HOW_ASKED, settled

    old = run.read_json(f"evals/{name}.json")["settings"]
    new = settled(name, config).model_dump(mode="json", exclude={"gate", *HOW_ASKED})
    for key in new:
        if old.get(key, new[key]) != new[key]:
            raise ValueError(
                f"{run.root}/evals/{name}.json was made with {key}={old[key]}, not {new[key]}; give another out=DIR"
            )


@contextmanager
def eval_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in the form that evals call: `(done, total)`."""
    with ExitStack() as stack:
        bar: list[Advance] = []
        shown = 0

        def advance(done: int, total: int) -> None:
            nonlocal shown
            if not bar:
                bar.append(stack.enter_context(progress(f"eval {name}", total)))
            bar[0](done - shown)
            shown = done

        yield advance
