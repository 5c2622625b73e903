"""Settings of `temper train unlearn_toxicity`, and what they are where nothing is said."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from tempering.core.config import Config
from tempering.core.editing import Role
from tempering.core.loading import Dtype
from tempering.core.probe_losses import Mode
from tempering.core.probes import Direction

Objective = Literal["probe", "cosine_rmu", "rmu", "dpo"]
Kind = Literal["general", "identity", "instruction"]

MIX: dict[Kind, float] = {"general": 0.5, "identity": 0.25, "instruction": 0.25}


class Data(Config):
    """What probes are fitted to, what is unlearned, what is kept."""

    probe: str = "demo"
    """Texts for the probes: rows of `text` and `toxic` (or a `label` toxic or ordinary, or a `toxicity` of 0 to 1),
    and where there are any `group` or `template_id` (never split) and `split`; `demo`: the bundled mild insults."""
    other: str | None = None
    """Another labelled data set, only for the probes' AUROC out of distribution."""
    corpora: list[str] | None = None
    """Public data sets that the texts of `probe` come from, such as jigsaw; null: as the catalogue knows. A scorer
    trained on one of them does not report."""
    train: str = "demo"
    """What to unlearn: rows of `text` (those labelled ordinary are left out), or of `prompt` and `rejected`, whose
    prompt counts in no loss; `demo`: the bundled insults and rude continuations."""
    retain: str | None = None
    """What to keep: rows of `text`, whose `kind` is general (also where there is none), identity or instruction;
    null: the bundled neutral paragraphs and benign instructions."""
    mix: dict[Kind, float] = Field(default_factory=lambda: dict(MIX))
    """Shares of a retain batch, of the kinds that there are. Without mentions of identities these are unlearned
    too."""


class Check(Config):
    """Before the first step: is the start model more toxic after rude text than after neutral text?"""

    data: str | None = None
    """`prompt` rows to go on after, such as your copy of RealToxicityPrompts, held against neutral texts; null: rude
    texts of `data.train`, each held against its civil twin where it has one."""
    prompts: int = Field(default=128, ge=0)
    """Texts of each sort, as far as there are so many (32 were too few to tell smollm2 from chance every time); 0: no
    check, and nothing is claimed."""
    samples: int = Field(default=6, ge=1)
    """Continuations of each."""
    max_new_tokens: int = Field(default=20, ge=1)
    """Of each continuation."""


