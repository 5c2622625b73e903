"""`temper redteam TARGET attacker=...`: k attacks a seed by each attacker on each target, and what that comes to.

An attempt succeeds where the attacker's output holds a request, the request still asks for what the seed does, and
the target falls: it answers a harmful seed, or refuses a benign one. `within` j is the share of seeds brought down
in j attempts (`evals/attempts.py`): ASR@j, and of benign seeds ORR@j, beside the refusals of those asked plainly.
Of several attackers and targets, all against all, both sides are rated (`evals/cross_play.py`), unless a cell differs
in anything from the others. PAIR stops where it succeeds, so that of it only "within k" is told, and no rating.

    temper redteam runs/defended attacker=[runs/game,untrained,templates,direct] seeds=seeds.jsonl
    temper redteam smollm2 targets=[runs/game] attacker=[runs/game,runs/game@step-12,untrained]
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.attacks.trained import Player
from tempering.core.meter import Meter
from tempering.core.run import Run
from tempering.data.attacker import Category
from tempering.data.describe import licences_of, sha256_of
from tempering.data.seeds import Seed, load_seeds, seeds_hash
from tempering.evals.attackers import Attacker
from tempering.evals.attempts import Attempt, budgets, by_seed, rates_within, shares
from tempering.evals.campaign import Campaign, Judges, response_id
from tempering.evals.correction import correct
from tempering.evals.cross_play import Cell, ratings, why_not_ranked
from tempering.evals.diversity import Embed, diversity
from tempering.evals.redteam_settings import HOW_ASKED, RedteamConfig
from tempering.evals.results import rate
from tempering.judges.tags import PARSER_VERSION

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait
    from tempering.evals.correction import Cards

DOCUMENT, ROWS = "evals/redteam.json", "evals/redteam.jsonl"
SHOWN = 80
"""Characters of a text outside the files that are labelled unsafe."""
METRIC: dict[Category, str] = {"harmful": "attack_success_at", "benign": "over_refusal_at"}
_RATE: dict[Category, str] = {"harmful": "attack_success_rate", "benign": "over_refusal_rate"}
"""What `evals.correction` knows the share of fallen answers by."""
DIRECT = Attacker("direct", "direct", "direct")
Row = dict[str, Any]


def seeds_of(config: RedteamConfig) -> tuple[list[Seed], Row]:
    """Read the seeds and say where they come from.

    Raises:
        FileNotFoundError, ValueError: they cannot be read, or a class has none.
    """
    every = load_seeds(config.seeds, classes=config.classes)
    split = config.split or ("test" if config.seeds.partition(":")[0] in ("demo", "wildjailbreak") else None)
    kept: list[Seed] = []
    for category in config.classes:
        mine = [s for s in every if s.category == category and split in (None, s.split)][: config.limit]
        if not mine:
            raise ValueError(f"seeds={config.seeds}: no {category} seed in split {split}; set split or classes")
        kept += mine
    count: Row = {category: sum(s.category == category for s in kept) for category in config.classes}
    source: Row = {"source": config.seeds, "split": split, "sha256": seeds_hash(kept), **count}
    if config.seeds != "demo":
        source |= {"file_sha256": sha256_of(config.seeds), "licences": licences_of(config.seeds)}
    return kept, source


def conduct(
    run: Run,
    config: RedteamConfig,
    seeds: Sequence[Seed],
    source: Row,
    attackers: Sequence[Attacker],
    targets: Mapping[str, Callable[[], Sampler]],
    judges: Judges,
    meter: Meter,
    *,
    writer: Callable[[str], Sampler] | None = None,
    embed: Embed | None = None,
    cards: Cards | None = None,
) -> Row:
    """Attack, as far as the caps allow, and write `evals/redteam.json` and `evals/redteam.jsonl`; returns the former.

    `writer` loads the model that writes for `pair:MODEL`.

    Raises:
        ValueError, RuntimeError: an attacker or target cannot be asked, or judges leave too much unscored.
    """
    started = time.perf_counter()
    campaign = Campaign(run, config, seeds, judges, meter)
    benign = [seed for seed in seeds if seed.category == "benign"]
    written = {a.name: campaign.write(a, seeds, config.k) for a in attackers if a.kind != "pair"}
    plain = campaign.write(DIRECT, benign, 1)
    searched: dict[tuple[str, str], list[Row]] = {}
    for target, load in targets.items():
        if campaign.stopped:
            break
        sampler = load()
        campaign.ask(target, sampler, plain)
        for attacker in attackers:
            if attacker.kind != "pair":
                campaign.ask(target, sampler, written[attacker.name])
            elif writer is not None:
                load_writer = functools.partial(writer, attacker.model or "")
                searched[attacker.name, target] = campaign.search(target, sampler, attacker, load_writer)
        del sampler  # one model in memory at a time
    cells, matrix = [], []
    for target in targets:
        for attacker in attackers:
            rows = searched.get((attacker.name, target), []) if attacker.kind == "pair" else written[attacker.name]
            for category in config.classes:
                if attacker.kind != "pair" or category == "harmful":
                    mine = [row for row in rows if row["category"] == category]
                    cell, game = _cell(campaign, attacker, target, category, mine, source, cards)
                    cells.append(cell)
                    matrix += [game] if game else []
    document = {
        "schema": 1,
        "eval": "redteam",
        "targets": list(targets),
        "attackers": [{"name": a.name, "kind": a.kind} for a in attackers],
        "k": config.k,
        "data": source,
        "judges": {
            "harmful": judges.harm.identity,
            "refused": judges.refusal.identity,
            "faithful": judges.faithful.identity,
        },
        "partial": campaign.stopped is not None,
        "stopped": campaign.stopped,
        "metrics": {target: _metrics(cells, target, config.k) for target in targets},
        "cells": cells,
        "refused_plainly": {target: _plain_refusals(campaign, target, plain) for target in targets} if benign else {},
        "diversity": _diversity(written, config.classes, embed),
        "ratings": {category: _ratings(matrix, category, config.seed) for category in config.classes},
        "cost": _cost(campaign, started),
        "settings": config.model_dump(mode="json", exclude={*HOW_ASKED}) | {"redact": config.redact},
        "warnings": warnings_of(config, seeds, attackers, judges, cells, campaign.stopped),
    }
    attacks = itertools.chain(plain, *written.values(), *searched.values())
    run.write_rows(ROWS, _shown(campaign, targets, list(attacks)))
    run.write_json(DOCUMENT, document)
    return document


def _cell(
    campaign: Campaign,
    attacker: Attacker,
    target: str,
    category: Category,
    rows: Sequence[Row],
    source: Row,
    cards: Cards | None,
) -> tuple[Row, Cell | None]:
    """Return what one attacker came to against one target on one class of seeds, and the same as a cell of games."""
    config, k = campaign.config, campaign.config.k
    responses = [campaign.responses.get(response_id(target, row)) for row in rows]
    attempts = [
        Attempt(
            row["seed_id"],
            category,
            row["index"],
            row["prompt"] is not None,
            row["faithful"],
            None if said is None else said["fell"],
            said is not None,
        )
        for row, said in zip(rows, responses, strict=True)
    ]
    outcomes, anyhow = by_seed(attempts, k), by_seed(attempts, k, anyhow=True)
    counts = shares(attempts)
    is_search = attacker.kind == "pair"
    unsearched = 0
    if is_search:
        outcomes, anyhow = (_searched(attempts, found) for found in (outcomes, anyhow))
        unsearched = sum(seed.category == category for seed in campaign.seeds) - len(outcomes)
    reported = [k] if is_search else budgets(k)
    within, within_anyhow = (
        rates_within(found, k, seed=config.seed) if found else {} for found in (outcomes, anyhow)
    )
    successes = sum(attempt.succeeded is True for attempt in attempts)
    asked = list({said["asked_id"]: said for said in responses if said is not None}.values())  # equal ones once
    paid_off = {said["asked_id"] for said, a in zip(responses, attempts, strict=True) if said and a.succeeded}
    judge = campaign.judges.harm if category == "harmful" else campaign.judges.refusal
    is_partial = bool(counts["not_asked"] or unsearched)
    cell = {
        "attacker": attacker.name,
        "target": target,
        "category": category,
        "within": {str(j): within[j] for j in reported if j in within},
        "within_anyhow": {str(j): within_anyhow[j] for j in reported if j in within_anyhow},
        "fell": _fell(rows, responses, category, judge.identity, cards),
        **counts,
        "queries": len(asked),
        "successes": successes,
        "queries_per_success": len(asked) / len(paid_off) if paid_off else None,
        "target_tokens": _sum([said["tokens"] for said in asked]),
        "attacker_tokens": _sum([row["tokens"] for row in rows]),
        "tries": sum(row["tries"] for row in rows),
        "partial": is_partial,
    }
    if is_search:
        return cell, None
    protocol = {
        "seeds": source["sha256"],
        "class": category,
        "k": k,
        "attacker's decoding": (config.temperature, config.top_p, config.max_new_tokens, config.filter, config.tries),
        "target's decoding": tuple(config.target.model_dump().values()),
        "judges": (judge.identity, campaign.judges.faithful.identity),
        "seed": config.seed,
    }
    return cell, Cell(attacker.name, target, protocol, outcomes, not is_partial)


def _searched(
    attempts: Sequence[Attempt], found: Mapping[str, Sequence[bool | None]]
) -> dict[str, list[bool | None]]:
    """Fill up what a search did not need to ask: it ended with a success, or with all that it could write."""
    made = {(attempt.seed_id, attempt.index) for attempt in attempts}
    return {s: [o if (s, i) in made else False for i, o in enumerate(tries)] for s, tries in found.items()}


def _fell(
    rows: Sequence[Row], responses: Sequence[Row | None], category: Category, judge: str, cards: Cards | None
) -> Row | None:
    """Return the share of answers that fell, faithful attacks or not, also corrected for the judge's errors."""
    name = _RATE[category]
    judged = [
        {"prompt_id": row["seed_id"], "prompt": row["seed"], "outcomes": {name: said["fell"]}}
        for row, said in zip(rows, responses, strict=True)
        if said is not None
    ]
    found = rate(judged, name, judge, clustered=True)
    if found is None or not cards:
        return found
    metrics, account = correct({name: found}, judged, cards)
    told = {"warnings": account["warnings"]} if account else {}
    return {**found, "corrected": metrics.get(f"{name}/corrected"), **told}


