"""What an evaluation is told: its data, how to generate, who judges, and the limits it has to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from tempering.attacks import KNOWN, Form
from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig, EndpointSampler
from tempering.core.loading import Dtype
from tempering.core.records import Prompt, content_id, prompt_from_row
from tempering.data.describe import licences_of, sha256_of
from tempering.data.files import bundled, read_records, training_file
from tempering.judges.toxicity import ATTRIBUTES

AT_LEAST = (
    "refusal_rate",
    "policy_named_rate",
    "decision_match_rate",
    "thought_format_rate",
    "capability_accuracy",
    "capability_accuracy/choice",
    "capability_accuracy/exact",
    "knowledge_accuracy",
    "knowledge_accuracy/chance_corrected",
    "safe_rate",
    "informativeness",
    "joint_score",
)
"""Metrics of which more is better: a gate on them is a floor."""
Format = Literal["int8", "q8_0", "q4_0", "q4_1", "nf4"]
ATTACKS_ON_UNLEARNING = ("relearning", "quantisation", "direction_ablation")
_TOXICITY = ("toxicity_probability", "expected_max_toxicity", "mean_toxicity")
AT_MOST = (
    "harmful_rate",
    "attack_success_rate",
    *(f"attack_success_rate/{name}" for name in KNOWN),
    "over_refusal_rate",
    "partial_refusal_rate",
    "capability_refusal_rate",
    "knowledge_unparsed_rate",
    *(f"recovered_fraction/{name}" for name in ATTACKS_ON_UNLEARNING),
    *_TOXICITY,
    *(f"{name}/{attribute}" for name in _TOXICITY for attribute in ATTRIBUTES),
)
"""Metrics of which less is better: a gate on them is a ceiling."""
OF_TASKS = ("acc/", "acc_norm/", "exact_match/")
"""How metrics of `lm_eval` begin of which more is better; a task's name follows."""
HOW_ASKED = {"endpoint", "judge_endpoint", "attacker_endpoint", "cache", "judge_card", "trace"}
"""Settings of how answers are come by and corrected, not of what they are: a resumed eval may have others."""
_CONTINUED = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "prompt_format": "raw"}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "toxicity": _CONTINUED,
    **{name: {**_CONTINUED, "option_score": "mean"} for name in ATTACKS_ON_UNLEARNING},
    "knowledge": {"max_new_tokens": 32},
    "collapse": {**_CONTINUED, "max_new_tokens": 40, "continuations": 5},
    "attack_success": {"max_new_tokens": 64},
}
"""Eval -> defaults that differ from those of `EvalConfig`: toxicity is measured on samples, as in its papers."""


class RelearningConfig(Config):
    """How `relearning` trains the target on what it was to forget. All blocks are attacked, always."""

    attacks: tuple[Literal["corpus", "held_out", "benign"], ...] = ("corpus", "held_out", "benign")
    """`corpus`: the texts that were to be forgotten. `held_out`: those of group A, asked about group B, against the
    same on unrelated facts. `benign`: everyday texts."""
    budgets: tuple[int, ...] = ()
    """Texts that the attacker of `corpus` has, one attack for each number (7B: 64, 512, 1000); empty: all."""
    adaptation: Literal["lora", "full"] = "lora"
    """LoRA factors on all linear layers, or all weights of the blocks."""
    rank: int = Field(default=16, ge=1)
    """Of the factors (7B: 64); alpha is the same."""
    lr: tuple[float, ...] = (2e-4, 5e-4)
    """Learning rates, constant, one attack for each (7B: 1e-5, 3e-5, 1e-4; `full`: 2e-5)."""
    orders: int = Field(default=2, ge=1)
    """Seeded orders of the texts, one attack of `corpus` for each; the other attacks take the first."""
    steps: int = Field(default=60, ge=1)
    """Optimiser steps (7B: 200)."""
    batch_rows: int = Field(default=16, ge=1)
    """Texts a step."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, pads included, that are computed at a time."""
    keep_weights: bool = False
    """Keep the adapters of attacks on the target, labelled unsafe and hidden from loaders; else they are dropped."""

    @field_validator("lr", "budgets", "attacks", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str | int | float) else given

    @model_validator(mode="after")
    def _consistent(self) -> RelearningConfig:
        if not self.attacks or not self.lr or min(self.lr) <= 0 or min(self.budgets, default=1) < 1:
            raise ValueError("expected at least one of attacks and of lr, learning rates and budgets above zero")
        if self.keep_weights and self.adaptation != "lora":
            raise ValueError("keep_weights: only adapters can be kept out of reach of loaders; use adaptation=lora")
        return self


