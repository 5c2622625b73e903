"""Settings of `temper train unlearn_knowledge`, and what they are where nothing is said."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tempering.core.bank import Bank
from tempering.core.config import Config
from tempering.core.editing import Role
from tempering.core.loading import EMBEDDED, Dtype
from tempering.core.policy import LoraSettings
from tempering.core.probe_losses import Mode
from tempering.core.probes import Direction, layer_weights, select_layers

Objective = Literal[
    "meta_cosine_rmu",
    "cosine_rmu",
    "rmu",
    "adaptive_rmu",
    "grad_diff",
    "npo",
    "simnpo",
    "circuit_breakers",
    "probe",
]
AttackKind = Literal["forget_ce", "retain_then_forget", "benign", "mcq"]
COSINE = ("meta_cosine_rmu", "cosine_rmu")
OUTPUT_SPACE = ("grad_diff", "npo", "simnpo")
SWEEP = (0.2, 0.4)
"""Share of the depth at which layer=sweep looks."""


class Defaults(NamedTuple):
    """What an objective takes where the configuration says null."""

    alpha: float
    gamma: float
    lr: float
    beta: float = 0.0


DEFAULTS: dict[Objective, Defaults] = {
    "meta_cosine_rmu": Defaults(10, 1, 3e-3),
    "cosine_rmu": Defaults(10, 1, 3e-3),
    "rmu": Defaults(1200, 1, 1e-3),
    "adaptive_rmu": Defaults(1200, 1, 1e-3),
    "grad_diff": Defaults(1, 1, 1e-5),
    "npo": Defaults(1, 1, 1e-5, beta=0.1),
    "simnpo": Defaults(1, 0.125, 1e-5, beta=4.5),
    "circuit_breakers": Defaults(10, 1, 1e-4),
    "probe": Defaults(30, 1, 1e-3),
}


class Data(Config):
    """What is forgotten, what is kept, and what asks about it."""

    train: str | dict[str, str] = "demo"
    """What to forget: a source of `text` rows (their `topic`, if any, says which topic), one source per topic as
    {bio: FILE, cyber: FILE}, or `demo`: the bundled invented facts."""
    retain: str | list[str] | None = None
    """What to keep: sources of `text` rows; null: with `demo` the bundled neighbours and neutral texts."""
    questions: str | list[str] | None = None
    """Multiple-choice questions about what is forgotten, for the check before the first step; never trained on. Null:
    with `demo` the bundled ones, else the check is left out and nothing is claimed."""
    attack_questions: str | None = None
    """Multiple-choice questions that the simulated attacker of `meta` may train on; other than `questions`."""
    neutral: str | None = None
    """Everyday `text` rows, in no other file here, for drift and perplexity; null: the bundled ones."""
    min_characters: int = Field(default=0, ge=0)
    """Shorter texts are left out and counted."""


class MetaSettings(Config):
    """The simulated relearning attack of `meta_cosine_rmu`. All our choice, unverified."""

    weight: float = Field(default=1.0, ge=0)
    """Of the gradient at the attacked weights (lambda_meta); 0: no attack, which is `cosine_rmu`."""
    every: int = Field(default=4, ge=1)
    """Outer steps of a topic from one attack on it to the next (1 at 7B)."""
    warmup: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps before the first attack."""
    steps: int = Field(default=8, ge=1)
    """Optimiser steps of an attack (K_in)."""
    checkpoints: list[int] = Field(default=[2, 4, 6, 8])
    """Attack steps after which the defender's gradient is taken, weighed by exp((j - K_in) / 4), sum 1."""
    adversary: Literal["lora", "full", "persistent"] = "lora"
    """`lora`: new factors for each attack. `full`: all weights of the blocks. `persistent`: one LoRA attacker that
    takes one step per outer step and is reset every `reset_every`."""
    reset_every: int = Field(default=40, ge=1)
    """Outer steps that a persistent attacker lives."""
    lr: tuple[float, float] | None = None
    """Range of the attacker's learning rate, drawn log-uniformly; null: 5e-5 to 5e-4, `full`: 2e-6 to 4e-5."""
    rank: int = Field(default=16, ge=1)
    """Of the attacker's LoRA factors; alpha is the same, so that their scale is 1."""
    scope: Literal["random", "below", "all"] = "random"
    """Blocks that are attacked: up to the loss layer, all, or one of the two by a fair coin."""
    mix: dict[AttackKind, float] = Field(
        default={"forget_ce": 0.6, "retain_then_forget": 0.2, "benign": 0.1, "mcq": 0.1}
    )
    """How often the attacker trains on what; `mcq` without `data.attack_questions` is `forget_ce`."""
    entropy: float = Field(default=0.1, ge=0)
    """Of the output entropy at attacked weights (mu_H); 0: the defender's pass stops at the loss layer."""
    query_share: int = Field(default=30, ge=1, le=99)
    """Per cent of the forget records that the attacker never sees and the defender is judged on."""
    share_records: bool = False
    """Attack and judge on the same records: the control that rewards memorised batches."""
    disruption_mask: bool = False
    """Leave out entries of the forget gradients whose sign opposes the running mean of the retain gradient."""

    @property
    def life(self) -> int:
        """Steps that an attacker takes in all."""
        return self.reset_every if self.adversary == "persistent" else self.steps

    @model_validator(mode="after")
    def _consistent(self) -> MetaSettings:
        if not self.checkpoints or not all(1 <= j <= self.steps for j in self.checkpoints):
            raise ValueError(f"meta.checkpoints={self.checkpoints}: expected attack steps from 1 to {self.steps}")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(f"meta.mix={self.mix}: expected shares, at least one above zero")
        return self


