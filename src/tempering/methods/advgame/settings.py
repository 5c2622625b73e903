"""The configuration of `advgame`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig
from tempering.core.loading import Dtype
from tempering.core.policy import LoraSettings
from tempering.data.attacker import Category, Format
from tempering.methods.advgame.pairs import Speaker

Role = Literal["attacker", "defender"]
ROLES: tuple[Role, ...] = ("attacker", "defender")


class Data(Config):
    """Where the seeds come from."""

    train: str = "demo"
    """File, folder, catalogue name or Hub id of requests with `prompt` and `category` (harmful or benign)."""
    classes: list[Category] = Field(default=["harmful", "benign"], min_length=1)
    """Classes that are played. With harmful alone nothing holds the defender back from refusing everything."""
    valid: int = Field(default=64, ge=0)
    """Seeds of each class, at most a twentieth of it, that only validation plays."""


class PlayerConfig(Config):
    """One of the two players."""

    model: str | None = None
    """Base model, where it is not `model`; players on the same weights share them."""
    init: str | None = None
    """A run whose adapter the player starts on top of, frozen, such as an SFT warm start; else the base itself."""
    train: bool = True
    """Whether the player learns; false: it stays what it is at the start."""
    tuning: Literal["lora", "full"] = "lora"
    """What of it learns: an adapter on a base that players share, or all weights, of which it then has its own, in
    float32, with as many again for its average, gradient and moments."""
    sampler: Literal["ema", "current", "initial"] = "ema"
    """Which of its weights write the rollouts: their average, the newest, or those of the start."""
    reference: Literal["ema", "fixed", "slow_ema"] = "ema"
    """What its loss is measured against: the average, the network of the start, or a slower average."""


class WarmStart(Config):
    """Imitation before the game, in an adapter that is frozen then, and is part of a player's start.

    Small models answer a seed instead of rewriting it, do not come to an end, and refuse nothing; then there are no
    pairs, or none of a refusal.
    """

    rewrites: int = Field(default=64, ge=0)
    """Seeds in template sentences that the attacker imitates; 0: none."""
    brief: int = Field(default=216, ge=0)
    """Seeds, two benign to a harmful one, to which the defender imitates an answer: its own, cut after a sentence."""
    deflections: int = Field(default=56, ge=0)
    """Harmful seeds among these, at most, to which it imitates a refusal with an offer instead."""
    lr: float = Field(default=1e-3, gt=0)
    """Largest learning rate, falls linearly to zero."""
    rows: int = Field(default=4, ge=1)
    """Rows an optimiser step."""
    epochs: int = Field(default=2, ge=1)
    """Passes."""


class Players(Config):
    """Who plays."""

    attacker: PlayerConfig = PlayerConfig()
    """Rewrites seeds."""
    defender: PlayerConfig = PlayerConfig()
    """Answers the rewrites."""
    shared: bool = False
    """One adapter plays both roles (self-play, a control)."""

    @model_validator(mode="after")
    def _can_share(self) -> Players:
        if self.shared and self.attacker != self.defender:
            raise ValueError("players.shared is one adapter: players.attacker and players.defender must be set alike")
        if not (self.attacker.train or self.defender.train):
            raise ValueError("neither player trains; set players.attacker.train or players.defender.train")
        return self


class Ema(Config):
    """Averages of the players over steps."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the old average; one update a step (usual: 0.95 for hundreds of steps)."""
    slow_decay: float = Field(default=0.999, ge=0, lt=1)
    """The same of the slow average, where a player's reference is `slow_ema`."""
    mode: Literal["factors", "frozen_a", "retruncate"] = "factors"
    """How LoRA factors are averaged: A and B each; B alone, with A frozen and shared; or the product, cut to rank."""
    audit: bool = True
    """Keep the exact average of one layer of each player, and log how far the EMA has drifted from it."""


