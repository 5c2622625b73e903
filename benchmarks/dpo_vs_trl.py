"""Our DPO step against TRL's `DPOTrainer`: same weights, LoRA, batches, token ids and precision, in turn.

    python benchmarks/dpo_vs_trl.py                                  # SmolLM2, bundled pairs, this machine's device
    python benchmarks/dpo_vs_trl.py --shape 1b --batch 16 --device cuda --dtype bfloat16

Sides: `ours` (reference scored once, kept); `trl` (its default: a reference forward in every step); `trl_precomputed`
(`precompute_ref_log_probs=True`). Each runs --steps optimiser steps --pairs times, A B C A B C ..., in one process;
the ratio of each round is taken, then the median and the range over rounds.

How TRL is set: gradient checkpointing off on all sides (its default is on, and slower), `bf16` autocast off (weights
in --dtype, adapters in float32, as ours; `--autocast` turns its default on), one micro-batch per step, pads to the
longest row of the batch. Its clock runs from the first step's begin to the last one's end: no set-up, no saving.
Rates count the pairs' tokens, prompt with either side, pads not. "with reference" adds the reference pass, shared
over --draws draws of each pair. Memory: on CUDA the peak of allocated bytes during a side's steps, above what all
sides hold at rest; on a CPU a process per side, the largest sampled resident size during its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tempering.core.chat import Encoded, encode
from tempering.core.loading import ModelSource, load_base, pick_dtype, resolve
from tempering.core.policy import LoraSettings, Policy
from tempering.core.records import pair_from_row
from tempering.core.training import Optimisation, Processes
from tempering.data.files import bundled, read_records
from tempering.methods.staged_competence import StagedCompetenceConfig, StepTotals, micro_scores, step_share
from tempering.methods.staged_competence.difficulty import PairTokens, pair_logprobs

SIDES = ("ours", "trl", "trl_precomputed")
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
TARGETS = {"trl": 1.3, "trl_precomputed": 1.0}
LORA = LoraSettings(r=16, alpha=32, target_modules=["q_proj", "v_proj"])
ADAPTER = "default"  # TRL's name for it
BETA = 0.1


class Side(NamedTuple):
    """One contestant: `run(steps)` gives seconds and the loss of each step; and what its reference pass took."""

    run: Callable[[int], tuple[float, list[float]]]
    reference_s: float


# --- what all sides share -----------------------------------------------------------------------------


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """The start model, the same weights each time, and a tokenizer."""
    dtype = pick_dtype(args.dtype, device)
    if args.shape == "smollm2":
        model, tokenizer = load_base(resolve("smollm2"), dtype)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=4096, tie_word_embeddings=True)
        _, tokenizer = load_base(resolve("smollm2"), torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config).to(dtype)
    return model.to(device).eval(), tokenizer


def make_pairs(args: argparse.Namespace, tokenizer: Any, count: int) -> dict[str, PairTokens]:
    """Token ids: the bundled pairs, or random ones of mixed lengths for a random model."""
    if args.shape == "smollm2":
        records = read_records(bundled("pairs"), pair_from_row).records
        out = {}
        for n in range(count):
            pair = records[n % len(records)]
            sides = [encode(tokenizer, pair.messages, text, max_length=1024, max_prompt_length=512)
                     for text in (pair.chosen, pair.rejected)]  # fmt: skip
            out[f"{n:05d}"] = PairTokens(*sides)
        return out
    rng = np.random.default_rng(0)

    def some(mean: int) -> list[int]:
        return rng.integers(10, 40_000, size=rng.integers(mean // 2, mean + mean // 2 + 1)).tolist()

    out = {}
    for n in range(count):
        prompt = some(args.prompt_tokens)
        sides = [Encoded(prompt + some(args.completion_tokens), len(prompt)) for _ in range(2)]
        out[f"{n:05d}"] = PairTokens(*sides)
    return out


def adapter_state(args: argparse.Namespace, model: torch.nn.Module, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The adapter that every side starts from; its B is zero, so that the first loss is ln 2."""
    policy = Policy(model, tokenizer, ModelSource("bench", "bench"))
    policy.add_adapter(ADAPTER, LORA, seed=0)
    state = policy.adapter_state()
    policy.drop_adapters()
    return state


# --- the sides ----------------------------------------------------------------------------------------


