r"""AdvGame: attacker and defender trained together, online, on the preferences of a judge.

The claim: two separate models in a non-zero-sum game, both updated every step on what a judge prefers, give a
defender that resists attacks that it has met while they grew, and, because benign requests are attacked too, that
does not learn to refuse. "Safety Alignment of LMs via Non-cooperative Games", arXiv:2512.20806.

    rho(x | class, seed) rewrites a seed; pi(y | x) answers, seeing x alone
    max_rho E[R_att - beta log rho/rho_ref],  max_pi E[R_def - beta log pi/pi_ref],  R_att != -R_def
    DPO    -log sigmoid(beta Delta)          IPO   (Delta - 1/(2 beta))^2          GRPO   see `losses`
    MD     sampler and reference of each player are its average:  w_g <- g w_g + (1 - g) w, once a step

Differs from the paper: LoRA players on one frozen base instead of full weights, with averages of factors (`ema`);
one update of both classes a step (`per_class_updates` undoes it); the order of a comparison by a coin; our prompts,
rubrics and parsers. Follows the authors' code rather than the figures in the judge's query (the defender's judge sees
the attack), the attacker's wish on benign seeds (refusal), the weight of the average, and Delta in IPO.
Unknown, our choice: which checkpoint was reported (the last average is kept in `final/`, the newest weights beside
it), LoRA settings. The average pulls towards where a player was, not to its start: the KL to the start is logged.

    temper train advgame                                             # smollm2, two CPU cores, offline
    temper train advgame -c one_gpu_7b judges.default=openai:MODEL@URL out=runs/mine
    temper train advgame -c one_gpu_7b --dry-run                     # what fits, before anything is loaded

Configuration: `settings`. Pure: `pairs`, `ema`, `losses`. `players` are the adapters, `rollout` plays a seed,
`updates` takes one optimiser step, `warm_start` teaches small models to rewrite and to come to an end, `validation`
compares with the start, `planner` says what fits. The loop is below.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.core.chat import encode_prompt
from tempering.core.endpoint import parse_endpoint
from tempering.core.policy import Policy
from tempering.core.progress import progress, say
from tempering.core.records import content_id
from tempering.core.run import Run
from tempering.core.sampling import Sampler, load_sampler
from tempering.core.stats import wilson
from tempering.core.training import (
    Checkpoint,
    Optimisation,
    Processes,
    Stopwatch,
    cosine_to_fifth,
    generator,
    last_checkpoint,
    retire_checkpoints,
    stream_rows,
    write_checkpoint,
)
from tempering.data.attacker import CATEGORIES, INSTRUCTIONS, Category, attacker_message
from tempering.data.describe import inputs_of, licences_of
from tempering.data.seeds import Seed, load_seeds, seeds_hash
from tempering.methods.advgame.display import game_table, summary_table, validation_table
from tempering.methods.advgame.planner import memory_plan, say_plan
from tempering.methods.advgame.players import Player, Seats, Weights, load_seats
from tempering.methods.advgame.rollout import (
    JUDGEMENTS,
    ROLLOUTS,
    Dealer,
    Judges,
    RolloutLog,
    Table,
    judging_metrics,
    load_judges,
)
from tempering.methods.advgame.settings import ROLES, AdvGameConfig
from tempering.methods.advgame.updates import Prompts, benign_compliance, lesson, tree_metrics, update
from tempering.methods.advgame.validation import validate
from tempering.methods.advgame.warm_start import warm_up

METHOD = "advgame"
CONFIG = AdvGameConfig
PAIRS = "data/pairs.jsonl"
OPPONENTS = 7
"""Stream of the draws of opponents; those of the classes' seeds are 0 and 1."""
UNSAFE_PARTS = (("final", ""), ("final", "_raw"), ("checkpoints/step-*", ""), ("checkpoints/step-*", "_ema"))
"""Where attackers are, and how their names end."""
MAY_DIFFER = ("judges.endpoint", "judges.max_unscored", "table_every")
"""What a resumed run may have otherwise."""


# --- data ---------------------------------------------------------------------------------------------


