"""What several commands do: read settings and recipes, hold gates, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer


def read_config(cls: Any, file: Path | None, items: list[str] | None, *, without: tuple[str, ...] = ()) -> Any:
    """A configuration of this class, from a file and over it the command line; `without` keys of the file."""
    from tempering.core.config import load_config

    return load_config(cls, file, items or [], without=without)


def find_recipe(folder: str, name: str | None) -> Path | None:
    """Find a recipe by path, or by the name of a bundled one."""
    if name is None:
        return None
    bundled = Path(__file__).parent.parent / "recipes" / folder
    found = bundled / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") or ("/" in name and not found.is_file()):
        return Path(name)
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"recipe {name}: no such file, nor a bundled recipe of {folder} ({names})")
    return found


def eval_settings(items: list[str], recipe: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return `out=`, and the settings of an eval: those of a recipe, and over them those of the command line."""
    from tempering.core.config import merge, parse_overrides, read_yaml

    file = find_recipe("eval", recipe)
    settings = merge(read_yaml(file) if file is not None else {}, parse_overrides(items))
    return settings.pop("out", None), settings


def require_gates(results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Exit with code 3 where a gate is not met."""
    from tempering.core.config import build
    from tempering.evals import EvalConfig, failed_gates

    gate = build(EvalConfig, settings, "eval settings").gate
    measured = {name for result in results.values() for name in result["metrics"]}
    failures: dict[str, None] = {}
    for metrics in (result["metrics"] for result in results.values()):
        here = {name: bound for name, bound in gate.items() if name in metrics or name not in measured}
        failures |= dict.fromkeys(failed_gates(metrics, here))
    if failures:
        tell("gate not met: " + "; ".join(failures))
        raise typer.Exit(3)


def print_keys(config: Any) -> None:
    """Every setting with default and meaning."""
    from tempering.core.config import field_table

    for name, default, meaning in field_table(config):
        typer.echo(f"{name} = {default}\n    {meaning}")


def print_metrics(results: dict[str, Any]) -> None:
    """A table with a column an eval."""
    from tempering.core.progress import metrics_table

    metrics_table({name: r["metrics"] for name, r in results.items()})


def print_by_attacker(metrics: dict[str, dict[str, Any]]) -> None:
    """Print a table a target, with a column an attacker."""
    from tempering.core.progress import metrics_table

    for target, found in metrics.items():
        columns: dict[str, dict[str, Any]] = {}
        for key, metric in found.items():
            name, _, attacker = key.partition("/")
            columns.setdefault(attacker, {})[name] = metric
        metrics_table(columns, title=target)


def tokens_of(used: dict[str, int] | None) -> str:
    """How many tokens a judge read and wrote, in words."""
    return "" if used is None else f", {used['prompt_tokens']} tokens read and {used['completion_tokens']} written"


def print_estimate(found: list[dict[str, Any]], as_json: bool) -> None:
    """What evals would ask of endpoints."""
    finish(found, as_json)
    if as_json:
        return
    for row in found:
        cost = row["cost_at_most"]
        tell(
            f"{row['eval']}, {row['role']}, {row['endpoint']}: {row['requests']:,} requests "
            f"({row['cached']:,} more are answered already), about {row['prompt_tokens_about']:,} prompt tokens, "
            f"at most {row['completion_tokens_at_most']:,} completion tokens, "
            + ("no prices given" if cost is None else f"cost at most about {cost:.4g}")
        )
    tell(
        "prompt tokens are guessed at 4 bytes of UTF-8 each, plus 4 a turn; a judge's prompts with answers of full "
        "length; tries after a failure are not counted"
        if found
        else "nothing is asked of an endpoint"
    )


def finish(result: Any, as_json: bool) -> None:
    """The result on stdout, where it is asked for as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")


def tell(text: str) -> None:
    """One message on stderr."""
    print(text, file=sys.stderr, flush=True)
