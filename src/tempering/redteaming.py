"""`temper redteam`: every attack that needs nothing but the target, ranked; or attackers, several attempts a seed.

With `attacker=` and without `attacks=` attackers are asked (`evals/redteam.py`), one or a list, on one target or
several; else the eval `attack_success` runs. Another machine is attacked only with `authorised=true` and a cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tempering.api import estimate, evaluate, load, report
from tempering.attacks import ATTACKS
from tempering.attacks.trained import player_folder, split_step
from tempering.core.config import build
from tempering.core.endpoint import EndpointConfig, EndpointSampler
from tempering.core.loading import resolve
from tempering.core.meter import Meter, Purse
from tempering.core.progress import say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.evals.authorisation import authorisation, remote_hosts, require_authorised
from tempering.evals.redteam_settings import HOW_ASKED, RedteamConfig

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler
    from tempering.evals.diversity import Embed

DEFAULTS = {"attacks": list(ATTACKS)}
"""What is tried when no attack is named."""
CAPS = ("budget", "max_tokens_total")
"""Of `endpoint`, those that limit what the eval may ask of another machine."""
REQUESTS, JUDGEMENTS = "data/requests.jsonl", "data/judgements.jsonl"


class RedteamRunConfig(RedteamConfig):
    """What the run folder of a campaign remembers."""

    attacked: tuple[str, ...]
    """All targets, in the order in which they were named."""


def by_attackers(settings: Mapping[str, Any]) -> bool:
    """Whether these settings name attackers, rather than attacks (some of which take an `attacker` as writer)."""
    return "attacker" in settings and "attacks" not in settings


def run_redteam(
    target: str, /, *, out: str | Path | None = None, resume: bool = False, authorised: bool = False, **settings: Any
) -> dict[str, Any]:
    """Run the eval `attack_success`, or with `attacker=` a campaign of attackers, and write its report.

    Returns what `evals/attack_success.json`, or `evals/redteam.json`, holds.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, RuntimeError: as `tempering.evaluate`; a target on another
            machine without `authorised` and a cap, before anything is connected to.
    """
    if by_attackers(settings):
        return run_attackers(target, out=out, resume=resume, authorised=authorised, **settings)
    limits = settings.get("endpoint") or {}
    has_cap = any(limits.get(name) is not None for name in CAPS)
    cap = " or ".join(f"endpoint.{name}=N" for name in CAPS)
    hosts = require_authorised([target], authorised=authorised is True, has_cap=has_cap, cap=cap)
    folder = _folder(target, out, settings.get("sampler"))
    allowed = {name: limits[name] for name in CAPS if limits.get(name) is not None}
    noted = {"authorised": authorisation(hosts, allowed)} if hosts else None
    results = evaluate(target, ["attack_success"], out=folder, resume=resume, noted=noted, **{**DEFAULTS, **settings})
    for warning in results["attack_success"]["warnings"]:
        if "was left out" in warning:
            say(f"[yellow]{escape(warning)}[/]")
    report([folder], title=f"Attacks on {target}")
    return results["attack_success"]


def run_attackers(
    target: str, /, *, out: str | Path | None = None, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    """Ask attackers for k attacks a seed, put them to the targets, and report; returns `evals/redteam.json`.

    Where a cap is met it stops, says so, and goes on with `resume`; nothing that was answered is asked again.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: wrong input; nothing has been written or connected to.
        RuntimeError: judges left too much unscored.
    """
    from tempering import judges
    from tempering.evals.attackers import find_attackers
    from tempering.evals.campaign import ATTACKS as ATTACKS_FILE
    from tempering.evals.campaign import RESPONSES, Judges
    from tempering.evals.correction import load_cards
    from tempering.evals.redteam import DOCUMENT, conduct, seeds_of
    from tempering.evals.settings import EvalConfig
    from tempering.judges.game import game_judge
    from tempering.judges.journal import Journal

    given = build(RedteamConfig, settings, "redteam settings")
    config = RedteamRunConfig(
        **{name: getattr(given, name) for name in given.model_fields_set}, attacked=_all(target, given)
    )
    hosts = _require_authorised(config)
    attackers = find_attackers(config.attacker, config.templates)
    references = {name: target_reference(name) for name in config.attacked}
    seeds, source = seeds_of(config)
    about_judges = {"judge": config.judge, "refusal_judge": config.refusal_judge, "judge_card": config.judge_card}
    cards = load_cards(build(EvalConfig, about_judges, "redteam settings"))
    folder = _campaign_folder(target, out, config)
    cache, purse = Path(config.cache or folder / "cache"), Purse(config.spend.max_cost)

    def connect(spec: str, how: EndpointConfig, meter: Meter | None = None, **more: Any) -> EndpointSampler:
        return EndpointSampler(spec, cache=cache, meter=meter or Meter(purse=purse), **{**how.model_dump(), **more})

    def judge_at(spec: str) -> EndpointSampler:
        return connect(spec, config.judge_endpoint)

    harm = judges.load_judge(config.judge, "harmful", judge_at)
    refusal = judges.load_judge(config.refusal_judge, "refused", judge_at)
    for judge in (harm, refusal):
        judges.check_files(judge)
    run = Run.create(folder, "redteam", config, resume=resume, may_differ=HOW_ASKED)
    if run.is_done:
        say(f"{run.root} is done already")
        return dict(run.read_json(DOCUMENT))
    meter = Meter(
        run.path(REQUESTS), max_requests=config.spend.max_queries, per_minute=config.rate_per_minute, purse=purse
    )
    encoder = sentence_encoder() if config.encoder else None
    by_words = config.faithfulness == "rules" and encoder is None
    faithful = game_judge(
        "rules:words" if by_words else config.faithfulness,
        kind="pointwise",
        order="off",
        seed=config.seed,
        journal=Journal(run.path(JUDGEMENTS)),
        connect=judge_at,
        encode=encoder,
    )
    run.write_provenance(
        method="redteam",
        targets=references,
        attackers={a.name: a.identity for a in attackers},
        seeds=source,
        judges=[harm.identity, refusal.identity, faithful.identity],
        authorised=authorisation(hosts, config.spend.model_dump()) if hosts else None,
        parents=sorted({str(a.trained.run) for a in attackers if a.trained}),
        unsafe=False,
        unsafe_data=[ATTACKS_FILE, RESPONSES, JUDGEMENTS, "cache"],
    )

    def target_at(reference: str) -> Callable[[], Sampler]:
        if reference.startswith("openai:"):
            return lambda: connect(reference, config.endpoint, meter, concurrency=config.concurrency)
        return lambda: load(reference, dtype=config.dtype)

    def writer(reference: str) -> Sampler:
        is_endpoint = reference.startswith("openai:")
        return connect(reference, config.attacker_endpoint) if is_endpoint else load(reference, dtype=config.dtype)

    document = conduct(
        run, config, seeds, source, attackers, {name: target_at(r) for name, r in references.items()},
        Judges(harm, refusal, faithful), meter, writer=writer, embed=encoder, cards=cards,
    )  # fmt: skip
    for warning in document["warnings"]:
        say(f"[yellow]{escape(warning)}[/]")
    report([run.root], title=f"Attacks on {', '.join(config.attacked)}")
    if not document["partial"]:
        run.finish()
    say(f"results in {escape(str(run.root / 'evals'))}")
    return document


def estimate_redteam(
    target: str, /, *, out: str | Path | None = None, authorised: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """Count what `run_redteam` would ask of endpoints, of a campaign at most; nothing is asked.

    Raises:
        ValueError, FileNotFoundError: as `tempering.api.estimate`.
    """
    if by_attackers(settings):
        return _estimate_attackers(target, {**settings, "authorised": authorised})
    return estimate(
        target, ["attack_success"], out=_folder(target, out, settings.get("sampler")), **{**DEFAULTS, **settings}
    )


def failed_gates(document: Mapping[str, Any], gate: Mapping[str, float]) -> list[str]:
    """List the ceilings that the strongest attacker on any target is above; one that was not measured is not met."""
    failures = []
    for name, bound in gate.items():
        found = [
            metric["value"]
            for metrics in document["metrics"].values()
            for key, metric in metrics.items()
            if key.partition("/")[0] == name and metric["value"] is not None
        ]
        if not found:
            failures.append(f"{name} was not measured, so the gate {bound:.3f} is not met")
        elif max(found) > bound:
            failures.append(f"{name} is {max(found):.3f}, above the gate {bound:.3f}")
    return failures


def target_reference(name: str) -> str:
    """Return what to load for a target: of a run that trained players, its defender.

    Raises:
        FileNotFoundError, ValueError: it is neither there, nor a Hub id, nor an endpoint.
    """
    root, step = split_step(name)
    if (step and Path(root).is_dir()) or (Path(name) / "final" / "defender").is_dir():
        return str(player_folder(name, "defender"))
    if not name.startswith("openai:") and not Path(name).exists():
        resolve(name)
    return name


def sentence_encoder() -> Embed | None:
    """Return the embedded sentence encoder, loaded with the first text; `None` where it is not installed."""
    from tempering.core.encoder import has_encoder, load_encoder

    if not has_encoder():
        return None
    loaded: list[Any] = []

    def embed(texts: Sequence[str]) -> Any:
        loaded or loaded.append(load_encoder())  # type: ignore[func-returns-value]
        return loaded[0](texts)

    return embed


def _all(target: str, config: RedteamConfig) -> tuple[str, ...]:
    names = (target, *config.targets)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"target {twice!r} is there twice; targets=[...] are those beside the first")
    return names


def _require_authorised(config: RedteamRunConfig) -> list[str]:
    cap = "spend.max_queries=N or spend.max_cost=N"
    return require_authorised(config.attacked, authorised=config.authorised, has_cap=config.has_own_cap, cap=cap)


def _estimate_attackers(target: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    from tempering.evals.attackers import find_attackers
    from tempering.evals.redteam import seeds_of

    config = build(RedteamConfig, settings, "redteam settings")
    attackers, (seeds, _) = find_attackers(config.attacker, config.templates), seeds_of(config)
    benign, harmful = (sum(seed.category == c for seed in seeds) for c in ("benign", "harmful"))
    per_target = benign + sum(config.k * (harmful if a.kind == "pair" else len(seeds)) for a in attackers)
    names = _all(target, config)
    rows = [("target", name, per_target, config.endpoint, config.target.max_new_tokens) for name in names]
    asked = per_target * len(names)
    rows += [("judge", name, asked, config.judge_endpoint, 512) for name in {config.judge, config.refusal_judge}]
    rows.append(("judge", config.faithfulness, asked, config.judge_endpoint, 1024))
    found = []
    for role, name, requests, how, longest in rows:
        if name.startswith("openai:"):
            read, written = requests * config.max_new_tokens, requests * longest
            cost = (read * how.price_in + written * how.price_out) / 1e6 if how.price_in or how.price_out else None
            found.append(
                {"eval": "redteam", "role": role, "endpoint": name, "requests": requests, "cached": 0,
                 "prompt_tokens_about": read, "completion_tokens_at_most": written, "cost_at_most": cost}
            )  # fmt: skip
    for host in remote_hosts(names):
        say(f"{escape(host)} is not this machine: it needs authorised=true and a cap")
    return found


def _campaign_folder(target: str, out: str | Path | None, config: RedteamConfig) -> Path:
    if out is not None:
        return Path(out)
    what = config.model_dump(mode="json", exclude=set(HOW_ASKED))
    return _folder(target, None, content_id(target, what)[:6])


def _folder(target: str, out: str | Path | None, sampler: str | None) -> Path:
    own = Path(target)
    name = own.name if own.exists() else target.translate(str.maketrans("/:@", "---"))
    return Path(out) if out is not None else Path("runs") / "-".join(filter(None, ("redteam", name, sampler)))