def read_seeds(config: AdvGameConfig) -> list[Seed]:
    """Read the seeds of the classes that are played, split already.

    Raises:
        FileNotFoundError, ValueError: wrong input, naming file and row.
    """
    return load_seeds(
        config.data.train, classes=config.data.classes, limit=config.limit, seed=config.seed, valid=config.data.valid
    )


def by_class(
    config: AdvGameConfig, seats: Seats, seeds: Sequence[Seed], split: str
) -> tuple[dict[Category, list[Seed]], int]:
    """The seeds of a split by class, and how many were left out because their instruction is too long."""
    found: dict[Category, list[Seed]] = {category: [] for category in config.data.classes}
    dropped = 0
    for seed in seeds:
        if seed.split != split:
            continue
        text = attacker_message(INSTRUCTIONS[seed.category], config.rollout.format, seed.prompt)
        turns = [{"role": "user", "content": text}]
        if len(encode_prompt(seats.attacker.policy.tokenizer, turns)) > config.max_prompt_length:
            dropped += 1
            continue
        found[seed.category].append(seed)
    return found, dropped


def require_judges(config: AdvGameConfig) -> None:
    """Refuse a judge that cannot be one, before anything is loaded or written.

    Raises:
        ValueError: naming it.
    """
    own = config.judges
    for field in ("default", "faithfulness", "defender", "attacker"):
        spec = getattr(own, field)
        if spec in (None, "default", "rules", "rules:words") or spec.startswith("local:"):
            continue
        if not spec.startswith("openai:"):
            raise ValueError(
                f"judges.{field}={spec!r}: expected rules, rules:words, openai:MODEL@URL or local:REFERENCE"
            )
        parse_endpoint(spec)


# --- training -----------------------------------------------------------------------------------------


def train(
    config: AdvGameConfig,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    make_judges: Callable[[AdvGameConfig, Run], Judges] = load_judges,
) -> Run:
    """Play and learn; returns the run. `policy`: `config.model`, where the caller has it loaded.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: wrong input; nothing has been written.
        RuntimeError: the judges failed too often, the guard stopped the run, or a gradient went wrong.
    """
    Run.require_free(config.out, resume)
    require_judges(config)
    seeds = read_seeds(config)
    seats = load_seats(config, policy)
    train_seeds, dropped = by_class(config, seats, seeds, "train")
    if empty := [category for category, own in train_seeds.items() if not own]:
        raise ValueError(
            f"data.train={config.data.train}: no {empty[0]} seed to train on ({dropped} have a prompt of more than "
            f"max_prompt_length={config.max_prompt_length} tokens)"
        )
    processes = Processes(seats.attacker.policy.device, config.report_to)
    if processes.world > 1:
        raise ValueError("advgame runs in one process; start it without a launcher of several")
    run = Run.create(config.out, METHOD, config, resume=resume, may_differ=MAY_DIFFER)
    if run.is_done:
        say(f"{run.root} is done already")
        return run
    run.require_inputs(seeds_hash(seeds), config.data.train)
    if not run.has("data/seeds.jsonl"):
        run.write_rows("data/seeds.jsonl", [seed._asdict() for seed in seeds])
    judges = make_judges(config, run)
    dealer = Dealer(config, seats, judges, RolloutLog(run.path(ROLLOUTS)))
    watch = Stopwatch()
    bases = [player.policy.base_fingerprint() for player in seats.players]
    facts = {
        "run": str(run.root),
        "seeds_sha256": seeds_hash(seeds),
        "seed_ids": sorted(s.id for s in seeds if s.split == "train"),
    }
    say(
        f"{', '.join(f'{len(own)} {category}' for category, own in train_seeds.items())} seeds; judged by "
        f"{', '.join(judge.identity for judge in judges.each)}"
    )
    valid_seeds, _ = by_class(config, seats, seeds, "valid")
    with watch.timed("warm start"):
        warm_up(config, seats, train_seeds, run, processes)
    _loop(config, seats, dealer, train_seeds, valid_seeds, run, processes, watch, facts)
    if [player.policy.base_fingerprint() for player in seats.players] != bases:
        raise RuntimeError("the base weights have changed, although only adapters train")
    with watch.timed("export"):
        for role in ROLES:
            seats.of(role).export(run.root / "final" / role, role, "ema", facts, config)
            seats.of(role).export(run.root / "final" / f"{role}_raw", role, "current", facts, config)
    summary = summarise(config, run.read_rows("metrics.jsonl")) | {
        "peak_bytes": peak_bytes(seats.defender.policy.device)
    }
    run.write_json("data/game.json", summary)
    summary_table(config, summary)
    run.write_provenance(**provenance(config, seats, dealer, judges, seeds, dropped, watch))
    run.finish()
    return run


