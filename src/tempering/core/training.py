"""What training loops share: processes, optimiser, schedule, accumulate-clip-step, exact save and resume.

Used by every method that trains; refuses to own the loop.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from tempering.core.chat import fill_batches
from tempering.core.policy import EXPERT_GATE, Policy, load_tensors, save_tensors
from tempering.core.run import Run, atomic_write, replace_folder


class Processes:
    """The processes that train together, through Accelerate: one, DDP or FSDP2, as its launcher says."""

    def __init__(self, device: torch.device, report_to: str | None = None) -> None:
        self.accelerator = Accelerator(cpu=device.type == "cpu", log_with=report_to)
        if report_to:
            self.accelerator.init_trackers("tempering")
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process

    @property
    def shards(self) -> bool:
        """Whether the launcher asks for FSDP2."""
        return self.accelerator.is_fsdp2

    def shard(self, policy: Policy) -> None:
        """Spread the base over the processes where the launcher asks for FSDP2; adapters stay whole on each.

        After everything that generates: a sharded base only scores. Adapters may still be added. They are small,
        so their gradients are averaged at the step (`Optimisation.step`) rather than sharded.

        Raises:
            ValueError: the base trains, or the launcher asks for the older FSDP.
        """
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.shards:
            raise ValueError("FSDP 1 is not supported; set fsdp_version: 2 in the Accelerate configuration")
        if not self.shards or policy.is_sharded:
            return
        if policy.trainable == "full":
            raise ValueError("all weights train, which is not supported with FSDP2; train an adapter, or use DDP")
        policy.before_sharding()
        plugin = self.accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # every process has loaded the base already
        plugin.ignored_modules = rf".*\.(lora_[AB]\..*|{EXPERT_GATE})"
        policy.scorer._no_split_modules = policy.base._no_split_modules  # what Accelerate wraps by default
        fsdp2_prepare_model(self.accelerator, policy.scorer)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module whose gradients are shared between processes."""
        if self.world == 1 or self.shards:
            return module
        self.accelerator.free_memory()  # forgets the module of the stage before
        return self.accelerator.prepare_model(module)

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """The share of an optimiser step that this process computes; every process gets at least one item.

        Raises:
            ValueError: fewer items than processes.
        """
        if len(items) < self.world:
            raise ValueError(f"an optimiser step of {len(items)} pairs cannot be shared by {self.world} processes")
        return list(items[self.rank :: self.world])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over the processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    def same(self, value: Any) -> Any:
        """Return the main process's value everywhere."""
        return value if self.world == 1 else broadcast_object_list([value], from_process=0)[0]

    def log(self, row: dict[str, Any], step: int) -> None:
        """Send the numbers of a row to the trackers, if any."""
        if self.accelerator.log_with:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()


def is_first_process() -> bool:
    """Whether this process is the one that writes, known before `Processes` exists (from the launcher)."""
    return os.environ.get("RANK", "0") == "0"


class Micro(NamedTuple):
    """Rows that one process computes at a time, and their weight: 0 where they only keep it in step with others."""

    rows: list[int]
    weight: float