def make_ours(
    args: argparse.Namespace, model: torch.nn.Module, tokenizer: Any, tokens: dict[str, PairTokens]
) -> Side:
    """The training step of `staged_competence`, reference kept, the whole batch as one micro-batch."""
    policy = Policy(model, tokenizer, ModelSource("bench", "bench"))
    policy.add_adapter(ADAPTER, LORA, seed=0)
    policy.train_only(ADAPTER)
    start = policy.adapter_state()
    config = StagedCompetenceConfig(beta=BETA, lr=args.lr)
    processes = Processes(policy.device)
    reference_s = float("inf")
    for _ in range(2):  # the first pass also warms up
        began = clock(policy.device)
        with policy.reference():
            reference = pair_logprobs(policy, tokens, "reference", batch_tokens=4096, cached=False, quiet=True)
        reference_s = min(reference_s, clock(policy.device) - began)
    ids = sorted(tokens)

    def run(steps: int) -> tuple[float, list[float]]:
        policy.load_state(start)
        optimisation = Optimisation(policy, processes, lr=args.lr, steps=steps)
        losses = []
        began = clock(policy.device)
        for t in range(steps):
            batch = [ids[(t * args.batch + n) % len(ids)] for n in range(args.batch)]
            totals = StepTotals(len(batch), sum(tokens[i].chosen.completion_tokens for i in batch))
            share, _ = step_share(micro_scores(optimisation.scorer, batch, tokens, reference, policy), config, totals)
            optimisation.backward(share)
            losses.append(share.detach())
            optimisation.step(t)
        return clock(policy.device) - began, [float(loss) for loss in losses]

    return Side(run, reference_s)


class Clock(TrainerCallback):
    """Time from the first step's begin to the last one's end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.ended = device, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        if state.global_step == 0:
            self.began = clock(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop it."""
        if state.global_step == state.max_steps:
            self.ended = clock(self.device)


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are token ids already, remembering its losses."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, remembered."""
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def make_trl(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: Any,
    tokens: dict[str, PairTokens],
    state: dict[str, torch.Tensor],
    precompute: bool,
) -> Side:
    """TRL's own loop over the same batches in the same order."""
    device, folder = next(model.parameters()).device, tempfile.mkdtemp()
    rows = [
        {
            "prompt_ids": t.chosen.ids[: t.chosen.prompt_tokens],
            "chosen_ids": t.chosen.ids[t.chosen.prompt_tokens :],
            "rejected_ids": t.rejected.ids[t.rejected.prompt_tokens :],
        }
        for _, t in sorted(tokens.items())
    ]
    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=args.batch, max_steps=args.steps, learning_rate=args.lr,
        beta=BETA, precompute_ref_log_probs=precompute, bf16=args.autocast, use_cpu=device.type == "cpu",
        gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=None, report_to=[],
        logging_steps=10_000, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), target_modules=LORA.target_modules, lora_dropout=0.0,
                      task_type="CAUSAL_LM")  # fmt: skip
    timer = Clock(device)
    trainer = TokenisedDPOTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora, callbacks=[timer],
    )  # fmt: skip
    reference_s = 0.0
    if precompute:  # once more, for the clock: the constructor has done it among other things
        batches = list(torch.utils.data.DataLoader(
            trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]),
            batch_size=args.batch, collate_fn=trainer.data_collator,
        ))  # fmt: skip
        reference_s = float("inf")
        for _ in range(2):
            began = clock(device)
            for batch in batches:
                trainer.compute_ref_log_probs(trainer.model, {k: v.to(device) for k, v in batch.items()})
            reference_s = min(reference_s, clock(device) - began)

    def run(steps: int) -> tuple[float, list[float]]:
        own = dict(trainer.model.named_parameters())
        for name, value in state.items():
            own[name].data.copy_(value)
        trainer.args.max_steps, trainer.losses = steps, []
        trainer.optimizer = trainer.lr_scheduler = None  # a fresh optimiser, as ours
        with silence():
            trainer.train()
        return timer.ended - timer.began, [float(loss) for loss in trainer.losses]

    return Side(run, reference_s)