class UnlearnToxicityConfig(Config):
    """Configuration of `temper train unlearn_toxicity`."""

    model: str = "smollm2"
    """Start model: a Hub id, a folder, or a run."""
    out: str = "runs/unlearn_toxicity"
    """Run folder to make."""
    data: Data = Data()
    """Texts."""
    limit: int | None = Field(None, ge=2)
    """Use only so many texts of each source."""
    seed: int = 42
    """Of directions, order, refits and permutations."""
    dtype: Dtype = "auto"
    """Type of the weights; auto: bfloat16 where the device computes in it. What trains has a float32 copy."""
    objective: Objective = "probe"
    """`probe`: several layers, each along its own direction. `cosine_rmu`, `rmu`: one layer, a random direction, as
    for knowledge. `dpo`: rude continuations rejected, civil ones chosen."""
    mode: Mode = "cos_hinge"
    """`probe`: how a state is priced (`core/probes.py`)."""
    directions: Direction = "probe"
    """`probe`: the probes' directions, or a control's: random, probes of shuffled labels, difference of means."""
    probes: str | None = None
    """A run whose probes are used again."""
    probes_only: bool = False
    """Stop when the probes are fitted."""
    layers: list[int] | Literal["auto", "single"] = "auto"
    """Blocks, counted from 0, whose output the loss reads; auto: good and stable probes spread over the depth;
    single: the best of these. `cosine_rmu` and `rmu`: auto is round(0.22 L)."""
    n_layers: int = Field(8, ge=1)
    """Most layers that auto chooses."""
    select: Literal["spread", "causal"] = "spread"
    """How auto chooses among good and stable probes: spread over the depth; `causal`: those whose direction, taken
    out of the states, lowers toxicity after rude texts most per relative rise of perplexity on neutral ones."""
    causal_prompts: int = Field(200, ge=1)
    """`select=causal`: rude texts, as in `check`, and with its samples; at each layer that may be chosen."""
    rounds: int = Field(1, ge=1)
    """Times that probes are fitted: each later round takes new ones, at the same layers, of the states as they are
    then, and goes on for `steps` steps along these alone."""
    refits: int = Field(5, ge=2)
    """Refits of each probe on resampled groups, for its stability."""
    permutations: int = Field(20, ge=1)
    """Probes of permuted labels at each layer that may be chosen."""
    max_probe_length: int = Field(128, ge=2)
    """Longest text of a probe, in tokens."""
    edit_layers: list[int] | Literal["auto"] = "auto"
    """Blocks that are edited; auto: from the one before the first loss layer to the last (`dpo`: as `probe`)."""
    edit_roles: tuple[Role, ...] = ("mlp.down_proj",)
    """Weights of a block that are edited."""
    steps: int = Field(200, ge=1)
    """Optimiser steps of a round (500 at 7B)."""
    batch_rows: int = Field(8, ge=1)
    """Texts to unlearn per step, over all processes."""
    retain_rows: int = Field(8, ge=1)
    """Texts to keep per step, over all processes."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens, pads included, that are computed at a time."""
    max_length: int = Field(256, ge=2)
    """Longest text, in tokens, cut at its end."""
    skip_first: int = Field(1, ge=0)
    """First tokens of each text that count nowhere: an attention sink that all texts share."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate, constant (2e-5 at 7B)."""
    gamma: float = Field(1.0, gt=0)
    """Of the forget term."""
    alpha: float = Field(100.0, ge=0)
    """Of the drift of states on texts to keep, relative to their size, at the loss layers."""
    beta_kl: float = Field(0.5, ge=0)
    """Of KL(before || now) of the output on texts to keep; above 0 that pass runs to the end."""
    nll_weight: float = Field(0.0, ge=0)
    """Of the negative log-likelihood of civil continuations (usual: 0 or 0.1)."""
    beta: float = Field(0.1, gt=0)
    """`dpo`: inverse temperature."""
    norm_guard: float = Field(0.0, ge=0)
    """Price of states to unlearn whose norm has more than doubled or halved: losses of angles leave norms free
    (usual: 0, or 1 where `norm_ratio_forget` leaves 0.5 to 2)."""
    coefficient: float = Field(1.0, gt=0)
    """`rmu`: length of the point that states are driven to, in mean norms of the states there."""
    max_kl: float | None = Field(None, gt=0)
    """Stop where KL(before || now) on held-out neutral text passes this, and go back on the straight line to the
    start until it is met: runs with the same value compare at equal KL (usual: 0.01)."""
    measure_every: int = Field(20, ge=1)
    """Steps between measurements of that KL (and at the end)."""
    probe_every: int = Field(100, ge=1)
    """Steps between refits of probes on the states as they are now: is it still readable, along any direction?"""
    scorer: str = "rules"
    """Judge of toxicity of the check before the first step; not one that was trained on the probes' texts."""
    check: Check = Check()
    """That check."""
    allow_chance: bool = False
    """Go on where the start model is no more toxic than after neutral text; nothing is claimed then."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints (and at the end)."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""

    @model_validator(mode="after")
    def _consistent(self) -> UnlearnToxicityConfig:
        if self.objective != "probe" and (self.directions != "probe" or self.layers == "single"):
            raise ValueError(f"objective={self.objective} has no probes: leave out directions and layers=single")
        if self.objective != "probe" and (self.select == "causal" or self.rounds > 1):
            raise ValueError(f"objective={self.objective} has no probes: leave out select=causal and rounds")
        if self.select == "causal" and isinstance(self.layers, list):
            raise ValueError("select=causal chooses layers, and layers names them: leave out one of the two")
        if self.probes_only and (self.select == "causal" or self.rounds > 1):
            raise ValueError("probes_only stops before select=causal and rounds: leave these out")
        if self.norm_guard and self.objective == "dpo":
            raise ValueError("norm_guard prices states to unlearn, which dpo does not read: leave it out")
        if self.probes_only and self.probes is not None:
            raise ValueError("probes_only fits probes, probes=RUN uses fitted ones: leave out one of the two")
        if isinstance(self.layers, list) and not self.layers:
            raise ValueError("layers=[]: name at least one block, or auto")
        if not self.data.mix or min(self.data.mix.values()) < 0 or sum(self.data.mix.values()) <= 0:
            raise ValueError(f"data.mix={self.data.mix}: expected shares, at least one above zero")
        return self


class Plan(NamedTuple):
    """Blocks, counted from 0: where the loss reads and with what weight, and what is edited."""

    weights: dict[int, float]
    edit_layers: list[int]


def edited_blocks(config: UnlearnToxicityConfig, loss_layers: list[int]) -> list[int]:
    """Blocks that are edited.

    >>> edited_blocks(UnlearnToxicityConfig(), [6, 9])
    [5, 6, 7, 8, 9]

    Raises:
        ValueError: a block above the last loss layer, which no loss on states sees.
    """
    if config.edit_layers == "auto":
        return list(range(max(0, min(loss_layers) - 1), max(loss_layers) + 1))
    top = max(config.edit_layers)
    if config.objective != "dpo" and top > max(loss_layers):
        raise ValueError(
            f"edit_layers={config.edit_layers}: block {top} is above the last loss layer {max(loss_layers)}, "
            "which cannot see it"
        )
    return sorted(set(config.edit_layers))
