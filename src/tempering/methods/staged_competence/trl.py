r"""The staged curriculum under any TRL trainer: same stages, pools and draws, TRL's loss, loop and generation.

For those who have a TRL set-up already, and to show that the curriculum does not depend on the policy-optimisation
loss. Nothing in `temper train` comes here; it needs `pip install 'tempering[bench]'`.

    class Paced(StagedCompetenceMixin, DPOTrainer): ...          # your own loop: set `stream` before `train()`
    result = train_staged(DPOTrainer, args, model, dataset, StreamPlan.read("runs/mine"), peft_config=lora)

Each stage is a new trainer: fresh optimiser and schedule, its own folder in `args.output_dir`. The reference moves
with it: `handover="copy"` goes on training the one adapter, of which TRL freezes a copy as reference; `"merge"` adds
the adapter to the weights (in their dtype) and starts a new one. Stacked adapters, which `temper train` uses, are
impossible here: TRL's reference is "no adapter" or the copy.

Differs from `temper train`: batches are whole (a schedule with short ones, such as `shuffled` where the batch does
not divide the stage, is refused), and with GRPO or RLOO the paced unit is a generation batch of prompts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft import PeftModel
from torch.utils.data import Sampler

from tempering.core.config import build
from tempering.core.run import Run
from tempering.methods.staged_competence.curriculum import Curriculum, stage_schedule

try:
    from trl import GRPOConfig, KTOTrainer, RLOOConfig
except ImportError as error:
    raise ImportError(f"the curriculum under TRL needs TRL ({error}); pip install 'tempering[bench]'") from error

ROW_ID = "row_id"
REFERENCE = "ref"


class StreamPlan(NamedTuple):
    """Which rows each stage has, easy to hard, and how they are paced."""

    stages: Sequence[Sequence[str]]
    epochs: Sequence[int]
    curriculum: Curriculum
    seed: int

    @classmethod
    def read(cls, run: str | Path) -> StreamPlan:
        """Take the plan of a `staged_competence` run: the same scores and stages under another trainer."""
        opened = Run.open(run)
        rows = opened.read_rows("data/plan.jsonl")
        curriculum = build(Curriculum, opened.config["curriculum"], f"{run}/config.yaml")
        return cls([r["ids"] for r in rows], [r["E"] for r in rows], curriculum, opened.config["seed"])


class StreamSampler(Sampler[int]):
    """Row positions in a given order; Accelerate deals whole batches out to the processes, so it is global."""

    def __init__(self, stream: Sequence[int]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[int]:
        return iter(self.stream)

    def __len__(self) -> int:
        return len(self.stream)


class StagedCompetenceMixin:
    """Makes any TRL trainer take its rows in a given order: `class Paced(StagedCompetenceMixin, DPOTrainer)`."""

    stream: Sequence[int] = ()
    """Positions in the *prepared* `train_dataset`, a multiple of the batch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> StreamSampler:
        if not self.stream:
            raise RuntimeError("set `stream`, the row positions in training order, before `train()`")
        return StreamSampler(self.stream)


class StagedResult(NamedTuple):
    """The trained model; per stage, the row ids of each batch and TRL's log."""

    model: PeftModel
    batches: list[list[list[str]]]
    logs: list[list[dict[str, Any]]]


class Stage(NamedTuple):
    """One stage's trainer, ready to train, and the row ids of each of its batches."""

    trainer: Any
    batches: list[list[str]]


