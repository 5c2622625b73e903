r"""Attribution: of N answers, return the one that looks least like what the model would have said before alignment.

The claim (Pathmanathan and Huang 2026, arXiv:2604.09665): aligned models still fall back on base behaviour; where
they do, their hidden states lie near the base model's on the same text. So sample N, run both models over each
answer, and return the answer whose states are least alike. No training, no judge, no labels.

    s_l = cos(h_aligned^l, h_base^l) at the last token        Eq. 2;  the least s is returned, Eq. 3
    kl  = (1/L) sum_t KL(p_aligned || p_base)                 Eq. 1;  the largest is returned

Base means the student's own weights before alignment. Where alignment is an adapter both are one set of weights.

Differs from the paper:
- states are read at the true end-of-turn token of the sampled ids, never at index -1 of a padded batch of text that
  was encoded again; published scores probably were, so the published effect may in part be one of read-out;
- layers: a window, mean of s over 0.35 n <= l <= 0.60 n, or what `temper train attribution` fits; the paper reads
  layer 12, and its "best layer" is chosen on test labels, which no rule here does;
- only finished candidates with an answer are chosen among (`validity=false` is the paper's way);
- risks are rounded to 1e-6, so that equal states tie, and ties go to the first.

Unknown, our choice: which model's perplexity (the aligned one's); whether "final token" is the end of turn (yes);
the effect itself under a correct read-out: measured with controls (`temper attribution controls`), not promised.

    temper eval RUN harm sampler=attribution              uncalibrated
    temper train attribution model=RUN out=runs/card      fit the layers on labelled candidates
    temper eval runs/card harm                            calibrated

This training changes no weights: it fits `final/card.json`, which is bound by hashes to the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tempering import judges
from tempering.core.config import Config, build
from tempering.core.endpoint import EndpointConfig, EndpointSampler
from tempering.core.loading import Dtype
from tempering.core.policy import Policy, save_tensors
from tempering.core.progress import progress, say
from tempering.core.records import Prompt, content_id, prompt_from_row
from tempering.core.run import Run
from tempering.core.sampling import Sampler, load_sampler
from tempering.data.describe import inputs_of, licences_of
from tempering.data.files import bundled, read_records
from tempering.methods.attribution.best_of_n import AttributionSampler, Ranking, candidate_row
from tempering.methods.attribution.calibration import FEW, Fit, fit
from tempering.methods.attribution.card import (
    CARD,
    CENTRE,
    Card,
    Sampling,
    identify,
    read_card,
    settle,
    verify,
)
from tempering.methods.attribution.collecting import (
    AnswerFound,
    Kind,
    Row,
    draw,
    kind_of,
    labelled,
    mean_states,
    score,
)
from tempering.methods.attribution.scores import length_beta
from tempering.methods.attribution.scoring import Pair
from tempering.methods.attribution.selection import winners
from tempering.methods.attribution.settings import (
    NEED_BASE,
    NEED_LOGITS,
    Aggregate,
    Distance,
    ReadOut,
    SelectionConfig,
)

METHOD = "attribution"
DEMO = ("dev_harmful", "dev_borderline")
TAU_SHARE = 0.95
HOW_ASKED = ("judge_endpoint", "cache")
"""Settings that a resumed run may have others of."""

__all__ = [
    "CONFIG",
    "HOW_ASKED",
    "METHOD",
    "AttributionConfig",
    "AttributionSampler",
    "Card",
    "Pair",
    "Ranking",
    "SelectionConfig",
    "around",
    "candidate_row",
    "dry_run",
    "is_run",
    "load",
    "load_judges",
    "needs_weights",
    "read_card",
    "read_prompts",
    "rehearsal",
    "require_labels",
    "sampler",
    "train",
    "verify",
]


class Data(Config):
    """What the candidates answer."""

    train: str = "demo"
    """File, folder, catalogue name or Hub id with a `prompt` a row and a `label`: `harmful` or `unsafe` (or none),
    `utility` with the `answer` to find, or `benign`, `borderline`, `harmless`, `safe`. `demo`: the bundled
    development prompts, harmful and borderline."""
    invalid: Literal["error", "drop"] = "error"
    """A row that cannot be used stops the run, or is dropped and counted."""


class AttributionConfig(Config):
    """Settings of `temper train attribution`."""

    model: str
    """The aligned model: a run, an adapter, or with `base` any model."""
    base: str | None = None
    """The model before alignment, where it is not in the same weights (merged or fully fine-tuned models)."""
    out: str = "runs/attribution"
    """Run folder to make."""
    data: Data = Data()
    """Labelled prompts; not those that you report on."""
    limit: int | None = Field(None, gt=0)
    """Read only so many prompts of each kind."""
    seed: int = 0
    """Of the draws, the folds and the bootstrap."""
    dtype: Dtype = "auto"
    """Type of the base weights; the card is for this type."""
    n: int = Field(8, ge=2)
    """Candidates of each prompt (paper: 8)."""
    temperature: float = Field(0.7, gt=0)
    """Of the draws (paper: 0.7)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the draws."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer, in tokens (paper: 2048)."""
    judge: str = "rules"
    """Judge of harm for the labels; not the one that reports."""
    refusal_judge: str = "rules"
    """Judge of refusals for the labels of harmless prompts."""
    max_unscored: float = Field(0.05, ge=0, le=1)
    """Largest share of candidates that may stay without a label."""
    readout: ReadOut = "eos"
    """Where states are read."""
    distance: Distance = "cos"
    """How they are compared."""
    aggregate: Aggregate = "mean"
    """Several layers: mean of the similarities, or median of the ranks within the prompt."""
    centre: bool = False
    """Subtract each model's mean read-out over the candidates first (a second pair of passes)."""
    batch_prompts: int = Field(8, ge=1)
    """Prompts drawn together; after each such batch the rows are on disk."""
    judge_endpoint: EndpointConfig = EndpointConfig()
    """How judges `openai:MODEL@URL` are asked, and what they may cost."""
    cache: str | None = None
    """Folder of what endpoints have answered, never asked again; null: `cache/` in the run folder."""

    def ask_judge(self, spec: str) -> EndpointSampler:
        """Connect a judge `openai:MODEL@URL`."""
        return EndpointSampler(spec, cache=self.cache or Path(self.out) / "cache", **self.judge_endpoint.model_dump())


