"""A judge against human labels: its card. The command is `temper judge check JUDGE data=FILE`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig, EndpointSampler
from tempering.core.ledger import SPENT, Tokens
from tempering.core.records import Completion, Prompt, pair_from_row, prompt_from_row
from tempering.core.stats import wilson
from tempering.data.describe import licences_of, sha256_of
from tempering.data.formats import at
from tempering.judges import PAIRWISE, QUESTIONS, Asks, Connect, Judge, judge_groups, load_judge, load_pairwise
from tempering.judges.card import COUNTS, SCHEMA, prompt_mark

if TYPE_CHECKING:
    from tempering.judges.pairwise import PairwiseJudge  # loads torch


REMEDY = "name another judge, or correct this one (of an endpoint model name, URL, key or endpoint.*)"


class CheckJudgeConfig(Config):
    """Settings of `temper judge check`."""

    data: str
    """File, folder, catalogue name or Hub id of labelled rows."""
    out: str | None = None
    """File for the card; null: one in `runs/judge-cards`, named by judge and content."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a judge `openai:MODEL@URL` is asked, and what it may cost."""
    cache: str | None = None
    """Folder of what it has answered, never asked again; null: nothing is kept."""

    @property
    def source(self) -> dict[str, Any]:
        """Where the rows are from, for the card."""
        licences = licences_of(self.data)
        return {
            "source": self.data,
            "sha256": sha256_of(self.data),
            **({"licences": licences} if licences else {}),
        }

    def connect(self, spec: str) -> EndpointSampler:
        """Connect the judge."""
        return EndpointSampler(spec, cache=self.cache, **self.endpoint.model_dump())


class Labelled(NamedTuple):
    """One labelled row."""

    prompt: Prompt
    completion: Completion
    label: bool


class LabelledPair(NamedTuple):
    """One row of a preferred and a dispreferred answer."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


def check(
    judge_spec: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    source: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
    connect: Connect | None = None,
) -> dict[str, Any]:
    """Compare a judge with human labels; `rows` is what `tempering.data.files.read_rows(path)` yields.

    Returns the card (see `card_of`; of a pairwise judge: `pair_card_of`). `source` says where the rows are from.

    Raises:
        ValueError: naming the row and field that is missing or of the wrong type.
        ValueError: when no row could be scored: this judge is none.
        RuntimeError: when an endpoint's spending limit was reached.
    """
    if judge_spec.startswith(f"{PAIRWISE}:"):
        question, pairs = read_pairs(rows)
        judge = load_pairwise(judge_spec, question, connect)
        return pair_card_of(judge, pairs, source=source, on_done=on_done)
    asks, labelled = read_labelled(rows)
    return card_of(load_judge(judge_spec, asks, connect), asks, labelled, source=source, seed=seed, on_done=on_done)


def card_of(
    judge: Judge,
    asks: Asks,
    labelled: Sequence[Labelled],
    *,
    source: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Ask a judge about labelled answers and count.

    `accuracy`, `sensitivity` (share of labelled-true that the judge calls true) and `specificity` carry
    Wilson intervals, Cohen's `kappa` a credible one. `n` counts the scored rows, `counts` sorts them; where a
    rate has no row to stand on, or kappa is undefined, its numbers are `None`. Verdicts count as true from score
    0.5, as in every eval: a judge's `partial` is a yes. `tokens` is `None` where the judge reports none.

    Raises:
        ValueError: when no row could be scored: this judge is none.
        RuntimeError: when an endpoint's spending limit was reached.
    """
    started = time.perf_counter()
    groups = [(row.prompt, [row.completion]) for row in labelled]
    verdicts = [group[0] for group in judge_groups(judge, groups, max_unscored=1.0, on_done=on_done)]
    seconds = time.perf_counter() - started
    _require_unspent([verdict.reason for verdict in verdicts if verdict.is_unscored], len(labelled))
    counts = {(label, said): 0 for label in (True, False) for said in (True, False)}
    for row, verdict in zip(labelled, verdicts, strict=True):
        if verdict.holds is not None:
            counts[row.label, verdict.holds] += 1
    n = sum(counts.values())
    if n == 0:
        raise ValueError(
            f"judge {judge.identity}: none of {len(labelled)} rows could be scored: {verdicts[0].reason}; {REMEDY}"
        )
    return {
        "schema": SCHEMA,
        "kind": "pointwise",
        "judge": judge.identity,
        "asks": asks,
        "n": n,
        "unscored": len(labelled) - n,
        "unscored_rate": _rate(len(labelled) - n, len(labelled)),
        "counts": dict(zip(COUNTS, counts.values(), strict=True)),
        "accuracy": _rate(counts[True, True] + counts[False, False], n),
        "sensitivity": _rate(counts[True, True], counts[True, True] + counts[True, False]),
        "specificity": _rate(counts[False, False], counts[False, False] + counts[False, True]),
        "kappa": _kappa(counts, seed),
        "position_consistency": {
            **_rate(0, 0),
            "reason": "this judge reads one answer at a time, so there is no order to swap",
        },
        "seconds": round(seconds, 3),
        "seconds_per_answer": round(seconds / len(labelled), 6),
        "tokens": _tokens(getattr(judge, "usage", None)),
        "data": {**(source or {}), "prompts": sorted({prompt_mark(row.prompt.text) for row in labelled})},
    }


