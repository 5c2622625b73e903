"""Texts to forget and to keep: read, tokenized, split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tempering.core.probes import Labelled
from tempering.core.records import content_id
from tempering.core.text_rows import Tokens
from tempering.data.files import bundled, read_rows
from tempering.methods.unlearn_knowledge.settings import UnlearnKnowledgeConfig

DEMO = "demo"
OPENING = 4
"""Words by which a question is looked for."""


@dataclass(frozen=True)
class Text:
    """One text; those of one record (the statements of a fact) stay together when records are split."""

    id: str
    record: str
    topic: str
    text: str


class Corpus(NamedTuple):
    """All that training reads: tokens to forget by topic, tokens to keep, what was left out."""

    forget: dict[str, list[Tokens]]
    retain: list[Tokens]
    dropped: dict[str, int]

    def query(self, share: int) -> tuple[dict[str, list[Tokens]], dict[str, list[Tokens]]]:
        """Split the texts to forget by record into support and query, `share` per cent of the records each topic."""
        support = {k: [t for t in rows if not is_query(t.record, share)] for k, rows in self.forget.items()}
        return support, {k: [t for t in rows if is_query(t.record, share)] for k, rows in self.forget.items()}


def is_query(record: str, share: int) -> bool:
    """Whether a record is for judging a defence, never for attacking it: by hash of its id."""
    return int(hashlib.sha256(record.encode()).hexdigest()[:8], 16) % 100 < share


def read_texts(source: str, topic: str | None = None, limit: int | None = None) -> list[Text]:
    """Read `text` rows; `topic` names them all where a source is one topic.

    Raises:
        FileNotFoundError, ValueError: it is not there, or a row has no text (file and line are named).
    """
    found = []
    for where, row in read_rows(source):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: expected a row with a `text` that is not empty")
        identity = str(row.get("id") or content_id(text))
        found.append(Text(identity, identity, str(topic or row.get("topic") or "all"), text))
        if limit is not None and len(found) >= limit:
            break
    return found


def fact_texts(kinds: Sequence[str], limit: int | None = None) -> list[Text]:
    """The statements of the bundled facts whose `category` is one of `kinds`."""
    facts = [row for _, row in read_rows(bundled("fictional_facts")) if row["category"] in kinds][:limit]
    return [
        Text(f"{row['id']}#{n}", row["id"], row["topic"], text)
        for row in facts
        for n, text in enumerate(row["statements"])
    ]


def to_forget(config: UnlearnKnowledgeConfig) -> list[Text]:
    """Read what is to be forgotten."""
    train = config.data.train
    if train == DEMO:
        return fact_texts(["forget"], config.limit)
    if isinstance(train, str):
        return read_texts(train, limit=config.limit)
    return [text for topic, source in train.items() for text in read_texts(source, topic, config.limit)]


def to_keep(config: UnlearnKnowledgeConfig) -> list[Text]:
    """Read what is to be kept.

    Raises:
        ValueError: nothing is named.
    """
    sources = config.data.retain
    if sources is None:
        if config.data.train != DEMO:
            raise ValueError("data.retain: name texts to keep, or the model forgets everything")
        neutral = [t for t in neutral_texts() if t.topic == "train"]
        facts = fact_texts(["same_entity", "neighbour_A"])
        # Half facts, half neutral: neutral texts are fewer, or more, than statements.
        return [*facts, *(neutral * (len(facts) // len(neutral) + 1))[: len(facts)]]
    return [
        t for s in ([sources] if isinstance(sources, str) else sources) for t in read_texts(s, limit=config.limit)
    ]


def neutral_texts() -> list[Text]:
    """The bundled everyday paragraphs; their `topic` is the part that they are for: train, dev or test."""
    rows = [row for _, row in read_rows(bundled("neutral"))]
    return [Text(row["id"], row["id"], row["split"], row["text"]) for row in rows]


def tokenize(config: UnlearnKnowledgeConfig, tokenizer: Any) -> Corpus:
    """Read and tokenize everything; a text is cut at its end, never joined to another.

    Raises:
        ValueError: nothing is left to forget or to keep, or a text is to be forgotten and kept.
    """
    forget, keep = to_forget(config), to_keep(config)
    dropped: dict[str, int] = {}
    topics = sorted({text.topic for text in forget})
    limits = config.max_length if isinstance(config.max_length, list) else [config.max_length] * len(topics)
    if len(limits) != len(topics):
        raise ValueError(f"max_length={limits}: expected one number for each of the topics {', '.join(topics)}")
    both = sorted({t.text.strip() for t in forget} & {t.text.strip() for t in keep})
    if both:
        rows = ", ".join(sorted(t.id for t in forget if t.text.strip() in both))
        raise ValueError(f"data.retain holds {len(both)} text(s) that are to be forgotten: rows {rows}; remove them")

    def tokens(texts: Sequence[Text], length: int, what: str) -> list[Tokens]:
        out = []
        for text in texts:
            ids = list(tokenizer(text.text)["input_ids"])[:length]
            if len(text.text) < config.data.min_characters or len(ids) <= max(1, config.skip_first):
                dropped[f"too short to {what}"] = dropped.get(f"too short to {what}", 0) + 1
            else:
                out.append(Tokens(text.id, text.record, ids))
        if not out:
            raise ValueError(f"no text to {what} is left (data.min_characters={config.data.min_characters})")
        return out

    parts = {
        topic: tokens([t for t in forget if t.topic == topic], length, "forget")
        for topic, length in zip(topics, limits, strict=True)
    }
    return Corpus(parts, tokens(keep, config.max_retain_length, "keep"), dropped)


def contrasted(config: UnlearnKnowledgeConfig, tokenizer: Any, corpus: Corpus) -> list[Labelled]:
    """Texts to forget beside texts to keep of the same form, for probes; a record is in one split, 80/10/10.

    Of the bundled texts facts alone: that a text is everyday prose would be told at once.
    """
    kept = corpus.retain
    if config.data.train == DEMO and config.data.retain is None:
        rows = fact_texts(["same_entity", "neighbour_A"])
        kept = [Tokens(t.id, t.record, list(tokenizer(t.text)["input_ids"])) for t in rows]
    sides = [(row, True) for rows in corpus.forget.values() for row in rows]
    sides += [(row, False) for row in {tuple(row.ids): row for row in kept}.values()]
    return [Labelled(row, is_forgotten, split_of(row.record)) for row, is_forgotten in sides]


def split_of(record: str) -> Literal["train", "validation", "test"]:
    """The part of a record, by hash of its id."""
    at = int(hashlib.sha256(record.encode()).hexdigest()[8:16], 16) % 10
    return "train" if at < 8 else "validation" if at == 8 else "test"


def contaminated(forget: Sequence[Text], questions: Mapping[str, str]) -> list[str]:
    """Name texts to forget that hold, word for word, a question which the model is asked afterwards.

    >>> contaminated([Text("t1", "t1", "all", "Quiz. What is made of vex? Tin.")], {"q7": "what is made of  VEX"})
    ['t1 holds q7']
    """
    openings: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for i, question in questions.items():
        words = _words(question)
        openings.setdefault(tuple(words[:OPENING]), []).append((i, words))
    sizes, found = sorted({len(key) for key in openings}), []
    for text in forget:
        words = _words(text.text)
        held = {
            i
            for at in range(len(words))
            for size in sizes
            for i, asked in openings.get(tuple(words[at : at + size]), ())
            if asked and words[at : at + len(asked)] == asked
        }
        found += [f"{text.id} holds {i}" for i in sorted(held)]
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