def train_staged(
    trainer_class: type,
    args: Any,
    model: Any,
    dataset: Any,
    plan: StreamPlan,
    handover: Literal["copy", "merge"] = "copy",
    **trainer_kwargs: Any,
) -> StagedResult:
    """Train stage after stage with a new `trainer_class` each; `dataset` needs the plan's ids in a column `row_id`.

    `model` is a loaded model; `trainer_kwargs` go to the trainer: `peft_config` (needed unless `model` has an adapter
    and `handover` is `copy`), `processing_class`, `reward_funcs`, ...

    Raises:
        ValueError: no `row_id`, no adapter to train, rows of the plan that are not in the dataset, or batches that
            are not whole.
    """
    _check(model, dataset, plan, handover, trainer_kwargs)
    paced = type(f"Staged{trainer_class.__name__}", (StagedCompetenceMixin, trainer_class), {})
    position = {str(row_id): n for n, row_id in enumerate(dataset[ROW_ID])}
    batches, logs = [], []
    for k in range(len(plan.stages)):
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir) / f"stage_{k}")
        make = _make_ordered if issubclass(trainer_class, KTOTrainer) else _make
        stage = make(paced, own, model, dataset, position, plan, k, trainer_kwargs)
        stage.trainer.train()
        batches.append(stage.batches)
        logs.append(stage.trainer.state.log_history)
        model = stage.trainer.accelerator.unwrap_model(stage.trainer.model)
        _drop_reference(model)
        if handover == "merge" and k < len(plan.stages) - 1:
            model = model.merge_and_unload()
        elif "peft_config" in trainer_kwargs:
            trainer_kwargs = {name: value for name, value in trainer_kwargs.items() if name != "peft_config"}
    return StagedResult(model, batches, logs)


# --- pure functions -----------------------------------------------------------------------------------


def whole_batches(rows: Sequence[Sequence[int]], batch: int) -> Sequence[Sequence[int]]:
    """Return the schedule, whose rows must all be whole.

    Raises:
        ValueError: one is short; TRL would fill it with the next one's rows.
    """
    short = next((len(row) for row in rows if len(row) != batch), None)
    if short is not None:
        raise ValueError(
            f"the schedule has a batch of {short} where TRL takes {batch}; use curriculum.sampling=with_replacement, "
            "or a batch that divides the stage"
        )
    return rows


def generation_stream(rows: Sequence[Sequence[int]], num_generations: int, repeats: int) -> list[int]:
    """Order for GRPO and RLOO: each prompt num_generations times, each generation batch `repeats` times.

    >>> generation_stream([[4, 7]], num_generations=2, repeats=2)
    [4, 4, 7, 7, 4, 4, 7, 7]
    """
    return [i for row in rows for _ in range(repeats) for i in row for _ in range(num_generations)]


def apart(keys: Sequence[str]) -> list[int]:
    """Order positions such that no two neighbours, first and last included, have the same key.

    >>> [("a", "a", "b", "c")[i] for i in apart(["a", "a", "b", "c"])]
    ['a', 'b', 'a', 'c']

    Raises:
        ValueError: a key stands for more than half of the positions.
    """
    count = Counter(keys)
    ranked = sorted(range(len(keys)), key=lambda i: (-count[keys[i]], keys[i], i))
    order = [0] * len(keys)
    # Most frequent first, into every second place, then the others: the classical way to keep equals apart.
    for place, i in zip([*range(0, len(keys), 2), *range(1, len(keys), 2)], ranked, strict=True):
        order[place] = i
    if any(keys[order[n]] == keys[order[n - 1]] for n in range(len(order))):
        raise ValueError(
            f"a micro-batch of {len(keys)} rows holds too few prompts ({len(count)}) to give each row an answer to "
            "another prompt; raise per_device_train_batch_size or curriculum.min_pool"
        )
    return order


# --- one stage ----------------------------------------------------------------------------------------


def _make(
    paced: type,
    args: Any,
    model: Any,
    dataset: Any,
    position: dict[str, int],
    plan: StreamPlan,
    k: int,
    kwargs: dict[str, Any],
) -> Stage:
    """Let TRL prepare the stage's rows, and pace those that it kept."""
    trainer: Any = paced(
        model=model, args=args, train_dataset=dataset.select([position[i] for i in plan.stages[k]]), **kwargs
    )
    place = {str(row_id): n for n, row_id in enumerate(trainer.train_dataset[ROW_ID])}
    ids = [i for i in plan.stages[k] if i in place]  # TRL drops over-long rows
    batch, generations, repeats, steps = _unit(args)
    schedule = stage_schedule(len(ids), batch, plan.epochs[k], plan.curriculum, plan.seed, k)
    rows = [[place[ids[n]] for n in row] for row in whole_batches(schedule, batch)]
    trainer.stream = generation_stream(rows, generations, repeats)
    args.max_steps = len(rows) * steps
    return Stage(trainer, [[ids[n] for n in row] for row in schedule])