def make_sides(args: argparse.Namespace, names: tuple[str, ...]) -> tuple[dict[str, Side], dict[str, Any]]:
    """Load what `names` need; also the facts for the head line."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_model(args, device)
    tokens = make_pairs(args, tokenizer, args.steps * args.batch)
    state = adapter_state(args, model, tokenizer)
    sides: dict[str, Side] = {}
    # TRL first: Accelerate's process-wide state takes its precision from whoever comes first.
    for name in [n for n in SIDES if n in names and n != "ours"] + [n for n in names if n == "ours"]:
        own = model if not sides else load_model(args, device)[0]
        if name == "ours":
            sides[name] = make_ours(args, own, tokenizer, tokens)
        else:
            sides[name] = make_trl(args, own, tokenizer, tokens, state, name == "trl_precomputed")
    lengths = [len(side.ids) for pair in tokens.values() for side in pair]
    prompts = [pair.chosen.prompt_tokens for pair in tokens.values()]
    facts = {
        "shape": args.shape, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "dtype": str(next(model.parameters()).dtype), "batch": args.batch,
        "steps": args.steps, "tokens": sum(lengths), "mean_prompt": round(float(np.mean(prompts)), 1),
        "mean_completion": round(float(np.mean(lengths)) - float(np.mean(prompts)), 1), "autocast": args.autocast,
    }  # fmt: skip
    return {name: sides[name] for name in names}, facts


# --- measuring ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all sides in turn and compare them."""
    sides, facts = make_sides(args, SIDES)
    device = torch.device("cuda" if facts["device"] != "cpu" else "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for side in sides.values():
        side.run(min(2, args.steps))  # warm-up
    for turn in range(args.pairs):
        order = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in order:
            best = float("inf")
            for _ in range(args.repeats):
                peak = Peak(device)
                with peak:
                    spent, found = sides[name].run(args.steps)
                memory[name] = max(memory.get(name, 0), peak.bytes)
                best = min(best, spent)
                losses.setdefault(name, found)
            seconds[name].append(best)
            print(
                f"round {turn + 1}/{args.pairs} {name:<16}{facts['tokens'] / best:10,.0f} tokens/s", file=sys.stderr
            )
    if device.type == "cpu":
        memory = {} if args.skip_memory else {name: peak_alone(args, name) for name in sides}
    return {**facts, "rounds": args.pairs, **summary(args, facts["tokens"], sides, seconds, losses), "memory": memory}


def summary(
    args: argparse.Namespace,
    tokens: int,
    sides: dict[str, Side],
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> dict[str, Any]:
    """Rates, ratios round by round, and how far the losses are apart."""
    out: dict[str, Any] = {"sides": {}, "ratios": {}, "loss_difference": {}}
    for name, spent in seconds.items():
        full = [s + sides[name].reference_s / args.draws for s in spent]
        out["sides"][name] = {
            "tokens_per_s": tokens / statistics.median(spent),
            "tokens_per_s_with_reference": tokens / statistics.median(full),
            "reference_s": sides[name].reference_s,
            "losses": losses[name],
        }
    ours = [s + sides["ours"].reference_s / args.draws for s in seconds["ours"]]
    for name in sides.keys() - {"ours"}:
        theirs = [s + sides[name].reference_s / args.draws for s in seconds[name]]
        out["ratios"][name] = {
            "step": spread([b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)]),
            "with_reference": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
            "target": TARGETS[name],
        }
        out["loss_difference"][name] = max(abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True))
    return out


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


class Peak:
    """Peak memory of a `with` block in bytes: allocated on CUDA above the start; resident size on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self._stop = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, resident())
            time.sleep(0.02)


def resident() -> int:
    """Resident bytes of this process; 0 where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def alone(args: argparse.Namespace) -> int:
    """Run one side in this process; returns its peak in bytes."""
    sides, _ = make_sides(args, (args.only,))
    with Peak(torch.device("cpu")) as peak:
        sides[args.only].run(min(args.steps, 2))
    return peak.bytes


def peak_alone(args: argparse.Namespace, name: str) -> int:
    """Measure one side's peak in a process of its own."""
    command = [sys.executable, __file__, "--only", name]
    for key in ("shape", "steps", "batch", "device", "dtype", "lr", "prompt_tokens", "completion_tokens"):
        value = getattr(args, key)
        command += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    done = subprocess.run([*command, *(["--autocast"] if args.autocast else [])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.strip().splitlines()[-1])


def clock(device: torch.device) -> float:
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class silence:  # noqa: N801
    """Keep the summary that `Trainer.train` prints off the terminal."""

    def __enter__(self) -> None:
        self._out, sys.stdout = sys.stdout, open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self._out


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    print(
        f"{result['shape']} on {result['device']} ({result['threads']} threads), {result['dtype']}, "
        f"{result['batch']} pairs a step (prompt {result['mean_prompt']}, completion {result['mean_completion']} "
        f"tokens on average), {result['rounds']} rounds of {result['steps']} steps, {result['tokens']:,} tokens each"
    )
    for name, side in result["sides"].items():
        peak = f"{result['memory'][name] / 2**20:8,.0f} MiB peak" if name in result["memory"] else ""
        print(
            f"  {name:<16}{side['tokens_per_s']:10,.0f} tokens/s{side['tokens_per_s_with_reference']:10,.0f} with "
            f"reference ({side['reference_s']:.2f} s){peak}"
        )
    for name, ratio in result["ratios"].items():
        step, full = ratio["step"], ratio["with_reference"]
        met = "met" if full["median"] >= ratio["target"] else "NOT met"
        print(
            f"  ours / {name:<16} step {step['median']:.2f} [{step['low']:.2f}, {step['high']:.2f}]   with reference "
            f"{full['median']:.2f} [{full['low']:.2f}, {full['high']:.2f}]   target {ratio['target']} {met}"
            f"   largest loss difference {result['loss_difference'][name]:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="smollm2")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of a run")
    parser.add_argument("--pairs", type=int, default=5, help="rounds A B C")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of a side in a round, of which the fastest counts"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs per step, in one micro-batch")
    parser.add_argument("--draws", type=int, default=5, help="draws of a pair that share its reference (epochs)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="mean, for random models")
    parser.add_argument("--completion-tokens", type=int, default=192, help="mean, for random models")
    parser.add_argument("--autocast", action="store_true", help="TRL's default bf16 autocast on top of --dtype")
    parser.add_argument("--skip-memory", action="store_true", help="on a CPU: no process per side")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    if args.only:
        print(alone(args))
        return
    result = measure(args)
    print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    main()