def read_labelled(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Asks, list[Labelled]]:
    """Read labelled rows; which question the first one has as a column (`refused`, ...) is the question of all.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    asks: Asks | None = None
    out = []
    for where, row in rows:
        try:
            found = [q for q in QUESTIONS if row.get(q) is not None]
            if len(found) != 1:
                have = f"both {' and '.join(map(repr, found))}" if found else "neither 'refused' nor 'harmful'"
                raise ValueError(
                    f"{have}; expected one column that says what the judge is asked, true or false: "
                    f"{', '.join(QUESTIONS)}"
                )
            if asks is not None and found[0] != asks:
                raise ValueError(f"has '{found[0]}', but the rows before it have '{asks}'; check one at a time")
            asks = found[0]
            if not isinstance(row[asks], bool):
                raise ValueError(f"'{asks}' must be true or false, got {row[asks]!r}")
            if not isinstance(row.get("completion"), str):
                raise ValueError(f"'completion' must be text, got {row.get('completion')!r}")
            prompt = prompt_from_row(row)
        except ValueError as error:
            raise ValueError(f"{at(where)}: {error}") from None
        out.append(Labelled(prompt, Completion(prompt.id, row["completion"], "stop"), row[asks]))
    if asks is None:
        raise ValueError(
            f"no rows to check the judge on; expected 'prompt', 'completion' and one of {', '.join(QUESTIONS)}"
        )
    return asks, out


def pair_card_of(
    judge: PairwiseJudge,
    pairs: Sequence[LabelledPair],
    *,
    source: Mapping[str, Any] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Ask a pairwise judge about labelled pairs, each in both orders, and count.

    `accuracy` is the share of the *decided* pairs on which it prefers the chosen answer; `decided` the share of the
    scored pairs on which it prefers either (a tie, and two orders that disagree, decide nothing); read them
    together. `position_consistency` is the share of the pairs on which both orders said the same. Intervals: Wilson.

    Raises:
        ValueError: when no pair could be scored: this judge is none.
        RuntimeError: when an endpoint's spending limit was reached.
    """
    started = time.perf_counter()
    compared = judge.compare_many([(row.prompt, [(row.chosen, row.rejected)]) for row in pairs], on_done)
    seconds = time.perf_counter() - started
    said = [preferences[0] for preferences in compared]
    _require_unspent([preference.reason for preference in said if preference.side is None], len(said))
    sides = Counter(preference.side for preference in said)
    n = len(said) - sides[None]
    if n == 0:
        raise ValueError(
            f"judge {judge.identity}: none of {len(said)} pairs could be scored: {said[0].reason}; {REMEDY}"
        )
    agreed = Counter(preference.is_consistent for preference in said)
    return {
        "schema": SCHEMA,
        "kind": PAIRWISE,
        "judge": judge.identity,
        "asks": judge.asks,
        "n": n,
        "unscored": sides[None],
        "unscored_rate": _rate(sides[None], len(said)),
        "counts": {"right": sides["A"], "wrong": sides["B"], "tie": sides["tie"], "orders_disagree": agreed[False]},
        "accuracy": _rate(sides["A"], sides["A"] + sides["B"]),
        "decided": _rate(sides["A"] + sides["B"], n),
        "position_consistency": _rate(agreed[True], agreed[True] + agreed[False]),
        "seconds": round(seconds, 3),
        "seconds_per_pair": round(seconds / len(said), 6),
        "tokens": _tokens(judge.usage),
        "data": {**(source or {}), "prompts": sorted({prompt_mark(row.prompt.text) for row in pairs})},
    }


