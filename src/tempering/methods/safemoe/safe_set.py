"""Build a safe-informative set: ask a teacher until an answer is complete, no refusal, safe and informative.

    temper data safe-set PROMPTS generator=openai:MODEL@URL judge=openai:OTHER@URL out=runs/safe_set

The paper (arXiv:2606.00686) wrapped requests of four domains in one sentence that asks for reasons instead of a flat
rejection, resampled the refusals (about 75 %), filtered for safety and informativeness, and kept 200 a domain. The
sentence is ours; so are eight attempts and the threshold (docs/safemoe.md). The judge that filters here must not
report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig, EndpointSampler
from tempering.core.progress import progress, say
from tempering.core.records import Completion, Prompt, Verdict, content_id, prompt_from_row
from tempering.core.run import Run
from tempering.core.sampling import Sampler
from tempering.data.describe import licences_of, sha256_of
from tempering.data.files import read_records, training_file
from tempering.judges import Judge, judge_groups, load_judge
from tempering.judges.informative import LEAST_INFORMATIVE, MOST_POINTS, SAFE, load_informative_judge

Row = dict[str, Any]
ATTEMPTS_FILE, OUT_FILE = "data/attempts.jsonl", "data/router_train.jsonl"
BATCH = 64
WRAP = (
    "{prompt}\n\nPlease do not just turn this down: leave out whatever would do harm, say what is wrong with it "
    "and why, "
    "and give facts or lawful ways that help with what may lie behind it."
)


class SafeSetConfig(Config):
    """Settings of `temper data safe-set`."""

    out: str = "runs/safe_set"
    """Run folder to make; the set is its `data/router_train.jsonl`."""
    generator: str = "smollm2"
    """The teacher: a model reference, or `openai:MODEL@URL`."""
    judge: str = "rules"
    """Judge that filters for safety and informativeness; report with another."""
    refusal_judge: str = "rules"
    """What counts as a refusal."""
    wrap: str = WRAP
    """How the teacher is asked; `{prompt}` stands for the request, which alone goes into the set."""
    domains: list[str] = Field(default_factory=list)
    """Domains of the prompts to use; empty: all."""
    per_domain: int = Field(200, ge=1)
    """Answers to keep for each domain."""
    attempts: int = Field(8, ge=1)
    """Answers asked for, each with a new seed, before a prompt is given up."""
    least: int = Field(LEAST_INFORMATIVE, ge=1, le=MOST_POINTS)
    """Fewest points of informativeness that are kept, of 10."""
    temperature: float = Field(0.7, ge=0)
    """Of the teacher's sampling."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the teacher's sampling."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer; one that is cut is not kept."""
    seed: int = 0
    """Of the first attempt; each later one has the next."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a teacher `openai:MODEL@URL` is asked, and what it may cost."""
    judge_endpoint: EndpointConfig = EndpointConfig()
    """The same for judges."""
    cache: str | None = None
    """Folder of what endpoints have answered, never asked again; null: nothing is kept."""

    def connect(self, spec: str) -> EndpointSampler:
        """Connect a judge."""
        return EndpointSampler(spec, cache=self.cache, **self.judge_endpoint.model_dump())


class Attempt(NamedTuple):
    """One answer of the teacher and what the judges made of it."""

    prompt: Prompt
    domain: str
    number: int
    """From 1."""
    completion: str
    problem: str | None
    """Why it is not kept."""
    points: int | None


def select(attempts: Sequence[Attempt], per_domain: int) -> list[Attempt]:
    """Keep the first good answer to each prompt, in the order given, up to `per_domain` of a domain."""
    kept: dict[str, Attempt] = {}
    counts: Counter[str] = Counter()
    for attempt in attempts:
        is_new = attempt.prompt.id not in kept and attempt.problem is None
        if is_new and counts[attempt.domain] < per_domain:
            kept[attempt.prompt.id] = attempt
            counts[attempt.domain] += 1
    return list(kept.values())


def problem_of(completion: Completion, refused: Verdict, graded: Verdict, least: int) -> str | None:
    """Say why an answer is not kept, by the first rule that it breaks; `None` where it is good.

    >>> no, good = Verdict(0.0, "r", "compliance"), Verdict(0.8, "j", "safe")
    >>> problem_of(Completion("p", "Because ...", "stop"), no, good, 7) is None
    True
    >>> problem_of(Completion("p", "Because ...", "length"), no, good, 7)
    'cut'
    """
    if completion.finish == "error":
        return "no answer"
    if completion.finish != "stop":
        return "cut"
    if refused.is_unscored or graded.is_unscored:
        return "unscored"
    if refused.holds:
        return "refusal"
    if graded.label != SAFE:
        return "unsafe"
    return None if points_of(graded) >= least else "not informative"


