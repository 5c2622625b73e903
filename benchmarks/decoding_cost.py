#!/usr/bin/env python3
"""What does each method cost where it answers? Decoding over the plain base's, interleaved in one process.

    python benchmarks/decoding_cost.py             # SmolLM2, 8 prompts of 64 tokens, 64 new each, 7 rounds: 3 minutes
    python benchmarks/decoding_cost.py --quick     # two rounds of 8 tokens: does it run at all?

Sides, all on weights of their own: the base; a LoRA adapter on all linear layers that is not merged, of rank 8 (a
player of `advgame`) and of rank 48 (three stages of 16); probes subtracted at eight blocks (`probe_subtract`); and 4
and 18 experts of rank 32 behind a gate (`safemoe`, back-ends as `auto` chose them). Adapters, probes and experts are
random: what is computed is the same. Adapters are joined once an answer, as in evals and games; a server does it once
and for all. Merged adapters and edited weights are the base. Best of N costs N answers and a scoring pass
(docs/attribution.md).

Told: median of the rounds' ratios of seconds, with the least and the largest, and the extra tensors in MB.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safemoe_vs_xlora import attach_ours, generation, interleaved, make_experts, ratio

from tempering.core.activations import subtracted
from tempering.core.adapted_layers import adapters_joined_once
from tempering.core.policy import LoraSettings, Policy

BLOCKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new_tokens = 2, 8
    base = load(options)
    ids = torch.randint(100, base.base.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    sides: dict[str, Callable[[], Any]] = {"base": answering(base, ids, options)}
    extra = {"base": 0}
    for rank in (8, 48):
        policy = load(options)
        policy.add_adapter("a", LoraSettings(r=rank, alpha=rank, target_modules="all-linear"), 0)
        sides[f"adapter, rank {rank}"] = answering(policy, ids, options)
        extra[f"adapter, rank {rank}"] = sum(p.nbytes for n, p in policy.model.named_parameters() if ".lora_" in n)
    policy = load(options)
    name = f"probe_subtract, {BLOCKS} blocks"
    sides[name], extra[name] = subtracting(policy, answering(policy, ids, options))
    with tempfile.TemporaryDirectory() as folder:
        for count in (4, 18):
            policy = load(options)
            experts = make_experts(policy, count, 32, Path(folder) / str(count))
            attach_ours(policy, experts)
            sides[f"safemoe, K = {count}"] = answering(policy, ids, options)
            extra[f"safemoe, K = {count}"] = sum(w.A.nbytes + w.B.nbytes for w in experts.modules.values())
    times = interleaved(sides, options.rounds, options.device)
    print(f"{options.model}, {options.device} ({str(base.dtype).removeprefix('torch.')}), "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds\n")  # fmt: skip
    print("| | seconds over the base's | tokens a second | extra tensors, MB |\n| --- | --: | --: | --: |")
    for name, seconds in times.items():
        r, rate = ratio(seconds, times["base"]), 8 * options.new_tokens / sorted(seconds)[len(seconds) // 2]
        print(f"| {name} | {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {rate:.0f} "
              f"| {extra[name] / 2**20:.1f} |")  # fmt: skip


def load(options: argparse.Namespace) -> Policy:
    return Policy.load(options.model, dtype=options.dtype, device=options.device)


def answering(policy: Policy, ids: torch.Tensor, options: argparse.Namespace) -> Callable[[], Any]:
    answer = generation(policy.model, ids, options.new_tokens, use_cache=True)

    def run() -> None:
        with adapters_joined_once(policy.model):
            answer()

    return run


def subtracting(policy: Policy, answer: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
    """The same with random probes subtracted at blocks spread over the depth, and the bytes of the probes."""
    count, width = policy.base.config.num_hidden_layers, policy.base.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    layers = [round(count * (0.2 + 0.6 * i / (BLOCKS - 1))) for i in range(BLOCKS)]
    drawn = (torch.randn(width, generator=generator) for _ in layers)
    probes = {layer: (v / v.norm(), 0.0) for layer, v in zip(layers, drawn, strict=True)}

    def run() -> None:
        with subtracted(policy.model, probes, 1.0):
            answer()

    return run, sum(v.nbytes for v, _ in probes.values())


if __name__ == "__main__":
    main()