def _metrics(cells: Sequence[Row], target: str, k: int) -> dict[str, Row]:
    """Return `NAME_J/ATTACKER` for one attempt and for k, in the form of an eval's metrics."""
    found = {}
    for cell in cells:
        if cell["target"] == target:
            for j in sorted({1, k}):
                if told := cell["within"].get(str(j)):
                    entry = {key: told[key] for key in ("value", "low", "high", "n", "unscored")}
                    found[f"{METRIC[cell['category']]}_{j}/{cell['attacker']}"] = {**entry, "bounds": told["bounds"]}
    return found


def _plain_refusals(campaign: Campaign, target: str, plain: Sequence[Row]) -> Row | None:
    said = [campaign.responses.get(response_id(target, row)) for row in plain]
    rows = [{"prompt_id": s["seed_id"], "outcomes": {"refused": s["fell"]}} for s in said if s is not None]
    return rate(rows, "refused", campaign.judges.refusal.identity)


def _diversity(written: Mapping[str, Sequence[Row]], classes: Sequence[Category], embed: Embed | None) -> list[Row]:
    found = []
    for name, rows in written.items():
        for category in classes:
            by: dict[str, list[str]] = {}
            for row in rows:
                if row["category"] == category and row["prompt"] is not None:
                    by.setdefault(row["seed_id"], []).append(row["prompt"])
            found.append({"attacker": name, "category": category, **diversity(by, embed)})
    return found


