"""Configuration of `safemoe`: the experts, the gate, its training, and the controls as presets of these settings."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from tempering.core.config import Config
from tempering.core.loading import Dtype
from tempering.core.policy import LoraSettings
from tempering.methods.safemoe.expert_rows import ExpertRows
from tempering.methods.safemoe.keys import BundleSettings
from tempering.methods.safemoe.layers import Gating, Granularity, Normalisation

Backend = Literal["auto", "eager", "fused", "gather", "grouped"]
Control = Literal[
    "first_layer", "last_token", "k4", "k_all", "null_expert", "with_replay", "first_T",
    "random_experts", "uniform_gate", "frozen_random_router",
    "refusal_only", "safe_only", "knowledge_only", "mixed_experts",
]  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "first_layer": {"granularity": "model"},
    "k4": {"k": 4},
    "k_all": {"k": "all"},
    "null_expert": {"null_expert": True},
    "uniform_gate": {"k": "all", "router_init": "zero"},
    "frozen_random_router": {"router_init": "normal"},
}
"""What a control that is a matter of settings sets; another value beside it is an error."""
UNTRAINED = {"uniform_gate", "frozen_random_router"}


class ExpertTraining(Config):
    """How experts are trained on `expert_data` or `expert_rows`: the paper's settings."""

    lora: LoraSettings = LoraSettings(r=32, alpha=64, target_modules=["gate_proj", "up_proj", "down_proj"])
    """Shape of each expert."""
    epochs: int = Field(default=5, gt=0)
    """Passes over an expert's rows."""
    batch_rows: int = Field(default=16, gt=0)
    """Rows per optimiser step."""
    lr: float = Field(default=2e-4, gt=0)
    """Largest learning rate."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Optimiser steps between checkpoints."""
    unsafe: bool = True
    """Label and quarantine the experts; false for those of controls that are trained on harmless answers."""


class Replay(Config):
    """Benign rows on which the routed model is held to the base."""

    data: str | None = None
    """File, catalogue name or Hub id of benign rows, in any format of `router_data`."""
    weight: float = Field(default=0.0, ge=0)
    """Weight of KL(p_base || p_routed), mean over completion tokens; 0: not computed."""
    batch: int = Field(default=4, gt=0)
    """Rows an optimiser step."""


class FixedGain(Config):
    """A constant factor on the mixture."""

    fixed: float = Field(ge=0)
    """The factor; 0 leaves the base."""


