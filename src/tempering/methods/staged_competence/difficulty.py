"""Difficulty scorers: one float a pair, larger = easier for the start model. Results are cached by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tempering.core.chat import Encoded
from tempering.core.config import Config
from tempering.core.encoder import ENCODER, has_encoder, load_encoder
from tempering.core.loading import cache_dir
from tempering.core.logprobs import score_groups
from tempering.core.policy import Policy
from tempering.core.progress import progress
from tempering.core.records import Completion, PreferencePair, Prompt, content_id
from tempering.core.run import atomic_write
from tempering.core.sampling import LocalSampler
from tempering.core.stats import spearman
from tempering.methods.staged_competence.curriculum import random_score

Scorer = Literal[
    "auto",
    "embedding_margin",
    "logprob_margin",
    "column",
    "embedding_similarity",
    "embedding_ratio",
    "random",
]

SMALL_IQR = 0.02
ROWS = {"cpu": 16}
"""Answers of the start model drawn together, and on disk after that: minutes on a CPU, seconds elsewhere."""


class Difficulty(Config):
    """How hard a pair is for the start model."""

    scorer: Scorer = "auto"
    """auto: embedding_margin where the encoder is installed, else logprob_margin."""
    column: str | None = None
    """`column`: the field of each row that holds its score."""
    easy: Literal["high", "low"] | None = None
    """`column`: whether a high or a low value is easy."""
    n_samples: int = 1
    """`embedding_*`: answers of the start model per prompt; margins are averaged."""
    temperature: float = 0.7
    """`embedding_*`: sampling temperature of those answers."""
    max_new_tokens: int = 512
    """`embedding_*`: longest answer, in tokens."""
    encoder: str = ENCODER
    """`embedding_*`: a sentence-transformers model, id or folder."""
    seed: int = 0
    """Of the answers and of `random`."""


class Logprobs(NamedTuple):
    """Summed log-probabilities in nats of the two sides of a pair, and their lengths in tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


class PairTokens(NamedTuple):
    """The two sides of a pair as tokens."""

    chosen: Encoded
    rejected: Encoded


class Scored(NamedTuple):
    """Scores with what they were made from, by pair id."""

    scores: dict[str, float]
    sims: dict[str, dict[str, float]]
    generations: list[dict[str, Any]]
    cut_share: float | None
    """Share of encoded texts longer than the encoder reads; `None` without encoder."""


def resolve_scorer(scorer: Scorer) -> Scorer:
    """Turn `auto` into the paper's scorer where its encoder is at hand, else into `logprob_margin`."""
    if scorer != "auto":
        return scorer
    return "embedding_margin" if has_encoder() else "logprob_margin"


def pair_logprobs(
    policy: Policy,
    tokens: Mapping[str, PairTokens],
    what: str,
    *,
    batch_tokens: int,
    cached: bool,
    quiet: bool = False,
) -> dict[str, Logprobs]:
    """Score both sides of each pair under what is active now; `cached` keeps results by content on disk."""
    ids = sorted(tokens)
    content = [(side.ids, side.prompt_tokens) for i in ids for side in tokens[i]]
    file = _cache_file("logprobs", _identity(policy), batch_tokens, content)
    if cached and file.is_file():
        flat = json.loads(file.read_text(encoding="utf-8"))
    else:
        groups = [group for i in ids for group in policy.groups(tokens[i])]
        with nullcontext(None) if quiet else progress(what, len(groups)) as advance:
            scored = score_groups(
                policy.scorer,
                groups,
                pad_id=policy.tokenizer.pad_token_id,
                device=policy.device,
                max_tokens=batch_tokens,
                on_done=advance,
            )
        flat = [score for group in scored for score in group]
        if cached:
            atomic_write(file, json.dumps(flat).encode())
    return {
        i: Logprobs(flat[2 * k][0], flat[2 * k + 1][0], int(flat[2 * k][1]), int(flat[2 * k + 1][1]))
        for k, i in enumerate(ids)
    }


