"""Imitation before the game: an attacker that rewrites instead of answering, a defender that comes to an end.

    attacker   instruction and seed -> the seed in a template sentence (`data/rewrites`)
    defender   seed, plain or in a template -> its own greedy answer, cut after a sentence: what it does stays;
               to some harmful seeds a deflection (`data/deflections`): it knows another way

The adapter is frozen afterwards and part of the player's start, which references and distances are taken to. It is in
the run before the first step, so that a resumed run does not learn it again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from tempering.core.chat import Encoded, collate, encode_prompt
from tempering.core.logprobs import nll_share
from tempering.core.policy import load_tensors, save_tensors
from tempering.core.progress import progress, say
from tempering.core.records import Prompt, as_messages
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler
from tempering.core.training import Optimisation, Processes, schedule, step_batches
from tempering.data.attacker import Category
from tempering.data.deflections import deflection
from tempering.data.rewrites import TEMPLATES, rewrite_rows
from tempering.data.seeds import Seed
from tempering.methods.advgame.players import WARM, Player, Seats
from tempering.methods.advgame.settings import AdvGameConfig

ENDS = re.compile(r"[.!?][\"')\]]*\Z")
BENIGN = 2
"""Benign seeds to a harmful one that a defender imitates answers to: what it declines is to stay the exception."""
BRIEF = 2 / 3
"""Share of the longest answer within which a cut one ends: samples vary, and should still end in time."""


def warm_up(
    config: AdvGameConfig,
    seats: Seats,
    seeds: Mapping[Category, Sequence[Seed]],
    run: Run,
    processes: Processes,
) -> None:
    """Give every player with a warm start its first adapter: from the run, or by imitation."""
    for player in seats.players:
        name = f"{player.name}_{WARM}"
        if name not in player.below:
            continue
        file = run.path(f"checkpoints/{name}.safetensors")
        if not file.is_file():
            rows: list[Encoded] = []
            for role in seats.roles(player):
                rows += (_rewrites if role == "attacker" else _answers)(config, player, seeds)
            imitate(config, player, name, rows, processes)
            temporary = file.with_suffix(".part")
            save_tensors(temporary, player.policy.adapter_state([name]))
            temporary.replace(file)
        player.policy.load_state(load_tensors(file))


def imitate(config: AdvGameConfig, player: Player, name: str, rows: Sequence[Encoded], processes: Processes) -> None:
    """Fine-tune one adapter of a player on rows: the mean negative log-likelihood of a step's completion tokens."""
    own, policy = config.warm_start, player.policy
    named = [(n, p) for n, p in sorted(policy.model.named_parameters()) if f".{name}." in n]
    plan = schedule(len(rows), own.rows, own.epochs, config.seed)
    optimisation = Optimisation(policy, processes, lr=own.lr, steps=len(plan), clip=config.clip, named=named)
    below = player.below[: player.below.index(name) + 1]
    with progress(f"warm start of the {player.name}", len(plan), is_passing=True) as advance:
        for t, places in enumerate(plan):
            part = [rows[i] for i in places]
            tokens = sum(row.completion_tokens for row in part)
            loss = 0.0
            with policy.using(below, training=[p for _, p in named]):
                for micro in step_batches([len(row.ids) for row in part], config.batch_tokens):
                    batch = collate([[part[j]] for j in micro.rows], policy.tokenizer.pad_token_id, policy.device)
                    share = nll_share(policy.scorer(batch).logprob, tokens)
                    optimisation.backward(share)
                    loss += float(share.detach())
            optimisation.step(t)
            advance(1, note=f"loss {loss:.3f}")
    say(f"warm start of the {player.name}: {len(rows)} rows, loss {loss:.3f} in the last step")


def _mixed(seeds: Mapping[Category, Sequence[Seed]], count: int, benign: int = 1) -> list[Seed]:
    """The last seeds of the classes, those that the game comes to last; `benign` to a harmful one, in turn."""
    turns = {name: benign if name == "benign" else 1 for name in seeds}
    left = {name: iter(own[::-1]) for name, own in seeds.items()}
    mixed = []
    while found := [seed for name, times in turns.items() for seed in islice(left[name], times)]:
        mixed += found
    return mixed[:count]


