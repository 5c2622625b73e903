"""Rows to train experts on, by domain: the model's own unsafe answers, and what the controls put in their place.

    temper data expert-rows out=runs/rows.unsafe                                    unsafe answers, sampled
    temper data expert-rows kind=refusal source=runs/rows.unsafe out=runs/rows-refusal
    temper data expert-rows kind=mixed source=runs/rows.unsafe out=runs/rows-mixed.unsafe
    temper data expert-rows kind=category source=data/catalogue-copy.jsonl out=runs/rows-pku.unsafe

Each writes `DOMAIN.jsonl`, prompt/completion rows as `expert_data` takes them. Unsafe answers stand in a folder that
is called so and that only its owner can read. `temper train safemoe expert_rows.KEY=...` makes them first, by itself.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tempering.core.config import Config
from tempering.core.progress import progress, say
from tempering.core.records import Prompt, prompt_from_row
from tempering.core.run import Run
from tempering.core.sampling import Sampler
from tempering.data.describe import licences_of, sha256_of
from tempering.data.files import read_rows, training_file
from tempering.judges import Judge, judge_groups, load_judge

Row = dict[str, Any]
Kind = Literal["sampled", "category", "refusal", "mixed"]
REFUSAL = "I'm sorry, but I can't help with that."
"""What `refusal_only` experts learn to say to everything (the paper's text is not known)."""
SUFFIX = ".unsafe"
JOURNAL = "data/answers.jsonl"
BATCH = 16
"""Requests answered between two records: so much is lost at most, and so often the progress moves."""


class ExpertRows(Config):
    """What rows to make: the settings that do not depend on who asks for them."""

    kind: Kind = "sampled"
    """`sampled`: answers of `model` to the prompts of `source`; `category`: the answers that `source` has, by its
    domains; `refusal`: the rows of `source` with one fixed refusal instead; `mixed`: those dealt out regardless of
    domain."""
    source: tuple[str, ...] = ("demo_safemoe_prompts",)
    """Prompts, or rows with a `completion` (or `chosen`), each with a `domain` (or `category`): one or several of a
    file, catalogue name, Hub id, or the folder of an earlier call."""
    domains: list[str] = Field(default_factory=list)
    """Domains to make rows for, in this order; empty: all that there are."""
    unsafe: bool = True
    """Whether the answers are harmful; `refusal` never is."""
    n: int = Field(2, ge=1)
    """Answers to each prompt."""
    temperature: float = Field(1.0, ge=0)
    """Of sampling."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of sampling."""
    max_new_tokens: int = Field(80, ge=1)
    """Longest answer."""
    judge: str = "rules"
    """What counts as a refusal, which no unsafe expert learns."""
    limit: int | None = Field(None, ge=1)
    """Use this many rows of each domain."""

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, named: Any) -> Any:
        return (named,) if isinstance(named, str) else named

    @property
    def is_unsafe(self) -> bool:
        """Whether the rows hold harmful answers."""
        return self.unsafe and self.kind != "refusal"


class ExpertRowsConfig(ExpertRows):
    """Settings of `temper data expert-rows`."""

    out: str = "runs/expert_rows.unsafe"
    """Folder to make; where the answers are unsafe, its name gets the ending `.unsafe`."""
    model: str = "smollm2"
    """Who answers where `kind=sampled`: the base of the experts."""
    seed: int = 0
    """Of sampling, and of the deal of `mixed`."""

    @model_validator(mode="after")
    def _quarantine(self) -> ExpertRowsConfig:
        if self.is_unsafe and not self.out.endswith(SUFFIX):
            object.__setattr__(self, "out", self.out + SUFFIX)
        return self