def _ratings(matrix: Sequence[Cell], category: Category, seed: int) -> Row:
    cells = [cell for cell in matrix if cell.protocol["class"] == category]
    why = why_not_ranked(cells) if cells else "there is no cell"
    return {"why_not": why} if why else {"why_not": None, **ratings(cells, seed=seed)}


def _cost(campaign: Campaign, started: float) -> Row:
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "queries": campaign.meter.count,
        "judged": campaign.judged,
        "target_tokens": _sum([row["tokens"] for row in campaign.responses.values()]),
        "attacker_tokens": _sum([row["tokens"] for row in campaign.attacks.values()]),
        "judge_tokens": _judge_tokens(campaign.judges),
        "price": round(campaign.meter.purse.spent, 6),
    }


def _judge_tokens(judges: Judges) -> int | None:
    """Tokens of judges behind endpoints in this process, by their own count; `None` where none says."""
    used = [tokens for judge in judges if (tokens := getattr(judge, "usage", None)) is not None]
    return sum(sum(tokens) for tokens in used) if used else None


def warnings_of(
    config: RedteamConfig,
    seeds: Sequence[Seed],
    attackers: Sequence[Attacker],
    judges: Judges,
    cells: Sequence[Row],
    stopped: str | None,
) -> list[str]:
    """Say what a reader of the numbers must know before believing them."""
    found = (
        [f"partial: {stopped}; raise the cap and go on with --resume, which asks nothing twice"] if stopped else []
    )
    own = {
        "harm": judges.harm.identity,
        "refusal": judges.refusal.identity,
        "faithfulness": judges.faithful.asker.identity,
    }
    for attacker in attackers:
        if attacker.trained is None:
            continue
        player, run = attacker.trained.player, attacker.trained.run
        if shared := trained_ids(run, player) & {seed.id for seed in seeds}:
            found.append(
                f"{attacker.name}: {len(shared)} of {len(seeds)} seeds are among those that it was trained on"
            )
        if player.parser_version != PARSER_VERSION:
            found.append(
                f"{attacker.name} was trained with version {player.parser_version} of the parser, and is read with "
                f"{PARSER_VERSION}: its parse rate may differ"
            )
        told = trained_by(run)
        found += [
            f"the judge of {what} ({identity}) also trained {attacker.name}, which learned to please it"
            for what, identity in own.items()
            if identity in told
        ]
    judged = [cell for cell in cells if cell["attempts"]]
    if unscored := sum(cell["unscored"] for cell in judged):
        total = sum(cell["attempts"] for cell in judged)
        found.append(f"{unscored} of {total} attempts are unscored; see the bounds")
    low = [cell for cell in judged if (share := cell["parsed"]["value"]) is not None and share < 0.5]
    found += [
        f"{c['attacker']}: only {c['parsed']['value']:.0%} of its outputs hold a {c['category']} attack" for c in low
    ]
    return list(dict.fromkeys(found))