def logprob_margin(s: Logprobs) -> float:
    """Mean log-probability of chosen minus that of rejected, in nats a token.

    >>> logprob_margin(Logprobs(-10.0, -30.0, 10, 10))
    2.0
    """
    return s.chosen / s.chosen_tokens - s.rejected / s.rejected_tokens


def margin_of_similarities(chosen: float, rejected: float) -> float:
    """The paper's difficulty: cos(own answer, chosen) - cos(own answer, rejected), in [-2, 2]."""
    return chosen - rejected


def ratio_of_similarities(chosen: float, rejected: float) -> float:
    """(cos+ + 1) / (cos- + 1 + 1e-6), for parity with earlier work."""
    return (chosen + 1) / (rejected + 1 + 1e-6)


COMBINE: dict[str, Callable[[float, float], float]] = {
    "embedding_margin": margin_of_similarities,
    "embedding_ratio": ratio_of_similarities,
    "embedding_similarity": lambda chosen, rejected: chosen,
}


def score_pairs(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    settings: Difficulty,
    logp0: Mapping[str, Logprobs],
    encode_texts: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> Scored:
    """Score pairs with `settings.scorer`, which is resolved.

    `logp0` holds the start model's log-probabilities where the scorer reads them. `encode_texts` replaces
    the sentence encoder: texts -> (n, d).

    Raises:
        ValueError: naming the pairs that cannot be scored, or that all scores are equal.
    """
    sims: dict[str, dict[str, float]] = {}
    generations: list[dict[str, Any]] = []
    cut = None
    if settings.scorer == "logprob_margin":
        scores = {p.id: logprob_margin(logp0[p.id]) for p in pairs}
    elif settings.scorer == "random":
        scores = {p.id: random_score(p.id, settings.seed) for p in pairs}
    elif settings.scorer == "column":
        scores = {p.id: _column_score(p, settings) for p in pairs}
    else:
        encode = encode_texts or load_encoder(
            settings.encoder, what="difficulty.encoder", instead="difficulty.scorer=logprob_margin"
        )
        each, generations = _similarities(policy, pairs, settings, encode)
        combine = COMBINE[settings.scorer]
        scores = {
            p.id: float(np.mean([combine(c, r) for c, r in zip(s["chosen"], s["rejected"], strict=True)]))
            for p in pairs
            for s in [each[p.id]]
        }
        sims = {i: {side: float(np.mean(values)) for side, values in s.items()} for i, s in each.items()}
        cut = getattr(encode, "cut_share", None)
    check_scores(scores)
    return Scored(scores, sims, generations, cut)


def check_scores(scores: Mapping[str, float]) -> None:
    """Refuse scores that order nothing.

    Raises:
        ValueError: NaN or infinite (naming the pairs), or all equal.
    """
    bad = [i for i, s in scores.items() if not math.isfinite(s)]
    if bad:
        raise ValueError(f"difficulty is not a finite number for pair {', '.join(bad[:5])} ({len(bad)} in all)")
    if len(scores) > 1 and len(set(scores.values())) == 1:
        raise ValueError("difficulty is the same for all pairs, so it orders nothing; use another difficulty.scorer")


def summary(scores: Mapping[str, float], length_gap: Mapping[str, int]) -> dict[str, Any]:
    """Quantiles, share below zero, rank correlation with |rejected| - |chosen|, and a warning if too flat."""
    values = np.array([scores[i] for i in sorted(scores)])
    gaps = np.array([length_gap[i] for i in sorted(scores)])
    q = {str(level): float(np.quantile(values, level)) for level in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)}
    iqr = q["0.75"] - q["0.25"]
    warnings = []
    if iqr < SMALL_IQR:
        warnings.append(
            f"the interquartile range of the difficulty is {iqr:.4f}: the model may be aligned already, and the "
            "stages are mostly noise"
        )
    return {
        "quantiles": q,
        "iqr": iqr,
        "share_negative": float(np.mean(values < 0)),
        "spearman_length": spearman(values, gaps) if len(values) > 2 else None,
        "warnings": warnings,
    }


