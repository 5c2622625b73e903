"""Scoring N candidates by attribution: beside drawing them, and beside two full forward passes over each.

    python benchmarks/attribution.py                          # smollm2, N 8, 4 prompts, 3 rounds
    python benchmarks/attribution.py --model RUN --n 8 --tokens 256 --prompts 8

Three things in turn, on the same candidates, in one process: draw them (our sampler), score them as we do (the prompt
once a model, its keys and values shared, no block after the last layer, no logits), score them the plain way (both
models, prompt and answer of every candidate in a padded batch, all blocks and the output layer). Sharing gains with
the length of the prompt against that of the answer: `--context 0` is the short end. The two scorings must rank alike
(float32). Without a run of your own, the aligned model is smollm2 with a random adapter: times do not depend on what
it says. Printed: medians over rounds and prompts with their range; targets 20 % of drawing, a third of plain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from tempering.core.activations import capture
from tempering.core.policy import LoraSettings, Policy
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.methods.attribution.best_of_n import AttributionSampler
from tempering.methods.attribution.readout import readout_positions
from tempering.methods.attribution.scores import cosine, ranks, window
from tempering.methods.attribution.scoring import Pair, Response
from tempering.methods.attribution.settings import SelectionConfig

TARGET_OF_DRAWING, TARGET_OF_PLAIN = 0.20, 1 / 3
ASKED = (
    "How can I get a wine stain out of a white cotton shirt before a dinner tonight? I have only a kitchen, no shop.",
    "Explain to a child why the sky is blue in the day and red in the evening, and what it is like on the moon.",
    "My neighbour plays loud music late at night. Write a short, friendly note that asks for quiet after eleven.",
    "Compare trains and planes for a trip of six hundred kilometres: time, price, comfort, luggage and emissions.",
)
PASSAGE = (
    "The museum opens at nine and closes at six, on Thursdays at nine in the evening. Bags that are larger than a "
    "sheet of paper stay in the lockers by the entrance; umbrellas too. Photographs without flash are welcome in all "
    "rooms but the third, where the drawings are. Children under twelve come in free, with an adult."
)


def aligned(reference: str, dtype: str) -> Policy:
    policy = Policy.load(reference, dtype=dtype)  # type: ignore[arg-type]
    if not policy.adapters:
        policy.add_adapter("random", LoraSettings(r=16, target_modules="all-linear"), seed=0)
        generator = torch.Generator().manual_seed(0)
        for _, layer in policy.lora_layers():
            b = layer.lora_B["random"].weight
            b.data = (torch.randn(b.shape, generator=generator) * 0.01).to(b.device)
    return policy


def plain(pair: Pair, prompt: list[int], responses: list[Response], layers: tuple[int, ...]) -> np.ndarray:
    """Two full passes over prompt and answer of every candidate."""
    width = max(len(r.ids) for r in responses) + len(prompt)
    ids = torch.zeros((len(responses), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(responses):
        row = [*prompt, *r.ids]
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    device = pair.policy.device
    at = [readout_positions(len(prompt), r.spans, len(r.ids), "eos")[0] for r in responses]
    sides = []
    for is_base in (False, True):
        with pair.side(is_base) as model, capture(model, layers) as states:
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        rows = torch.arange(len(responses))
        sides.append(torch.stack([states[layer][rows, at].float().cpu() for layer in layers]))
    return cosine(sides[0], sides[1]).mean(0).double().numpy()


def timed(work: Callable[[], object]) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a run, or a model that gets a random adapter")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--context", type=int, default=100, help="words of a passage before each question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="bfloat16 rounds near-ties either way: compare winners")
    options = parser.parse_args()
    policy = aligned(options.model, options.dtype)
    inner, pair = LocalSampler(policy), Pair(policy)
    layers = window(pair.blocks)
    ours = AttributionSampler(inner, pair, SelectionConfig(n=options.n, layers=layers))
    passage = (PASSAGE.split() * (options.context // len(PASSAGE.split()) + 1))[: options.context]
    prompts = [
        Prompt(({"role": "user", "content": f"{' '.join(passage[i:])} {ASKED[i % len(ASKED)]}".strip()},))
        for i in range(options.prompts)
    ]
    drawing, scoring, naive, rank_identical, same_winner = [], [], [], 0, 0
    for turn in range(options.rounds + 1):  # the first warms up
        for prompt in prompts[: 1 if turn == 0 else None]:
            ask = {"n": options.n, "max_new_tokens": options.tokens, "temperature": 0.7, "seed": turn}
            drew, [group] = timed(lambda prompt=prompt, ask=ask: inner([prompt], **ask))  # type: ignore[misc]
            ids, opened = ours.prompt_of(prompt)
            responses = [ours.response_of(c, opened)[0] for c in group]
            sides = {
                "ours": lambda prompt=prompt, group=group: ours.rank(prompt, group).risk,
                "plain": lambda ids=ids, responses=responses: plain(pair, ids, responses, layers),
            }
            found = {name: timed(sides[name]) for name in list(sides)[:: 1 if turn % 2 else -1]}
            if turn:
                drawing.append(drew)
                scoring.append(found["ours"][0])
                naive.append(found["plain"][0])
                a, b = (np.asarray(found[name][1], dtype=float) for name in ("ours", "plain"))
                rank_identical += bool((ranks(a) == ranks(b)).all())
                same_winner += int(np.argmin(a) == np.argmin(b))
                assert np.allclose(a, b, atol=1e-5 if policy.dtype == torch.float32 else 5e-3), (a, b)
    lengths = sorted(len(ours.prompt_of(prompt)[0]) for prompt in prompts)
    print(
        f"{options.model}, {policy.dtype}, {policy.device}, N {options.n}, at most {options.tokens} tokens, "
        f"prompts of {lengths[0]} to {lengths[-1]}"
    )
    for name, values in (("drawing", drawing), ("scoring, ours", scoring), ("scoring, plain", naive)):
        print(f"{name:<16} {statistics.median(values):7.3f} s a prompt  ({min(values):.3f} - {max(values):.3f})")
    for name, over, target in (("drawing", drawing, TARGET_OF_DRAWING), ("plain", naive, TARGET_OF_PLAIN)):
        ratio = [a / b for a, b in zip(scoring, over, strict=True)]
        print(
            f"ours / {name:<9} {statistics.median(ratio):7.3f}  ({min(ratio):.3f} - {max(ratio):.3f}), "
            f"target at most {target:.2f}"
        )
    print(f"ranked alike: {rank_identical}, same winner: {same_winner}, of {len(scoring)} prompts")


if __name__ == "__main__":
    main()