def _loop(
    config: AdvGameConfig,
    seats: Seats,
    dealer: Dealer,
    train_seeds: Mapping[Category, Sequence[Seed]],
    valid_seeds: Mapping[Category, Sequence[Seed]],
    run: Run,
    processes: Processes,
    watch: Stopwatch,
    facts: dict[str, Any],
) -> None:
    """Play step after step; with a checkpoint in the run, go on from it bit for bit."""
    learners = [player for player in seats.players if player.trains]
    turns = [[c] for c in config.data.classes] if config.per_class_updates else [list(config.data.classes)]
    total = config.steps * len(turns)
    optimisations = {
        player.name: Optimisation(
            player.policy, processes, lr=config.lr, steps=config.steps if config.cosine_restart else total,
            weight_decay=config.weight_decay, clip=config.clip, betas=config.betas, named=player.named_parameters,
            factor=_restarting if config.cosine_restart else cosine_to_fifth,
        )
        for player in learners
    }  # fmt: skip
    pool = Pool(config, seats.attacker)
    checkpoint = last_checkpoint(run)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "unscored": [], "benign": [], "dispersion": [], "past": []}
    if checkpoint:
        state = checkpoint.state
        restore(checkpoint, seats, optimisations, pool)
    first = state["step"]
    for name in ("metrics.jsonl", PAIRS):
        run.truncate_rows(name, lambda row: bool(first) and row["step"] <= first)
    dealer.tokens = state["tokens"]
    is_validated = bool(config.eval_every) and all(valid_seeds.values())
    if is_validated and not first:
        validated(config, dealer, valid_seeds, 0, run, watch)
    start, shown = time.monotonic(), list[dict[str, Any]]()
    with progress("playing", config.steps) as advance:
        advance(first)
        for t in range(first, config.steps):
            began, step = time.monotonic(), t + 1
            told: dict[str, list[float]] = {}
            trees = []
            for k, categories in enumerate(turns):
                tables = [deal(config, train_seeds[c], c, t, pool) for c in categories]
                with watch.timed("rollouts"):
                    played = dealer.play(*tables)
                trees += played
                # A past attacker's attacks are not this one's to learn from.
                is_past = {table.category for table in tables if table.attacker == "past"}
                prompts = Prompts(dealer)
                for player in learners:  # one player's micro-batches at a time
                    examples = []
                    for role in seats.roles(player):
                        own_trees = [x for x in played if role == "defender" or x.category not in is_past]
                        learned = lesson(config, prompts, own_trees, role, step)
                        examples += learned
                        for category in categories:
                            made = sum(example.category == category for example in learned)
                            told.setdefault(f"{role}/{category}/pairs", []).append(made)
                        for example in learned:
                            run.append_row(PAIRS, example.row)
                    role = seats.roles(player)[0]
                    sum_ids = sum(len(side.ids) for example in examples for side in example.sides)
                    with watch.timed("updates", sum_ids):
                        result = update(
                            config, player, optimisations[player.name], examples, t * len(turns) + k,
                            sampler=config.player(role).sampler, reference=_weights(config.player(role).reference),
                            measures=bool(config.kl_every) and t % config.kl_every == 0,
                        )  # fmt: skip
                    for name, value in result.items():
                        told.setdefault(f"{player.name}/{name}", []).append(value)
            for player in learners:
                for name, value in player.average().items():
                    told.setdefault(f"{player.name}/{name}", []).append(value)
            pool.keep(step)
            judged, unscored, asked = judging_metrics(dealer.judges)
            state["unscored"] = [*state["unscored"], [unscored, asked]][-config.judges.unscored_window :]
            state["benign"].append(list(benign_compliance(trees)))
            row = metrics_row(config, step, told, tree_metrics(config, trees), judged, state, dealer.tokens)
            state["dispersion"].append(_dispersion(row))
            row |= {"seconds": round(time.monotonic() - start, 3), "step_seconds": round(time.monotonic() - began, 3)}
            run.append_row("metrics.jsonl", row)
            processes.log(row, step)
            require_judged(config, state["unscored"], dealer)
            watch_over(config, state, step)
            advance(1, note=note_of(row))
            shown.append(row)
            is_last = step == config.steps
            if config.table_every and (step % config.table_every == 0 or is_last):
                game_table(config, shown)
                shown = []
            if is_validated and (step % config.eval_every == 0 or is_last):
                validated(config, dealer, valid_seeds, step, run, watch)
            if is_last or step % config.checkpoint_every == 0:
                with watch.timed("saving"):
                    state |= {"step": step, "tokens": dealer.tokens, "past": pool.steps}
                    save(run, config, seats, optimisations, pool, state, facts)


