"""Eval `separation`: how far apart are chosen and rejected answers, and how far is the policy from its start?

With S(y) the summed completion log-probability in nats, |y| its tokens, beta that of the run (0.1 without one):

    margin_raw        S(y+) - S(y-)                        policy alone
    margin_per_token  S(y+)/|y+| - S(y-)/|y-|              policy alone
    margin_initial    beta (change of S(y+) - change of S(y-)), against the recorded base
    margin_stage      the same against the last stage's reference, where the run allows to rebuild it
    kl_initial        mean of S(y) - S_base(y), y sampled at temperature 1 from the policy, in nats

`pair_accuracy` is the share of pairs with a raw margin above 0 (`/per_token`, `/initial`: of those margins), and
`_matched_length` the same on the third of pairs that are closest in length, because a sum favours the shorter
answer. A rising margin with a falling `logprob_chosen` means that the policy only learned what not to say. KL belongs
beside every margin: stages and low beta both buy margin with distance.

    temper eval runs/mine separation
    temper eval smollm2 separation data=runs/mine/data/heldout.jsonl limit=64
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tempering.core.records import Completion, Prompt, content_id
from tempering.core.stats import Interval, bootstrap_mean, separation
from tempering.evals.pairs import EncodedPair, has_start, initial, load_pairs, local, run_of, score_pairs
from tempering.evals.results import Cost, EvalResult, Journal, Progress, Row
from tempering.evals.settings import EvalConfig

if TYPE_CHECKING:
    from tempering.core.policy import Policy
    from tempering.core.sampling import LocalSampler, Sampler

BETA = 0.1
KL_PROMPTS = 64
MEASURE = "log-probabilities"


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Score every pair under the policy and its start, and sample from the policy for the KL.

    `limit` takes that many pairs (all without it), and as many prompts for the KL (64 without it).

    Raises:
        FileNotFoundError, ValueError: there are no pairs to be had, or the target has no weights here.
    """
    del journal  # one pass of scoring: there is little to take over
    cost, target = Cost(), local(sampler, "separation")
    policy = target.policy
    pairs, source, warnings = load_pairs(target, config, config.limit)
    prompts = distinct_prompts(pairs)[: config.limit or KL_PROMPTS]
    done, total = 0, len(pairs) + len(prompts)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    now = score_pairs(policy, pairs)
    advance(len(pairs))
    completions = sample(target, prompts, config, cost, advance)
    sampled = score_samples(policy, target, prompts, completions)
    start, start_sampled = now, sampled
    if has_start(policy):
        with initial(policy) as first:
            start = score_pairs(first, pairs)
            start_sampled = score_samples(first, target, prompts, completions)
    before = stage_start(policy, pairs, start)
    run = run_of(policy)
    beta = float(run.config.get("beta", BETA)) if run else BETA

    rows = pair_rows(pairs, now, start, before, beta)
    rows += kl_rows(prompts, completions, sampled, start_sampled)
    metrics = pair_metrics(pairs, now, start, before, beta)
    drift = [float(row["outcomes"]["kl_initial"]) for row in rows if "kl_initial" in row["outcomes"]]
    if drift:
        metrics["kl_initial"] = entry(bootstrap_mean(drift), len(drift))
    if not has_start(policy):
        warnings.append("the target is a base model: its margin and KL over its own start are 0 by definition")
    return EvalResult(rows, metrics, {}, cost.summary(), warnings, {**source, "beta": beta, "kl_prompts": len(drift)})


# --- pure functions -----------------------------------------------------------------------------------


def matched(pairs: Sequence[EncodedPair]) -> set[int]:
    """The third of the pairs whose sides are closest in length; the earlier of equals."""
    gap = np.abs([p.chosen.completion_tokens - p.rejected.completion_tokens for p in pairs])
    return set(np.argsort(gap, kind="stable")[: max(1, round(len(pairs) / 3))].tolist())


def pair_rows(
    pairs: Sequence[EncodedPair],
    now: Sequence[tuple[float, float]],
    start: Sequence[tuple[float, float]],
    before: Sequence[tuple[float, float]] | None,
    beta: float,
) -> list[Row]:
    """One row a pair, with what it adds to each metric: the report pairs systems on these."""
    close = matched(pairs)
    rows: list[Row] = []
    for k, (p, (chosen, rejected)) in enumerate(zip(pairs, now, strict=True)):
        raw = chosen - rejected
        per_token = chosen / p.chosen.completion_tokens - rejected / p.rejected.completion_tokens
        from_start = beta * (raw - (start[k][0] - start[k][1]))
        outcomes: dict[str, float | bool] = {
            "margin_raw": raw,
            "margin_per_token": per_token,
            "margin_initial": from_start,
            **({} if before is None else {"margin_stage": beta * (raw - (before[k][0] - before[k][1]))}),
            "pair_accuracy": raw > 0,
            "pair_accuracy/per_token": per_token > 0,
            "pair_accuracy/initial": from_start > 0,
            **({"pair_accuracy_matched_length": raw > 0} if k in close else {}),
            "logprob_chosen": chosen,
            "logprob_rejected": rejected,
        }
        tokens = {"chosen": p.chosen.completion_tokens, "rejected": p.rejected.completion_tokens}
        rows.append({**_about(p.pair.id, p.pair.messages), "category": p.pair.category, "tokens": tokens}
                    | {"outcomes": outcomes})  # fmt: skip
    return rows


