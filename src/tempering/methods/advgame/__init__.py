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
    temper train advgame -c one_gpu_7b judges.default=openai:MODEL@URL data.train=wildjailbreak:FILE out=runs/mine
    temper train advgame -c one_gpu_7b data.train=demo --dry-run     # what fits, before anything is loaded

Configuration: `settings`. Pure: `pairs`, `ema`, `losses`. `players` are the adapters, `rollout` plays a seed, `ahead`
plays it some steps before it is learned from, `updates` takes one optimiser step, `warm_start` teaches small models
to rewrite and to come to an end, `validation` compares with the start, `opponents` keeps past attackers, `watching`
raises alarms, `checkpoints` and `summary` write down, `inputs` and `planner` say before anything loads what is wrong
and what fits. The loop is below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from tempering.core.policy import Policy
from tempering.core.progress import progress, say
from tempering.core.run import Run
from tempering.core.sampling import Sampler, load_sampler
from tempering.core.training import (
    Optimisation,
    Processes,
    Stopwatch,
    cosine_to_fifth,
    last_checkpoint,
    stream_rows,
)
from tempering.data.attacker import CATEGORIES, Category
from tempering.data.seeds import Seed, seeds_hash
from tempering.methods.advgame.ahead import Rounds
from tempering.methods.advgame.checkpoints import restore, save
from tempering.methods.advgame.display import game_table, summary_table, validation_table
from tempering.methods.advgame.inputs import by_class, read_seeds, require_judges
from tempering.methods.advgame.networks import Weights
from tempering.methods.advgame.opponents import Pool
from tempering.methods.advgame.planner import memory_plan, say_plan
from tempering.methods.advgame.players import Seats, load_seats
from tempering.methods.advgame.rollout import (
    ROLLOUTS,
    Dealer,
    Judges,
    Table,
    judging_metrics,
    load_judges,
)
from tempering.methods.advgame.samples import RolloutLog
from tempering.methods.advgame.settings import ROLES, AdvGameConfig
from tempering.methods.advgame.summary import peak_bytes, provenance, summarise
from tempering.methods.advgame.updates import Prompts, benign_compliance, lesson, tree_metrics, update
from tempering.methods.advgame.validation import validate
from tempering.methods.advgame.warm_start import warm_up
from tempering.methods.advgame.watching import dispersion, metrics_row, note_of, require_judged, watch_over

METHOD = "advgame"
CONFIG = AdvGameConfig
PAIRS = "data/pairs.jsonl"
MAY_DIFFER = ("judges.endpoint", "judges.max_unscored", "table_every")
"""What a resumed run may have otherwise."""


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
    if policy is None:
        say_plan(memory_plan(config))  # before anything is loaded
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
    for player in seats.players:
        player.begin()
    _loop(config, seats, dealer, train_seeds, valid_seeds, run, processes, watch, facts)
    shared = [player for player in seats.players if player.tuning == "lora"]
    if any(player.policy.base_fingerprint() != player.start_fingerprint for player in shared):
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
    state: dict[str, Any] = {"step": 0, "tokens": 0}
    state |= {name: [] for name in ("unscored", "benign", "dispersion", "past", "ahead")}
    if checkpoint:
        state = checkpoint.state
        restore(checkpoint, seats, optimisations, pool)
    first = state["step"]
    for name in ("metrics.jsonl", PAIRS):
        run.truncate_rows(name, lambda row: bool(first) and row["step"] <= first)
    rounds = Rounds(
        config, dealer, lambda category, t, by: deal(config, train_seeds[category], category, t, pool, by)
    )
    dealer.tokens = state["tokens"]
    is_validated = bool(config.eval_every) and all(valid_seeds.values())
    if is_validated and not first:
        validated(config, dealer, valid_seeds, 0, run, watch)
    start, shown = time.monotonic(), list[dict[str, Any]]()
    with closing(rounds), progress("playing", config.steps) as advance:
        advance(first)
        rounds.load_state(state.get("ahead", []))
        for t in range(first, config.steps):
            began, step = time.monotonic(), t + 1
            told: dict[str, list[float]] = {}
            trees = []
            with watch.timed("rollouts"):
                rounds.begin(t)
            for k, categories in enumerate(turns):
                with watch.timed("rollouts"):
                    tables, played = rounds.play(t, categories)
                trees += played
                # A past attacker's attacks are not this one's to learn from.
                is_past = {table.category for table in tables if table.attacker == "past"}
                prompts = Prompts(dealer)
                for player in learners:  # one player's micro-batches at a time
                    if player is learners[-1]:  # before the defender moves
                        with watch.timed("rollouts"):
                            rounds.answer()
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
            judged, unscored, asked = rounds.end(t)
            state["unscored"] = [*state["unscored"], [unscored, asked]][-config.judges.unscored_window :]
            state["benign"].append(list(benign_compliance(trees)))
            row = metrics_row(config, step, told, tree_metrics(config, trees), judged, state, dealer.tokens)
            state["dispersion"].append(dispersion(row))
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
                rounds.settle()
                validated(config, dealer, valid_seeds, step, run, watch)
            if is_last or step % config.checkpoint_every == 0:
                with watch.timed("saving"):
                    state |= {"step": step, "tokens": dealer.tokens, "past": pool.steps, "ahead": rounds.state()}
                    save(run, config, seats, optimisations, pool, state, facts)


def deal(
    config: AdvGameConfig, seeds: Sequence[Seed], category: Category, t: int, pool: Pool, by: Weights | None
) -> Table:
    """Set a class's table for step t: the next seeds in their order, and who plays; `by`: the attacker, if known."""
    own = config.rollout
    places = stream_rows(len(seeds), own.seeds, t, config.seed, CATEGORIES.index(category))
    dealt = [seeds[i] for i in places]
    keys = [("step", t, b) if own.fresh else ("seed", seed.id) for b, seed in enumerate(dealt)]
    attacker: Weights = by or ("past" if pool.meets(t, category) else config.players.attacker.sampler)
    return Table(category, dealt, keys, attacker, config.players.defender.sampler, own.attacks, own.responses, t + 1)


def _weights(reference: str) -> Any:
    return "initial" if reference == "fixed" else reference


def _restarting(t: int, steps: int, warmup: int) -> float:
    return cosine_to_fifth(t % steps, steps, warmup)


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


def dry_run(config: AdvGameConfig) -> dict[str, Any]:
    """Check seeds and judges, say what a step asks for and what memory a run takes; nothing is loaded or written."""
    Run.require_free(config.out, resume=False)
    require_judges(config)
    plan = memory_plan(config)
    say_plan(plan)  # first: it needs no seeds, which may be gated
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
    say("nothing was loaded and nothing was written")
    return facts


def sampler(run: Run) -> Sampler:
    """Return what answers for a run: the defender's last average."""
    return load_sampler(str(run.root))


__all__ = ["CONFIG", "METHOD", "dry_run", "sampler", "train"]