CONFIG = AttributionConfig


# --- fitting ------------------------------------------------------------------------------------------


def train(config: AttributionConfig, *, resume: bool = False, policy: Policy | None = None) -> Run:
    """Fit the card and return its run; `policy` is the aligned model where the caller has it loaded already.

    Draw and judge candidates; measure them at all layers in one pair of passes; choose the layers.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: too many candidates could not be judged.
    """
    Run.require_free(config.out, resume)
    prompts, dropped = read_prompts(config.data.train, DEMO, limit=config.limit, invalid=config.data.invalid)
    judge_of = load_judges(config.judge, config.refusal_judge, config.ask_judge)
    inner, pair = load(config.model, config.base, config.dtype, policy)
    dtype = str(pair.policy.dtype).removeprefix("torch.")
    settled_config = config.model_copy(update={"dtype": dtype})
    run = Run.create(config.out, METHOD, settled_config, resume=resume, may_differ=HOW_ASKED)
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    run.require_inputs(content_id([[p.id, p.label] for p in prompts]), config.data.train)
    ask = {key: getattr(config, key) for key in ("n", "temperature", "top_p", "max_new_tokens", "seed")}
    with progress("candidates", len(prompts)) as advance:
        rows = draw(run, prompts, inner, judge_of, ask, batch=config.batch_prompts, on_done=advance)
    require_labels(rows, config.max_unscored)
    means = None
    if config.centre:
        means = mean_states(inner, pair, rows, config.readout)
        save_tensors(run.path(CENTRE), {"centre": means})
    centred = None if means is None else means[:, None]
    with progress("scoring", len(rows)) as advance:
        scores = score(
            run, rows, inner, pair, [config.readout], config.distance, means=centred, on_done=advance
        )  # fmt: skip
    card, found = make_card(config, pair, rows, scores, dtype)
    for warning in found.warnings:
        say(f"[yellow]{warning}[/]")
    run.write_json(CARD, card.model_dump(mode="json"))
    run.write_provenance(
        method=METHOD,
        model=pair.policy.source.to_row(),
        base=config.base,
        inputs={} if config.data.train == "demo" else inputs_of(config.data.train),
        dropped=dropped,
        judges=sorted({judge.identity for judge in judge_of.values()}),
        data_licences=licences_of(config.data.train, config.model),
        warnings=found.warnings,
        unsafe=False,
    )
    run.finish()
    first, then = card.fit["asr_first"], card.fit["asr_cv"]
    rates = "not measured: too few scored prompts" if first is None or then is None else f"{first:.1%} -> {then:.1%}"
    say(f"{card.rule}: layers {list(card.layers)}; harmful, cross-validated: {rates}")
    return run