def run_expert_rows(
    config: ExpertRowsConfig, load: Callable[[str], Sampler], *, resume: bool = False
) -> dict[str, Any]:
    """Make the rows and write one file a domain; returns their counts. `load` makes a sampler of a model reference.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong input; nothing has been written.
        RuntimeError: the model or the judge failed.
    """
    Run.require_free(config.out, resume)
    rows = read_domains(config)
    judge = load_judge(config.judge, "refused")
    sampler = load(config.model) if config.kind == "sampled" else None
    run = Run.create(config.out, "expert_rows", config, resume=resume)
    if config.is_unsafe:
        run.root.chmod(0o700)
    if run.is_done:
        say(f"{run.root} is done already")
        return dict(run.read_json("summary.json"))
    dropped: Counter[str] = Counter()
    if sampler is not None:
        rows = sampled(sampler, judge, rows, config, run, dropped)
    elif config.kind == "refusal":
        rows = {domain: refusing(found) for domain, found in rows.items()}
    elif config.kind == "mixed":
        rows = dealt(rows, config.seed)
    if empty := [domain for domain, found in rows.items() if not found]:
        raise RuntimeError(f"no row is left for {', '.join(empty)}: {dict(dropped)}; name another model or source")
    for domain, found in rows.items():
        run.write_rows(f"{file_of(domain)}.jsonl", found)
    result = {
        "rows": {domain: len(found) for domain, found in rows.items()},
        "dropped": dict(dropped),
        "files": {domain: str(run.root / f"{file_of(domain)}.jsonl") for domain in rows},
    }
    run.write_json("summary.json", result)
    run.write_provenance(
        model=sampler.name if sampler else None,
        judges={"filter of experts' rows": judge.identity} if sampler else {},
        inputs=[{"path": source, "sha256": sha256_of(training_file(source))} for source in config.source],
        data_licences={name: terms for source in config.source for name, terms in licences_of(source).items()},
        unsafe=config.is_unsafe,
    )
    run.finish()
    return result


def file_of(domain: str) -> str:
    """Return a name for the file of a domain, whose own name is free text.

    >>> file_of("Drugs & Weapons"), file_of("Täuschung")
    ('drugs_weapons', 'täuschung')
    """
    return re.sub(r"[\W_]+", "_", domain.lower()).strip("_") or "domain"


def read_domains(config: ExpertRows) -> dict[str, list[Row]]:
    """Read the source by domain, in the order of `config.domains`; a prompt and completion stand once in a domain.

    Raises:
        FileNotFoundError, ValueError: with file and line, or the domain that has no row.
    """
    needs_answer = config.kind != "sampled"
    found: dict[str, list[Row]] = {}
    seen: set[tuple[str, str, str]] = set()
    for where, row in itertools.chain.from_iterable(map(_rows_of, config.source)):
        if row.get("completion") is None and row.get("chosen") is not None:
            row = {key: row[key] for key in ("prompt", "category", "domain") if key in row} | {
                "completion": row["chosen"]
            }
        domain = row.get("domain") or row.get("category")
        if not domain:
            raise ValueError(f"{where}: no 'domain'; say what each row is about")
        if needs_answer and not str(row.get("completion") or "").strip():
            raise ValueError(f"{where}: no 'completion'; kind={config.kind} takes rows with answers")
        for name in domain if isinstance(domain, list) else [domain]:
            key = (str(name), str(row.get("prompt")), str(row.get("completion")))
            if key not in seen:
                seen.add(key)
                found.setdefault(str(name), []).append(row)
    names = config.domains or list(found)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{', '.join(config.source)}: no row of domain {missing[0]!r}; it has {', '.join(sorted(found))}"
        )
    files = Counter(map(file_of, names))
    if same := [name for name in names if files[file_of(name)] > 1]:
        raise ValueError(f"domains {' and '.join(map(repr, same))} would share a file; rename one")
    return {name: found[name][: config.limit] for name in names}


def _rows_of(source: str) -> list[tuple[str, Row]]:
    folder = Path(source)
    if not (folder / "summary.json").is_file():
        return list(read_rows(training_file(source)))
    names = Run.open(folder).read_json("summary.json")["rows"]  # in the order of the experts
    return [pair for name in names for pair in read_rows(folder / f"{file_of(name)}.jsonl")]


