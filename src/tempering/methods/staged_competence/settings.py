"""Configuration of Staged-Competence: every key, its default and its meaning, in one place."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tempering.core.chat import PromptFormat
from tempering.core.config import Config
from tempering.core.loading import Dtype
from tempering.core.policy import LoraSettings
from tempering.methods.staged_competence.curriculum import Curriculum
from tempering.methods.staged_competence.difficulty import Difficulty


class Data(Config):
    """Where the pairs come from."""

    train: str = "demo"
    """File (JSONL, Parquet, CSV), folder, catalogue name or Hub id of prompt/chosen/rejected rows; bundled: `demo`,
    and `demo_smollm2` with that model's own answers to harmless prompts."""
    invalid: Literal["error", "drop"] = "error"
    """A row that cannot be used stops the run, or is dropped and counted."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Share of the pairs of a label to use, such as {harmful: 0.6}; other labels whole. Fewer harmful pairs are
    less over-refusal and more harm."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training pairs to use, the same in each quartile of difficulty (data efficiency)."""


class Split(Config):
    """What is held out, to measure margins on."""

    by: Literal["prompt", "margin_rows"] = "prompt"
    """`prompt`: all pairs of a prompt together, before scoring. `margin_rows`: the paper's, by score strata."""
    share: float = Field(default=0.2, ge=0, lt=1)
    """Share held out."""
    seed: int = 42
    """Of the split: the same for every training seed."""
    limit: int = 64
    """Largest number of held-out pairs that training measures itself on."""


class StagedCompetenceConfig(Config):
    """Configuration of `temper train staged_competence`."""

    model: str = "smollm2"
    """Start model: smollm2, a Hub id (owner/name@revision), a folder, a .gguf file, or a run."""
    out: str = "runs/staged_competence"
    """Run folder to make."""
    data: Data = Data()
    """Training pairs."""
    limit: int | None = None
    """Use only the first rows of the file."""
    seed: int = 42
    """Of adapters and draws."""
    dtype: Dtype = "auto"
    """Type of the base weights; auto: bfloat16 where the device computes in it."""
    prompt_format: PromptFormat = "chat"
    """`chat`: the tokenizer's template. `raw`: no template, as in the paper's training."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt + completion, in tokens; longer completions are cut at their end."""
    max_prompt_length: int = Field(512, gt=0)
    """Longest prompt, in tokens; a row with a longer one is unusable."""
    split: Split = Split()
    """Held-out pairs."""
    difficulty: Difficulty = Difficulty()
    """How hard a pair is."""
    curriculum: Curriculum = Curriculum()
    """Stages, pacing, draws."""
    reference: Literal["previous", "initial"] = "previous"
    """`previous`: the policy as the stage began. `initial`: the start model throughout (a control)."""
    handover: Literal["stack", "merge", "full"] = "stack"
    """`stack`: one adapter a stage. `merge`: into the weights. `full`: all weights train, no adapter."""
    lora: LoraSettings = LoraSettings()
    """Shape of each adapter."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "kto"] = (
        "sigmoid"
    )
    """Preference loss; sigmoid is DPO."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the KL penalty."""
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """`robust`: assumed share of flipped labels."""
    gamma: float = 1.0
    """`simpo`: target margin."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answers' negative log-likelihood (token mean over the step), added to the loss."""
    batch_pairs: int = Field(32, gt=0)
    """B: pairs per optimiser step, over all processes."""
    batch_tokens: int = Field(4096, gt=0)
    """Tokens, pads included, that are computed at a time."""
    lr: float = Field(5e-5, gt=0)
    """Learning rate at the start of each stage; falls linearly to zero."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up at the start of each stage."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int = Field(50, gt=0)
    """Optimiser steps between measurements on held-out pairs (and at each stage's end)."""
    early_stop: int | None = None
    """End a stage after this many measurements without a better held-out margin."""
    checkpoint_every: int = Field(20, gt=0)
    """Optimiser steps between checkpoints (and at each stage's end)."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""
