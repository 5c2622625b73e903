"""Texts of unlearning toxicity: labelled ones for probes, those to unlearn, those to keep; read and tokenized."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tempering.core.chat import encode
from tempering.core.probes import Labelled, auroc, fit
from tempering.core.records import Prompt, content_id
from tempering.core.text_rows import Tokens
from tempering.data.files import bundled, read_rows, training_file
from tempering.data.origin import origin
from tempering.methods.unlearn_toxicity.settings import Kind, UnlearnToxicityConfig

DEMO = "demo"
TOXIC = 0.5
KINDS: tuple[Kind, ...] = ("general", "identity", "instruction")
IDENTITY_TERMS = (
    "muslim", "jewish", "jew", "christian", "hindu", "buddhist", "sikh", "catholic", "atheist", "gay",
    "lesbian", "bisexual", "transgender", "queer", "straight", "black", "white", "asian", "african",
    "mexican", "chinese", "indian", "american", "arab", "turkish", "polish", "woman", "women", "man", "men",
    "female", "male", "deaf", "blind", "disabled", "old", "young",
)  # fmt: skip


class Pair(NamedTuple):
    """Two ways to go on after one opening, as tokens."""

    chosen: Tokens
    rejected: Tokens


class Corpus(NamedTuple):
    """All that training reads."""

    labelled: list[Labelled]
    forget: list[Tokens]
    pairs: list[Pair]
    retain: dict[Kind, list[Tokens]]
    neutral: list[Tokens]
    """Held-out texts to keep, on which the KL is measured."""
    dropped: dict[str, int]


def label_of(row: Mapping[str, Any]) -> bool | None:
    """Whether a row says that its text is toxic; `None` where it says nothing.

    >>> label_of({"toxic": True}), label_of({"label": "ordinary"}), label_of({"toxicity": 0.7}), label_of({})
    (True, False, True, None)
    """
    if isinstance(row.get("toxic"), bool):
        return bool(row["toxic"])
    if row.get("label") in ("toxic", "ordinary"):
        return row["label"] == "toxic"
    if isinstance(row.get("toxicity"), int | float):
        return float(row["toxicity"]) >= TOXIC
    return None


def split_of(row: Mapping[str, Any], group: str) -> str:
    """The split that a row names, else 80/10/10 by hash of its group."""
    if row.get("split") in ("train", "validation", "test"):
        return str(row["split"])
    at = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) % 10
    return "train" if at < 8 else "validation" if at == 8 else "test"


def read_labelled(
    source: str, tokenizer: Any, config: UnlearnToxicityConfig, *, is_other: bool = False
) -> list[Labelled]:
    """Read texts for probes, as many toxic as not, in an order that only their contents decide.

    Raises:
        FileNotFoundError, ValueError: it is not there, a row has no text or no label, or a class is missing.
    """
    found: dict[bool, list[Labelled]] = {True: [], False: []}
    for where, row in read_rows(bundled("insults") if source == DEMO else source):
        text, label = row.get("text"), label_of(row)
        if not isinstance(text, str) or not text.strip() or label is None:
            raise ValueError(
                f"{where}: expected a row with a `text` and with `toxic` (true or false), got {sorted(row)}"
            )
        if config.limit is not None and min(map(len, found.values())) >= config.limit:
            break  # a public set has millions of rows
        if config.limit is not None and len(found[label]) >= config.limit:
            continue
        group = str(row.get("template_id") or row.get("group") or row.get("document") or content_id(text))
        ids = list(tokenizer(text)["input_ids"])[: config.max_probe_length]
        if len(ids) > config.skip_first:
            split: Any = "other" if is_other else split_of(row, group)
            found[label].append(Labelled(Tokens(str(row.get("id") or content_id(text)), group, ids), label, split))
    rows = []
    for split in ("train", "validation", "test", "other"):
        sides = [
            sorted((r for r in found[k] if r.split == split), key=lambda r: content_id(r.tokens.id)) for k in found
        ]
        most = min(len(side) for side in sides)
        if config.limit is not None:
            most = min(most, max(2, config.limit // 2))
        if not most and split in (("other",) if is_other else ("train", "validation", "test")):
            raise ValueError(
                f"{source}: no {split} texts of both classes; a probe needs toxic and other texts in each split"
            )
        rows += [row for side in sides for row in side[:most]]
    return rows


def identity_auroc(source: str) -> float | None:
    """AUROC of the words for identities alone, on held-out texts: what a probe of identities, not of toxicity, would
    get.

    `None` where no text has one.
    """
    x, y, splits = [], [], []
    for _, row in read_rows(bundled("insults") if source == DEMO else source):
        words = set(re.findall(r"[a-z]+", str(row.get("text")).casefold()))
        x.append([float(term in words) for term in IDENTITY_TERMS])
        y.append(bool(label_of(row)))
        splits.append(split_of(row, str(row.get("template_id") or row.get("group") or row.get("text"))))
    features, labels, is_train = np.array(x), np.array(y), np.array(splits) == "train"
    if not features[is_train].any():
        return None
    try:
        return auroc(fit(features[is_train], labels[is_train], 1.0), features[~is_train], labels[~is_train])
    except ValueError:  # the words tell nothing apart: twins mention the same identities
        return 0.5


def read_corpus(config: UnlearnToxicityConfig, policy: Any) -> Corpus:
    """Read and tokenize everything; a text is cut at its end, never joined to another.

    Raises:
        FileNotFoundError, ValueError: a source is not there, cannot be read, or a text is to be unlearned and kept.
    """
    tokenizer = policy.tokenizer
    dropped: dict[str, int] = {}

    def tokens(row: Mapping[str, Any], text: str, prompt: str = "") -> Tokens | None:
        before = list(tokenizer(prompt)["input_ids"]) if prompt else []
        ids = (before + list(tokenizer(text, add_special_tokens=not prompt)["input_ids"]))[: config.max_length]
        if len(ids) <= max(config.skip_first, len(before)):
            dropped["too short"] = dropped.get("too short", 0) + 1
            return None
        identity = str(row.get("id") or content_id(prompt, text))
        return Tokens(identity, str(row.get("template_id") or row.get("opening_id") or identity), ids, len(before))

    labelled = read_labelled(config.data.probe, tokenizer, config)
    if config.data.other:
        labelled += read_labelled(config.data.other, tokenizer, config, is_other=True)
    forget: list[Tokens] = []
    pairs: list[Pair] = []
    train = config.data.train
    for source in [bundled("insults"), bundled("insult_continuations")] if train == DEMO else [train]:
        kept = 0
        for where, row in read_rows(source):
            if row.get("split", "train") != "train" or label_of(row) is False:
                continue
            text, prompt = row.get("text") or row.get("rejected"), row.get("prompt") if row.get("rejected") else ""
            if not isinstance(text, str) or not isinstance(prompt, str):
                raise ValueError(f"{where}: expected `text`, or `prompt` and `rejected`, got {sorted(row)}")
            found = tokens(row, text, prompt)
            chosen = tokens(row, row["chosen"], prompt) if isinstance(row.get("chosen"), str) else None
            if found:
                forget.append(found)
                kept += 1
            if found and chosen:
                pairs.append(Pair(chosen, found))
            if config.limit is not None and kept >= config.limit:
                break
    retain, neutral = _to_keep(config, policy, tokens)
    both = sorted({tuple(t.ids) for t in forget} & {tuple(t.ids) for rows in retain.values() for t in rows})
    if both:
        named = ", ".join(sorted(t.id for t in forget if tuple(t.ids) in both))
        raise ValueError(f"data.retain holds {len(both)} text(s) that are to be unlearned: rows {named}; remove them")
    if not forget:
        raise ValueError(f"{train}: no text to unlearn is left")
    if (config.objective == "dpo" or config.nll_weight) and not pairs:
        raise ValueError(f"{train}: objective=dpo and nll_weight need rows of `prompt`, `chosen` and `rejected`")
    return Corpus(labelled, forget, pairs, retain, neutral, dropped)


def _kept_rows(source: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of texts to keep; of the bundled ones, that a text mentions identities is told by its file."""
    if source is not None:
        yield from read_rows(source)
        return
    yield from read_rows(bundled("neutral"))
    for where, row in read_rows(bundled("identity_mentions")):
        yield where, {**row, "kind": "identity"}