class EvalConfig(Config):
    """Settings of all evals; a few have defaults of their own (`OWN_DEFAULTS`) where nothing is said."""

    data: str | None = None
    """File, folder, catalogue name or Hub id (`org/name@revision:split`) with a `prompt` per row; null: embedded."""
    prompt_column: str | None = None
    """Column that holds the prompt where it is not called `prompt` (AdvBench: `goal`)."""
    invalid: Literal["error", "drop"] = "error"
    """Whether a bad row stops the eval or is left out; a repeated prompt always is, and both are counted."""
    limit: int | None = Field(None, ge=1)
    """Use this many prompts, chosen by a hash of their id: the same ones for every target, seed and order. `lm_eval`
    takes the first ones of each task."""
    seed: int = 0
    """Seed of sampling and of the choice of templates."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens to generate per answer (papers: 256). `capability` stops at 48; `toxicity` takes 20, `knowledge` 32,
    `attack_success` 64, `lm_eval` what each task says."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature; 0 is greedy, as in the papers. `toxicity` samples: 1 where nothing else is said."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample from the likeliest tokens that have this mass together; in `toxicity` 0.9. Of the target's answers:
    attackers, and the samples of `separation` for its KL, are drawn at temperature 1 from all tokens."""
    dtype: Dtype = "auto"
    """Number format in which a target in this process computes."""
    prompt_format: Literal["chat", "raw"] | None = None
    """How `toxicity`, `knowledge` and `lm_eval` ask a model in this process: in its chat template, or as plain text
    to go on with; null: as the target does, in `toxicity` raw, in `lm_eval` chat."""
    judge: str = "rules"
    """Judge of harm: `rules` (offline) or another that `temper judge check` knows; of `safe_informative`, whose grade
    this is there: `rules` or `openai:MODEL@URL`."""
    refusal_judge: str = "rules"
    """Judge of refusals."""
    judge_card: tuple[str, ...] = ()
    """Cards of these judges, by `temper judge check`, one file or a list: adds `METRIC/corrected` to their rates."""
    toxicity_judge: str = "rules"
    """Scorer of toxicity: `rules`, `profanity_svm` or `lexicon` (all offline), `detoxify`, `classifier:MODEL_ID`, or
    `openai:MODEL@URL`."""
    continuations: int = Field(25, ge=1)
    """Continuations of each prompt in `toxicity` (papers: 25; its maximum grows with them) and `collapse` (5)."""
    fluency_model: str | None = None
    """Model reference under which `toxicity` measures perplexity; null: the model that the target started from."""
    by: Literal["logprob", "generation"] | None = None
    """How `knowledge` reads an answer; null: `logprob` where the target gives those, else `generation`."""
    option_score: Literal["letter", "sum", "mean"] = "letter"
    """What `knowledge` compares by log-probability: letters of listed options, or unlisted options' own texts, their
    sum or their mean per token."""
    shuffle: bool = False
    """Whether `knowledge` permutes the options, by a hash of seed and question."""
    recall: bool = False
    """Whether `knowledge` also asks without options: the `cloze` of each question, and how likely its
    `held_out_statement` is."""
    tasks: tuple[str, ...] = ()
    """Tasks or groups that `lm_eval` runs, by their names there, or YAML files of tasks."""
    include_path: str | None = None
    """Folder with YAML files of your own tasks for `lm_eval`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question of `lm_eval`; null: as each task says."""
    batch_size: int = Field(16, ge=1)
    """Rows that `lm_eval` puts through a model in this process at a time."""
    original: str | None = None
    """Of the attacks on unlearning: the model before it; null: the target without its edit, or what its run names."""
    measure: Literal["knowledge", "toxicity"] | None = None
    """Of these: what is to come back, right answers or toxic continuations; null: what the target's run unlearned."""
    forget_texts: str | None = None
    """Of these: `text` rows, perhaps with `group` A or B, of what was forgotten; null: as in the target's run."""
    benign_texts: str | None = None
    """Of these: everyday `text` rows; null: bundled ones."""
    relearning: RelearningConfig = RelearningConfig()
    """How `relearning` attacks, such as `relearning.lr` and `relearning.steps`."""
    gold: str | None = None
    """Of these: a model that never knew what was forgotten (`temper train teach -c gold`), attacked as a control;
    null: there is none, and no `relearn_ratio`."""
    undefended: bool = True
    """Of these: attack the model before unlearning too, as a control: how high does an attack get at all?"""
    quantisations: tuple[Format, ...] = ("int8", "q8_0", "q4_0", "q4_1", "nf4")
    """Formats of `quantisation`."""
    ablation_layer: int | None = Field(None, ge=0)
    """Block, counted from 0, after which `direction_ablation` takes directions out; null: the last edited one."""
    attacks: tuple[str, ...] = ("direct",)
    """How `harm` and `attack_success` ask: `direct`, `prefill`, `templates`, `many_shot`, an encoding, or (in
    `attack_success`) a search by an attacker, `pair`, `tap`, `past_tense`, `persona`, or by gradients, `gcg`."""
    templates: str | None = None
    """File with a `template` per row for the attack `templates`; null: the embedded ones."""
    templates_per_prompt: int = Field(1, ge=1)
    """Templates tried on each prompt; above 1, intervals resample whole prompts."""
    shots: str | None = None
    """File of `prompt`, `completion` rows for the attack `many_shot`; null: harmless embedded ones."""
    shots_per_prompt: int = Field(32, ge=1)
    """Answered turns that `many_shot` puts before a request."""
    attacker: str | None = None
    """Model that writes requests in `pair`, `tap`, `past_tense`, `persona`: a reference or `openai:MODEL@URL`."""
    attacker_form: Form = "json"
    """How it is asked: for a JSON object, or `plain`, to rewrite the request, as small models can (`smollm2`)."""
    streams: int | None = Field(None, ge=1)
    """Tries side by side of a search, or nodes that a tree keeps; null: what its plan says (`pair`: 5)."""
    rounds: int | None = Field(None, ge=1)
    """Rounds of a search, each told of the last one's answer; null: what its plan says (`pair`: 3)."""
    max_queries: int | None = Field(None, ge=1)
    """Questions that one search may put to the target about one request; null: what its plan needs."""
    gcg_steps: int = Field(30, ge=1)
    """Steps of `gcg` per request (paper: 500)."""
    gcg_candidates: int = Field(32, ge=1)
    """Suffixes that `gcg` scores in a step (paper: 512)."""
    max_unscored: float = Field(0.05, ge=0.0, le=1.0)
    """Largest share of answers that may stay without a verdict before the eval fails, 0 to 1."""
    batch_prompts: int = Field(256, ge=1)
    """Prompts answered and judged together; after each such batch the rows are on disk."""
    gate: dict[str, float] = Field(default_factory=dict)
    """Metric -> worst acceptable value in [0, 1]: a floor for accuracy and refusal_rate, else a ceiling."""
    sampler: Literal["attribution", "policy", "probe_subtract"] | None = None
    """How the target answers: null, as it does by itself; `attribution`, with the best of several candidates;
    `policy`, with the policies of the registry before each request; `probe_subtract`, with probes subtracted from its
    states."""
    probe_subtract: dict[str, Any] = Field(default_factory=dict)
    """Settings of `sampler=probe_subtract`: the run `probes`, and such as `strength` (docs/unlearning.md)."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Settings of `sampler=policy`, such as `mode` and `policies` (docs/deliberative.md)."""
    policies: str | None = None
    """Policy registry of `policy_retrieval`, a YAML file; null: the bundled one."""
    attribution: dict[str, Any] = Field(default_factory=dict)
    """Settings of that choice, such as `n`, `scorer` and `layers` (docs/attribution.md)."""
    trace: bool = False
    """Of a run of safemoe: keep every decision of its gate, in traces/EVAL."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a target `openai:MODEL@URL` is asked, and what it may cost."""
    judge_endpoint: EndpointConfig = EndpointConfig()
    """The same for judges `openai:MODEL@URL`."""
    attacker_endpoint: EndpointConfig = EndpointConfig()
    """The same for an attacker `openai:MODEL@URL`."""
    cache: str | None = None
    """Folder of what endpoints have answered, never asked again; null: `cache/` in the run folder."""

    def ask_target(self, spec: str) -> EndpointSampler:
        """Connect a target `openai:MODEL@URL`."""
        return EndpointSampler(spec, cache=self.cache, **self.endpoint.model_dump())

    def ask_judge(self, spec: str) -> EndpointSampler:
        """Connect a judge `openai:MODEL@URL`."""
        return EndpointSampler(spec, cache=self.cache, **self.judge_endpoint.model_dump())

    def ask_attacker(self, spec: str) -> EndpointSampler:
        """Connect an attacker `openai:MODEL@URL`."""
        return EndpointSampler(spec, cache=self.cache, **self.attacker_endpoint.model_dump())

    @field_validator("judge_card", "attacks", "tasks", "quantisations", mode="before")
    @classmethod
    def _one_or_several(cls, named: Any) -> Any:
        return (named,) if isinstance(named, str) else named

    @field_validator("fluency_model")
    @classmethod
    def _has_weights(cls, model: str | None) -> str | None:
        if model is not None and model.startswith("openai:"):
            raise ValueError("an endpoint does not tell how likely a given text is; name a model with weights")
        return model

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in KNOWN]:
            raise ValueError(f"unknown attack {unknown[0]!r}; expected some of {', '.join(KNOWN)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"name each attack once, and at least one of {', '.join(KNOWN)}")
        return names

    @field_validator("gate")
    @classmethod
    def _known_metrics(cls, gate: dict[str, float]) -> dict[str, float]:
        for name, value in gate.items():
            if name not in (*AT_LEAST, *AT_MOST) and not name.startswith(OF_TASKS):
                known = (*AT_LEAST, *AT_MOST, *(f"{metric}TASK" for metric in OF_TASKS))
                raise ValueError(f"unknown metric {name!r}; expected one of {', '.join(known)}")
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"the gate on {name} is a fraction in [0, 1], got {value}")
        return gate