def _make_ordered(
    paced: type,
    args: Any,
    model: Any,
    dataset: Any,
    position: dict[str, int],
    plan: StreamPlan,
    k: int,
    kwargs: dict[str, Any],
) -> Stage:
    """For KTO, which pairs rows with their neighbours while it prepares them: write the rows in training order.

    Its estimate of the KL takes each row's prompt with the answer of the row before it in the micro-batch, so these
    must be answers to other prompts.
    """
    batch, _, _, _ = _unit(args)
    micro, ids = args.per_device_train_batch_size, list(plan.stages[k])
    prompts = {str(i): str(p) for i, p in zip(dataset[ROW_ID], dataset["prompt"], strict=True)}
    while True:
        schedule = whole_batches(
            stage_schedule(len(ids), batch, plan.epochs[k], plan.curriculum, plan.seed, k), batch
        )
        batches = [_spread([ids[n] for n in row], micro, prompts) for row in schedule]
        rows = [position[i] for row in batches for i in row]
        args.max_steps = len(batches)
        trainer: Any = paced(model=model, args=args, train_dataset=dataset.select(rows), **kwargs)
        kept = {str(i) for i in trainer.train_dataset[ROW_ID]}
        if len(trainer.train_dataset) == len(rows):
            trainer.stream = range(len(rows))
            return Stage(trainer, batches)
        ids = [i for i in ids if i in kept or i not in {j for row in batches for j in row}]
        model = trainer.accelerator.unwrap_model(trainer.model)
        _drop_reference(model)
        kwargs = {name: value for name, value in kwargs.items() if name != "peft_config"}


def _spread(row: Sequence[str], micro: int, prompts: dict[str, str]) -> list[str]:
    """Deal an optimiser step's rows out to its micro-batches, equal prompts apart, then order each of them."""
    ranked = sorted(range(len(row)), key=lambda n: (prompts[row[n]], n))
    count = len(row) // micro
    parts = [[row[n] for n in ranked[m::count]] for m in range(count)]
    return [part[i] for part in parts for i in apart([prompts[j] for j in part])]


class Unit(NamedTuple):
    """What TRL takes at a time."""

    batch: int
    """Rows (prompts, with GRPO and RLOO) of one paced batch, over all processes."""
    generations: int
    repeats: int
    steps: int
    """Optimiser steps of one paced batch."""


def _unit(args: Any) -> Unit:
    generates: bool = isinstance(args, GRPOConfig | RLOOConfig)
    if generates:
        repeats = args.num_iterations * args.steps_per_generation
        if repeats % args.gradient_accumulation_steps:
            raise ValueError(
                f"num_iterations * steps_per_generation = {repeats} is not a multiple of gradient_accumulation_steps "
                f"= {args.gradient_accumulation_steps}: an optimiser step would mix two generation batches"
            )
        steps = repeats // args.gradient_accumulation_steps
        return Unit(args.generation_batch_size // args.num_generations, args.num_generations, repeats, steps)
    return Unit(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size, 1, 1, 1)


def _drop_reference(model: Any) -> None:
    """Take away TRL's frozen copy: the next trainer makes its own, and fails where there is one."""
    if isinstance(model, PeftModel) and REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
        model.set_adapter("default")


def _check(model: Any, dataset: Any, plan: StreamPlan, handover: str, kwargs: dict[str, Any]) -> None:
    if handover not in ("copy", "merge"):
        raise ValueError(f"handover is {handover!r}; expected copy or merge")
    if ROW_ID not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {ROW_ID!r} (found {', '.join(dataset.column_names)}): the plan's ids"
        )
    known = {str(i) for i in dataset[ROW_ID]}
    if len(known) < len(dataset):
        raise ValueError(f"the ids in {ROW_ID!r} are not distinct")
    missing = [i for ids in plan.stages for i in ids if i not in known]
    if missing:
        raise ValueError(f"{len(missing)} rows of the plan are not in the dataset, first {missing[0]!r}")
    if not isinstance(model, PeftModel) and kwargs.get("peft_config") is None:
        raise ValueError(
            "give peft_config: without an adapter TRL reloads the start model as reference in every stage"
        )
    if handover == "merge" and kwargs.get("peft_config") is None:
        raise ValueError("handover=merge needs peft_config, for the new adapter of each stage")