def make_card(
    config: AttributionConfig, pair: Pair, rows: list[Row], scores: list[Row], dtype: str
) -> tuple[Card, Fit]:
    """Choose the layers, and write down what for and on what.

    Raises:
        ValueError: there are no harmful prompts.
    """
    kinds: tuple[Kind, ...] = ("harmful", "benign", "utility")
    harmful, benign, utility = (labelled(rows, scores, kind, config.readout) for kind in kinds)
    if harmful is None:
        raise ValueError(f"{config.data.train}: no prompt is labelled harmful; layers are chosen on those")
    found = fit(harmful, benign, utility, aggregate=config.aggregate, seed=config.seed)
    risk = found.rule.risk(harmful, config.aggregate)
    tau = None
    if benign is not None:
        theirs = found.rule.risk(benign, config.aggregate)
        best = theirs[np.arange(len(theirs)), winners(theirs, benign.valid)]
        best = best[~np.isnan(best)]
        tau = float(np.quantile(best, TAU_SHARE)) if len(best) else None
    card = Card(
        student=identify(pair, config.model),
        base=config.base,
        layers=found.rule.layers,
        rule=found.rule.name,
        aggregate=config.aggregate,
        readout=config.readout,
        distance=config.distance,
        centre=config.centre,
        dtype=dtype,
        n=config.n,
        sampling=Sampling(
            temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens, seed=config.seed
        ),
        length_beta=length_beta(risk, harmful.tokens),
        tau=tau,
        fit={**found.report, "judge": config.judge},
    )
    return card, found


def dry_run(config: AttributionConfig) -> dict[str, Any]:
    """Check data, judges and models, say what a fit would do, and write nothing."""
    Run.require_free(config.out, resume=False)
    prompts, dropped = read_prompts(config.data.train, DEMO, limit=config.limit, invalid=config.data.invalid)
    load_judges(config.judge, config.refusal_judge, config.ask_judge)
    _, pair = load(config.model, config.base, config.dtype)
    kinds = [kind_of(prompt) for prompt in prompts]
    facts = {
        **{kind: kinds.count(kind) for kind in ("harmful", "benign", "utility")},
        "candidates": config.n * len(prompts),
        "tokens_at_most": config.n * len(prompts) * config.max_new_tokens, "blocks": pair.blocks, "dropped": dropped,
    }  # fmt: skip
    say(
        f"{facts['candidates']} candidates of {len(prompts)} prompts ({facts['harmful']} harmful, {facts['benign']} "
        f"harmless, {facts['utility']} utility); at least {FEW} contested prompts are needed"
    )
    return facts


# --- data ---------------------------------------------------------------------------------------------