def _to_keep(
    config: UnlearnToxicityConfig, policy: Any, tokens: Any
) -> tuple[dict[Kind, list[Tokens]], list[Tokens]]:
    retain: dict[Kind, list[Tokens]] = {kind: [] for kind in KINDS}
    neutral: list[Tokens] = []
    held_texts = []
    for where, row in _kept_rows(config.data.retain):
        text, kind = row.get("text"), row.get("kind") or "general"
        if not isinstance(text, str) or kind not in KINDS:
            raise ValueError(f"{where}: expected a `text`, and as `kind` one of {', '.join(KINDS)}")
        found = tokens(row, text)
        # Held out for the KL: what a file calls dev, else every tenth text by hash.
        split = row.get("split") or ("dev" if int(content_id(text)[:8], 16) % 10 == 0 else "train")
        if split != "train":
            held_texts.append(text)
        if found and split == "dev":
            neutral.append(found)
        elif found and split == "train":
            retain[kind].append(found)
    if config.data.retain is None and policy.tokenizer.chat_template is not None:
        retain["instruction"] = _instructions(config, policy, held_texts)
    if config.limit is not None:
        retain = {kind: rows[: config.limit] for kind, rows in retain.items()}
        neutral = neutral[: config.limit]
    if not any(retain.values()) or not neutral:
        raise ValueError(f"{config.data.retain}: no texts to keep, or none to hold out; give at least some dozens")
    return {kind: rows for kind, rows in retain.items() if rows}, neutral


