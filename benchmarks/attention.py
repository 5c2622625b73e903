#!/usr/bin/env python3
"""Attention on a CPU, forward and backward: transformers' `sdpa` in bfloat16 beside ours, by the length of rows.

    python benchmarks/attention.py            # the heads of SmolLM2, 1024 tokens in rows of 16 to 512; a minute

Interleaved in one process; told: the least of `--rounds` milliseconds of each, of one layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tempering.core.attention import LONGEST, attend

HEADS, KV_HEADS, WIDTH, TOKENS = 9, 3, 64, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KV_HEADS, True
    print(f"{options.threads} threads, torch {torch.__version__}, {TOKENS} tokens; beyond {LONGEST} both are one\n")
    print("| tokens a row | sdpa: forward, ms | backward | ours: forward | backward |\n|--:|--:|--:|--:|--:|")
    for length in options.lengths:
        rows = TOKENS // length
        states = [torch.randn(rows, heads, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
                  for heads in (HEADS, KV_HEADS, KV_HEADS)]  # fmt: skip
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        best = [[float("inf")] * 2 for _ in range(2)]
        for _ in range(options.rounds):
            for side, function in zip(best, (sdpa_attention_forward, attend), strict=True):
                side[:] = map(min, side, timed(function, module, states, mask))
        print(f"| {length} | " + " | ".join(f"{1e3 * seconds:.1f}" for side in best for seconds in side) + " |")


def timed(
    function: Callable[..., Any], module: torch.nn.Module, states: list[torch.Tensor], mask: torch.Tensor
) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    began = time.perf_counter()
    out = function(module, *states, mask)[0]
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    return middle - began, time.perf_counter() - middle


if __name__ == "__main__":
    main()