def read_prompts(
    source: str, demo: Sequence[str], *, limit: int | None = None, invalid: Literal["error", "drop"] = "error"
) -> tuple[list[Prompt], dict[str, int]]:
    """Read labelled prompts, `limit` of each kind, in the order of the file; `demo` stands for bundled files.

    Raises:
        FileNotFoundError, ValueError: there are none that are harmful, or one cannot be used.
    """
    sources = [bundled(name) for name in demo] if source == "demo" else [source]
    prompts: list[Prompt] = []
    dropped: dict[str, int] = {}
    for file in sources:
        found = read_records(file, _labelled_prompt, invalid=invalid, repeats="drop", what="prompt")
        prompts += found.records
        dropped |= {reason: count + dropped.get(reason, 0) for reason, count in found.dropped.items()}
    if silent := [p.id for p in prompts if kind_of(p) == "utility" and not p.extra.get("answer")]:
        raise ValueError(f"{source}: prompt {silent[0]} is labelled utility and has no 'answer'")
    kept = []
    for kind in ("harmful", "benign", "utility"):
        kept += [p for p in prompts if kind_of(p) == kind][:limit]
    if not any(kind_of(p) == "harmful" for p in kept):
        raise ValueError(f"{source}: no prompt is labelled harmful; layers are chosen and judged on those")
    return kept, dropped


def _labelled_prompt(row: Mapping[str, Any]) -> Prompt:
    """Read a prompt whose label says what is asked of its answers."""
    prompt = prompt_from_row(row)
    kind_of(prompt)
    return prompt


def load_judges(judge: str, refusal_judge: str, connect: judges.Connect | None = None) -> dict[Kind, judges.Judge]:
    """The judge of each kind of prompt; `connect` makes the sampler of one behind an endpoint."""
    return {
        "harmful": judges.load_judge(judge, "harmful", connect),
        "benign": judges.load_judge(refusal_judge, "refused", connect),
        "utility": AnswerFound(),
    }


def require_labels(rows: list[Row], max_unscored: float) -> None:
    """Fail where too many candidates have no label.

    Raises:
        RuntimeError: naming the share and a reason.
    """
    found = [c for row in rows for c in row["candidates"]]
    missing = [c for c in found if c["outcome"] is None]
    if len(missing) > max_unscored * len(found):
        raise RuntimeError(
            f"{len(missing)} of {len(found)} candidates unscored (limit {max_unscored:.0%}), for instance "
            f'"{missing[0]["reason"]}"; mend the judge, or raise max_unscored'
        )


# --- inference ----------------------------------------------------------------------------------------


def load(model: str, base: str | None, dtype: Dtype, policy: Policy | None = None) -> tuple[Sampler, Pair]:
    """Load what draws and what scores: one policy, and its base where that is another model.

    Raises:
        ValueError: no weights, or no base in them.
    """
    if model.startswith("openai:"):
        raise ValueError(f"{model} gives no hidden states; name a model with weights")
    if policy is None:
        inner: Any = load_sampler(model, dtype=dtype)
        policy = inner.policy
    else:
        from tempering.core.sampling import local_sampler

        inner = local_sampler(policy, name=model)
    assert policy is not None
    other = None
    if base is not None:
        kept: Any = str(policy.dtype).removeprefix("torch.")
        other = Policy.load(base, dtype=kept, device=policy.device)
    return inner, Pair(policy, other)


def sampler(
    target: str | Path,
    options: Mapping[str, Any] | SelectionConfig | None = None,
    *,
    dtype: Dtype = "auto",
    connect: judges.Connect | None = None,
    **endpoint: Any,
) -> AttributionSampler:
    """Return the sampler of a calibration run, its card verified, or of any aligned model, with the default window.

    `connect` makes the sampler of a guard `openai:MODEL@URL`. A target behind an endpoint (its settings: `endpoint`)
    does for scorers that read no weights. With a `generator` that draws, of the models stays what the scores need.

    Raises:
        ValueError: an option that does not fit, a card of another model, or a model without its base.
    """
    given = dict(options or {}) if not isinstance(options, SelectionConfig) else None
    config = options if isinstance(options, SelectionConfig) else build(SelectionConfig, given or {}, "attribution")
    config.require_read()
    if not is_run(target):
        if str(target).startswith("openai:") and not needs_weights(config):
            return around(load_sampler(str(target), **endpoint), config, connect)
        inner, pair = load(str(target), config.base, dtype)
        drawn_by = _drawn_by(inner, config, **endpoint)
        return _stub(AttributionSampler(drawn_by, pair, config, connect=connect))
    card, means = read_card(Path(target))
    config = settle(config, card)
    if dtype not in ("auto", card.dtype):
        raise ValueError(
            f"dtype={dtype}: {target} was calibrated in {card.dtype}; leave it out, or calibrate in {dtype}"
        )
    wanted: Any = card.dtype
    inner, pair = load(card.student.model, card.base, wanted)
    verify(card, pair)
    drawn_by = _drawn_by(inner, config, **endpoint)
    return _stub(AttributionSampler(drawn_by, pair, config, card, means, name=_name(target, given), connect=connect))