class Rollouts(Config):
    """How seeds are played."""

    seeds: int = Field(default=3, ge=1)
    """Seeds of each class a step."""
    attacks: int = Field(default=4, ge=1)
    """Rewrites of a seed (A): of more, the best and the worst lie farther apart."""
    responses: int = Field(default=3, ge=1)
    """Answers to a rewrite (D): of more, both a deflection and an answer are likelier to be among them."""
    format: Format = "raw"
    """What the attacker has to write: think, prompt, free or raw (all of its output is the rewrite)."""
    source: Literal["attacker", "seeds"] = "attacker"
    """Who writes the attacks; `seeds`: nobody, each seed is put as it is (a control)."""
    fresh: bool = True
    """Whether a seed that comes again is played again; false: its rollouts are those of the first time where the
    sampler has not changed (with sampler=initial: offline training)."""
    temperature: float = Field(default=0.7, gt=0)
    """Of sampling, both players (a model of billions of parameters: 1). The losses are those of temperature 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling. The losses are those of 1."""
    attacker_tokens: int = Field(default=48, ge=1)
    """Longest rewrite, reasoning included, in tokens; a longer one loses."""
    defender_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens; a longer one loses."""
    rows: int = Field(default=96, ge=1)
    """Samples that are written at a time, and kept in one piece."""
    logprobs: bool = False
    """Keep each token's log-probability as it was sampled, and take it for the reference's where that is what sampled
    (sampler and reference `ema`, staleness 0), and for the sampler's with loss=grpo: a forward pass less. A hundredth
    is computed all the same, and where it differs by more than 0.05 nats a token the run stops."""
    staleness: int = Field(default=0, ge=0, le=20)
    """Steps by which trees are played ahead of the step that learns from them, so that players learn while judges are
    waited for (usual: 1, rarely 2); 0: judged first, then learned from."""


class Judging(Config):
    """Who judges, and what it is asked."""

    default: str = "rules"
    """Judge of everything: rules (rules:words: without the sentence encoder), openai:MODEL@URL or local:REFERENCE."""
    faithfulness: str = "default"
    """Another judge of whether a rewrite keeps its seed's intent."""
    defender: str | None = "default"
    """Another judge of the answers; null: none, an answer is worth 0 or, too long, -1."""
    attacker: str | None = "default"
    """Another judge of the attacks, by the answers that they drew; null: none."""
    kind: Literal["pairwise", "pointwise"] = "pairwise"
    """Whether answers are compared, or graded one by one."""
    order: Literal["off", "random", "both"] = "random"
    """Which of two answers stands first: the earlier, by a coin, or each once."""
    judge_singletons: bool = True
    """Whether an answer without another to compare with is compared with itself; else it has 0 points."""
    faithfulness_samples: int = Field(default=1, ge=1)
    """How often faithfulness is asked; a majority decides."""
    defender_query: Literal["prompt", "seed"] = "prompt"
    """What the defender's judge is shown as the request: the rewrite, or the seed."""
    attacker_benign: Literal["refusal", "deflection"] = "deflection"
    """What the attacker wants of the defender on a benign seed (the paper: deflection; its code: refusal)."""
    attacker_response: Speaker = "first"
    """The answer that speaks for an attack: the one of most points (optimistic: the paper's), the first, as in a
    test, or all, in turn, whose points are averaged (mean: more to judge, less left to chance)."""
    tie_margin: float = Field(default=0.0, ge=0)
    """Points by which two rewards have to differ to make a pair."""
    max_unscored: float = Field(default=0.2, ge=0, le=1)
    """Largest share of questions without an answer over `unscored_window` steps; with more the run stops."""
    unscored_window: int = Field(default=5, ge=1)
    """Steps over which that is taken."""
    temperature: float = Field(default=0.0, ge=0)
    """Of a judge that is a model."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest reply of a judge that is a model, in tokens."""
    endpoint: EndpointConfig = EndpointConfig()
    """How judges over an endpoint are asked, and what they may cost."""


class Grpo(Config):
    """The policy gradient, with loss=grpo."""

    baseline: Literal["batch", "group", "none"] = "batch"
    """Whose mean reward is taken off: of the class, of the group (seed or attack), nobody's."""
    cap: float = Field(default=2.0, gt=0)
    """Largest weight of a token that another policy sampled."""
    mask_invalid: bool = False
    """Leave samples of reward -1 out of the loss; they count in the baseline."""


