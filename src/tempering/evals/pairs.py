"""What evals of held-out pairs share: the pairs, their tokens, and the policy beside the model that it started from.

They need the weights: a policy in this process, not an endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tempering.core.records import PreferencePair, content_id, pair_from_row
from tempering.core.run import Run
from tempering.data.describe import licences_of, sha256_of
from tempering.data.files import read_records, training_file
from tempering.evals.settings import EvalConfig

if TYPE_CHECKING:
    from tempering.core.chat import Encoded
    from tempering.core.policy import Policy
    from tempering.core.sampling import LocalSampler, Sampler

MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512
"""Tokens. Not the run's own: systems are compared on the same tokens of the same pairs."""


class EncodedPair(NamedTuple):
    """A pair with both sides as tokens."""

    pair: PreferencePair
    chosen: Encoded
    rejected: Encoded


class LoadedPairs(NamedTuple):
    """The pairs of an eval in the order of their ids, where they come from, and what to tell the reader."""

    pairs: list[EncodedPair]
    source: dict[str, Any]
    warnings: list[str]


def local(sampler: Sampler, name: str) -> LocalSampler:
    """Return the sampler where it has weights to look into.

    Raises:
        ValueError: it is an endpoint, or its weights are not what answers.
    """
    from tempering.core.sampling import LocalSampler

    if not isinstance(sampler, LocalSampler):
        raise ValueError(f"eval {name} needs the target's weights, and {sampler.name} only answers; name a model")
    if sampler.changes_states:
        raise ValueError(
            f"eval {name} looks into weights, and those of {sampler.name} are unchanged: it is another model at "
            "inference alone; leave the eval out"
        )
    return sampler


def run_of(policy: Policy) -> Run | None:
    """The run folder that the policy was loaded from, if it was."""
    root = Path(policy.source.reference)
    return Run(root) if (root / "config.yaml").is_file() else None


def load_pairs(sampler: LocalSampler, config: EvalConfig, limit: int | None) -> LoadedPairs:
    """Read the pairs of `data=`, else those that the target's own training held out, and tokenize them.

    A pair that does not fit (over-long prompt, template that cannot be masked) is left out and counted.

    Raises:
        FileNotFoundError, ValueError: there are no pairs, or none is usable.
    """
    from tempering.core.chat import encode

    policy = sampler.policy
    run = run_of(policy)
    where = pairs_file(config, run)
    records, dropped = read_records(
        where, pair_from_row, invalid=config.invalid, repeats="drop", what="pair", remedy="set invalid=drop"
    )
    warnings = [f"left out {count} rows: {reason}" for reason, count in dropped.items()]
    if limit is not None:
        records = sorted(records, key=lambda p: content_id(p.id))[:limit]
    fmt = run.config.get("prompt_format", sampler.fmt) if run else sampler.fmt
    limits = {"max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT_LENGTH}
    pairs, problems = [], []
    for pair in sorted(records, key=lambda p: p.id):
        try:
            sides = [
                encode(policy.tokenizer, pair.messages, text, fmt=fmt, end_ids=policy.end_ids, **limits)
                for text in (pair.chosen, pair.rejected)
            ]
        except ValueError as error:
            problems.append(f"{pair.id} ({error})")
            continue
        pairs.append(EncodedPair(pair, *sides))
    if problems:
        warnings.append(f"left out {len(problems)} of {len(records)} pairs that do not fit, first {problems[0]}")
    if not pairs:
        raise ValueError(f"{where}: no pair is usable; {warnings[-1]}")
    licences = {"licences": found} if (found := licences_of(where)) else {}
    source = {"source": str(where), "sha256": sha256_of(where), "prompts": len(pairs), **licences}
    return LoadedPairs(pairs, {**source, **limits, "prompt_format": fmt}, warnings)


def pairs_file(config: EvalConfig, run: Run | None) -> str | Path:
    """Where the pairs are.

    Raises:
        ValueError: neither `data=` nor the target's training says.
    """
    if config.data is not None:
        return training_file(config.data)
    if run is not None and run.has("data/heldout.jsonl"):
        return run.root / "data" / "heldout.jsonl"
    raise ValueError(
        "which pairs? The target is no run with held-out pairs of its own (data/heldout.jsonl); "
        "name a file of prompt/chosen/rejected rows with data=FILE, such as data=runs/NAME/data/heldout.jsonl"
    )


@contextmanager
def initial(policy: Policy) -> Iterator[Policy]:
    """The recorded base, to score with: adapters off and edits out, or for full weights the model that they were
    trained from.

    A policy that is itself a base is its own start.
    """
    from tempering.core.policy import Policy as Loader

    lineage = Path(policy.source.base) / "lineage.json"
    if policy.adapters or policy.originals:
        with policy.reference(initial=True):
            yield policy
    elif lineage.is_file():
        facts = json.loads(lineage.read_text(encoding="utf-8"))
        name = f"{facts['base']}@{facts['revision']}" if facts.get("revision") else facts["base"]
        dtype: Any = str(policy.dtype).removeprefix("torch.")
        yield Loader.load(name, dtype=dtype, device=policy.device)
    else:
        yield policy


def has_start(policy: Policy) -> bool:
    """Whether the policy is anything else than its own start."""
    return bool(policy.adapters or policy.originals) or (Path(policy.source.base) / "lineage.json").is_file()


def score_pairs(policy: Policy, pairs: Sequence[EncodedPair]) -> list[tuple[float, float]]:
    """Return summed log-probabilities in nats (chosen, rejected) under whatever is active now."""
    from tempering.core.logprobs import score_groups

    groups = [group for p in pairs for group in policy.groups((p.chosen, p.rejected))]
    scored = score_groups(policy.scorer, groups, pad_id=policy.tokenizer.pad_token_id, device=policy.device)
    flat = [logprob for group in scored for logprob, _ in group]
    return list(zip(flat[::2], flat[1::2], strict=True))