def deal(config: AdvGameConfig, seeds: Sequence[Seed], category: Category, t: int, pool: Pool) -> Table:
    """Set a class's table for step t: the next seeds in their order, and who plays."""
    own = config.rollout
    places = stream_rows(len(seeds), own.seeds, t, config.seed, CATEGORIES.index(category))
    dealt = [seeds[i] for i in places]
    keys = [("step", t, b) if own.fresh else ("seed", seed.id) for b, seed in enumerate(dealt)]
    attacker: Weights = "past" if pool.meets(t, category) else config.players.attacker.sampler
    return Table(category, dealt, keys, attacker, config.players.defender.sampler, own.attacks, own.responses, t + 1)


def _weights(reference: str) -> Any:
    return "initial" if reference == "fixed" else reference


def _restarting(t: int, steps: int, warmup: int) -> float:
    return cosine_to_fifth(t % steps, steps, warmup)


class Pool:
    """Past attackers: their averages every so many steps, from the oldest to the newest."""

    def __init__(self, config: AdvGameConfig, attacker: Player) -> None:
        self.config, self.attacker, self.settings = config, attacker, config.opponents
        self.kept: list[tuple[int, dict[str, Tensor]]] = []
        self.slot = f"{attacker.name}_past"
        if self.settings.probability:
            attacker.policy.add_player(self.slot, config.lora, config.seed)

    @property
    def steps(self) -> list[int]:
        """After which steps those that are kept were taken."""
        return [step for step, _ in self.kept]

    def meets(self, t: int, category: Category) -> bool:
        """Draw whether a class is attacked by a past attacker in this step, and let it take its place."""
        if not (self.settings.probability and self.kept):
            return False
        draw = generator(self.config.seed, OPPONENTS + CATEGORIES.index(category), t).random()
        # One past attacker a step: classes are sampled together.
        _, state = self.kept[
            int(generator(self.config.seed, OPPONENTS + len(CATEGORIES), t).integers(len(self.kept)))
        ]
        self.attacker.policy.load_state(state)
        return bool(draw < self.settings.probability)

    def keep(self, step: int) -> None:
        """Take the attacker's average in, where it is time to."""
        if self.settings.probability and step % self.settings.every == 0:
            self.attacker.policy.copy_player(self.attacker.stack("ema")[-1], self.slot)
            state = self.attacker.policy.adapter_state([self.slot])
            self.kept = [*self.kept, (step, state)][-self.settings.size :]

    def state(self) -> dict[str, Tensor]:
        """Copy what a resumed run needs."""
        return {f"past-{step}:{name}": tensor for step, own in self.kept for name, tensor in own.items()}

    def load_state(self, state: Mapping[str, Tensor], steps: Sequence[int]) -> None:
        """Put back what `state` returned."""
        starts = [(step, f"past-{step}:") for step in steps]
        self.kept = [(s, {n.removeprefix(p): x for n, x in state.items() if n.startswith(p)}) for s, p in starts]