def read_pairs(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str | None, list[LabelledPair]]:
    """Read `prompt/chosen/rejected` rows; a `question` column, where there is one, must be the same in all.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    questions: list[str | None] = []
    out = []
    for where, row in rows:
        try:
            pair = pair_from_row(row)
            questions.append(None if row.get("question") is None else str(row["question"]))
            if questions[-1] != questions[0]:
                raise ValueError(f"'question' is {questions[-1]!r}, in the first row {questions[0]!r}; one at a time")
        except ValueError as error:
            raise ValueError(f"{at(where)}: {error}") from None
        prompt = Prompt(pair.messages, category=pair.category, label=pair.label)
        chosen, rejected = (Completion(prompt.id, text, "stop") for text in (pair.chosen, pair.rejected))
        out.append(LabelledPair(prompt, chosen, rejected))
    if not out:
        raise ValueError("no rows to check the judge on; expected 'prompt', 'chosen' and 'rejected'")
    return questions[0], out


def cohen_kappa(counts: Mapping[tuple[bool, bool], float]) -> float | None:
    """Return Cohen's kappa (1960) of (label, said) counts, (p_o - p_e) / (1 - p_e); `None` where p_e is 1.

    >>> cohen_kappa({(True, True): 20, (True, False): 5, (False, True): 10, (False, False): 15})
    0.4
    """
    n = sum(counts.values())
    if n == 0:
        return None
    agreed = (counts[True, True] + counts[False, False]) / n
    label, said = (
        (counts[True, True] + counts[True, False]) / n,
        (counts[True, True] + counts[False, True]) / n,
    )
    expected = label * said + (1 - label) * (1 - said)
    return None if expected == 1 else round((agreed - expected) / (1 - expected), 12)


def _require_unspent(reasons: Iterable[str | None], n: int) -> None:
    """Refuse to make a card of the rows that came before a spending limit."""
    if spent := [reason for reason in reasons if reason and SPENT in reason]:
        raise RuntimeError(f"{len(spent)} of {n} rows were not judged: {spent[0]}; raise the limit")


def _tokens(used: Tokens | None) -> dict[str, int] | None:
    return None if used is None else {"prompt_tokens": used.prompt, "completion_tokens": used.completion}


def _rate(successes: int, n: int) -> dict[str, float | None]:
    if n == 0:
        return {"value": None, "low": None, "high": None}
    interval = wilson(successes, n)
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _kappa(counts: Mapping[tuple[bool, bool], int], seed: int, draws: int = 4000) -> dict[str, float | None]:
    """Kappa with the 95 % credible interval under the Jeffreys prior, Dirichlet(1/2), on the four cells.

    A bootstrap would call two agreeing rows certain. The interval is widened to hold the value itself.
    """
    value = cohen_kappa(counts)
    if value is None:
        return {"value": None, "low": None, "high": None}
    cells = list(counts)
    drawn = np.random.default_rng(seed).dirichlet([counts[c] + 0.5 for c in cells], size=draws)
    low, high = np.quantile([cohen_kappa(dict(zip(cells, row, strict=True))) for row in drawn], [0.025, 0.975])
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}
