"""What is watched while a game runs: the line of metrics, silent judges, over-refusal, attacks that are all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tempering.core.progress import say
from tempering.methods.advgame.rollout import Dealer
from tempering.methods.advgame.settings import ROLES, AdvGameConfig


def metrics_row(
    config: AdvGameConfig,
    step: int,
    told: Mapping[str, Sequence[float]],
    played: Mapping[str, Any],
    judged: Mapping[str, float],
    state: Mapping[str, Any],
    tokens: int,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: counts are summed over the updates of a step, all else is their mean."""
    counts = {name: int(sum(v)) for name, v in told.items() if name.endswith("/pairs")}
    means = {name: float(np.mean(v)) for name, v in told.items() if name not in counts}
    own, is_graded = config.rollout, config.loss == "grpo"  # then every sample may be learned from
    possible = {
        "attacker": own.seeds * (own.attacks if is_graded else 1),
        "defender": own.seeds * own.attacks * (own.responses if is_graded else 1),
    }
    counts |= {name.replace("/pairs", "/possible"): possible[name.partition("/")[0]] for name in counts}
    losses = [v for name, v in means.items() if name.endswith("/loss")]
    rates = [v for name, v in means.items() if name.endswith("/lr")]
    comply, answers = (sum(x) for x in zip(*state["benign"][-config.guard.window :], strict=True))
    unscored, asked = (sum(x) for x in zip(*state["unscored"], strict=True))
    return {
        "step": step, "loss": float(np.mean(losses)) if losses else None, "lr": rates[0] if rates else None,
        "tokens": tokens, **counts, **means, **played, **judged,
        "guard/benign_compliance": comply / answers if answers else None,
        "guard/unscored": unscored / asked if asked else 0.0,
    }  # fmt: skip


def require_judged(config: AdvGameConfig, window: Sequence[Sequence[int]], dealer: Dealer) -> None:
    """Stop where judges said nothing too often: at once where they said nothing at all, else over the window.

    Raises:
        RuntimeError: how many of how many, the limit, and the most frequent reason.
    """
    unscored, asked = (sum(x) for x in zip(*window, strict=True))
    is_full = len(window) == config.judges.unscored_window
    if asked and (is_full or unscored == asked) and unscored > config.judges.max_unscored * asked:
        reason = next((told for told, _ in dealer.reasons.most_common(1)), "no reason")
        raise RuntimeError(
            f"{unscored} of {asked} questions to the judges had no answer in {len(window)} step(s) (limit "
            f"{100 * config.judges.max_unscored:g} %), most often {reason!r}; repair the judge and --resume, or "
            "raise judges.max_unscored"
        )


def fallen(history: Sequence[float | None], window: int) -> float | None:
    """By what share the mean of the last `window` values lies below that of the first, once there are both.

    >>> fallen([0.8, 0.8, 0.4, 0.4], 2)
    0.5
    """
    if len(history) < 2 * window:
        return None
    first, last = ([v for v in part if v is not None] for part in (history[:window], history[-window:]))
    return 1 - float(np.mean(last)) / float(np.mean(first)) if first and last and any(first) else None


def compliance_fallen(history: Sequence[Sequence[int]], window: int) -> tuple[float, float] | None:
    """The shares of benign answers that complied in the first `window` steps and in the last, once there are both.

    >>> compliance_fallen([[4, 4], [3, 4], [2, 4]], 1)
    (1.0, 0.5)
    """
    if len(history) < 2 * window:
        return None
    (before, n), (now, m) = (
        [sum(x) for x in zip(*part, strict=True)] for part in (history[:window], history[-window:])
    )
    return (before / n, now / m) if n and m else None


def watch_over(config: AdvGameConfig, state: Mapping[str, Any], step: int) -> None:
    """Raise an alarm when it begins: benign compliance has fallen (over-refusal), or attacks on a seed are all alike.

    Raises:
        RuntimeError: compliance has fallen, and `guard.stop` is set.
    """

    def falls(back: int) -> tuple[bool, bool]:
        end = len(state["benign"]) - back
        shares = compliance_fallen(state["benign"][:end], config.guard.window)
        likeness = fallen(state["dispersion"][:end], config.guard.window)
        has_fallen = shares is not None and shares[0] - shares[1] >= config.guard.drop
        return has_fallen, likeness is not None and likeness > 0.5

    (refuses, is_alike), (did, was_alike) = falls(0), falls(1)
    if refuses and not did:
        before, now = compliance_fallen(state["benign"], config.guard.window) or (0.0, 0.0)
        text = (
            f"step {step}: {now:.0%} of benign answers comply, {before:.0%} in the first {config.guard.window} "
            "steps: the defender is learning to refuse"
        )
        if config.guard.stop:
            raise RuntimeError(f"{text}; raise class_weights.benign, or set guard.stop=false")
        say(f"[yellow]alarm: {text}[/]")
    if is_alike and not was_alike:
        say(f"[yellow]alarm: step {step}: attacks on a seed differ by less than half of what they did[/]")


def dispersion(row: Mapping[str, Any]) -> float | None:
    """How much attacks on a seed differ, over the classes."""
    found = [value for name, value in row.items() if name.endswith("/dispersion")]
    return float(np.mean(found)) if found else None


def note_of(row: Mapping[str, Any]) -> str:
    """What stands beside the bar: pairs and loss of each player."""
    parts = []
    for role in ROLES:
        pairs = sum(v for name, v in row.items() if name.startswith(f"{role}/") and name.endswith("/pairs"))
        loss = row.get(f"{role}/loss", row.get("shared/loss"))
        parts.append(f"{role} {pairs} pairs" + (f" loss {loss:.3f}" if loss is not None else ""))
    return ", ".join(parts)