class Opponents(Config):
    """Past attackers that the defender meets again."""

    probability: float = Field(default=0.0, ge=0, le=1)
    """Of a class and step being played by a past attacker; 0: never."""
    every: int = Field(default=10, ge=1)
    """Steps between two that are kept."""
    size: int = Field(default=5, ge=1)
    """How many are kept; the oldest leaves."""


class Guard(Config):
    """Watches the answers to benign seeds."""

    window: int = Field(default=10, ge=1)
    """Steps over which compliance is averaged; the first so many are what later ones are held to."""
    drop: float = Field(default=0.1, gt=0, le=1)
    """A fall of the share of benign answers that comply, from which on there is an alarm."""
    stop: bool = False
    """Whether the alarm stops the run."""


class AdvGameConfig(Config):
    """Configuration of `temper train advgame`."""

    model: str = "smollm2"
    """Base model of both players: smollm2, a Hub id (owner/name@revision), a folder, a .gguf file, or a run."""
    out: str = "runs/advgame"
    """Run folder to make."""
    data: Data = Data()
    """Seeds."""
    players: Players = Players()
    """Who plays, and from which weights."""
    warm_start: WarmStart = WarmStart()
    """What the players imitate first; for models of a few billion parameters and more set both counts to 0."""
    rollout: Rollouts = Rollouts()
    """How seeds are played."""
    judges: Judging = Judging()
    """Who judges."""
    loss: Literal["dpo", "ipo", "grpo", "sft"] = "dpo"
    """What a player minimises; `sft`: minus the log-probability of chosen samples, a token (a control)."""
    labels: Literal["judged", "shuffled"] = "judged"
    """Which side of a pair is chosen: as judged, or by a coin (a control)."""
    beta: float = Field(default=0.1, gt=0)
    """Of the loss: inverse temperature (dpo, ipo) or weight of the KL (grpo)."""
    nll_scale: float = Field(default=0.3, ge=0)
    """Weight of the chosen side's negative log-likelihood, a token (dpo, ipo; the paper: 0): without it few pairs a
    step at a large rate push down both sides, and samples come to no end."""
    entropy_scale: float = Field(default=0.0, ge=0)
    """Weight of a bonus for entropy: the mean, a token, over what a player learns from (usual: 0.001 to 0.01)."""
    class_weights: dict[Category, float] = Field(default={"harmful": 1.0, "benign": 1.4})
    """Weight of a class in a player's loss (the paper: alike)."""
    per_class_updates: bool = False
    """Play and update on harmful, then on benign: two updates a step. False: one, on both."""
    grpo: Grpo = Grpo()
    """The policy gradient."""
    ema: Ema = Ema()
    """Averages."""
    opponents: Opponents = Opponents()
    """Past attackers."""
    guard: Guard = Guard()
    """Over-refusal."""
    steps: int = Field(default=36, ge=1)
    """Steps of the game."""
    lr: float = Field(default=1e-3, gt=0)
    """Largest learning rate, falls to a fifth by half a cosine (usual: full 1e-6, LoRA of a big one 1e-5 to 2e-4)."""
    cosine_restart: bool = False
    """With per_class_updates: let the cosine run over `steps` and begin again, as the authors' code does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a player's gradient."""
    lora: LoraSettings = LoraSettings(r=8, alpha=16, target_modules="all-linear")
    """Shape of each player's adapter, and of its averages."""
    batch_tokens: int = Field(default=2048, gt=0)
    """Tokens, pads included, that are computed at a time."""
    sample_tokens: int = Field(default=16_384, gt=0)
    """Tokens, pads and answers included, that are sampled at a time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_length: int = Field(default=1024, gt=1)
    """Longest row, prompt and sample, in tokens."""
    max_prompt_length: int = Field(default=512, gt=0)
    """Longest instruction with its seed, in tokens; a seed with a longer one is left out and counted."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first seeds of each class and split."""
    seed: int = 42
    """Of adapters, the order of seeds, sampling, and the judges' coin."""
    dtype: Dtype = "auto"
    """Type of the base weights; auto: bfloat16 where the device computes in it."""
    checkpoint_every: int = Field(default=12, gt=0)
    """Steps between checkpoints (and at the end)."""
    eval_every: int = Field(default=36, ge=0)
    """Steps between validations (and before the first step and after the last); 0: none."""
    eval_trees: int = Field(default=64, ge=1)
    """Fixed trees of one attack and one answer that a validation plays, of both classes together."""
    kl_every: int = Field(default=3, ge=0)
    """Steps between measurements of the distance to the start and to the average, a further forward pass; 0: none."""
    table_every: int = Field(default=6, ge=0)
    """Steps between two tables on the terminal; 0: none."""
    report_to: str | None = None
    """An Accelerate tracker (tensorboard, wandb, ...) beside metrics.jsonl."""

    @model_validator(mode="after")
    def _is_consistent(self) -> AdvGameConfig:
        if self.loss == "grpo" and self.judges.kind != "pointwise":
            raise ValueError("loss=grpo compares points across groups, which a pairwise judge does not give; set "
                             "judges.kind=pointwise")  # fmt: skip
        if self.loss == "grpo" and self.rollout.staleness and not self.rollout.logprobs:
            raise ValueError("rollout.staleness: loss=grpo weighs samples by the weights that wrote them, which are "
                             "not kept; set rollout.logprobs=true")  # fmt: skip
        if self.loss == "grpo" and self.labels != "judged":
            raise ValueError("labels=shuffled is of pairs; loss=grpo has none")
        is_whole = any(self.player(role).tuning == "full" for role in ROLES)
        if is_whole and self.dtype not in ("auto", "float32"):
            raise ValueError(f"players.*.tuning=full with dtype={self.dtype}: small steps are lost in it; leave out "
                             "dtype, and such a player has float32")  # fmt: skip
        if self.cosine_restart and not self.per_class_updates:
            raise ValueError("cosine_restart needs per_class_updates=true")
        if missing := set(self.data.classes) - {c for c, w in self.class_weights.items() if w > 0}:
            raise ValueError(
                f"class_weights: {min(missing)} is played and weighs nothing; leave it out of data.classes"
            )
        if self.rollout.attacks == 1 and self.rollout.responses == 1 and self.loss != "grpo":
            raise ValueError("rollout.attacks and rollout.responses are both 1: there is nothing to compare")
        if self.rollout.source == "seeds" and self.players.attacker.train:
            raise ValueError("rollout.source=seeds: nobody attacks, so set players.attacker.train=false")
        if self.rollout.source == "seeds" and self.rollout.attacks > 1:
            raise ValueError("rollout.source=seeds: all attacks are the seed, so set rollout.attacks=1")
        for role, tokens in (("attacker", self.rollout.attacker_tokens), ("defender", self.rollout.defender_tokens)):
            longest = (self.max_prompt_length if role == "attacker" else self.rollout.attacker_tokens) + tokens
            if longest > self.max_length:
                raise ValueError(
                    f"max_length={self.max_length} is less than the longest row of the {role}, {longest}"
                )
        return self

    def needs_start(self, player: PlayerConfig) -> bool:
        """Whether a player's network of the start is asked again: a copy, where all its weights train."""
        return bool(self.kl_every or self.eval_every or player.reference == "fixed" or player.sampler == "initial")

    def warm_rows(self, role: Role) -> int:
        """How many rows a seat imitates before the game."""
        return self.warm_start.rewrites if role == "attacker" else self.warm_start.brief

    def player(self, role: Role) -> PlayerConfig:
        """The settings of one of the two."""
        return self.players.attacker if role == "attacker" else self.players.defender

    @property
    def plays(self) -> dict[str, Any]:
        """How the attacker writes, for whoever asks it again."""
        tokens = {"max_new_tokens": self.rollout.attacker_tokens}
        return {"temperature": self.rollout.temperature, "top_p": self.rollout.top_p, **tokens}
