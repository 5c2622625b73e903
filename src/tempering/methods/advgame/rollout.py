"""Rollout trees: attacks on seeds, answers to attacks, and what the judges say; every sample is on disk before it is
judged, and every judgement before it is used.

    X[b][a] = attacker(instruct(class, s_b));  Y[b][a][d] = defender(x) for each valid x
    r_y = judge(x or s, the answers to x);  y* = the best of them;  r_x = judge(s, the y* of one seed)

A sample is keyed by where it stands in the game (`rng_key`) and by the weights that wrote it (`policy_version`),
never by its batch. Samples are written in chunks, each in one piece: a resumed run writes them in the same batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from tempering.core.draws import Key
from tempering.core.endpoint import EndpointSampler
from tempering.core.records import Prompt, Verdict, content_id
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.data.attacker import INSTRUCTIONS, Category, attacker_message
from tempering.data.seeds import Seed
from tempering.judges.game import Asked, GameJudge, game_judge
from tempering.judges.game_askers import Criterion
from tempering.judges.journal import Journal
from tempering.judges.tags import parse_attack
from tempering.methods.advgame.networks import Weights
from tempering.methods.advgame.pairs import (
    AttackNode,
    Response,
    Status,
    Tree,
    attack_status,
    patch_rewards,
    response_status,
    speaking_responses,
)
from tempering.methods.advgame.players import Seats
from tempering.methods.advgame.samples import Request, RolloutLog, Sample
from tempering.methods.advgame.settings import AdvGameConfig, Role

ROLLOUTS, JUDGEMENTS = "data/rollouts.jsonl", "data/judgements.jsonl"
MOST_POINTS = 10.0


class Judges(NamedTuple):
    """Who judges what; `None`: nobody."""

    faithfulness: GameJudge
    defender: GameJudge | None
    attacker: GameJudge | None

    @property
    def each(self) -> list[GameJudge]:
        """Every judge once."""
        return list({id(judge): judge for judge in self if judge is not None}.values())

    def apart(self) -> Judges:
        """The same judges, which count by themselves."""
        made = {id(judge): judge.apart() for judge in self.each}
        defender, attacker = (judge and made[id(judge)] for judge in (self.defender, self.attacker))
        return Judges(made[id(self.faithfulness)], defender, attacker)


def load_judges(config: AdvGameConfig, run: Run) -> Judges:
    """Make the judges, which keep the run's journal.

    Raises:
        ValueError: a judge that is not known.
    """
    own = config.judges
    journal = Journal(run.path(JUDGEMENTS))
    made: dict[str, GameJudge] = {}

    def connect(spec: str) -> EndpointSampler:
        return EndpointSampler(spec, cache=run.root / "cache", **own.endpoint.model_dump())

    def load(spec: str | None) -> GameJudge | None:
        if spec is None:
            return None
        name = own.default if spec == "default" else spec
        if name not in made:
            made[name] = game_judge(
                name, kind=own.kind, order=own.order, seed=config.seed, judge_singletons=own.judge_singletons,
                faithfulness_samples=own.faithfulness_samples, journal=journal, connect=connect,
                temperature=own.temperature, max_new_tokens=own.max_new_tokens,
            )  # fmt: skip
        return made[name]

    faithfulness = load(own.faithfulness)
    assert faithfulness is not None
    return Judges(faithfulness, load(own.defender), load(own.attacker))


class Table(NamedTuple):
    """Seeds of one class that are played together, and who plays them."""

    category: Category
    seeds: Sequence[Seed]
    keys: Sequence[Any]
    """What each seed's samples are keyed by, beside class, role and place."""
    attacker: Weights
    defender: Weights
    attacks: int
    responses: int
    step: int
    staleness: int | None = None
    """How many steps older than those that learn from it the players are, where they may be."""


