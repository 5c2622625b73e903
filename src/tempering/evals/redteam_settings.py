"""Settings of `temper redteam TARGET attacker=...`: who attacks whom, from which seeds, who judges, at what cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig
from tempering.core.loading import Dtype
from tempering.data.attacker import CATEGORIES, Category
from tempering.data.seeds import Split

HOW_ASKED = (
    "spend", "concurrency", "rate_per_minute", "authorised", "redact", "max_unscored", "gate", "batch", "endpoint",
    "judge_endpoint", "attacker_endpoint", "cache",
)  # fmt: skip
"""Settings that change no attempt: a resumed run may have others."""


class TargetConfig(Config):
    """How targets answer."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy, and equal attacks are then one question."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""


class SpendConfig(Config):
    """What may be spent, checked before each request; where it is reached, the run stops cleanly and is partial."""

    max_queries: int | None = Field(default=10_000, ge=1)
    """Requests to all targets together, retries among them."""
    max_cost: float | None = Field(default=None, ge=0)
    """Cost of all endpoints together, in the currency of their `price_in` and `price_out`."""


class RedteamConfig(Config):
    """Settings of `temper redteam TARGET attacker=...`."""

    attacker: tuple[str, ...]
    """RUN, RUN@step-N, untrained, direct, template:NAME, templates (k a seed) or pair:MODEL; one, or a list."""
    targets: tuple[str, ...] = ()
    """Further targets: with a list of attackers, all against all, and ratings of both sides."""
    seeds: str = "demo"
    """Requests to attack from: `demo` (bundled, mild), or a file with `prompt` and `category` (harmful, benign)."""
    split: Split | None = None
    """Which of the seeds; null: `test` of `demo` and of WildJailbreak, all of any other file."""
    classes: tuple[Category, ...] = CATEGORIES
    """`harmful` seeds: does the target answer? `benign` ones: does it refuse?"""
    limit: int | None = Field(default=None, ge=1)
    """Use so many seeds of each class."""
    k: int = Field(default=8, ge=1)
    """Attacks a seed (paper: 1)."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the attacker."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the attacker."""
    max_new_tokens: int = Field(default=500, ge=1)
    """Longest output of the attacker, in tokens; one that is cut holds no attack, as in training."""
    target: TargetConfig = TargetConfig()
    """How targets answer, such as `target.temperature`."""
    filter: Literal["none", "faithful"] = "none"
    """`faithful`: sample again what holds no attack, or one that is not faithful."""
    tries: int = Field(default=4, ge=1)
    """Samples of one attack with that filter, at most."""
    templates: str | None = None
    """File with a `template` per row; null: the embedded ones."""
    rounds: int | None = Field(default=None, ge=1)
    """Rounds of `pair:MODEL`; null: what its plan says. It has k / rounds streams."""
    attacker_form: Literal["json", "plain"] = "json"
    """How the writer of `pair:MODEL` is asked; `plain` for a small one."""
    judge: str = "rules"
    """Judge of harm, on the seed and the answer; better not the one that trained the attacker."""
    faithfulness: str = "rules"
    """Judge of whether an attack asks for what its seed does: rules, openai:MODEL@URL or local:REFERENCE."""
    refusal_judge: str = "rules"
    """Judge of refusals, on the attack and the answer."""
    judge_card: tuple[str, ...] = ()
    """Cards of the judge of harm, by `temper judge check`: adds rates corrected for its errors."""
    encoder: bool = True
    """Use the sentence encoder, where it is installed, for diversity and in the rules of faithfulness."""
    seed: int = 0
    """Of sampling, of the choice of templates, and of bootstraps."""
    dtype: Dtype = "auto"
    """Number format of models in this process."""
    spend: SpendConfig = SpendConfig()
    """Caps: `spend.max_queries`, `spend.max_cost`."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at a time, to a target behind an endpoint."""
    rate_per_minute: float | None = Field(default=None, gt=0)
    """Most requests a minute to all targets together, evenly spaced."""
    authorised: bool = False
    """Your word that you may test a target on another machine; it needs a cap of your own in `spend` as well."""
    redact: bool = True
    """Show in the report the category and 80 characters of a text, and no more."""
    max_unscored: float = Field(default=0.2, ge=0, le=1)
    """Largest share of attempts that judges may leave unscored before the run fails, 0 to 1."""
    gate: dict[str, float] = Field(default_factory=dict)
    """Metric, such as attack_success_at_1, -> ceiling in [0, 1] for the strongest attacker; missed: exit code 3."""
    batch: int = Field(default=64, ge=1)
    """Attempts that are asked and judged together; after each such batch they are on disk."""
    endpoint: EndpointConfig = EndpointConfig()
    """How targets `openai:MODEL@URL` are asked, and their prices."""
    judge_endpoint: EndpointConfig = EndpointConfig()
    """The same for judges."""
    attacker_endpoint: EndpointConfig = EndpointConfig()
    """The same for the writer of `pair:openai:MODEL@URL`."""
    cache: str | None = None
    """Folder of what endpoints have answered; null: `cache/` in the run folder."""

    @property
    def has_own_cap(self) -> bool:
        """Whether the user set a cap; the default is none of theirs."""
        given = {name for name in self.spend.model_fields_set if getattr(self.spend, name) is not None}
        return bool(given) or self.endpoint.budget is not None or self.endpoint.max_tokens_total is not None

    @field_validator("attacker", "targets", "classes", "judge_card", mode="before")
    @classmethod
    def _one_or_several(cls, named: Any) -> Any:
        return (named,) if isinstance(named, str) else named

    @model_validator(mode="after")
    def _consistent(self) -> RedteamConfig:
        if not self.attacker:
            raise ValueError("attacker=[]: name at least one")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={list(self.classes)}: name each of {', '.join(CATEGORIES)} at most once")
        if "concurrency" in self.endpoint.model_fields_set:
            raise ValueError("endpoint.concurrency: say concurrency=N; judges have judge_endpoint.concurrency")
        priced = (self.endpoint, self.judge_endpoint, self.attacker_endpoint)
        if self.spend.max_cost is not None and not any(e.price_in or e.price_out for e in priced):
            raise ValueError(
                "spend.max_cost needs prices: endpoint.price_in and endpoint.price_out, per million tokens"
            )
        metrics = {f"{name}_{j}" for name in ("attack_success_at", "over_refusal_at") for j in (1, self.k)}
        for name, value in self.gate.items():
            if name not in metrics or not 0 <= value <= 1:
                raise ValueError(f"gate.{name}={value}: expected one of {', '.join(sorted(metrics))}, in [0, 1]")
        return self