def step_batches(lengths: Sequence[int], max_tokens: int, rank: int = 0, world: int = 1) -> list[Micro]:
    """Share the rows of an optimiser step between processes, in equally many micro-batches each.

    Rows of similar length share a micro-batch of at most `max_tokens`, pads included. Where processes would
    take different numbers of forward passes, which sharded weights do not allow, rows are repeated with weight 0.

    >>> [micro.rows for micro in step_batches([5, 9, 4, 8], max_tokens=18)]
    [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = []
    for r in range(world):
        share = order[r::world]
        batches = fill_batches([lengths[i] for i in share], max_tokens)
        shares.append([[share[j] for j in batch] for batch in batches])
    mine = [Micro(rows, 1.0) for rows in shares[rank]]
    idle = Micro(order[-1:], 0.0)
    return mine + [idle] * (max(map(len, shares)) - len(mine))


class StepResult(NamedTuple):
    """What one optimiser step did."""

    grad_norm: float
    lr: float


class Optimisation:
    """AdamW, a schedule (linear decay to zero), clipping, accumulation over micro-batches.

    Over the policy's trainable parameters, or over `named` where several optimisers share one policy.
    """

    def __init__(
        self,
        policy: Policy,
        processes: Processes,
        *,
        lr: float,
        steps: int,
        warmup: int = 0,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        named: list[tuple[str, nn.Parameter]] | None = None,
        factor: Callable[[int, int, int], float] | None = None,
    ) -> None:
        self.policy, self.processes = policy, processes
        self.lr, self.steps, self.warmup, self.clip = lr, steps, warmup, clip
        self.factor = factor or linear_to_zero
        self.named = policy.trainable_parameters() if named is None else named
        processes.shard(policy)
        self.scorer = processes.wrap(policy.scorer)
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.named], lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay
        )

    def accumulate(self, is_last: bool) -> Any:
        """Context of a micro-batch: gradients travel between processes with the last one only."""
        if self.processes.world == 1 or is_last or self.policy.is_sharded:
            return nullcontext()
        return self.processes.accelerator.no_sync(self.scorer)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the step's mean loss."""
        (loss * self.processes.world).backward()  # DDP and FSDP average over processes, a share is a sum

    def step(self, t: int) -> StepResult:
        """Clip, update with the learning rate of step t, clear.

        Raises:
            RuntimeError: the gradient is not finite.
        """
        if self.policy.is_sharded:
            for _, parameter in self.named:
                parameter.grad = self.processes.accelerator.reduce(parameter.grad, reduction="mean")
        norm = float(_full(torch.nn.utils.clip_grad_norm_([p for _, p in self.named], self.clip)))
        if not norm < float("inf"):
            raise RuntimeError(f"the gradient is not finite at step {t} (norm {norm}); lower lr or raise beta")
        lr = self.lr * self.factor(t, self.steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, lr)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name."""
        out = {}
        for name, parameter in self.named:
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"{key}:{name}"] = _full(value).detach().cpu().clone()
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned, bit for bit."""
        for name, parameter in self.named:
            self.optimizer.state[parameter] = {
                key: state[f"{key}:{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}:{name}" in state
            }


def linear_to_zero(t: int, steps: int, warmup: int = 0) -> float:
    """Learning-rate factor at step t of `steps`: linear warm-up, then linear to zero.

    >>> [linear_to_zero(t, 4) for t in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if t < warmup:
        return (t + 1) / warmup
    return max(0.0, (steps - t) / max(1, steps - warmup))


def cosine_to_fifth(t: int, steps: int, warmup: int = 0) -> float:
    """Learning-rate factor at step t of `steps`: linear warm-up, then half a cosine from one to a fifth.

    >>> [round(cosine_to_fifth(t, 4), 4) for t in range(5)]
    [1.0, 0.8828, 0.6, 0.3172, 0.2]
    """
    if t < warmup:
        return (t + 1) / warmup
    return 0.2 + 0.4 * (1 + math.cos(math.pi * (t - warmup) / max(1, steps - warmup)))


def schedule(n: int, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the positions that each optimiser step takes: every epoch a permutation keyed by (seed, epoch).

    The last step of an epoch is short. World size, micro-batches and resuming do not touch it.

    >>> sorted(schedule(3, 2, 1, seed=0)[0] + schedule(3, 2, 1, seed=0)[1])
    [0, 1, 2]
    """
    rows = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n).tolist()
        rows += [order[i : i + batch] for i in range(0, n, batch)]
    return rows