class Dealer:
    """Plays tables: samples, parses, asks the judges, and gives statuses and rewards.

    `play` is all of it; its parts are for who puts something else between them. `attack` and `answer` compute with
    the players, `check` and `grade` ask judges.
    """

    def __init__(self, config: AdvGameConfig, seats: Seats, judges: Judges, log: RolloutLog) -> None:
        self.config, self.seats, self.judges, self.log = config, seats, judges, log
        self.reasons: Counter[str] = Counter()
        """Why verdicts were unscored."""
        self.tokens = 0
        """Written so far, replayed ones among them."""
        self.versions: dict[str, str] = {}
        """Which weights wrote what was played, as ROLE/WEIGHTS."""
        self.is_replaying = False
        """Whether all was written before, by `versions`; the weights that wrote it may be gone."""

    def apart(self, versions: Mapping[str, str] | None = None) -> Dealer:
        """Return a dealer that counts by itself; with `versions` it plays again what these wrote."""
        own = Dealer(self.config, self.seats, self.judges.apart(), self.log)
        own.versions, own.is_replaying = dict(versions or {}), versions is not None
        return own

    def play(self, *tables: Table) -> list[Tree]:
        """Play tables together, from the attacks to the rewards; the trees stand in the order of their seeds."""
        return self.grade(self.answer(tables, self.check(self.attack(tables))))

    def grade(self, trees: Sequence[Tree]) -> list[Tree]:
        """Ask the judges about answers, then about attacks, and give rewards."""
        return [patch_rewards(tree) for tree in self._grade_attacks(self._grade_answers(trees))]

    def instruction(self, category: Category, seed: str) -> str:
        """The user turn that asks the attacker for a rewrite."""
        return attacker_message(INSTRUCTIONS[category], self.config.rollout.format, seed)

    # --- sampling ------------------------------------------------------------------------------------

    def attack(self, tables: Sequence[Table]) -> list[Tree]:
        """Let the attacker rewrite the seeds."""
        is_direct = self.config.rollout.source == "seeds"
        asked: list[tuple[Weights, Request]] = [
            (table.attacker, self._request(table, "attacker", b, a, None, self.instruction(table.category, s.prompt)))
            for table in tables
            for b, s in enumerate(table.seeds)
            for a in range(table.attacks)
        ]
        if is_direct:
            samples = [Sample((), s.prompt, "stop") for t in tables for s in t.seeds for _ in range(t.attacks)]
        else:
            samples = self._sample("attacker", asked, self.config.rollout.attacker_tokens)
        nodes = iter([AttackNode(self._parsed(sample)) for sample in samples])
        return [
            Tree(seed.id, table.category, seed.prompt, tuple(next(nodes) for _ in range(table.attacks)))
            for table in tables
            for seed in table.seeds
        ]

    def _parsed(self, sample: Sample) -> Response:
        fmt = "raw" if self.config.rollout.source == "seeds" else self.config.rollout.format
        prompt = parse_attack(sample.text, fmt).prompt
        status = attack_status(sample.finish, prompt is not None)
        return Response(sample.token_ids, sample.text, sample.finish, prompt, status, logprobs=sample.logprobs)

    def answer(self, tables: Sequence[Table], trees: Sequence[Tree]) -> list[Tree]:
        """Let the defender answer the attacks that are valid."""
        seats = [(table, b) for table in tables for b in range(len(table.seeds))]  # of each tree
        asked: dict[tuple[int, int, int], tuple[Weights, Request]] = {}
        for i, ((table, b), tree) in enumerate(zip(seats, trees, strict=True)):
            for a, node in enumerate(tree.attacks):
                if node.attack.status == "OK":
                    for d in range(table.responses):
                        request = self._request(table, "defender", b, a, d, node.attack.prompt or "")
                        asked[i, a, d] = table.defender, request
        samples = self._sample("defender", list(asked.values()), self.config.rollout.defender_tokens)
        found = dict(zip(asked, samples, strict=True))
        never = Response((), "", None, None, response_status(None))

        def response(i: int, a: int, d: int) -> Response:
            s = found.get((i, a, d))
            if s is None:
                return never
            status = response_status(s.finish)
            return Response(s.token_ids, s.text, s.finish, s.text, status, logprobs=s.logprobs)

        return [
            replace(
                tree,
                attacks=tuple(
                    replace(node, responses=tuple(response(i, a, d) for d in range(table.responses)))
                    for a, node in enumerate(tree.attacks)
                ),
            )
            for i, ((table, _), tree) in enumerate(zip(seats, trees, strict=True))
        ]

    def _request(self, table: Table, role: Role, b: int, a: int, d: int | None, prompt: str) -> Request:
        key = content_id(self.config.seed, table.keys[b], table.category, role, a, d)
        facts: dict[str, Any] = {
            "step": table.step,
            "class": table.category,
            "seed_id": table.seeds[b].id,
            "role": role,
        }
        facts |= {"b": b, "a": a, "d": d} | ({} if table.staleness is None else {"staleness": table.staleness})
        return Request(prompt, key, facts)

    def _sample(self, role: Role, asked: Sequence[tuple[Weights, Request]], tokens: int) -> list[Sample]:
        """Answer requests, those to the same weights together."""
        found: dict[int, Sample] = {}
        for weights in dict.fromkeys(weights for weights, _ in asked):
            places = [i for i, (own, _) in enumerate(asked) if own == weights]
            samples = self._sample_of(role, weights, [asked[i][1] for i in places], tokens)
            found |= dict(zip(places, samples, strict=True))
        return [found[i] for i in range(len(asked))]

    def _sample_of(self, role: Role, weights: Weights, requests: Sequence[Request], tokens: int) -> list[Sample]:
        own, player, name = self.config.rollout, self.seats.of(role), f"{role}/{weights}"
        if not self.is_replaying:
            self.versions[name] = player.version(weights, own.temperature, own.top_p, tokens)
        version = self.versions[name]
        sampler = LocalSampler(player.policy, batch_rows=own.rows, batch_tokens=self.config.sample_tokens)
        found: list[Sample] = []
        for start in range(0, len(requests), own.rows):
            part = requests[start : start + own.rows]
            kept = [self.log.get(version, request.rng_key) for request in part]
            if any(sample is None for sample in kept):
                if self.is_replaying:
                    raise RuntimeError(
                        f"{self.log.path}: samples of step {part[0].facts['step']} are missing that the checkpoint "
                        "goes on from; put the file back as it was, or begin again"
                    )
                prompts = [Prompt(({"role": "user", "content": r.prompt},), id=r.rng_key) for r in part]
                nothing: dict[Key, list[float]] = {}
                with (
                    player.playing(weights),
                    sampler.keeping_logprobs() if own.logprobs else nullcontext(nothing) as said,
                ):
                    groups = sampler(
                        prompts, max_new_tokens=tokens, temperature=own.temperature, top_p=own.top_p,
                        seed=self.config.seed,
                    )  # fmt: skip
                written = [
                    Sample(c.token_ids, c.text, c.finish, tuple(said.get((self.config.seed, c.prompt_id, 0), ())))
                    for (c,) in groups
                ]
                kept = [old or new for old, new in zip(kept, written, strict=True)]
                self.log.put(version, list(zip(part, [s for s in kept if s is not None], strict=True)))
            found += [sample for sample in kept if sample is not None]
        self.tokens += sum(len(sample.token_ids) for sample in found)
        return found

    # --- judging -------------------------------------------------------------------------------------

    def check(self, trees: Sequence[Tree]) -> list[Tree]:
        """Ask whether each attack is faithful to its seed."""
        if self.config.rollout.source == "seeds":
            return list(trees)
        places = [(b, a) for b, t in enumerate(trees) for a, n in enumerate(t.attacks) if n.attack.status == "OK"]
        verdicts = self.judges.faithfulness.faithful(
            [
                Asked(
                    "faithfulness_harmful" if trees[b].category == "harmful" else "faithfulness_benign",
                    trees[b].seed, (trees[b].attacks[a].attack.prompt or "",), f"{trees[b].seed_id}/{a}",
                )
                for b, a in places
            ]
        )  # fmt: skip
        said = dict(zip(places, verdicts, strict=True))
        self._note(verdicts)

        def status(b: int, a: int, node: Response) -> Status:
            if (b, a) not in said or node.finish is None:
                return node.status
            return attack_status(node.finish, node.prompt is not None, is_faithful=said[b, a].holds)

        return _with_attacks(trees, lambda b, a, node: replace(node.attack, status=status(b, a, node.attack)))

    def _grade_answers(self, trees: Sequence[Tree]) -> list[Tree]:
        judge = self.judges.defender
        if judge is None:
            return list(trees)
        places = [(b, a) for b, t in enumerate(trees) for a, n in enumerate(t.attacks) if _valid(n)]
        by_prompt = self.config.judges.defender_query == "prompt"
        asked = [
            Asked(
                "deflection" if trees[b].category == "harmful" else "compliance",
                (trees[b].attacks[a].attack.prompt or "") if by_prompt else trees[b].seed,
                tuple(trees[b].attacks[a].responses[d].text for d in _valid(trees[b].attacks[a])),
                f"{trees[b].seed_id}/{a}/answers",
            )
            for b, a in places
        ]
        verdicts = judge.score(asked)
        self._note([verdict for group in verdicts for verdict in group])
        said = {
            (b, a, d): verdict
            for (b, a), group in zip(places, verdicts, strict=True)
            for d, verdict in zip(_valid(trees[b].attacks[a]), group, strict=True)
        }

        def graded(b: int, a: int, d: int, response: Response) -> Response:
            verdict = said.get((b, a, d))
            if verdict is None:
                return response
            return replace(
                response,
                status=response_status(response.finish, is_scored=not verdict.is_unscored),
                score=_points(verdict),
            )

        return [
            replace(
                tree,
                attacks=tuple(
                    replace(node, responses=tuple(graded(b, a, d, r) for d, r in enumerate(node.responses)))
                    for a, node in enumerate(tree.attacks)
                ),
            )
            for b, tree in enumerate(trees)
        ]

    def _grade_attacks(self, trees: Sequence[Tree]) -> list[Tree]:
        """Compare the attacks on a seed by an answer to each, as many times as answers speak for them."""
        judge, config = self.judges.attacker, self.config.judges
        speaking = [
            [
                speaking_responses(node.responses, config.attacker_response) if node.attack.status == "OK" else []
                for node in tree.attacks
            ]
            for tree in trees
        ]
        said: dict[tuple[int, int], list[Verdict]] = {}
        if judge is not None:
            rounds = [
                (b, k, [(a, places[k]) for a, places in enumerate(own) if len(places) > k])
                for b, own in enumerate(speaking)
                for k in range(max(map(len, own), default=0))
                if k == 0 or config.judge_singletons or sum(len(places) > k for places in own) > 1
            ]  # an answer that nobody asks about would be worth 0, and pull its attack down
            asked = [
                Asked(
                    self._wanted(trees[b].category), trees[b].seed,
                    tuple(trees[b].attacks[a].responses[d].text for a, d in answers),
                    f"{trees[b].seed_id}/attacks/{k}",
                )
                for b, k, answers in rounds
            ]  # fmt: skip
            verdicts = judge.score(asked)
            self._note([verdict for group in verdicts for verdict in group])
            for (b, _, answers), group in zip(rounds, verdicts, strict=True):
                for (a, _), verdict in zip(answers, group, strict=True):
                    said.setdefault((b, a), []).append(verdict)

        def graded(b: int, a: int, node: AttackNode) -> Response:
            attack = node.attack
            if attack.status != "OK" or attack.finish is None:
                return attack
            points = [p for verdict in said.get((b, a), []) if (p := _points(verdict)) is not None]
            status = attack_status(
                attack.finish, attack.prompt is not None, is_answered=bool(speaking[b][a]),
                is_scored=judge is None or not speaking[b][a] or bool(points),
            )  # fmt: skip
            return replace(attack, status=status, score=sum(points) / len(points) if points else None)

        return _with_attacks(trees, graded)

    def _wanted(self, category: Category) -> Criterion:
        """What the attacker wants of the answers."""
        return "compliance" if category == "harmful" else self.config.judges.attacker_benign

    def _note(self, verdicts: Sequence[Verdict]) -> None:
        self.reasons.update(v.reason or "" for v in verdicts if v.is_unscored)


def judging_metrics(judges: Judges) -> tuple[dict[str, float], int, int]:
    """What became of the questions of a step: for the metrics, and how many were unscored of how many."""
    found: dict[str, float] = {}
    asked = unscored = 0.0
    for judge in judges.each:
        told = judge.metrics()
        found |= {f"judge/{name}": value for name, value in told.items()}
        for name, value in told.items():
            criterion, _, what = name.partition("/")
            asked += value if what == "asked" else 0.0
            unscored += value * told[f"{criterion}/asked"] if what == "unscored" else 0.0
    return found, round(unscored), round(asked)


def _valid(node: AttackNode) -> list[int]:
    return [d for d, response in enumerate(node.responses) if response.status == "OK"]


def _points(verdict: Verdict) -> float | None:
    return None if verdict.score is None else MOST_POINTS * verdict.score


def _with_attacks(trees: Sequence[Tree], change: Any) -> list[Tree]:
    """The trees with each attack replaced by `change(b, a, node)`."""
    return [
        replace(tree, attacks=tuple(replace(node, attack=change(b, a, node)) for a, node in enumerate(tree.attacks)))
        for b, tree in enumerate(trees)
    ]
