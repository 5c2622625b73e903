"""Rates corrected for the judge's error: what a judge's card says, applied to what an eval measured.

A corrected rate assumes that the judge errs on these answers as often as on the labelled ones. How many of them are
harmful may differ; what kind of answers they are may not. The raw rate stays what is reported first, gated and
compared: where the error rates are the same for both systems, a difference of raw rates has the right sign.

    temper eval smollm2 harm judge_card=runs/judge-cards/CARD.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tempering.core.run import Run
from tempering.core.stats import correct_rate, wilson
from tempering.evals.results import Row
from tempering.evals.settings import EvalConfig
from tempering.judges import Asks, load_judge
from tempering.judges.card import JudgeCard, prompt_mark, read_card

ASKED: dict[str, Asks] = {
    "harmful_rate": "harmful",
    "attack_success_rate": "harmful",
    "refusal_rate": "refused",
    "over_refusal_rate": "refused",
}
"""Metric (or what stands before its `/`) -> the question that its judge answers."""
SUFFIX = "/corrected"
FEW_LABELS = 50
"""Labelled answers of either kind below which a card earns a warning."""
MANY_UNSCORED = 0.05

Metrics = dict[str, dict[str, Any]]
Cards = Mapping[Asks, JudgeCard]


class Correction(NamedTuple):
    """The metrics with corrected ones after the raw, and how they came about (`None`: nothing was corrected)."""

    metrics: Metrics
    account: dict[str, Any] | None
    """`cards`: what was used; `warnings`: what to know before believing it."""


def load_cards(config: EvalConfig) -> dict[Asks, JudgeCard]:
    """Read the cards of an eval, one a question, and hold them against its judges.

    Raises:
        FileNotFoundError, ValueError: a card cannot be read, is one of two on a question, or of another judge.
    """
    cards: dict[Asks, JudgeCard] = {}
    for file in config.judge_card:
        card = read_card(file)
        if card.asks in cards:
            raise ValueError(f"judge cards {cards[card.asks].file} and {file} are both on {card.asks!r}; give one")
        spec = config.judge if card.asks == "harmful" else config.refusal_judge
        _require_judge(card, load_judge(spec, card.asks).identity)
        cards[card.asks] = card
    return cards


def correct(metrics: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], cards: Cards) -> Correction:
    """Put `NAME/corrected` after each rate whose question a card is on.

    Rogan and Gladen's estimate with an interval that carries the card's uncertainty as well; see
    `tempering.core.stats.correct_rate`. Several answers to one prompt count as one: the interval is over
    prompts. Where the card cannot tell its judge from a coin, value and interval are `None`.

    Raises:
        ValueError: a rate was judged by another judge than its card's.
    """
    out: Metrics = {}
    used: dict[Asks, JudgeCard] = {}
    warnings: list[str] = []
    best_of_several = {name for row in rows if row.get("queries", 1) > 1 for name in row["outcomes"]}
    for name, metric in metrics.items():
        out[name] = dict(metric)
        asks = ASKED.get(name.partition("/")[0])
        # Of several answers one suffices: the judge's errors add up, and a card says nothing of that.
        if asks is None or asks not in cards or name in best_of_several:
            continue
        card = used[asks] = cards[asks]
        _require_judge(card, str(metric["judge"]))
        prompts = {row["prompt_id"] for row in rows if row["outcomes"].get(name) is not None}
        ends, problem = _corrected(metric["value"], len(prompts), card)
        out[name + SUFFIX] = {**metric, **ends}
        warnings += [f"{name}: {problem}"] if problem else []
    if not used:
        return Correction(out, None)
    warnings += [line for card in used.values() for line in _doubts(card, rows)]
    return Correction(out, {"cards": [_summary(card) for card in used.values()], "warnings": warnings})


def correct_finished(name: str, run: Run, config: EvalConfig) -> None:
    """Apply cards to an eval that is done: from its rows, without asking target or judge again.

    Raises:
        FileNotFoundError, ValueError: as `load_cards` and `correct`.
    """
    document, rows = run.read_json(f"evals/{name}.json"), run.read_rows(f"evals/{name}.jsonl")
    raw = {key: metric for key, metric in document["metrics"].items() if not key.endswith(SUFFIX)}
    metrics, account = correct(raw, rows, load_cards(config))
    if account is None:
        return
    settings = {**document["settings"], "judge_card": list(config.judge_card)}
    document |= {"metrics": metrics, "settings": settings, "correction": account}
    run.write_json(f"evals/{name}.json", document)


def _corrected(value: float | None, n: int, card: JudgeCard) -> tuple[dict[str, float | None], str | None]:
    """Value and ends of the corrected rate, and what is wrong with it."""
    nothing = dict.fromkeys(("value", "low", "high"))
    if value is None:
        return nothing, None
    if not (card.positives and card.negatives):
        missing = card.asks if not card.positives else f"not {card.asks}"
        return nothing, f"not corrected: {card.file} has no scored answer that is labelled {missing}"
    try:
        got = correct_rate(
            value * n,
            n,
            true_positives=card.true_positives,
            positives=card.positives,
            true_negatives=card.true_negatives,
            negatives=card.negatives,
        )
    except ValueError as error:
        return nothing, f"not corrected: {error} ({card.file})"
    seen = wilson(value * n, n)
    lowest = wilson(card.false_positives, card.negatives)  # what a judge reports of answers of which none is true
    highest = wilson(card.true_positives, card.positives)  # ... and of which all are
    problem = None
    if seen.high < lowest.low or seen.low > highest.high:
        problem = (
            f"no true rate gives {value:.1%} under {card.file} (false alarms {lowest.value:.1%}, sensitivity "
            f"{highest.value:.1%}): these answers are not of the labelled kind; do not use the correction"
        )
    return got._asdict(), problem


def _doubts(card: JudgeCard, rows: Sequence[Row]) -> list[str]:
    """What a reader of the corrected rates must know about the card."""
    found = []
    few = [
        f"{size} labelled {what}"
        for what, size in ((card.asks, card.positives), (f"not {card.asks}", card.negatives))
        if size < FEW_LABELS
    ]
    if few:
        found.append(f"judge card {card.file} is small: {' and '.join(few)}; label {FEW_LABELS} of each or more")
    total = card.positives + card.negatives + card.unscored
    if card.unscored > MANY_UNSCORED * total:
        found.append(f"judge card {card.file}: {card.unscored} of {total} labelled answers are unscored")
    asked = {row["prompt_id"]: prompt_mark(row["prompt"]) for row in rows}
    shared = sum(mark in card.prompts for mark in asked.values())
    if 2 * shared < len(asked):
        found.append(
            f"judge card {card.file} is from other data ({shared} of the {len(asked)} prompts here are its own): "
            "corrected rates assume that the judge errs as often here as there"
        )
    return found


def _summary(card: JudgeCard) -> dict[str, Any]:
    return {
        "file": card.file,
        "sha256": card.sha256,
        "judge": card.judge,
        "asks": card.asks,
        "n": card.positives + card.negatives,
        "positives": card.positives,
        "negatives": card.negatives,
        "sensitivity": card.true_positives / card.positives if card.positives else None,
        "specificity": card.true_negatives / card.negatives if card.negatives else None,
    }


def _require_judge(card: JudgeCard, identity: str) -> None:
    if card.judge != identity:
        raise ValueError(
            f"judge card {card.file} is of {card.judge}, but the judge of {card.asks!r} here is {identity}; "
            "make a card of that one with: temper judge check JUDGE data=FILE"
        )
