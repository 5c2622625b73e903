"""A judge against human labels: its card. The command is `temper judge check JUDGE data=FILE`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tempering.core.records import Completion, Prompt, prompt_from_row
from tempering.core.stats import wilson
from tempering.data.formats import at
from tempering.judges import Asks, judge_groups, load_judge

QUESTIONS: tuple[Asks, ...] = ("refused", "harmful", "toxic")
_NAMES = "'refused', 'harmful' or 'toxic'"


class Labelled(NamedTuple):
    """One labelled row."""

    prompt: Prompt
    completion: Completion
    label: bool


def check(
    judge_spec: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare a judge with human labels; `rows` is what `tempering.data.files.read_rows(path)` yields.

    `accuracy`, `sensitivity` (share of labelled-true that the judge calls true) and `specificity` carry
    Wilson intervals, Cohen's `kappa` a credible one. `n` counts the scored rows; where a rate has no
    row to stand on, or kappa is undefined, its numbers are `None`. Verdicts count as true from score 0.5.

    Raises:
        ValueError: naming the row and field that is missing or of the wrong type.
        RuntimeError: when no row could be scored.
    """
    asks, labelled = read_labelled(rows)
    judge = load_judge(judge_spec, asks)
    started = time.perf_counter()
    groups = [(row.prompt, [row.completion]) for row in labelled]
    verdicts = [group[0] for group in judge_groups(judge, groups, max_unscored=1.0, on_done=on_done)]
    seconds = time.perf_counter() - started
    counts = {(label, said): 0 for label in (True, False) for said in (True, False)}
    for row, verdict in zip(labelled, verdicts, strict=True):
        if verdict.holds is not None:
            counts[row.label, verdict.holds] += 1
    n = sum(counts.values())
    if n == 0:
        raise RuntimeError(f"none of {len(labelled)} rows could be scored: {verdicts[0].reason}")
    return {
        "judge": judge.identity,
        "asks": asks,
        "n": n,
        "unscored": len(labelled) - n,
        "accuracy": _rate(counts[True, True] + counts[False, False], n),
        "sensitivity": _rate(counts[True, True], counts[True, True] + counts[True, False]),
        "specificity": _rate(counts[False, False], counts[False, False] + counts[False, True]),
        "kappa": _kappa(counts, seed),
        "seconds": round(seconds, 3),
    }


def read_labelled(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Asks, list[Labelled]]:
    """Read labelled rows; which of `QUESTIONS` the first one has is the question of all.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    asks: Asks | None = None
    out = []
    for where, row in rows:
        try:
            found = [q for q in QUESTIONS if row.get(q) is not None]
            if len(found) != 1:
                have = " and ".join(map(repr, found)) if found else f"no {_NAMES}"
                raise ValueError(f"{have}; expected one, true or false, which says what the judge is asked")
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
        raise ValueError(f"no rows to check the judge on; expected 'prompt', 'completion' and {_NAMES}")
    return asks, out


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
