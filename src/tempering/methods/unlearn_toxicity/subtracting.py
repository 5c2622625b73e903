"""Subtract probes at inference, without training: the baseline that asks what directions do by themselves.

    h_l <- h_l - strength relu(<h_l, v_l> + b_l) v_l        at all positions, of each chosen block

A state that the probe of its block finds toxic is moved along the probe's direction to where that probe is undecided;
all others stay. The weights do not change: whoever has them has the model as it was, so attacks on unlearning and
evals that look into weights are refused. Layers are chosen as in training (`layers=auto`), of the bank of a run.

    temper train unlearn_toxicity probes_only=true out=runs/bank
    temper eval smollm2 toxicity capability sampler=probe_subtract probe_subtract.probes=runs/bank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tempering.core.activations import block_count, subtracted
from tempering.core.bank import FOLDER, Bank, require_own
from tempering.core.config import Config, build
from tempering.core.probes import select_layers
from tempering.core.records import Completion, Prompt
from tempering.core.sampling import LocalSampler, Sampler


class SubtractConfig(Config):
    """What is subtracted; on the command line `probe_subtract.KEY=VALUE`."""

    probes: str
    """A run whose probes are taken, fitted to the states of the target."""
    layers: list[int] | Literal["auto", "single"] = "auto"
    """Blocks, counted from 0, after which probes are subtracted; auto: good and stable ones spread over the depth."""
    n_layers: int = Field(8, ge=1)
    """Most layers that auto chooses."""
    directions: Literal["probe", "shuffled", "diff_of_means"] = "probe"
    """The probes, or a control's: probes of shuffled labels, difference of means."""
    strength: float = Field(1.0, gt=0)
    """How far states that a probe finds toxic are moved: 1, to where it is undecided; 2, as far to its other side."""


class SubtractingSampler(LocalSampler):
    """Answer and score with probes subtracted; the policy itself stays as it is."""

    changes_states = True

    def __init__(
        self, inner: LocalSampler, probes: Mapping[int, tuple[Tensor, float]], strength: float, name: str,
        corpora: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__(
            inner.policy, batch_rows=inner.batch_rows, batch_tokens=inner.batch_tokens, fmt=inner.fmt,
            thinks=inner.thinks, name=name,
        )  # fmt: skip
        self.probes, self.strength, self.probe_corpora = dict(probes), strength, list(corpora)

    def computing(self) -> AbstractContextManager[None]:
        """Inside it the model computes with the probes subtracted."""
        return subtracted(self.policy.model, self.probes, self.strength)

    def __call__(self, *args: Any, **settings: Any) -> list[list[Completion]]:
        """Return n completions for each prompt; see `LocalSampler`."""
        with self.computing():
            return super().__call__(*args, **settings)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Return (summed log-probability in nats, tokens) of each given completion."""
        with self.computing():
            return super().score(prompts, completions)


def subtracting_sampler(inner: Sampler, options: Mapping[str, Any] | None = None) -> SubtractingSampler:
    """Subtract the probes of a run from what a sampler computes.

    Raises:
        FileNotFoundError, ValueError: an option or run that cannot be had, probes of another model, a block that is
            not there, or a target without weights here.
    """
    config = build(SubtractConfig, dict(options or {}), "probe_subtract")
    if not isinstance(inner, LocalSampler) or inner.changes_states:
        raise ValueError(f"sampler=probe_subtract changes states, and {inner.name} only answers; name a model")
    bank = Bank.load(Path(config.probes) / FOLDER)
    require_own(bank, inner.policy, config.probes)
    count = block_count(inner.policy.model)
    layers = config.layers if isinstance(config.layers, list) else select_layers(bank.worth, count, config.n_layers)
    if config.layers == "single":
        auroc = {w.layer: w.auroc for w in bank.worth}
        layers = [max(layers, key=lambda layer: (auroc[layer], -layer))]
    fits = bank.fits if config.directions == "probe" else bank.controls[config.directions]
    if missing := sorted(set(layers) - set(fits)):
        raise ValueError(f"probe_subtract.layers: no probe of block {missing[0]}; there are 0 to {count - 1}")
    probes = {layer + 1: (torch.tensor(fits[layer].direction), fits[layer].bias) for layer in sorted(set(layers))}
    name = f"{inner.name}+probe_subtract({config.directions},{config.strength:g})"
    return SubtractingSampler(inner, probes, config.strength, name, bank.facts.get("corpora") or [])