class UnlearnKnowledgeConfig(Config):
    """Configuration of `temper train unlearn_knowledge`."""

    model: str = "smollm2"
    """Start model, which knows what is to be forgotten: a Hub id, a folder, or a run."""
    teach: bool | None = None
    """Teach the bundled facts first, in a run of its own that later runs use again; null: where `model` is smollm2
    and `data.train` is demo."""
    out: str = "runs/unlearn_knowledge"
    """Run folder to make."""
    data: Data = Data()
    """Texts and questions."""
    limit: int | None = None
    """Use only the first texts of each source."""
    seed: int = 42
    """Of directions, order and attacks."""
    dtype: Dtype = "auto"
    """Type of the weights; auto: bfloat16 where the device computes in it. What trains has a float32 copy."""
    objective: Objective = "meta_cosine_rmu"
    """What is minimised."""
    target: Literal["random_fixed", "random_per_token", "anti_frozen"] = "random_fixed"
    """Of the cosine objectives: one random direction per topic; one line per token; away from the frozen state."""
    n_directions: int = Field(default=1, ge=1)
    """Orthonormal directions per topic, dealt to tokens by a seeded table: one can be projected out."""
    compat: Literal["wmdp"] | None = None
    """`rmu` exactly as the released WMDP code computes it: pads counted, flat means, positive directions, its
    AdamW."""
    coefficient: float | list[float] = 6.5
    """`rmu`: length c of the point that states are driven to; a list has one per topic, these in alphabetical
    order."""
    scale: float = Field(default=5.0, gt=0)
    """`adaptive_rmu`: that length in units of the frozen state's."""
    adaptive: Literal["per_token", "first_batch"] = "per_token"
    """`adaptive_rmu`: the frozen state is that of each token, or the mean over a topic's first batch."""
    layer: int | Literal["auto", "sweep"] = "auto"
    """Block, counted from 0, whose output the loss reads; auto: round(0.22 L). sweep: of up to five blocks at 20 to
    40 % of the depth, chosen by how well mean states tell the texts apart, the one that does best in short trials on
    the development questions."""
    probes: str | None = None
    """`probe`: a run whose probes are used again; null: probes that tell texts to forget from texts to keep."""
    probes_only: bool = False
    """`probe`: stop when the probes are fitted."""
    mode: Mode = "cos_hinge"
    """`probe`: how a state is priced (`core/probes.py`)."""
    directions: Direction = "probe"
    """`probe`: the probes' directions, or a control's: random, probes of shuffled labels, difference of means."""
    layers: list[int] | Literal["auto"] = "auto"
    """`probe`: blocks whose output the loss reads; auto: good and stable probes spread over the depth."""
    n_layers: int = Field(8, ge=1)
    """`probe`: most layers that auto chooses."""
    beta_kl: float = Field(0.5, ge=0)
    """`probe`: of KL(before || now) of the output on texts to keep; above 0 that pass runs to the end."""
    edit_layers: list[int] | Literal["auto", "all"] = "auto"
    """Blocks that are edited; auto: the loss layer and the two before it (output-space objectives: all)."""
    edit_roles: list[Role] | Literal["auto", "all"] = "auto"
    """Weights of a block that are edited; auto: mlp.down_proj (output-space objectives: all of them)."""
    adapter: LoraSettings | None = None
    """Train LoRA factors instead of editing weights: dropping the adapter undoes the unlearning."""
    steps: int = Field(default=200, ge=1)
    """Optimiser steps."""
    batch_rows: int = Field(default=16, ge=1)
    """Texts to forget per step, over all processes."""
    retain_rows: int = Field(default=16, ge=1)
    """Texts to keep per step, over all processes."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, pads included, that are computed at a time."""
    max_length: int | list[int] = 512
    """Longest text, in tokens, cut at its end; a list has one per topic, these in alphabetical order."""
    max_retain_length: int = Field(default=512, ge=1)
    """The same, of texts to keep."""
    shuffle: bool = True
    """Take texts in a seeded order; false: in that of the file."""
    skip_first: int = Field(default=1, ge=0)
    """First tokens of each text that count in no loss on states: an attention sink that all texts share."""
    lr: float | None = None
    """Learning rate, constant; null: 3e-3 for the cosine objectives, 1e-3 for other losses on states (5e-5 at 7B),
    1e-4 circuit_breakers, 1e-5 others."""
    gamma: float | None = None
    """Of the forget term; null: 1 (simnpo 0.125)."""
    alpha: float | None = None
    """Of the retain term; null: 10 for the cosine objectives (300 at 7B) and circuit_breakers, 30 for
    probe, 1200 for rmu and adaptive_rmu, 1 for the others."""
    beta: float | None = None
    """Of npo (null: 0.1) and simnpo (null: 4.5)."""
    delta: float = 0.0
    """Margin of simnpo, in nats a token."""
    retain: Literal["rel_mse", "mse", "cos", "kl"] | None = None
    """How drift on texts to keep is priced; null: rel_mse for the cosine objectives, mse for rmu and adaptive_rmu.
    `kl`: KL(before || now) of the output."""
    norm_guard: float = Field(default=0.0, ge=0)
    """Price of states to forget whose norm has more than doubled or halved."""
    meta: MetaSettings = MetaSettings()
    """The simulated attack of meta_cosine_rmu."""
    cache_reference: bool | Literal["auto"] = "auto"
    """Keep the frozen states of texts to keep; auto: where they recur and take less than 2 GB."""
    max_kl: float | None = Field(None, gt=0)
    """Stop where KL(before || now) on held-out neutral text passes this, and go `back` (comparisons: 0.01)."""
    back: Literal["best", "line"] = "best"
    """Where to: `best`, the measured step that was best on development questions; `line`, on the straight line to the
    start until `max_kl` is met, so that runs with the same value compare at equal KL."""
    measure_every: int = Field(default=50, ge=1)
    """Steps between measurements on development questions and neutral text (and at the end)."""
    allow_chance: bool = False
    """Go on where the start model knows no more than chance; nothing is claimed then."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints (and at the end)."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""

    @model_validator(mode="after")
    def _consistent(self) -> UnlearnKnowledgeConfig:
        if self.objective != "probe" and (self.probes or self.probes_only or self.directions != "probe"):
            raise ValueError(
                f"objective={self.objective} has no probes: leave out probes, probes_only and directions"
            )
        if self.probes_only and self.probes:
            raise ValueError("probes_only fits probes, probes=RUN uses fitted ones: leave out one of the two")
        if self.layers == []:
            raise ValueError("layers=[]: name at least one block, or auto")
        if self.adapter and (self.layer == "sweep" or self.objective == "probe" or self.back == "line"):
            raise ValueError("adapter: layer=sweep, objective=probe and back=line are for edited weights")
        if self.layer == "sweep" and (self.objective in (*OUTPUT_SPACE, "circuit_breakers", "probe") or self.compat):
            raise ValueError("layer=sweep: it is about objectives on the states of one layer, without compat")
        if self.compat and (self.objective != "rmu" or self.adapter or self.batch_rows != self.retain_rows):
            raise ValueError(
                "compat=wmdp: it is about objective=rmu without adapter, batch_rows equal to retain_rows"
            )
        if self.n_directions > 1 and (self.objective not in COSINE or self.target != "random_fixed"):
            raise ValueError("n_directions: only with a cosine objective and target=random_fixed")
        persistent = self.objective == "meta_cosine_rmu" and self.meta.adversary == "persistent"
        if persistent and self.checkpoint_every % self.meta.reset_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every}: with meta.adversary=persistent a multiple of "
                f"meta.reset_every={self.meta.reset_every}, since an attacker is never saved"
            )
        if self.retain == "cos" and not self.norm_guard:
            raise ValueError("retain=cos leaves norms free: set norm_guard too, for instance 1")
        return self

    @property
    def is_taught(self) -> bool:
        """Whether the start model is taught the bundled facts first."""
        default = self.model == EMBEDDED and self.data.train == "demo"
        return default if self.teach is None else self.teach

    def value(self, name: Literal["alpha", "gamma", "lr", "beta"]) -> float:
        """A number that may be left to the objective."""
        given = getattr(self, name)
        return float(getattr(DEFAULTS[self.objective], name) if given is None else given)

    @property
    def is_searched(self) -> bool:
        """Whether the loss layers are only known once something has been measured."""
        return self.layer == "sweep" or (self.objective == "probe" and self.layers == "auto")

    @property
    def price(self) -> str:
        """How drift is priced."""
        return self.retain or ("rel_mse" if self.objective in (*COSINE, "probe") else "mse")

    @property
    def reads_states(self) -> bool:
        """Whether the loss is on hidden states."""
        return self.objective not in OUTPUT_SPACE


class Plan(NamedTuple):
    """Blocks, counted from 0: where the loss reads, and what is edited."""

    layer: int
    """The last block that the loss reads."""
    loss_layers: list[int]
    weights: list[float]
    """Of the loss layers in it, in their order; sum 1."""
    edit_layers: list[int]
    is_whole: bool
    """All parameters of the blocks, whatever their role."""
    roles: list[Role]


def plan(config: UnlearnKnowledgeConfig, count: int, bank: Bank | None = None) -> Plan:
    """Settle layers and tensors for a model of `count` blocks; `probe` needs the bank for layers=auto.

    >>> [plan(UnlearnKnowledgeConfig(), n).layer for n in (30, 32, 28, 36)]
    [7, 7, 6, 8]
    >>> plan(UnlearnKnowledgeConfig(), 30).edit_layers
    [5, 6, 7]

    Raises:
        ValueError: the loss layer is not there, or a block above it would be edited.
    """
    loss_layers = [round(0.22 * count) if isinstance(config.layer, str) else config.layer]
    worth = {w.layer: w.auroc for w in bank.worth} if bank else {}
    if config.objective == "circuit_breakers":
        loss_layers = [round(0.31 * count), round(0.62 * count)]
    elif config.objective == "probe" and isinstance(config.layers, list):
        loss_layers = sorted(set(config.layers))
    elif config.objective == "probe":
        loss_layers = select_layers(bank.worth if bank else [], count, config.n_layers)
    layer = loss_layers[-1]
    if not 0 <= loss_layers[0] <= layer < count:
        raise ValueError(f"layer={layer}: this model has blocks 0 to {count - 1}")
    weights = [1 / len(loss_layers)] * len(loss_layers)
    if config.objective == "probe" and all(i in worth for i in loss_layers):
        weights = list(layer_weights({i: worth[i] for i in loss_layers}).values())
    top = layer if config.reads_states else count - 1
    if config.edit_layers == "all" or (config.edit_layers == "auto" and not config.reads_states):
        edited = list(range(top + 1))
    elif config.edit_layers == "auto" and config.objective == "probe":
        edited = list(range(max(0, loss_layers[0] - 1), top + 1))
    elif config.edit_layers == "auto":
        edited = sorted({i for at in loss_layers for i in range(max(0, at - 2), at + 1)})
    else:
        edited = sorted(set(config.edit_layers))
    if not edited or edited[0] < 0:
        raise ValueError(f"edit_layers={edited}: name blocks from 0 to {top}, or auto")
    if edited[-1] > top:
        raise ValueError(
            f"edit_layers={edited}: block {edited[-1]} is above the loss layer {top}, which cannot see it"
        )
    is_whole = config.edit_roles == "all" or (config.edit_roles == "auto" and not config.reads_states)
    roles: Any = ["mlp.down_proj"] if isinstance(config.edit_roles, str) else config.edit_roles
    return Plan(layer, loss_layers, weights, edited, is_whole, roles)


def swept_layers(count: int) -> list[int]:
    """Blocks that layer=sweep chooses its candidates from.

    >>> swept_layers(30)
    [6, 7, 8, 9, 10, 11, 12]
    """
    return list(range(math.ceil(SWEEP[0] * count), math.floor(SWEEP[1] * count) + 1))
