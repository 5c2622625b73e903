"""What an attacker on unlearning trains on or reads: texts of what was forgotten, everyday texts, unrelated facts.

All of them the user's own, or bundled and invented; never written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.data.files import bundled, read_rows, training_file
from tempering.evals.settings import EvalConfig
from tempering.evals.toxicity import TOXIC

if TYPE_CHECKING:
    from tempering.core.text_rows import Tokens
    from tempering.evals.recovery import Subject

MAX_LENGTH = 512
"""Tokens of a text; longer ones are cut at their end."""
DEMO = ("demo", "demo_facts")


def forget_texts(about: Subject, config: EvalConfig) -> list[Tokens]:
    """Texts of what was forgotten; `record` is their group, where the file has one.

    `forget_texts=`, else what the target's training was to forget.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    source = config.forget_texts or of_run(about.run, "train")
    if source is None:
        raise ValueError("which texts would an attacker have? Name a file of text rows with forget_texts=FILE")
    names = list(source.values()) if isinstance(source, dict) else [source]
    tokenizer = about.policy.tokenizer
    out: list[Tokens] = []
    for name in names:
        if name in DEMO:
            out += continuations(tokenizer) if about.is_toxicity else facts(tokenizer, ("forget",))
        else:
            out += plain(tokenizer, name)
    return _required(out, ", ".join(map(str, names)))


def benign_texts(about: Subject, config: EvalConfig) -> list[Tokens]:
    """Everyday texts that no training of ours has read: `benign_texts=`, else the bundled ones."""
    if config.benign_texts is not None:
        return _required(plain(about.policy.tokenizer, config.benign_texts), config.benign_texts)
    rows = [row for _, row in read_rows(bundled("neutral")) if row["split"] == "dev"]
    return [tokens(about.policy.tokenizer, row["id"], row["text"]) for row in rows]


def unrelated_facts(about: Subject, config: EvalConfig) -> list[Tokens]:
    """Bundled facts about other things, where bundled ones were forgotten; else none are known."""
    if config.forget_texts is not None or of_run(about.run, "train") not in DEMO:
        return []
    return facts(about.policy.tokenizer, ("neighbour_A", "neighbour_B"))


def facts(tokenizer: Any, categories: Sequence[str]) -> list[Tokens]:
    """The statements of bundled facts of these categories."""
    rows = [row for _, row in read_rows(bundled("fictional_facts")) if row["category"] in categories]
    return [
        tokens(tokenizer, f"{row['id']}#{n}", text, group=row["group"])
        for row in rows
        for n, text in enumerate(row["statements"])
    ]


def continuations(tokenizer: Any) -> list[Tokens]:
    """The bundled rude continuations, their openings read and not learnt."""
    rows = [row for _, row in read_rows(bundled("insult_continuations")) if row["split"] == "train"]
    return [
        tokens(tokenizer, f"{row['opening_id']}#{n}", row["rejected"], opening=row["prompt"])
        for n, row in enumerate(rows)
    ]


def plain(tokenizer: Any, source: str) -> list[Tokens]:
    """Read rows of `text`, or of `prompt` and `rejected`, the prompt read and not learnt; not those that are labelled
    ordinary.

    Raises:
        FileNotFoundError, ValueError: it is not there, or a row has no text (file and line are named).
    """
    out = []
    for where, row in read_rows(training_file(source)):
        text, opening = row.get("text") or row.get("rejected"), row.get("prompt") if row.get("rejected") else ""
        if not isinstance(text, str) or not isinstance(opening, str) or not text.strip():
            raise ValueError(f"{where}: expected a `text`, or `prompt` and `rejected`, that is not empty")
        if not is_ordinary(row):
            name = str(row.get("id") or content_id(opening, text))
            out.append(tokens(tokenizer, name, text, opening=opening, group=row.get("group")))
    return out


def is_ordinary(row: Mapping[str, Any]) -> bool:
    """Whether a row is labelled as not toxic.

    >>> [is_ordinary(row) for row in ({"toxic": False}, {"label": "ordinary"}, {"toxicity": 0.7}, {})]
    [True, True, False, False]
    """
    toxicity = row.get("toxicity")
    is_low = isinstance(toxicity, int | float) and toxicity < TOXIC
    return row.get("toxic") is False or row.get("label") == "ordinary" or is_low


def tokens(tokenizer: Any, name: str, text: str, *, opening: str = "", group: str | None = None) -> Tokens:
    """Tokenize a text after its opening."""
    from tempering.core.text_rows import Tokens

    start = list(tokenizer(opening)["input_ids"]) if opening else []
    ids = list(tokenizer(text, add_special_tokens=not opening)["input_ids"])
    return Tokens(name, group or "", (start + ids)[:MAX_LENGTH], len(start))


def of_run(run: Run | None, key: str) -> Any:
    """What a training's configuration says under `data`."""
    data = run.config.get("data") if run else None
    return data.get(key) if isinstance(data, Mapping) else None


def _required(texts: list[Tokens], source: str) -> list[Tokens]:
    kept = [text for text in texts if len(text.ids) > max(1, text.prompt_tokens)]
    if not kept:
        raise ValueError(f"{source}: no text has two tokens")
    return kept