class Split(Config):
    """What is held out of `router_data`, to choose the best gate by."""

    share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the distinct prompts held out."""
    seed: int = 42
    """Of the split: the same for every training seed."""


class SafeMoEConfig(Config):
    """Configuration of `temper train safemoe`."""

    model: str = "smollm2"
    """Base model; an adapter that it has is merged in memory first."""
    out: str = "runs/safemoe"
    """Run folder to make."""
    experts: list[str] = Field(default_factory=list)
    """Trained experts: runs of `sft`, or PEFT folders. Their order is the expert index."""
    expert_data: dict[str, str] = Field(default_factory=dict)
    """Domain -> file of rows to train an expert on first (`OUT-experts/DOMAIN.unsafe`); after `experts`."""
    expert_rows: ExpertRows | None = None
    """In place of `expert_data`: make those rows first (`OUT-rows.unsafe`), of the `domains` named here."""
    expert: ExpertTraining = ExpertTraining()
    """How those are trained."""
    keep_experts: bool = True
    """False: delete the experts trained here once the bundle is sealed and verified."""
    bundle: BundleSettings = BundleSettings()
    """Keys of the sealed bundle."""
    layers: list[int] | None = None
    """Decoder layers, from 0, whose experts are used; null: all."""
    router_data: str | None = None
    """File, catalogue name or Hub id of safe and informative answers, prompt/completion or messages."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first rows of `router_data`."""
    evaluation_data: list[str] = Field(default_factory=list)
    """Files of prompts that the result will be evaluated on; none may be in expert or router data."""
    invalid: Literal["error", "drop"] = "error"
    """A row that cannot be used stops the run, or is dropped and counted."""
    split: Split = Split()
    """Held-out safe answers."""
    prompt_format: Literal["auto", "chat", "raw"] = "auto"
    """`chat`: the tokenizer's template; `raw`: none; `auto`: chat where there is a template."""
    max_length: int = Field(default=512, gt=1)
    """Longest prompt + completion, in tokens."""
    max_prompt_length: int = Field(default=384, gt=0)
    """Longest prompt, in tokens."""
    granularity: Granularity = "block"
    """One router per block of target layers, per target layer (`module`), or the first block's for all (`model`)."""
    k: int | Literal["all"] = 2
    """Experts mixed at each token."""
    k_inference: int | None = Field(default=None, gt=0)
    """Another k when serving; 1 lets single experts act and needs the override."""
    normalisation: Normalisation = "selected"
    """Weights: softmax over the selected logits, softmax over all (`switch`), or `sigmoid`."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits. Not in the paper."""
    null_expert: bool = False
    """One more row of V that adds nothing when selected. Not in the paper."""
    gain: Literal["off", "layer"] | FixedGain = "off"
    """Factor on the mixture: none, {fixed: g}, or `layer`: 2 sigmoid(b), b trained. Not in the paper."""
    first_tokens: int | None = Field(default=None, ge=0)
    """Serve the base after so many generated tokens (control first_T)."""
    backend: Backend = "auto"
    """How the mixture is computed; `auto` measures at the start and keeps its table in the run."""
    router_init: Literal["normal", "arrow", "zero"] = "normal"
    """N(0, 0.02^2), or the experts' own main input directions; `zero` only for uniform_gate."""
    replay: Replay = Replay()
    """KL to the base on benign rows. Not in the paper."""
    balance_weight: float = Field(default=0.0, ge=0)
    """Weight of the load-balance loss K sum_e f_e P_e. Not in the paper."""
    z_weight: float = Field(default=0.0, ge=0)
    """Weight of mean logsumexp(z)^2. Not in the paper."""
    control: Control | None = None
    """Name of the control that this run is; those that are settings set them."""
    seed: int = 0
    """Of routers, order and random experts (paper: 0, 1, 2)."""
    dtype: Dtype = "auto"
    """Type of the base weights and experts; the routers are always float32."""
    epochs: int = Field(default=10, gt=0)
    """Passes over the safe answers."""
    batch_rows: int = Field(default=4, gt=0)
    """Safe answers per optimiser step."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens, pads included, that are computed at a time."""
    lr: float = Field(default=1e-4, gt=0)
    """Largest learning rate of the routers (paper: tuned over 1e-3 to 1e-5)."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    log_every: int = Field(default=10, gt=0)
    """Optimiser steps between statistics of the routing."""
    eval_every: int = Field(default=50, gt=0)
    """Optimiser steps between measurements on held-out answers; the best routers are kept."""
    checkpoint_every: int = Field(default=50, gt=0)
    """Optimiser steps between checkpoints (and at the end)."""
    report_to: str | None = None
    """An Accelerate tracker beside metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _apply_control(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("control") is None:
            return tree
        wanted = PRESETS.get(tree["control"], {})
        for key, value in wanted.items():
            if tree.get(key, value) != value:
                raise ValueError(f"control={tree['control']} sets {key}={value}, not {tree[key]}; leave it out")
        return {**tree, **wanted}

    @model_validator(mode="after")
    def _trainable(self) -> SafeMoEConfig:
        if self.k != "all" and self.k < 1:
            raise ValueError("k must be at least 1, or all")
        if self.k == 1 and self.normalisation == "selected":
            raise ValueError(
                "k=1 with normalisation=selected gives every selected expert the weight 1 and the router no gradient "
                "at all; use k=2, or normalisation=switch or sigmoid"
            )
        if self.router_init == "zero" and self.control != "uniform_gate":
            raise ValueError(
                "router_init=zero ties every token, so that two fixed experts win everywhere; use normal"
            )
        if self.expert_rows is not None:
            self._require_rows(self.expert_rows)
        if self.control == "first_T" and self.first_tokens is None:
            raise ValueError("control=first_T: say after how many tokens the experts go off, with first_tokens=T")
        if self.control == "with_replay" and self.replay.weight == 0:
            raise ValueError("control=with_replay: set replay.data and replay.weight")
        if self.replay.weight and self.replay.data is None:
            raise ValueError("replay.weight without replay.data; name benign rows")
        return self

    def _require_rows(self, rows: ExpertRows) -> None:
        if self.expert_data:
            raise ValueError("expert_rows makes the rows that expert_data would name; give one of them")
        if not rows.domains:
            raise ValueError("expert_rows.domains: name the domains, one expert each")
        if rows.is_unsafe and not self.expert.unsafe:
            raise ValueError(
                "expert.unsafe=false beside unsafe expert_rows: their experts must be quarantined; leave it out, or "
                "set expert_rows.unsafe=false where the answers are harmless"
            )

    def gating(self, experts: int) -> Gating:
        """How these settings decide among so many experts."""
        return Gating(
            granularity=self.granularity,
            k=experts + self.null_expert if self.k == "all" else self.k,
            normalisation=self.normalisation,
            temperature=self.temperature,
            null_expert=self.null_expert,
            gain=self.gain.fixed if isinstance(self.gain, FixedGain) else self.gain,
            last_token=self.control == "last_token",
            first_tokens=None,
        )


assert set(PRESETS) | UNTRAINED <= set(get_args(Control))
