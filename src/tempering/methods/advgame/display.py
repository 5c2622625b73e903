"""What a person sees of a running game: pair yield, win rates of both seats, statuses, over-refusal, distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from tempering.core.progress import console
from tempering.methods.advgame.settings import ROLES, AdvGameConfig


def game_table(config: AdvGameConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean of some steps' metrics, one row a seat and class."""
    if not rows:
        return
    first, last = rows[0]["step"], rows[-1]["step"]
    table = Table(title=f"steps {first} to {last} of {config.steps}", title_justify="left")
    for name in ("seat", "pairs", "reward", "wins", "tokens", "statuses"):
        table.add_column(name, justify="left" if name in ("seat", "statuses") else "right", overflow="fold")
    for role in ROLES:
        for category in config.data.classes:
            name = f"{role}/{category}"
            table.add_row(
                f"{role}, {category}", _share(rows, name), _mean(rows, f"{name}/reward", "{:.2f}"),
                _mean(rows, f"{name}/win", "{:.0%}"), _mean(rows, f"{name}/tokens", "{:.0f}"), _statuses(rows, name),
            )  # fmt: skip
    console.print(table)
    for player in ("shared",) if config.players.shared else ROLES:
        told = {
            "delta": _mean(rows, f"{player}/delta", "{:+.2f} nats"),
            "accuracy": _mean(rows, f"{player}/accuracy", "{:.0%}"),
            "KL to the start": _mean(rows, f"{player}/kl_initial_nats", "{:.4f} nats a token"),
            "to the average": _mean(rows, f"{player}/kl_ema_nats", "{:.4f}"),
            "drift": _mean(rows, f"{player}/drift", "{:.1e}"),
        }
        if any(told.values()):
            console.print(f"{player}: " + ", ".join(f"{what} {value}" for what, value in told.items() if value))
    guard = _mean(rows, "guard/benign_compliance", "{:.0%}")
    seconds = _mean(rows, "step_seconds", "{:.1f}")
    waited = _mean(rows, "waited_seconds", ", {:.1f} of them waiting for judges")
    console.print(f"benign answers that comply: {guard or 'not judged'}; {seconds} s a step{waited}")


def validation_table(config: AdvGameConfig, facts: Mapping[str, Any]) -> None:
    """Print what a validation found: training rewards on fixed trees, before and after, paired."""
    table = Table(title=f"validation after step {facts['step']}, {facts['trees']} fixed trees", title_justify="left")
    for name in ("player, against the initial other", "reward before", "after", "change (95 %)", "n"):
        table.add_column(name, justify="left" if name.startswith("player") else "right")
    for role in ROLES:
        change = facts.get(f"{role}/change")
        table.add_row(
            role, _number(facts.get(f"{role}/reward_initial")), _number(facts.get(f"{role}/reward")),
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*change) if change else "", str(facts.get(f"{role}/n", "")),
        )  # fmt: skip
    console.print(table)


def summary_table(config: AdvGameConfig, facts: Mapping[str, Any]) -> None:
    """Print what a whole game came to."""
    table = Table(title=f"the game, {facts['steps']} steps", title_justify="left")
    for name in ("seat", "pair yield (95 %)", "statuses"):
        table.add_column(name, overflow="fold")
    for name, found in facts["yield"].items():
        share = "{pairs}/{possible}: {value:.0%} ({low:.0%} to {high:.0%})".format(**found)
        statuses = " ".join(f"{status} {count}" for status, count in facts["statuses"][name].items())
        table.add_row(name.replace("/", ", "), share, statuses)
    console.print(table)
    for player in ("shared",) if config.players.shared else ROLES:
        told = {
            name: facts.get(f"{player}/{name}") for name in ("kl_initial_nats", "kl_ema_nats", "drift_accumulated")
        }
        console.print(f"{player}: " + ", ".join(f"{n} {v:.2g}" for n, v in told.items() if v is not None))
    if facts["best_step"]:
        best = ", ".join(f"{role} after step {step}" for role, step in facts["best_step"].items())
        console.print(f"best in validation: {best}")
    console.print(f"{facts['seconds_per_step']:.1f} s a step, {facts['peak_bytes'] / 1e9:.2f} GB at most")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    known = [row[name] for row in rows if row.get(name) is not None]
    return form.format(np.mean(known)) if known else ""


def _share(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    made, possible = (sum(row.get(f"{name}/{what}", 0) for row in rows) for what in ("pairs", "possible"))
    return f"{made}/{possible} {made / possible:.0%}" if possible else ""


def _statuses(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    start = f"{name}/status/"
    found = sorted({key.removeprefix(start) for row in rows for key in row if key.startswith(start)})
    return " ".join(f"{status} {sum(row.get(start + status, 0) for row in rows)}" for status in found)