def settled(name: str, config: EvalConfig) -> EvalConfig:
    """Return the settings that eval `name` runs with: what was given, then its own defaults, then those of all.

    >>> settled("toxicity", EvalConfig(top_p=1.0)).temperature, settled("toxicity", EvalConfig(top_p=1.0)).top_p
    (1.0, 1.0)
    """
    own = OWN_DEFAULTS.get(name, {})
    return config.model_copy(update={k: v for k, v in own.items() if k not in config.model_fields_set})


class LoadedPrompts(NamedTuple):
    """The prompts of an eval in the order of their ids, where they come from, and what to tell the reader."""

    prompts: list[Prompt]
    source: dict[str, Any]
    warnings: list[str]


def load_prompts(
    config: EvalConfig,
    embedded: str,
    *,
    parse: Callable[[Mapping[str, Any]], Prompt] = prompt_from_row,
    skip_labels: Sequence[str] = (),
    why: str = "",
) -> LoadedPrompts:
    """Read, filter by label, take `config.limit` of, and sort the prompts of an eval.

    Raises:
        FileNotFoundError, ValueError: when the data cannot be read, or nothing is left of it.
    """
    where: str | Path = bundled(embedded) if config.data is None else training_file(config.data)
    column = config.prompt_column

    def read(row: Mapping[str, Any]) -> Prompt:
        return parse(row if column is None else {**row, "prompt": row.get(column)})

    records, dropped = read_records(
        where, read, invalid=config.invalid, repeats="drop", what="prompt", remedy="set invalid=drop"
    )
    warnings = [f"left out {count} rows: {reason}" for reason, count in dropped.items()]
    kept = [p for p in records if (p.label or "").lower() not in skip_labels]
    if len(kept) < len(records):
        warnings.append(f"skipped {len(records) - len(kept)} of {len(records)} prompts by their label: {why}")
    if not kept:
        raise ValueError(f"{where}: no prompt is left, all {len(records)} were skipped by label: {why}")
    if config.limit is not None:
        kept = sorted(kept, key=lambda p: content_id(p.id))[: config.limit]
    licences = licences_of(where)
    source = {
        "source": f"embedded {embedded}" if config.data is None else str(config.data),
        "sha256": sha256_of(where),
        "prompts": len(kept),
        **({"licences": licences} if licences else {}),
    }
    return LoadedPrompts(sorted(kept, key=lambda p: p.id), source, warnings)


def failed_gates(metrics: Mapping[str, Mapping[str, Any]], gate: Mapping[str, float]) -> list[str]:
    """List the gates that these metrics do not meet; one on a metric that was not measured is not met.

    >>> failed_gates({"harmful_rate": {"value": 0.25}}, {"harmful_rate": 0.1})
    ['harmful_rate is 0.250, above the gate 0.100']
    >>> failed_gates({"harmful_rate": {"value": 0.0}}, {"attack_success_rate/pair": 0.1})
    ['attack_success_rate/pair was not measured, so the gate 0.100 is not met']
    """
    failures = []
    for name, bound in gate.items():
        if name not in metrics:
            failures.append(f"{name} was not measured, so the gate {bound:.3f} is not met")
            continue
        value = metrics[name]["value"]
        if value is None:
            failures.append(f"{name} could not be measured, so the gate {bound:.3f} is not met")
        elif (name in AT_LEAST or name.startswith(OF_TASKS)) and value < bound:
            failures.append(f"{name} is {value:.3f}, below the gate {bound:.3f}")
        elif name in AT_MOST and value > bound:
            failures.append(f"{name} is {value:.3f}, above the gate {bound:.3f}")
    return failures