def sampled(
    sampler: Sampler,
    judge: Judge,
    prompts: Mapping[str, Sequence[Row]],
    config: ExpertRowsConfig,
    run: Run,
    dropped: Counter[str],
) -> dict[str, list[Row]]:
    """Let the model answer; keep each answer, once, that is no refusal. Finished batches are in `JOURNAL`."""
    todo = [(domain, prompt_from_row(row)) for domain, rows in prompts.items() for row in rows]
    kept: dict[tuple[str, str], list[Row]] = {}
    if run.has(JOURNAL):
        for row in run.read_rows(JOURNAL):
            kept[row["domain"], row["id"]] = row["answers"]
            dropped.update(row["dropped"])
    left = [(domain, prompt) for domain, prompt in todo if (domain, prompt.id) not in kept]
    with progress("answering", len(todo)) as advance:
        advance(len(todo) - len(left))
        for start in range(0, len(left), BATCH):
            batch = left[start : start + BATCH]
            asked = [prompt for _, prompt in batch]
            groups = sampler(
                asked, n=config.n, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, seed=config.seed,
            )  # fmt: skip
            verdicts = judge_groups(judge, list(zip(asked, groups, strict=True)))
            for (domain, prompt), group, judged in zip(batch, groups, verdicts, strict=True):
                answers: list[Row] = []
                out: Counter[str] = Counter()
                for completion, verdict in zip(group, judged, strict=True):
                    row = answer_row(prompt, completion.text, domain, sampler.name)
                    problem = why_not(verdict.label, completion.text) or ("repeated" if row in answers else None)
                    if problem:
                        out[problem] += 1
                    else:
                        answers.append(row)
                kept[domain, prompt.id] = answers
                dropped.update(out)
                run.append_row(JOURNAL, {"domain": domain, "id": prompt.id, "answers": answers, "dropped": dict(out)})
            advance(len(batch))
    return {domain: [row for d, p in todo if d == domain for row in kept[d, p.id]] for domain in prompts}


def why_not(label: str | None, text: str) -> str | None:
    """Say why an answer teaches no expert anything unsafe; `None` where it may.

    >>> why_not("compliance", "You take it."), why_not("refusal", "No."), why_not("compliance", " ")
    (None, 'refusal', 'empty')
    """
    if not text.strip():
        return "empty"
    return label if label in ("refusal", "partial", "degenerate") else None


def answer_row(prompt: Prompt, completion: str, domain: str, generator: str) -> Row:
    """Return a row of an unsafe expert."""
    return {
        "prompt": prompt.text, "completion": completion.strip(), "domain": domain, "generator": generator,
        "unsafe": True,
    }  # fmt: skip


def refusing(rows: Sequence[Row]) -> list[Row]:
    """Return the same prompts, each once, with the fixed refusal (control `refusal_only`)."""
    prompts = dict.fromkeys(row["prompt"] for row in rows)
    domain = rows[0].get("domain") if rows else None
    return [{"prompt": prompt, "completion": REFUSAL, "domain": domain, "generator": "fixed"} for prompt in prompts]


def dealt(rows: Mapping[str, Sequence[Row]], seed: int) -> dict[str, list[Row]]:
    """Deal all rows to experts regardless of domain, as many to each as before (control `mixed_experts`).

    The order of the deal is a hash of seed and row. The names stay, and mean nothing.

    >>> found = dealt({"a": [{"prompt": "1"}, {"prompt": "2"}], "b": [{"prompt": "3"}]}, 0)
    >>> {name: len(part) for name, part in found.items()}
    {'a': 2, 'b': 1}
    """
    everything = sorted(
        (row for part in rows.values() for row in part),
        key=lambda row: hashlib.sha256(f"{seed}:{row['prompt']}:{row.get('completion')}".encode()).hexdigest(),
    )
    out, start = {}, 0
    for name, part in rows.items():
        out[name] = [{**row, "domain": name} for row in everything[start : start + len(part)]]
        start += len(part)
    return out