def stream_rows(n: int, batch: int, index: int, seed: int, stream: int, *, shuffle: bool = True) -> list[int]:
    """Return the positions that batch `index` of an endless stream takes: permutations of n, one after another.

    Keyed by (seed, stream, epoch): streams are independent, and any batch is known without those before it.

    >>> stream_rows(3, 2, 1, seed=0, stream=0, shuffle=False)
    [2, 0]
    """
    rows: list[int] = []
    for place in range(index * batch, (index + 1) * batch):
        epoch, at = divmod(place, n)
        if not rows or at == 0:
            order = generator(seed, stream, epoch).permutation(n) if shuffle else np.arange(n)
        rows.append(int(order[at]))
    return rows


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Return random numbers keyed by (seed, stream, index), independent of all others."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 32) + index]))


class HasState(Protocol):
    """An optimiser as a checkpoint sees it."""

    processes: Processes

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        ...


def save_checkpoint(
    run: Run, policy: Policy, optimisation: HasState, state: dict[str, Any], *, whole: bool, keep: int = 1
) -> None:
    """Write `checkpoints/step-N/` (N = `state["step"]`), whole or not at all, then delete older ones.

    `whole`: all weights, not the adapters, or the tensors that train in place, alone. Every process calls this
    (sharded tensors are gathered); the main one writes.
    """
    own = policy.edit_state if policy.trainable == "edit" else policy.adapter_state
    weights = policy.state() if whole else own()
    moments = optimisation.state()
    if not optimisation.processes.is_main:
        return
    write_checkpoint(run, Checkpoint(weights, moments, state))
    for old in _checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(run: Run, checkpoint: Checkpoint, more: Callable[[Path], None] | None = None) -> Path:
    """Write `checkpoints/step-N/` (N = `state["step"]`), whole or not at all; returns it. `more` adds to it."""
    parent = run.path("checkpoints/x").parent
    for left in parent.glob(".saving-*"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".saving-"))
    try:
        save_tensors(temporary / "weights.safetensors", checkpoint.weights)
        save_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer)
        atomic_write(temporary / "state.json", (json.dumps(checkpoint.state) + "\n").encode())
        if more is not None:
            more(temporary)
        temporary.chmod(0o755)
        final = parent / f"step-{checkpoint.state['step']}"
        replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def retire_checkpoints(run: Run, keep: int = 1) -> None:
    """Take from older checkpoints what only a resumed run reads; what else is in them stays."""
    for old in _checkpoints(run)[:-keep]:
        for name in ("state.json", "optimizer.safetensors", "weights.safetensors"):  # the first marks it complete
            (old / name).unlink(missing_ok=True)


class Checkpoint(NamedTuple):
    """A complete checkpoint, read."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def last_checkpoint(run: Run) -> Checkpoint | None:
    """Read the newest complete checkpoint, or `None` where there is none."""
    found = _checkpoints(run)
    if not found:
        return None
    folder = found[-1]
    return Checkpoint(
        load_tensors(folder / "weights.safetensors"),
        load_tensors(folder / "optimizer.safetensors"),
        json.loads((folder / "state.json").read_text(encoding="utf-8")),
    )


class Stopwatch:
    """Seconds and tokens by phase, for the cost table."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    def add(self, phase: str, seconds: float, tokens: int = 0) -> None:
        """Add to a phase."""
        entry = self.phases.setdefault(phase, {"seconds": 0.0, "tokens": 0})
        entry["seconds"] += seconds
        entry["tokens"] += tokens

    def timed(self, phase: str, tokens: int = 0) -> Any:
        """Time a `with` block as part of a phase."""
        return _Timed(self, phase, tokens)


class _Timed:
    def __init__(self, watch: Stopwatch, phase: str, tokens: int) -> None:
        self.watch, self.phase, self.tokens = watch, phase, tokens

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.watch.add(self.phase, time.monotonic() - self.start, self.tokens)


def _checkpoints(run: Run) -> list[Path]:
    parent = run.root / "checkpoints"
    folders = [p for p in parent.glob("step-*") if (p / "state.json").is_file()] if parent.is_dir() else []
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]))


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