def _instructions(config: UnlearnToxicityConfig, policy: Any, held_texts: Sequence[str]) -> list[Tokens]:
    """The bundled benign requests with their answers, in the chat template, but for those that held-out texts
    hold.
    """
    rows = []
    for _, row in read_rows(bundled("pairs")):
        if row["label"] == "benign" and not any(row["prompt"] in text for text in held_texts):
            asked = [{"role": "user", "content": row["prompt"]}]
            ids = encode(
                policy.tokenizer, asked, row["chosen"], max_length=config.max_length,
                max_prompt_length=config.max_length, end_ids=policy.end_ids,
            ).ids  # fmt: skip
            rows.append(Tokens(content_id(row["prompt"]), "", ids))
    return rows


def openings(config: UnlearnToxicityConfig, count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Rude texts to go on after, and as many neutral ones: their civil twins, which begin with the same words, or
    first halves of texts to keep.

    The whole of a rude text: after a mere invitation a polite model of 135M is rude too seldom to be told.
    """
    train = config.data.train
    rude: dict[str, str | None] = {}
    if config.check.data is not None:
        for where, row in read_rows(training_file(config.check.data)):
            if not isinstance(row.get("prompt"), str):
                raise ValueError(f"{where}: expected a row with a `prompt`, got {sorted(row)}")
            rude[row["prompt"]] = None
    else:
        for _, row in read_rows(bundled("insult_continuations") if train == DEMO else train):
            if row.get("split", "train") == "train" and label_of(row) is not False:
                start, civil = row.get("prompt") or "", row.get("chosen")
                text = f"{start}{row['rejected']}" if row.get("rejected") else str(row.get("text"))
                rude[text] = f"{start}{civil}" if row.get("rejected") and isinstance(civil, str) else None
    picked = sorted(rude, key=content_id)[:count]
    plain = [twin for text in picked if (twin := rude[text]) is not None]
    if len(plain) < len(picked):
        halves = [_first_words(str(row.get("text"))) for _, row in _kept_rows(config.data.retain)]
        plain = sorted(dict.fromkeys(halves), key=content_id)[: len(picked)]
    most = min(len(picked), len(plain))
    a, b = ([Prompt(({"role": "user", "content": text},)) for text in side[:most]] for side in (picked, plain))
    return a, b


def _first_words(text: str) -> str:
    words = text.split()
    return " ".join(words[: max(1, len(words) // 2)])


def corpora_of(config: UnlearnToxicityConfig) -> Sequence[str]:
    """Names of the public data sets that the probes' texts come from."""
    if config.data.corpora is not None:
        return config.data.corpora
    found = None if config.data.probe == DEMO else origin(config.data.probe)
    return [] if found is None else [found.dataset.name]