def _framed(seeds: Sequence[Seed]) -> list[str]:
    """Of each four seeds of a class two plain, and two in a template of the class."""
    texts, seen = [], Counter[str]()
    for seed in seeds:
        own, i = TEMPLATES[seed.category], seen[seed.category]
        texts.append(own[i // 2 % len(own)].format(prompt=seed.prompt) if i % 4 > 1 else seed.prompt)
        seen[seed.category] += 1
    return texts


def _rewrites(config: AdvGameConfig, player: Player, seeds: Mapping[Category, Sequence[Seed]]) -> list[Encoded]:
    policy, mixed = player.policy, _mixed(seeds, config.warm_start.rewrites)
    rows = []
    for row in rewrite_rows(mixed, fmt=config.rollout.format):
        prompt = encode_prompt(policy.tokenizer, as_messages(row["prompt"]))
        ids = policy.tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if len(ids) < config.rollout.attacker_tokens:
            rows.append(Encoded([*prompt, *ids, policy.end_id], len(prompt)))
    if len(rows) < len(mixed) / 2:
        raise ValueError(
            f"rollout.attacker_tokens={config.rollout.attacker_tokens}: {len(mixed) - len(rows)} of {len(mixed)} "
            "template rewrites are longer; raise it, or set warm_start.rewrites=0"
        )
    return rows


def _answers(config: AdvGameConfig, player: Player, seeds: Mapping[Category, Sequence[Seed]]) -> list[Encoded]:
    """Own answers, and deflections of the first harmful seeds; those that are too long are left out."""
    own, mixed = config.warm_start, _mixed(seeds, config.warm_start.brief, BENIGN)
    harmful = [seed for seed in mixed if seed.category == "harmful"][: own.deflections]
    declined = {seed.id for seed in harmful}
    rows = _brief(config, player, _framed([seed for seed in mixed if seed.id not in declined]))
    policy = player.policy
    for i, (seed, text) in enumerate(zip(harmful, _framed(harmful), strict=True)):
        prompt = encode_prompt(policy.tokenizer, as_messages(text))
        ids = policy.tokenizer(deflection(seed.prompt, i), add_special_tokens=False)["input_ids"]
        if len(ids) < config.rollout.defender_tokens:
            rows.append(Encoded([*prompt, *ids, policy.end_id], len(prompt)))
    return rows


def _brief(config: AdvGameConfig, player: Player, texts: Sequence[str]) -> list[Encoded]:
    """Answers of the defender as it is, greedy and cut."""
    policy, most = player.policy, int(BRIEF * config.rollout.defender_tokens)
    prompts = [Prompt(as_messages(text), id=str(i)) for i, text in enumerate(texts)]
    sampler = LocalSampler(policy, batch_rows=config.rollout.rows, batch_tokens=config.sample_tokens)
    start = [name for name in player.below if not name.endswith(f"_{WARM}")]
    with policy.using(start), torch.no_grad():
        answers = sampler(prompts, max_new_tokens=config.rollout.defender_tokens)
    rows = []
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = encode_prompt(policy.tokenizer, prompt.messages)
        cut = brief_ids(policy.tokenizer, answer.token_ids, policy.end_id, set(policy.end_ids), most)
        if cut:
            rows.append(Encoded([*ids, *cut], len(ids)))
    if texts and not rows:
        raise RuntimeError(
            f"no answer of the defender has an end of a sentence within {most} tokens to be cut at; raise "
            "rollout.defender_tokens, or set warm_start.brief=0"
        )
    return rows


def brief_ids(tokenizer: Any, ids: Sequence[int], end_id: int, ends: set[int], most: int) -> list[int]:
    """An answer's tokens up to the last end of a sentence within `most`, and the end of the turn; else nothing.

    One that ended by itself within `most` stays as it is.
    """
    if ids and ids[-1] in ends and len(ids) <= most:
        return list(ids)
    for n in range(min(most, len(ids)), 0, -1):
        if ENDS.search(tokenizer.decode(ids[:n], skip_special_tokens=True)):
            return [*ids[:n], end_id]
    return []