def pair_metrics(
    pairs: Sequence[EncodedPair],
    now: Sequence[tuple[float, float]],
    start: Sequence[tuple[float, float]],
    before: Sequence[tuple[float, float]] | None,
    beta: float,
) -> dict[str, dict[str, Any]]:
    """Means with bootstrap intervals over prompts, accuracies with Wilson's."""
    columns = [list(column) for column in zip(*now, strict=True)]
    found = separation(
        columns[0],
        columns[1],
        [p.chosen.completion_tokens for p in pairs],
        [p.rejected.completion_tokens for p in pairs],
        beta=beta,
        initial_reference=_columns(start),
        stage_reference=None if before is None else _columns(before),
        prompt_ids=[content_id(p.pair.messages) for p in pairs],
    )
    metrics = {f"margin_{name}": entry(m.mean, found.n) for name, m in found.margins.items()}
    raw = found.margins["raw"]
    metrics["pair_accuracy"] = entry(raw.accuracy, found.n)
    metrics |= {f"pair_accuracy/{k}": entry(found.margins[k].accuracy, found.n) for k in ("per_token", "initial")}
    metrics["pair_accuracy_matched_length"] = entry(raw.accuracy_matched, found.n_matched)
    metrics["logprob_chosen"] = entry(found.logprob_chosen, found.n)
    metrics["logprob_rejected"] = entry(found.logprob_rejected, found.n)
    return metrics


def entry(interval: Interval, n: int) -> dict[str, Any]:
    """A metric as it stands in the JSON file."""
    return {**interval._asdict(), "n": n, "unscored": 0, "judge": MEASURE}


def distinct_prompts(pairs: Sequence[EncodedPair]) -> list[Prompt]:
    """Every prompt once, in the order of a hash of its content: the same first ones for every target."""
    found = {p.id: p for p in (Prompt(pair.pair.messages) for pair in pairs)}
    return [found[i] for i in sorted(found, key=content_id)]


# --- scoring ------------------------------------------------------------------------------------------


def sample(
    target: LocalSampler, prompts: Sequence[Prompt], config: EvalConfig, cost: Cost, advance: Any
) -> list[Completion]:
    """One answer a prompt from the policy itself: temperature 1, nothing cut off."""
    groups = target(prompts, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.seed, on_done=advance)
    cost.add(groups)
    return [group[0] for group in groups]


def score_samples(
    policy: Policy, target: LocalSampler, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[float]:
    """Log-probability in nats of the very tokens that were sampled."""
    from tempering.core.chat import Encoded, encode_prompt
    from tempering.core.logprobs import score_groups

    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = encode_prompt(policy.tokenizer, prompt.messages, target.fmt)
        rows.append([Encoded([*ids, *completion.token_ids], len(ids))])
    scored = score_groups(policy.scorer, rows, pad_id=policy.tokenizer.pad_token_id, device=policy.device)
    return [logprob for [(logprob, _)] in scored]


def kl_rows(
    prompts: Sequence[Prompt], completions: Sequence[Completion], now: Sequence[float], start: Sequence[float]
) -> list[Row]:
    """One row a prompt: the sampled answer and how much likelier the policy finds it than its start does."""
    return [
        {**_about(p.id, p.messages), "category": p.category, "completion": c.text, "finish": c.finish,
         "tokens": {"completion": len(c.token_ids)}, "outcomes": {"kl_initial": a - b}}
        for p, c, a, b in zip(prompts, completions, now, start, strict=True)
    ]  # fmt: skip


def stage_start(
    policy: Policy, pairs: Sequence[EncodedPair], start: Sequence[tuple[float, float]]
) -> Sequence[tuple[float, float]] | None:
    """Score the pairs under the last stage's reference, where the run folder allows to rebuild it.

    One stage, or a fixed reference: the start model. A stack of adapters: they lie in the exported one side by side
    along the rank, so without the last one's columns it is the policy as the last stage began.
    """
    run = run_of(policy)
    if run is None or not run.has("data/plan.jsonl"):
        return None
    config = run.config
    if len(run.read_rows("data/plan.jsonl")) == 1 or config.get("reference") == "initial":
        return start
    if config.get("handover") != "stack" or len(policy.adapters) != 1:
        return None
    with _without_last(policy, int(config["lora"]["r"])):
        return score_pairs(policy, pairs)


@contextmanager
def _without_last(policy: Policy, rank: int) -> Iterator[None]:
    """Switch off the last `rank` columns of the policy's one adapter; they are back on exit."""
    weights = [p for n, p in policy.model.named_parameters() if ".lora_B." in n]
    kept = [w.data[:, -rank:].clone() for w in weights]
    try:
        for w in weights:
            w.data[:, -rank:] = 0
        yield
    finally:
        for w, values in zip(weights, kept, strict=True):
            w.data[:, -rank:] = values


def _columns(scores: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [chosen for chosen, _ in scores], [rejected for _, rejected in scores]


def _about(identity: str, messages: Sequence[dict[str, str]]) -> Row:
    text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return {"id": identity, "prompt_id": content_id(messages), "prompt": text}