def points_of(graded: Verdict) -> int:
    """The judge's whole number from 0 to 10."""
    assert graded.score is not None
    return round(graded.score * MOST_POINTS)


def yield_of(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return how many answers were good, by domain, and what was wrong with the others (paper: about 25 % good)."""
    good = Counter(a.domain for a in attempts if a.problem is None)
    tried = Counter(a.domain for a in attempts)
    return {
        "attempts": len(attempts),
        "good": good.total(),
        "share": good.total() / len(attempts) if attempts else None,
        "by_domain": {d: {"attempts": n, "good": good[d], "share": good[d] / n} for d, n in tried.items()},
        "problems": dict(Counter(a.problem for a in attempts if a.problem).most_common()),
    }


def require_working(problems: Sequence[str | None], who: str) -> None:
    """Stop where a teacher or judge fails at most of a round, so that no attempts are used up on one that is down.

    `problems`: of each answer why there is none, or no verdict; `None` where there is.

    Raises:
        ValueError: more than half of them failed, and more than three.
    """
    failed = Counter(problem for problem in problems if problem is not None)
    if failed.total() > max(3, len(problems) // 2):
        reason = failed.most_common(1)[0][0]
        raise ValueError(
            f"{who} failed at {failed.total()} of {len(problems)} answers, most often {reason!r}; "
            "mend it, then go on with --resume: these attempts do not count"
        )


def ask(
    sampler: Sampler,
    graders: tuple[Judge, Judge],
    prompts: Sequence[tuple[str, Prompt]],
    number: int,
    config: SafeSetConfig,
) -> list[Attempt]:
    """Ask the teacher once for each (domain, prompt) and judge the answers against the plain request.

    Raises:
        ValueError: the teacher or a judge fails at most of them.
    """
    wrapped = [
        Prompt(({"role": "user", "content": config.wrap.replace("{prompt}", p.text)},), id=p.id) for _, p in prompts
    ]
    groups = sampler(
        wrapped, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
        seed=config.seed + number - 1,
    )  # fmt: skip
    errors = [(group[0].error or "no answer") if group[0].finish == "error" else None for group in groups]
    require_working(errors, f"the teacher {sampler.name}")
    asked = [(prompt, group) for (_, prompt), group in zip(prompts, groups, strict=True)]
    refused, graded = (judge_groups(judge, asked, max_unscored=1.0) for judge in graders)
    for judge, verdicts in zip(graders, (refused, graded), strict=True):
        reasons = [v.reason or "unscored" if v.is_unscored else None for (v,) in verdicts]
        require_working(
            [None if error else reason for error, reason in zip(errors, reasons, strict=True)],
            f"the judge {judge.identity}",
        )
    found = []
    for (domain, prompt), group, no, grade in zip(prompts, groups, refused, graded, strict=True):
        problem = problem_of(group[0], no[0], grade[0], config.least)
        points = None if grade[0].is_unscored else points_of(grade[0])
        found.append(Attempt(prompt, domain, number, group[0].text.strip(), problem, points))
    return found


def build(
    sampler: Sampler,
    graders: tuple[Judge, Judge],
    prompts: Mapping[str, Sequence[Prompt]],
    config: SafeSetConfig,
    *,
    done: Sequence[Attempt] = (),
    keep: Callable[[Attempt], None] = lambda attempt: None,
) -> list[Attempt]:
    """Ask until each domain is full or each prompt was tried `config.attempts` times; returns all attempts in order.

    `done`: attempts of an interrupted call; `keep` is told of each new one. In a round only as many prompts are
    asked as the domain still lacks, so that a teacher is not asked for what is thrown away.
    """
    attempts = list(done)
    most = sum(len(found) for found in prompts.values()) * config.attempts
    with progress("asking the teacher", most) as advance:
        advance(len(attempts))
        while todo := _next(attempts, prompts, config):
            number = 1 + sum(a.prompt.id == todo[0][1].id for a in attempts)
            for attempt in ask(sampler, graders, todo, number, config):
                attempts.append(attempt)
                keep(attempt)
            advance(len(todo), note=f"{len(select(attempts, config.per_domain))} kept")
    return attempts


def _next(
    attempts: Sequence[Attempt], prompts: Mapping[str, Sequence[Prompt]], config: SafeSetConfig
) -> list[tuple[str, Prompt]]:
    """The prompts to ask next, a batch that was asked equally often, and least often of those that are still open."""
    tries = Counter(a.prompt.id for a in attempts)
    good = {a.prompt.id for a in attempts if a.problem is None}
    todo: list[tuple[str, Prompt]] = []
    for domain, found in prompts.items():
        lacks = config.per_domain - sum(prompt.id in good for prompt in found)
        open_ = [p for p in found if p.id not in good and tries[p.id] < config.attempts]
        open_.sort(key=lambda p: (tries[p.id], content_id(p.id)))
        todo += [(domain, p) for p in open_[: max(lacks, 0)]]
    least = min((tries[p.id] for _, p in todo), default=0)
    return [(domain, p) for domain, p in todo if tries[p.id] == least][:BATCH]


def run_safe_set(
    file: str, config: SafeSetConfig, load: Callable[[str], Sampler], *, resume: bool = False
) -> dict[str, Any]:
    """Build the set and write it with its yield; returns the counts. `load` makes the teacher of its name.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong input, and nothing has been written; or the teacher or
            judge fails at most answers, and `resume` goes on.
        RuntimeError: no answer was good enough.
    """
    if "{prompt}" not in config.wrap:
        raise ValueError("wrap: no {prompt} in it; say where the request goes")
    Run.require_free(config.out, resume)
    prompts = read_prompts(file, config.domains)
    graders = (
        load_judge(config.refusal_judge, "refused", config.connect),
        load_informative_judge(config.judge, config.connect),
    )
    sampler = load(config.generator)
    run = Run.create(config.out, "safe_set", config, resume=resume)
    if run.is_done:
        say(f"{run.root} is done already")
        return dict(run.read_json("summary.json"))
    by_id = {p.id: (domain, p) for domain, found in prompts.items() for p in found}
    done = [
        Attempt(
            by_id[row["id"]][1], by_id[row["id"]][0], row["attempt"], row["completion"], row["problem"], row["points"]
        )
        for row in (run.read_rows(ATTEMPTS_FILE) if run.has(ATTEMPTS_FILE) else [])
        if row["id"] in by_id
    ]
    attempts = build(
        sampler, graders, prompts, config, done=done,
        keep=lambda a: run.append_row(
            ATTEMPTS_FILE,
            {"id": a.prompt.id, "attempt": a.number, "completion": a.completion, "problem": a.problem,
             "points": a.points},
        ),
    )  # fmt: skip
    kept, found = select(attempts, config.per_domain), yield_of(attempts)
    if not kept:
        raise RuntimeError(
            f"none of {len(attempts)} answers is good enough: {found['problems']}; name another generator"
        )
    identities = {"refusal": graders[0].identity, "filter": graders[1].identity}
    kept.sort(key=lambda attempt: content_id(attempt.prompt.id))  # so that the first n rows are of all domains
    run.write_rows(OUT_FILE, [row_of(attempt, sampler.name, identities["filter"]) for attempt in kept])
    result = {"kept": len(kept), "file": str(run.root / OUT_FILE), "yield": found}
    run.write_json("summary.json", result)
    path = training_file(file)
    run.write_provenance(
        model=sampler.name, judges=identities, inputs=[{"path": str(file), "sha256": sha256_of(path)}],
        data_licences=licences_of(file),
    )  # fmt: skip
    run.finish()
    return result


def read_prompts(file: str, domains: Sequence[str]) -> dict[str, list[Prompt]]:
    """Read requests by `domain` (or `category`).

    Raises:
        FileNotFoundError, ValueError: with file and line, or the domain that has none.
    """
    found: dict[str, list[Prompt]] = {}
    for prompt in read_records(training_file(file), prompt_from_row, what="prompt", repeats="drop").records:
        domain = str(prompt.extra.get("domain") or prompt.category or "all")
        found.setdefault(domain, []).append(prompt)
    if missing := [name for name in domains if name not in found]:
        raise ValueError(f"{file}: no prompt of domain {missing[0]!r}; it has {', '.join(sorted(found))}")
    return {name: found[name] for name in domains or found}


def row_of(attempt: Attempt, generator: str, judge: str) -> Row:
    """Return a row of the set: what was asked and answered, by whom, at which attempt, and the filter's verdict."""
    return {
        "prompt": attempt.prompt.text, "completion": attempt.completion, "domain": attempt.domain,
        "generator": generator, "attempts": attempt.number, "points": attempt.points, "judge": judge,
    }  # fmt: skip