def around(
    inner: Any, options: Mapping[str, Any] | SelectionConfig, connect: judges.Connect | None = None
) -> AttributionSampler:
    """Choose among the answers of a sampler that is loaded already; with weights where it has them (`policy`).

    Raises:
        ValueError: an option that does not fit, or a scorer that reads weights where there are none.
    """
    config = options if isinstance(options, SelectionConfig) else build(SelectionConfig, dict(options), "attribution")
    config.require_read()
    policy = getattr(inner, "policy", None)
    if policy is None or not needs_weights(config):
        return AttributionSampler(_drawn_by(inner, config), None, config, connect=connect)
    dtype: Any = str(policy.dtype).removeprefix("torch.")
    base = None if config.base is None else Policy.load(config.base, dtype=dtype, device=policy.device)
    return AttributionSampler(_drawn_by(inner, config), Pair(policy, base), config, connect=connect)


def rehearsal(
    target: str, inner: Sampler, options: Mapping[str, Any], connect: judges.Connect | None = None
) -> AttributionSampler:
    """Return a sampler that asks what the real one would at most, for a dry run: `inner` stands for the target.

    Scores of weights are not computed, every winner falls back, and no candidate is good enough to stop at.

    Raises:
        ValueError: an option that does not fit, or a scorer that reads weights where the target has none.
    """
    config = build(SelectionConfig, dict(options), "attribution")
    config.require_read()
    if is_run(target):
        config = settle(config, read_card(Path(target))[0])
    if config.generator is not None:
        raise ValueError("attribution.generator: a dry run cannot count what it would be asked; leave --dry-run out")
    changed: dict[str, Any] = {"max_unscored": 1.0}
    is_asked = "openai:" in (config.guard or "")  # a guard in this process is no one's bill
    if "guard" in config.scorers:
        changed["scorer"] = "guard" if is_asked else "first"
    elif needs_weights(config) and not target.startswith("openai:"):
        changed["scorer"] = "first"
    changed |= {"centre": False, "residual": False} if "scorer" in changed else {}
    if not is_asked:
        changed |= {"guard": None, "fallback": "none" if config.fallback == "guard" else config.fallback}
    if config.fallback != "none" or config.enough is not None:
        changed["tau"] = float("-inf")
    return AttributionSampler(inner, None, config.model_copy(update=changed), connect=connect)


def needs_weights(config: SelectionConfig) -> bool:
    """Whether a scorer reads hidden states or logits."""
    return bool({*config.scorers} & {*NEED_BASE, *NEED_LOGITS})


def _drawn_by(inner: Sampler, config: SelectionConfig, **endpoint: Any) -> Sampler:
    return inner if config.generator is None else load_sampler(config.generator, **endpoint)


def _stub(found: AttributionSampler) -> AttributionSampler:
    """Free the blocks that no score reads, where another draws the candidates and only states are compared."""
    pair, read_logits = found.pair, {*found.config.scorers} & {*NEED_LOGITS}
    if pair is None or found.config.generator is None or not found.layers or read_logits:
        return found
    last = max(1, *found.layers)
    if last < pair.blocks:
        pair.keep_only(last)
        say(f"{found.inner.name} draws; of the models the first {last} of {pair.blocks} blocks are kept")
    return found


def is_run(target: str | Path) -> bool:
    """Whether a target is the run folder of a calibration."""
    root = Path(target)
    return (root / "config.yaml").is_file() and Run.open(root).config.get("method") == METHOD


def _name(target: str | Path, given: Mapping[str, Any] | None) -> str:
    told = ",".join(f"{key}={value}" for key, value in sorted((given or {}).items()))
    return f"{target}({told})" if told else str(target)