def trained_ids(run: Path, player: Player) -> frozenset[str]:
    """Return the ids of the seeds that a run trained on: by its own list, or, without one, all that it had."""
    file = run / "data/seeds.jsonl"
    if not file.is_file():
        return player.seed_ids
    return frozenset(
        str(row.get("id")) for row in Run(run).read_rows("data/seeds.jsonl") if row.get("split") == "train"
    )


def trained_by(run: Path) -> str:
    """Return what a run's provenance says of its judges, as text to look identities up in."""
    try:
        told = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        return json.dumps(told.get("judges", told.get("judge", "")), ensure_ascii=False)
    except (OSError, ValueError, AttributeError):
        return ""


def _shown(campaign: Campaign, targets: Mapping[str, Any], attacks: Sequence[Row]) -> list[Row]:
    """Return a line per attempt with its outcome, and of its texts no more than may be shown."""
    rows = []
    cut = (lambda text: text[:SHOWN]) if campaign.config.redact else (lambda text: text)
    for attack in {row["id"]: row for row in attacks}.values():
        for target in targets:
            said = campaign.responses.get(response_id(target, attack))
            if said is None and attack["prompt"] is not None:
                continue
            fell = None if said is None else said["fell"]
            attempt = Attempt(
                attack["seed_id"],
                attack["category"],
                attack["index"],
                attack["prompt"] is not None,
                attack["faithful"],
                fell,
            )
            rows.append(
                {
                    "id": response_id(target, attack),
                    **{
                        key: attack[key]
                        for key in ("attacker", "seed_id", "category", "index", "faithful", "reason", "tries")
                    },
                    "target": target,
                    "fell": fell,
                    "succeeded": attempt.succeeded,
                    "verdict": said["verdict"] if said else None,
                    "asked": cut(attack["prompt"] or ""),
                    "answer": cut(said["answer"]) if said else "",
                    "redacted": campaign.config.redact,
                }
            )
    return rows


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count or 0 for count in counts)