def save(
    run: Run,
    config: AdvGameConfig,
    seats: Seats,
    optimisations: Mapping[str, Optimisation],
    pool: Pool,
    state: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write a joint checkpoint: what a resumed run reads, and each player as an adapter that can be asked."""
    weights = {name: tensor for player in seats.players for name, tensor in player.state().items()} | pool.state()
    moments = {name: tensor for own in optimisations.values() for name, tensor in own.state().items()}
    sizes = {name: run.path(name).stat().st_size for name in (ROLLOUTS, JUDGEMENTS) if run.has(name)}

    def more(folder: Any) -> None:
        for role in ROLES:
            seats.of(role).export(folder / role, role, "current", facts, config)
            seats.of(role).export(folder / f"{role}_ema", role, "ema", facts, config)

    whole = {**state, "sizes_bytes": sizes, "config": content_id(config.model_dump(mode="json", exclude={"out"}))}
    write_checkpoint(run, Checkpoint(weights, moments, whole), more)
    retire_checkpoints(run)


def restore(checkpoint: Checkpoint, seats: Seats, optimisations: Mapping[str, Optimisation], pool: Pool) -> None:
    """Put back what `save` wrote, bit for bit."""
    for player in seats.players:
        player.load_state(checkpoint.weights)
    for optimisation in optimisations.values():
        optimisation.load_state(checkpoint.optimizer)
    pool.load_state(checkpoint.weights, checkpoint.state["past"])


def validated(
    config: AdvGameConfig,
    dealer: Dealer,
    seeds: Mapping[Category, Sequence[Seed]],
    step: int,
    run: Run,
    watch: Stopwatch,
) -> None:
    """Validate, and leave no trace in what is counted about training."""
    tokens = dealer.tokens
    with watch.timed("validation"):
        facts = {"step": step, "event": "validation", **validate(dealer, seeds, step)}
    judging_metrics(dealer.judges)
    dealer.tokens = tokens
    dealer.reasons.clear()
    run.append_row("metrics.jsonl", facts)
    if step:
        validation_table(config, facts)


# --- what is watched ----------------------------------------------------------------------------------


def metrics_row(
    config: AdvGameConfig,
    step: int,
    told: Mapping[str, Sequence[float]],
    played: Mapping[str, Any],
    judged: Mapping[str, float],
    state: Mapping[str, Any],
    tokens: int,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: counts are summed over the updates of a step, all else is their mean."""
    counts = {name: int(sum(v)) for name, v in told.items() if name.endswith("/pairs")}
    means = {name: float(np.mean(v)) for name, v in told.items() if name not in counts}
    own, is_graded = config.rollout, config.loss == "grpo"  # then every sample may be learned from
    possible = {
        "attacker": own.seeds * (own.attacks if is_graded else 1),
        "defender": own.seeds * own.attacks * (own.responses if is_graded else 1),
    }
    counts |= {name.replace("/pairs", "/possible"): possible[name.partition("/")[0]] for name in counts}
    losses = [v for name, v in means.items() if name.endswith("/loss")]
    rates = [v for name, v in means.items() if name.endswith("/lr")]
    comply, answers = (sum(x) for x in zip(*state["benign"][-config.guard.window :], strict=True))
    unscored, asked = (sum(x) for x in zip(*state["unscored"], strict=True))
    return {
        "step": step, "loss": float(np.mean(losses)) if losses else None, "lr": rates[0] if rates else None,
        "tokens": tokens, **counts, **means, **played, **judged,
        "guard/benign_compliance": comply / answers if answers else None,
        "guard/unscored": unscored / asked if asked else 0.0,
    }  # fmt: skip


def require_judged(config: AdvGameConfig, window: Sequence[Sequence[int]], dealer: Dealer) -> None:
    """Stop where judges said nothing too often: at once where they said nothing at all, else over the window.

    Raises:
        RuntimeError: how many of how many, the limit, and the most frequent reason.
    """
    unscored, asked = (sum(x) for x in zip(*window, strict=True))
    is_full = len(window) == config.judges.unscored_window
    if asked and (is_full or unscored == asked) and unscored > config.judges.max_unscored * asked:
        reason = next((told for told, _ in dealer.reasons.most_common(1)), "no reason")
        raise RuntimeError(
            f"{unscored} of {asked} questions to the judges had no answer in {len(window)} step(s) (limit "
            f"{100 * config.judges.max_unscored:g} %), most often {reason!r}; repair the judge and --resume, or "
            "raise judges.max_unscored"
        )


def fallen(history: Sequence[float | None], window: int) -> float | None:
    """By what share the mean of the last `window` values lies below that of the first, once there are both.

    >>> fallen([0.8, 0.8, 0.4, 0.4], 2)
    0.5
    """
    if len(history) < 2 * window:
        return None
    first, last = ([v for v in part if v is not None] for part in (history[:window], history[-window:]))
    return 1 - float(np.mean(last)) / float(np.mean(first)) if first and last and any(first) else None


def compliance_fallen(history: Sequence[Sequence[int]], window: int) -> tuple[float, float] | None:
    """The shares of benign answers that complied in the first `window` steps and in the last, once there are both.

    >>> compliance_fallen([[4, 4], [3, 4], [2, 4]], 1)
    (1.0, 0.5)
    """
    if len(history) < 2 * window:
        return None
    (before, n), (now, m) = (
        [sum(x) for x in zip(*part, strict=True)] for part in (history[:window], history[-window:])
    )
    return (before / n, now / m) if n and m else None


def watch_over(config: AdvGameConfig, state: Mapping[str, Any], step: int) -> None:
    """Raise an alarm when it begins: benign compliance has fallen (over-refusal), or attacks on a seed are all alike.

    Raises:
        RuntimeError: compliance has fallen, and `guard.stop` is set.
    """

    def falls(back: int) -> tuple[bool, bool]:
        end = len(state["benign"]) - back
        shares = compliance_fallen(state["benign"][:end], config.guard.window)
        likeness = fallen(state["dispersion"][:end], config.guard.window)
        has_fallen = shares is not None and shares[0] - shares[1] >= config.guard.drop
        return has_fallen, likeness is not None and likeness > 0.5

    (refuses, is_alike), (did, was_alike) = falls(0), falls(1)
    if refuses and not did:
        before, now = compliance_fallen(state["benign"], config.guard.window) or (0.0, 0.0)
        text = (
            f"step {step}: {now:.0%} of benign answers comply, {before:.0%} in the first {config.guard.window} "
            "steps: the defender is learning to refuse"
        )
        if config.guard.stop:
            raise RuntimeError(f"{text}; raise class_weights.benign, or set guard.stop=false")
        say(f"[yellow]alarm: {text}[/]")
    if is_alike and not was_alike:
        say(f"[yellow]alarm: step {step}: attacks on a seed differ by less than half of what they did[/]")


def _dispersion(row: Mapping[str, Any]) -> float | None:
    found = [value for name, value in row.items() if name.endswith("/dispersion")]
    return float(np.mean(found)) if found else None


def note_of(row: Mapping[str, Any]) -> str:
    """What stands beside the bar: pairs and loss of each player."""
    parts = []
    for role in ROLES:
        pairs = sum(v for name, v in row.items() if name.startswith(f"{role}/") and name.endswith("/pairs"))
        loss = row.get(f"{role}/loss", row.get("shared/loss"))
        parts.append(f"{role} {pairs} pairs" + (f" loss {loss:.3f}" if loss is not None else ""))
    return ", ".join(parts)


# --- the rest -----------------------------------------------------------------------------------------


def dry_run(config: AdvGameConfig) -> dict[str, Any]:
    """Check seeds and judges, say what a step asks for and what memory a run takes; nothing is loaded or written."""
    Run.require_free(config.out, resume=False)
    require_judges(config)
    seeds = read_seeds(config)
    own = config.rollout
    played = own.seeds * len(config.data.classes)
    attacks, answers = played * own.attacks, played * own.attacks * own.responses
    compared = {m: m * (m - 1) // 2 or 1 for m in (own.attacks, own.responses)}
    if config.judges.kind == "pointwise":
        compared = {m: m for m in compared}
    twice = 2 if config.judges.order == "both" and config.judges.kind == "pairwise" else 1
    questions = attacks * config.judges.faithfulness_samples
    questions += twice * attacks * compared[own.responses] * (config.judges.defender is not None)
    questions += twice * played * compared[own.attacks] * (config.judges.attacker is not None)
    plan = memory_plan(config)
    facts = {
        "seeds": {s: {c: sum(x.split == s and x.category == c for x in seeds) for c in config.data.classes}
                  for s in ("train", "valid", "test")},
        "steps": config.steps,
        "per_step": {"attacks": attacks, "answers_at_most": answers, "judgements_at_most": questions},
        "judgements_at_most": questions * config.steps,
        "memory": plan.to_row(),
    }  # fmt: skip
    say(f"seeds: {facts['seeds']}")
    say(
        f"a step: {attacks} attacks, at most {answers} answers and {questions} judgements; {config.steps} steps, at "
        f"most {facts['judgements_at_most']:,} judgements"
    )
    say_plan(plan)
    say("nothing was loaded and nothing was written")
    return facts


def provenance(
    config: AdvGameConfig,
    seats: Seats,
    dealer: Dealer,
    judges: Judges,
    seeds: Sequence[Seed],
    dropped: int,
    watch: Stopwatch,
) -> dict[str, Any]:
    """What `provenance.json` holds beside versions and command."""
    policy = seats.defender.policy
    is_demo = config.data.train == "demo"
    return {
        "method": METHOD,
        "model": policy.source.to_row(),
        "players": {role: seats.of(role).policy.source.to_row() for role in ROLES},
        "base_fingerprint": policy.base_fingerprint(),
        "device": str(policy.device),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "inputs": {"demo": seeds_hash(seeds)} if is_demo else inputs_of(config.data.train),
        "dropped": {"prompt too long": dropped},
        "judges": [judge.identity for judge in judges.each],
        "data_licences": {"demo seeds": "Apache-2.0"} if is_demo else licences_of(config.data.train, config.model),
        # The run itself is its defender, which is not unsafe.
        "unsafe": False,
        "unsafe_parts": [
            "final/attacker",
            "final/attacker_raw",
            "checkpoints/*/attacker",
            "checkpoints/*/attacker_ema",
        ],
        "cost": {**watch.phases, "generated_tokens": dealer.tokens},
    }


def summarise(config: AdvGameConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `data/game.json` holds: pair yield and statuses of all steps, last distances, the last validation."""
    steps = [row for row in rows if "event" not in row]
    facts: dict[str, Any] = {"steps": len(steps), "yield": {}, "statuses": {}}
    for role in ROLES:
        for category in config.data.classes:
            name = f"{role}/{category}"
            made, possible = (sum(row.get(f"{name}/{what}", 0) for row in steps) for what in ("pairs", "possible"))
            if possible:
                low, high = wilson(made, possible)[-2:]
                found = {"pairs": made, "possible": possible, "value": made / possible, "low": low, "high": high}
                facts["yield"][name] = found
            start = f"{name}/status/"
            statuses = sorted({key.removeprefix(start) for row in steps for key in row if key.startswith(start)})
            facts["statuses"][name] = {s: sum(row.get(start + s, 0) for row in steps) for s in statuses}
    for name in ("kl_initial_nats", "kl_ema_nats", "drift", "drift_accumulated"):
        for player in ("shared",) if config.players.shared else ROLES:
            told = [row[f"{player}/{name}"] for row in steps if row.get(f"{player}/{name}") is not None]
            if told:
                facts[f"{player}/{name}"] = told[-1]
    facts["seconds_per_step"] = float(np.mean([row["step_seconds"] for row in steps]))
    facts["validation"] = next((row for row in reversed(rows) if row.get("event") == "validation"), None)
    return facts


def peak_bytes(device: torch.device) -> int:
    """Most memory that was taken: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else 1024))


def sampler(run: Run) -> Sampler:
    """Return what answers for a run: the defender's last average."""
    return load_sampler(str(run.root))


__all__ = ["CONFIG", "METHOD", "dry_run", "sampler", "train"]
