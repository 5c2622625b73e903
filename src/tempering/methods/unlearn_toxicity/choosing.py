"""Which layers the loss reads: spread over the depth, or those whose direction matters most for what is said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tempering import judges
from tempering.core.activations import projected_out
from tempering.core.bank import Bank
from tempering.core.chat import Encoded
from tempering.core.logprobs import score_groups
from tempering.core.policy import Policy
from tempering.core.probes import good_layers, layer_weights, select_layers
from tempering.core.progress import progress
from tempering.core.run import Run
from tempering.core.text_rows import Tokens
from tempering.core.training import Processes
from tempering.methods.unlearn_toxicity.checks import expected_maximum
from tempering.methods.unlearn_toxicity.settings import Plan, UnlearnToxicityConfig, edited_blocks
from tempering.methods.unlearn_toxicity.texts import openings

FILE = "data/causal.json"
LEAST_RISE = 0.01
"""Rises of perplexity below this share count as this much: they are within noise."""


@dataclass(frozen=True)
class Effect:
    """What taking a layer's direction out of the states does."""

    layer: int
    toxicity: float
    """Expected maximum toxicity then."""
    perplexity: float
    """On held-out neutral texts."""
    score: float
    """Fall of toxicity per relative rise of perplexity."""


def score(toxicity: float, perplexity: float, before: tuple[float, float]) -> float:
    """Return the fall of toxicity per relative rise of perplexity; `before` is (toxicity, perplexity).

    >>> round(score(0.3, 22.0, (0.4, 20.0)), 6), round(score(0.3, 19.0, (0.4, 20.0)), 6)
    (1.0, 10.0)
    """
    return (before[0] - toxicity) / max(perplexity / before[1] - 1, LEAST_RISE)


def plan(config: UnlearnToxicityConfig, bank: Bank | None, count: int, effects: Sequence[Effect] = ()) -> Plan:
    """Settle the layers that the loss reads, their weights, and what is edited.

    `effects`: with `select=causal`, of all good layers.

    Raises:
        ValueError: a layer that is not there, or too few probes that are good and stable, or that matter.
    """
    worth = {w.layer: w for w in bank.worth} if bank else {}
    if isinstance(config.layers, list):
        chosen = sorted(set(config.layers))
        if not 0 <= chosen[0] <= chosen[-1] < count:
            raise ValueError(f"layers={config.layers}: this model has blocks 0 to {count - 1}")
    elif config.objective in ("cosine_rmu", "rmu"):
        chosen = [round(0.22 * count)]
    elif config.select == "causal":
        chosen = most_effective(effects, 1 if config.layers == "single" else config.n_layers)
    else:
        assert bank is not None
        chosen = select_layers(bank.worth, count, config.n_layers)
        if config.layers == "single":
            chosen = [max(chosen, key=lambda layer: (worth[layer].auroc, -layer))]
    is_weighed = config.objective == "probe" and all(layer in worth for layer in chosen)
    weights = layer_weights({i: worth[i].auroc if is_weighed else 1.0 for i in chosen})
    return Plan(weights, edited_blocks(config, chosen))


def most_effective(effects: Sequence[Effect], n_layers: int) -> list[int]:
    """Choose the layers with the largest score, in order of depth; of equals the lower.

    Raises:
        ValueError: no layer's direction lowers toxicity when it is taken out.
    """
    useful = sorted((e for e in effects if e.score > 0), key=lambda e: (-e.score, e.layer))
    if not useful:
        table = "; ".join(f"{e.layer}: toxicity {e.toxicity:.3f}, perplexity {e.perplexity:.2f}" for e in effects)
        raise ValueError(
            f"select=causal: no probe's direction lowers toxicity when it is taken out ({table}); use select=spread, "
            "more causal_prompts or check.samples, or name layers=[...]"
        )
    return sorted(e.layer for e in useful[:n_layers])


def found_effects(
    config: UnlearnToxicityConfig, policy: Policy, bank: Bank, neutral: Sequence[Tokens], scorer: judges.Judge,
    run: Run, processes: Processes, count: int,
) -> list[Effect]:  # fmt: skip
    """Measure what every good layer's direction does, once a run; every process learns what was found.

    Raises:
        ValueError: too few good layers.
    """
    if processes.is_main and not run.has(FILE):
        run.write_json(
            FILE, measured_effects(config, policy, bank, neutral, scorer, list(good_layers(bank.worth, count)))
        )
    processes.wait()
    return [Effect(**row) for row in run.read_json(FILE)["layers"]]


def measured_effects(
    config: UnlearnToxicityConfig, policy: Policy, bank: Bank, neutral: Sequence[Tokens], scorer: judges.Judge,
    layers: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Sample after rude texts, and read neutral ones, with nothing and with each layer's direction taken out.

    The control directions of a run are not asked: all arms of a comparison then have the same layers.
    """
    rude, _ = openings(config, config.causal_prompts)

    def measured(directions: Mapping[int, torch.Tensor]) -> tuple[float, float]:
        with projected_out(policy.model, directions):
            toxicity = statistics.fmean(expected_maximum(policy, rude, scorer, config))
            return toxicity, perplexity(policy, neutral, config.batch_tokens)

    with progress("causal effects", len(layers) + 1) as advance:
        before = measured({})
        advance(1)
        effects = []
        for layer in layers:
            v = torch.tensor(bank.fits[layer].direction, dtype=torch.float32)[None]
            found = measured({layer + 1: v})
            effects.append(Effect(layer, *found, score(*found, before)))
            advance(1)
    return {
        "prompts": len(rude), "samples": config.check.samples, "scorer": scorer.identity,
        "toxicity": before[0], "perplexity": before[1], "layers": [asdict(e) for e in effects],
    }  # fmt: skip


def perplexity(policy: Policy, rows: Sequence[Tokens], batch_tokens: int) -> float:
    """Perplexity of texts after their first token, over all tokens."""
    groups = [[Encoded(row.ids, 1)] for row in rows if len(row.ids) > 1]
    scored = score_groups(
        policy.scorer, groups, pad_id=policy.tokenizer.pad_token_id, device=policy.device, max_tokens=batch_tokens
    )
    nats, tokens = (sum(column) for column in zip(*(one for [one] in scored), strict=True))
    return math.exp(-nats / tokens)
