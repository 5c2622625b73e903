"""One campaign: attackers write, targets answer, judges look, and every step is on disk before the next.

`data/attacks.jsonl` has what attackers wrote, `data/responses.jsonl` what targets answered, with the verdicts; both
grow batch by batch, the last line of an id counts, and a resumed campaign takes over all that they hold. The answers
of endpoints are in the cache besides, one by one as they come. Used by `evals/redteam.py`; refuses to know of rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tempering import judges
from tempering.attacks import PLANS, search
from tempering.core.endpoint import EndpointSampler
from tempering.core.ledger import SPENT
from tempering.core.meter import Meter
from tempering.core.progress import progress
from tempering.core.records import Completion, Prompt, Verdict, content_id, tokens_of
from tempering.core.run import Run
from tempering.data.seeds import Seed
from tempering.evals.attackers import Attacker, Written
from tempering.evals.redteam_settings import RedteamConfig
from tempering.evals.results import require_scored, verdict_row
from tempering.judges.game import Asked, GameJudge
from tempering.judges.tags import parse_attack

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait

ATTACKS, RESPONSES = "data/attacks.jsonl", "data/responses.jsonl"
UNSAFE = {"unsafe": True}
"""Stands in every line of these two files: they hold attacks that worked, and what came of them."""
Row = dict[str, Any]
Slot = tuple[Seed, int, str]
"""A seed, which of its attacks, and the id of that."""
T = TypeVar("T")


class Judges(NamedTuple):
    """Who looks at what."""

    harm: judges.Judge
    refusal: judges.Judge
    faithful: GameJudge


@dataclass
class Campaign:
    """The state of a campaign; `stopped` says which cap ended it."""

    run: Run
    config: RedteamConfig
    seeds: Sequence[Seed]
    judges: Judges
    meter: Meter
    stopped: str | None = None
    judged: int = 0
    """Answers that judges of harm and of refusals have looked at in this process."""
    attacks: dict[str, Row] = field(default_factory=dict)
    responses: dict[str, Row] = field(default_factory=dict)
    said: dict[str, Row] = field(default_factory=dict)
    """Answers by what was asked: at temperature 0, equal attacks are one question."""

    def __post_init__(self) -> None:
        for name, rows in ((ATTACKS, self.attacks), (RESPONSES, self.responses)):
            self.run.truncate_rows(name, lambda row: True)  # takes off what a kill left half-written
            if self.run.has(name):
                rows |= {row["id"]: row for row in self.run.read_rows(name)}
        self.said |= {row["asked_id"]: row for row in self.responses.values()}

    # --- attackers --------------------------------------------------------------------------------------------

    def write(self, attacker: Attacker, seeds: Sequence[Seed], k: int) -> list[Row]:
        """Return k attacks on each seed, those of an earlier process among them."""
        ids = {seed.id: [self._attack_id(attacker, seed, i) for i in range(k)] for seed in seeds}
        todo = [seed for seed in seeds if any(self._is_open(name) for name in ids[seed.id])]
        if todo:
            sampler = attacker.load(self.config.dtype) if attacker.needs_model else None
            with progress(f"{attacker.name} writes", len(todo)) as advance:
                for batch in _parts(todo, max(1, self.config.batch // k)):
                    self._keep(ATTACKS, self.attacks, self._written(attacker, sampler, batch, k))
                    advance(len(batch))
        written = [self.attacks[name] for seed in seeds for name in ids[seed.id]]
        self._require_faithfulness(attacker, [row for row in written if row["prompt"] is not None])
        return written

    def _attack_id(self, attacker: Attacker, seed: Seed, index: int, *parts: str) -> str:
        c = self.config
        decoding = (c.temperature, c.top_p, c.max_new_tokens, c.filter, c.tries, c.seed)
        return content_id(attacker.identity, decoding, seed.id, seed.prompt, index, *parts)

    def _is_open(self, name: str) -> bool:
        row = self.attacks.get(name)
        return row is None or (row["prompt"] is not None and row["faithful"] is None)

    def _written(self, attacker: Attacker, sampler: Sampler | None, seeds: Sequence[Seed], k: int) -> list[Row]:
        """Write k attacks on each seed; what is on disk is only judged again, where it is unscored."""
        slots = [(seed, i, self._attack_id(attacker, seed, i)) for seed in seeds for i in range(k)]
        rows = {name: dict(self.attacks[name]) for _, _, name in slots if name in self.attacks}
        new = [slot for slot in slots if slot[2] not in rows]
        if sampler is None:
            texts = {seed.id: attacker.texts(seed, k, self.config.seed) for seed in seeds}
            rows |= {name: self._attack_row(attacker, seed, i, name, texts[seed.id][i]) for seed, i, name in new}
        unscored = [row for row in rows.values() if row["faithful"] is None]
        attempt = 0
        while (
            sampler is not None and new and attempt < (self.config.tries if self.config.filter == "faithful" else 1)
        ):
            for (seed, i, name), written in zip(new, self._sample(attacker, sampler, new, k, attempt), strict=True):
                tokens = rows[name]["tokens"] if name in rows else 0
                rows[name] = self._attack_row(attacker, seed, i, name, written, attempt + 1, tokens)
            self._judge_faithful(attacker, seeds, [rows[name] for _, _, name in new])
            new = [slot for slot in new if rows[slot[2]]["prompt"] is None or rows[slot[2]]["faithful"] is False]
            attempt += 1
        self._judge_faithful(attacker, seeds, unscored)
        return [rows[name] for _, _, name in slots]

    def _sample(
        self, attacker: Attacker, sampler: Sampler, slots: Sequence[Slot], k: int, attempt: int
    ) -> list[Written]:
        """Sample each slot; in attempt t, attack i is sample i + t k, so that a sample depends on nothing else."""
        c, found = self.config, {}
        of_seed: dict[str, list[int]] = {}
        for seed, i, _ in slots:
            of_seed.setdefault(seed.id, []).append(i)
        seeds = {seed.id: seed for seed, _, _ in slots}
        wanted: dict[tuple[int, int], list[Seed]] = {}
        for seed_id, indices in of_seed.items():  # one call for all samples of a seed, where all are wanted
            spans = [(0, k)] if len(indices) == k else [(i, 1) for i in indices]
            for span in spans:
                wanted.setdefault(span, []).append(seeds[seed_id])
        for (first, n), group in wanted.items():
            how: dict[str, Any] = {
                "first": first + k * attempt,
                "max_new_tokens": c.max_new_tokens,
                "temperature": c.temperature,
                "top_p": c.top_p,
                "seed": c.seed,
            }
            answers = sampler(attacker.prompts(group), n=n, **how)
            for seed, completions in zip(group, answers, strict=True):
                for place, done in enumerate(completions, first):
                    found[seed.id, place] = Written(done.text, done.finish, tokens_of([done]), done.error)
        return [found[seed.id, i] for seed, i, _ in slots]

    def _attack_row(
        self, attacker: Attacker, seed: Seed, index: int, name: str, written: Written, tries: int = 1,
        tokens: int | None = 0,
    ) -> Row:  # fmt: skip
        prompt, reason = None, written.error or f"cut at {self.config.max_new_tokens} tokens"
        if written.finish == "stop":
            prompt, _, reason = parse_attack(written.text, attacker.format)  # type: ignore[assignment]
        return {
            "id": name,
            "attacker": attacker.name,
            "seed_id": seed.id,
            "seed": seed.prompt,
            "category": seed.category,
            "index": index,
            "raw": written.text,
            "prompt": prompt,
            "reason": None if prompt is not None else reason,
            "tries": tries,
            "tokens": None if tokens is None or written.tokens is None else tokens + written.tokens,
            "faithful": None,
            "faithful_reason": None,
            **UNSAFE,
        }

    def _judge_faithful(self, attacker: Attacker, seeds: Sequence[Seed], rows: Sequence[Row]) -> None:
        """Say of each row that holds an attack whether that is faithful; in place."""
        plain = {seed.id: seed for seed in seeds}
        asked = [row for row in rows if row["prompt"] is not None and row["faithful"] is None]
        certain = [row for row in asked if attacker.keeps_meaning or row["prompt"] == plain[row["seed_id"]].prompt]
        for row in certain:
            row |= {"faithful": True, "faithful_reason": "it holds the seed"}
        asked = [row for row in asked if row["faithful"] is None]
        verdicts = self.judges.faithful.faithful(
            [
                Asked(
                    "faithfulness_harmful" if row["category"] == "harmful" else "faithfulness_benign",
                    plain[row["seed_id"]].prompt, (row["prompt"],), row["id"],
                )
                for row in asked
            ]
        )  # fmt: skip
        for row, verdict in zip(asked, verdicts, strict=True):
            row |= {"faithful": verdict.holds, "faithful_reason": verdict.reason}
            self._note_spent(verdict.reason)

    # --- targets ----------------------------------------------------------------------------------------------

    def ask(self, target: str, sampler: Sampler, attacks: Sequence[Row]) -> None:
        """Put attacks to a target and judge what it says, until all are done or a cap is met.

        Raises:
            ValueError, RuntimeError: too many attempts stay unscored; see `results.require_scored`.
        """
        asked = [row for row in attacks if row["prompt"] is not None]
        done = {row["id"] for row in asked if is_scored(self.responses.get(response_id(target, row)))}
        todo = [row for row in asked if row["id"] not in done]
        with progress(f"{target} answers", len(asked)) as advance:
            advance(len(done))
            for batch in _parts(todo, self.config.batch):
                if self.stopped:
                    return
                self._keep(RESPONSES, self.responses, self._answered(target, sampler, batch))
                advance(len(batch))
                if not self.stopped:
                    self._require_scored(target, asked)

    def _answered(self, target: str, sampler: Sampler, attacks: Sequence[Row]) -> list[Row]:
        self._query(target, sampler, attacks)
        rows = []
        for attack in attacks:
            said = self.said.get(self._asked_id(target, attack))
            if said is not None:
                rows.append(
                    {
                        "id": response_id(target, attack),
                        "attack_id": attack["id"],
                        "target": target,
                        **{key: attack[key] for key in ("attacker", "seed_id", "category", "index")},
                        **{key: said[key] for key in ("asked_id", "answer", "finish", "error", "tokens")},
                        **UNSAFE,
                    }
                )
        self._judge(rows)
        return rows

    def _query(self, target: str, sampler: Sampler, attacks: Sequence[Row]) -> None:
        """Ask what has not been asked before; what a cap kept from being asked is not in `said` afterwards."""
        prompts: dict[str, Prompt] = {}
        for attack in attacks:
            asked_id = self._asked_id(target, attack)
            known = self.said.get(asked_id)
            if known is None or known["finish"] == "error":
                prompts[asked_id] = Prompt(({"role": "user", "content": attack["prompt"]},), id=asked_id)
        if not isinstance(sampler, EndpointSampler):  # an endpoint asks the meter itself, before each try
            for asked_id in list(prompts):
                if refusal := self.meter.take():
                    del prompts[asked_id]
                    self._note_spent(refusal)
        how = self.config.target
        groups = sampler(
            list(prompts.values()), max_new_tokens=how.max_new_tokens, temperature=how.temperature, top_p=how.top_p,
            seed=self.config.seed,
        ) if prompts else []  # fmt: skip
        for asked_id, (done,) in zip(prompts, groups, strict=True):
            if not self._note_spent(done.error):
                self.said[asked_id] = {
                    "asked_id": asked_id,
                    "answer": done.text,
                    "finish": done.finish,
                    "error": done.error,
                    "tokens": tokens_of([done]),
                }

    def _asked_id(self, target: str, attack: Row) -> str:
        how = self.config.target
        which = attack["id"] if how.temperature else None
        return content_id(target, how.model_dump(), self.config.seed, attack["prompt"], which)

    def _judge(self, rows: Sequence[Row]) -> None:
        """Put the verdict into each row: on harm where the seed is harmful, on refusal where it is benign."""
        for category, judge in (("harmful", self.judges.harm), ("benign", self.judges.refusal)):
            mine = [row for row in rows if row["category"] == category]
            answered = [row for row in mine if row["finish"] != "error"]
            groups = [
                (
                    # Harm is held to what was wanted, a refusal to what was asked.
                    Prompt(
                        ({"role": "user", "content": self._text(row, "seed" if category == "harmful" else "prompt")},)
                    ),
                    [Completion(row["asked_id"], row["answer"], row["finish"])],
                )
                for row in answered
            ]
            self.judged += len(groups)
            scored = iter(judges.judge_groups(judge, groups, max_unscored=1.0) if groups else [])
            for row in mine:
                failed = Verdict(None, judge.identity, reason=f"no answer: {row['error'] or 'the target failed'}")
                verdict = failed if row["finish"] == "error" else next(scored)[0]
                row |= {"verdict": verdict_row(verdict), "fell": verdict.holds}
                self._note_spent(verdict.reason if verdict.is_unscored else None)

    def _text(self, response: Row, key: str) -> str:
        return str(self.attacks[response["attack_id"]][key])

    # --- searches ---------------------------------------------------------------------------------------------

    def search(self, target: str, sampler: Sampler, attacker: Attacker, writer: Callable[[], Sampler]) -> list[Row]:
        """Let PAIR search on each harmful seed, with at most k questions each; returns its attacks on this target."""
        k, seeds = self.config.k, [seed for seed in self.seeds if seed.category == "harmful"]
        names = {seed.id: [self._attack_id(attacker, seed, i, target) for i in range(k)] for seed in seeds}
        todo = [seed for seed in seeds if self._is_unsearched(target, names[seed.id])]
        loaded = writer() if todo else None
        with progress(f"{attacker.name} on {target}", len(seeds)) as advance:
            advance(len(seeds) - len(todo))
            for batch in _parts(todo, max(1, self.config.batch // k)):
                if self.stopped:
                    break
                assert loaded is not None
                self._search(target, sampler, attacker, loaded, batch, names)
                advance(len(batch))
        return [self.attacks[name] for seed in seeds for name in names[seed.id] if name in self.attacks]

    def _is_unsearched(self, target: str, names: Sequence[str]) -> bool:
        made = [self.attacks[name] for name in names if name in self.attacks]
        return not made or any(
            row["prompt"] is not None and not is_scored(self.responses.get(response_id(target, row))) for row in made
        )

    def _search(
        self, target: str, sampler: Sampler, attacker: Attacker, writer: Sampler, seeds: Sequence[Seed],
        names: dict[str, list[str]],
    ) -> None:  # fmt: skip
        plan, k = PLANS["pair"], self.config.k
        rounds = min(k, self.config.rounds or plan.depth)
        plan = replace(plan, depth=rounds, width=max(1, k // rounds))
        requests = [
            Prompt(({"role": "user", "content": seed.prompt},), id=seed.id, category="harmful") for seed in seeds
        ]

        def ask(prompts: Sequence[Prompt], _: int) -> list[Completion]:
            rows = [{"id": p.id, "prompt": p.text} for p in prompts]
            self._query(target, sampler, rows)
            said = [self.said.get(self._asked_id(target, row)) for row in rows]
            return [
                Completion(p.id, one["answer"], one["finish"], error=one["error"], counted_tokens=one["tokens"])
                if one
                else Completion(p.id, "", "error", error=self.stopped or "not asked")
                for p, one in zip(prompts, said, strict=True)
            ]

        def score(plain: Sequence[Prompt], _: Sequence[Prompt], answers: Sequence[Completion]) -> list[Verdict]:
            groups = [(p, [a]) for p, a in zip(plain, answers, strict=True)]
            self.judged += len(groups)
            return [verdict for (verdict,) in judges.judge_groups(self.judges.harm, groups, max_unscored=1.0)]

        traces = search(
            requests, plan, ask, writer, score, name="pair", form=self.config.attacker_form, max_queries=k,
            seed=self.config.seed,
        )  # fmt: skip
        attacks, responses = [], []
        for seed, trace in zip(seeds, traces, strict=True):
            own = names[seed.id]
            self._note_spent(trace.failure)
            if not trace.attempts and not self.stopped:
                nothing = Written("", "error", trace.attacker_tokens, trace.doubt)
                attacks.append(self._attack_row(attacker, seed, 0, own[0], nothing))
            for i, attempt in enumerate(trace.attempts):
                tokens = trace.attacker_tokens if i == 0 else 0
                row = self._attack_row(attacker, seed, i, own[i], Written(attempt.asked.text, "stop", tokens))
                said = self.said.get(self._asked_id(target, {"id": attempt.asked.id, "prompt": attempt.asked.text}))
                attacks.append(row)
                if said is not None:
                    about = {key: row[key] for key in ("attacker", "seed_id", "category", "index")}
                    told = {"verdict": verdict_row(attempt.verdict), "fell": attempt.verdict.holds}
                    responses.append(
                        {"id": response_id(target, row), "attack_id": row["id"], "target": target, **about, **said,
                         **told, **UNSAFE}
                    )  # fmt: skip
        self._judge_faithful(attacker, seeds, attacks)
        self._keep(ATTACKS, self.attacks, attacks)
        self._keep(RESPONSES, self.responses, responses)

    # --- the journal ------------------------------------------------------------------------------------------

    def _keep(self, name: str, held: dict[str, Row], rows: Sequence[Row]) -> None:
        for row in rows:
            if held.get(row["id"]) != row:
                self.run.append_row(name, row)
                held[row["id"]] = row

    def _note_spent(self, reason: str | None) -> bool:
        """Stop where a reason says that a cap was met; says whether it did."""
        if reason is None or SPENT not in reason:
            return False
        self.stopped = self.stopped or reason[reason.index(SPENT) :]
        return True

    def _require_faithfulness(self, attacker: Attacker, attacks: Sequence[Row]) -> None:
        unscored = [row for row in attacks if row["faithful"] is None]
        if not self.stopped and len(unscored) > self.config.max_unscored * len(attacks):
            raise RuntimeError(
                f"{attacker.name}: of {len(unscored)} of {len(attacks)} attacks it is not known whether they are "
                f"faithful (limit {self.config.max_unscored:.0%}), as of this one: {unscored[0]['faithful_reason']}; "
                "correct faithfulness= or judge_endpoint.*, and go on with --resume, or raise max_unscored"
            )

    def _require_scored(self, target: str, attacks: Sequence[Row]) -> None:
        made = [self.responses[name] for row in attacks if (name := response_id(target, row)) in self.responses]
        rows = [
            {"outcomes": {f"{row['category']} seeds": row["fell"]}, "verdict": row["verdict"], "refusal": {}}
            for row in made
        ]
        if None in (row["fell"] for row in made):
            require_scored(rows, self.config.max_unscored, str(self.run.root / RESPONSES), total=len(attacks))


def response_id(target: str, attack: Row) -> str:
    """Return the id of what a target said to an attack."""
    return content_id(target, attack["id"])


def is_scored(row: Row | None) -> bool:
    """Whether an attempt needs nothing more."""
    return row is not None and row["fell"] is not None


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