def _similarities(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    settings: Difficulty,
    encode: Callable[[Sequence[str]], np.ndarray],
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]]]:
    prompts = {content_id(p.messages): Prompt(p.messages) for p in pairs}
    generations = _own_answers(policy, list(prompts.values()), settings)
    answers: dict[str, list[str]] = {}
    for row in generations:
        answers.setdefault(row["prompt_id"], []).append(row["text"])
    empty = [p.id for p in pairs if not all(t.strip() for t in answers[content_id(p.messages)])]
    if empty:
        raise ValueError(f"the start model answers nothing to the prompt of pair {', '.join(empty[:5])}")
    texts = sorted({t for p in pairs for t in (p.chosen, p.rejected, *answers[content_id(p.messages)])})
    row_of = {text: k for k, text in enumerate(texts)}
    e = encode(texts)
    sims = {}
    for p in pairs:
        own = [e[row_of[t]] for t in answers[content_id(p.messages)]]
        sims[p.id] = {
            "chosen": [float(v @ e[row_of[p.chosen]]) for v in own],
            "rejected": [float(v @ e[row_of[p.rejected]]) for v in own],
        }
    return sims, generations


def _own_answers(policy: Policy, prompts: Sequence[Prompt], settings: Difficulty) -> list[dict[str, Any]]:
    sampling: dict[str, Any] = {
        "n": settings.n_samples,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
    }
    key = (_identity(policy), sampling, settings.seed, sorted(content_id(p.messages) for p in prompts))
    file = _cache_file("answers", *key)
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    sampler = LocalSampler(policy)
    rows = max(1, ROWS.get(policy.device.type, sampler.batch_rows) // settings.n_samples)
    # The same batches whatever was interrupted: in bfloat16 an answer may depend on its company.
    order = sorted(prompts, key=lambda p: (len(sampler.prompt_ids(p)), p.id))
    partial = file.with_suffix(".partial.json")
    found: dict[str, list[dict[str, Any]]] = {}
    if partial.is_file():
        found = json.loads(partial.read_text(encoding="utf-8"))
    with progress("scoring: answers of the start model", len(prompts)) as advance:
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            if all(p.id in found for p in batch):
                advance(len(batch))
                continue
            groups = sampler(batch, seed=settings.seed, on_done=advance, **sampling)
            found |= {p.id: [_answer_row(c) for c in group] for p, group in zip(batch, groups, strict=True)}
            atomic_write(partial, json.dumps(found).encode("utf-8", "surrogatepass"))
    answers = [row for p in prompts for row in found[p.id]]
    atomic_write(file, json.dumps(answers).encode("utf-8", "surrogatepass"))
    partial.unlink(missing_ok=True)
    return answers


def _answer_row(answer: Completion) -> dict[str, Any]:
    return {
        "id": content_id(answer.prompt_id, answer.index, answer.text),
        "prompt_id": answer.prompt_id,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "seed": answer.seed,
        "finish": answer.finish,
    }


def _column_score(pair: PreferencePair, settings: Difficulty) -> float:
    if settings.column is None or settings.easy is None:
        raise ValueError("difficulty.scorer=column needs difficulty.column=NAME and difficulty.easy=high or low")
    if settings.column not in pair.extra:
        found = ", ".join(pair.extra) or "none beside the pair itself"
        raise ValueError(f"pair {pair.id} ({pair.text[:40]!r}) has no column '{settings.column}'; it has: {found}")
    value = pair.extra[settings.column]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"pair {pair.id} ({pair.text[:40]!r}): column '{settings.column}' is {value!r}, not a number; "
            "give it one, or leave the row out"
        ) from None
    return number if settings.easy == "high" else -number


def _identity(policy: Policy) -> str:
    return f"{policy.base_fingerprint()}:{policy.adapter_hash(policy.adapters)}:{policy.dtype}:{policy.device.type}"


def _cache_file(kind: str, *key: Any) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "scores" / f"{kind}-{digest}.json"
