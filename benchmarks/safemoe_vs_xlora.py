"""SafeMoE's mixture against PEFT's X-LoRA on the same experts, and against the plain base: same process, in turn.

    python benchmarks/safemoe_vs_xlora.py                    # SmolLM2, K = 18, 8, 4, 2, r = 32, this machine's device
    python benchmarks/safemoe_vs_xlora.py --quick            # K = 4, two rounds, short sequences: does it work?
    python benchmarks/safemoe_vs_xlora.py --repeat 3         # `auto` alone, three times: how far can it be told?

Experts are random LoRAs on gate, up and down of all layers, written as PEFT folders and read by both sides. X-LoRA is
set to mix as we do: a linear classifier, layerwise scalings, softmax over the top 2. It names its adapters "0", "1",
..., computes the base first and then all experts, and switches the KV cache off, as it always does.

What is measured, median over --rounds of interleaved runs:
- generation: 8 prompts of 64 tokens, 16 new tokens each, greedy; tokens a second, ours over X-LoRA's. It computes the
  whole text anew for each token: the longer the answer, the larger the ratio, and the wait (128 tokens: ten minutes
  a run);
- training step: 4 rows of 256 tokens, forward, backward and AdamW on the gate alone; seconds, X-LoRA's over ours;
- prefill: 1 x 512 and 4 x 512 tokens, median of the pairs' ratios over the base (experts switched off), 41 and 21
  pairs, since single pairs differ by half;
- auto: what `auto` chose at each size of its grid, median seconds over the best back-end's there. The best of several
  noisy medians at 56 sizes is in part the luckiest: where it is ahead by more than the bar, choice and best are
  measured again, in turn and by themselves, and the median of those pairs' ratios counts (both are printed);
- decoding: the same generation, seconds over those with the experts switched off, median of eleven pairs;
- traces: the same with a recorder over that without, median of eleven pairs;
- memory: peak of a process that attaches and generates, against the base's plus one copy of the experts.
Rates are of this machine; on a CPU read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from process_memory import resident_mb
from safetensors.torch import save_file

from tempering.core.chat import Encoded, collate
from tempering.core.loading import load_base, pick_dtype, quiet_libraries, resolve
from tempering.core.policy import EXPERT_GATE, Policy
from tempering.methods.safemoe.attaching import attach, initial_routers
from tempering.methods.safemoe.backends import GRID, calibrate, shape_key, time_all, time_backends
from tempering.methods.safemoe.experts import Adapter, Experts, stack_experts
from tempering.methods.safemoe.layers import Gating
from tempering.methods.safemoe.tracing import Recorder

TARGETS = ("gate_proj", "up_proj", "down_proj")
BARS = {"generation": 5.0, "training": 2.0, "prefill": 1.35, "auto": 1.1, "trace": 1.05, "memory": 1.25}
"""At least, for the first two; at most, for the others."""
AUTO_S = 20.0
"""Seconds of measuring the back-ends, several times what `auto` itself takes."""
AGAIN, AGAIN_S = 21, 0.5
"""Passes, and seconds of each, in which a choice that looked too slow is measured again."""


def make_experts(policy: Policy, K: int, r: int, folder: Path) -> Experts:
    """Write K random PEFT adapters and stack the same tensors."""
    generator = torch.Generator().manual_seed(K)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    config.base_model_name_or_path = policy.source.base
    adapters = []
    for e in range(K):
        tensors = {}
        for name, module in policy.base.named_modules():
            if name.endswith(TARGETS):
                A = torch.randn(r, module.in_features, generator=generator) * module.in_features**-0.5
                B = torch.randn(module.out_features, r, generator=generator) * 0.01
                tensors |= {f"base_model.model.{name}.lora_{half}.weight": t for half, t in (("A", A), ("B", B))}
        config.save_pretrained(str(folder / str(e)))
        save_file(tensors, folder / str(e) / "adapter_model.safetensors", metadata={"format": "pt"})
        own = json.loads((folder / str(e) / "adapter_config.json").read_text())
        adapters.append(Adapter(str(e), own, tensors, {}))
    return Experts(tuple(a.domain for a in adapters), stack_experts(adapters), {}, ({},) * K)


def attach_ours(policy: Policy, experts: Experts, **settings: Any) -> Any:
    """Attach the experts with a random gate."""
    gating = Gating()
    return attach(policy, experts, gating, initial_routers(policy, experts, gating, "normal", 0), **settings)


def load_xlora(reference: str, dtype: torch.dtype, device: str, K: int, folder: Path) -> Any:
    """X-LoRA over the same folders on weights of its own."""
    model, _ = load_base(resolve(reference), dtype)
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        xlora_depth=1,
        adapters={str(e): str(folder / str(e)) for e in range(K)},
        layerwise_scalings=True,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k_lora=2,
    )
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model.to(device), config)


def seconds_of(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side, A B A B ..., after one warm-up of each."""
    for run in sides.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(seconds_of(run, device))
    return found


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and range of the rounds' ratios."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def generation(model: Any, ids: torch.Tensor, new_tokens: int, **settings: Any) -> Callable[[], Any]:
    def run() -> None:
        with torch.inference_mode(), quiet_libraries():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                **settings,
            )

    return run


def our_step(policy: Policy, rows: list[Encoded]) -> Callable[[], Any]:
    parameters = [p for _, p in policy.train_only(EXPERT_GATE)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batch = collate([[row] for row in rows], policy.tokenizer.pad_token_id, policy.device)

    def run() -> None:
        scores = policy.scorer(batch)
        (-scores.logprob.sum() / scores.tokens.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def their_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    parameters = [p for name, p in model.named_parameters() if "internal_xlora_classifier" in name]
    for name, p in model.named_parameters():
        p.requires_grad_("internal_xlora_classifier" in name)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def against_xlora(options: argparse.Namespace, K: int, folder: Path) -> dict[str, Any]:
    """Generation and training step, ours and X-LoRA's; then what only concerns us."""
    policy, device = load_ours(options), options.device
    experts = make_experts(policy, K, options.rank, folder)
    routing = attach_ours(policy, experts)
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.base.config.vocab_size

    def tokens(rows: int, length: int) -> torch.Tensor:
        return torch.randint(100, vocabulary, (rows, length), generator=generator).to(device)

    prompts, new = tokens(8, options.prompt_tokens), options.new_tokens
    ours = generation(policy.model, prompts, new, use_cache=True)
    found: dict[str, Any] = {"K": K, "r": options.rank}
    if not options.alone:
        theirs = load_xlora(options.model, policy.dtype, device, K, folder)
        times = interleaved({"ours": ours, "xlora": generation(theirs, prompts, new)}, options.rounds, device)
        found["generation"] = ratio(times["xlora"], times["ours"])
        found["tokens_per_s"] = {n: round(8 * new / statistics.median(t), 1) for n, t in times.items()}

    recorder = Recorder()

    def traced() -> None:
        routing.state.recorder = recorder
        ours()
        recorder.rows()
        routing.state.recorder = None

    def base() -> None:
        routing.enabled = False
        ours()
        routing.enabled = True

    times = interleaved({"routed": ours, "traced": traced, "base": base}, max(options.rounds, 11), device)
    found["trace"] = ratio(times["traced"], times["routed"])
    found["decoding"] = ratio(times["routed"], times["base"])

    if not options.alone:
        train = tokens(4, options.train_tokens)
        step = our_step(policy, [Encoded(row.tolist(), 1) for row in train])
        theirs.train()
        times = interleaved({"ours": step, "xlora": their_step(theirs, train)}, options.rounds, device)
        found["training"] = ratio(times["xlora"], times["ours"])
        found["step_s"] = {n: round(statistics.median(t), 2) for n, t in times.items()}
        del theirs
        policy.trainable = None
        policy.freeze()

    found["prefill"] = {}
    for batch in (1, 4):
        ids = tokens(batch, options.prefill_tokens)

        def forward(enabled: bool, ids: torch.Tensor = ids) -> None:
            routing.enabled = enabled
            with torch.inference_mode():
                policy.model(input_ids=ids, logits_to_keep=1)
            routing.enabled = True

        sides = {"routed": lambda: forward(True), "base": lambda: forward(False)}
        times = interleaved(sides, max(options.rounds, 41 if batch == 1 else 21), device)
        found["prefill"][f"{batch}x{options.prefill_tokens}"] = ratio(times["routed"], times["base"])
    found["auto"] = auto_against_best(policy, routing, options)
    return found


def auto_against_best(policy: Policy, routing: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """At each size of the grid: what `auto` chose, and its seconds over those of the best back-end now."""
    rows = []
    weights = [policy.base.get_submodule(name).weights for name in routing.experts.modules]
    sizes, seconds = (GRID[:4], 1.0) if options.quick else (GRID, AUTO_S)
    for (key, n), passes in time_all(weights, 2, sizes, seconds).items():
        times = medians(passes)
        chosen, best = routing.table[key][str(n)], min(times, key=lambda b: times[b])
        first = times[chosen] / times[best]
        rows.append({
            "shape": key, "tokens": n, "auto": chosen, "best": best, "first": first,
            "ratio": first if first <= BARS["auto"] else again(weights, key, n, chosen, best),
            "us": {b: round(s * 1e6, 1) for b, s in times.items()},
        })  # fmt: skip
    return rows


def again(weights: Sequence[Any], key: str, tokens: int, chosen: Any, best: Any) -> float:
    """Median over `AGAIN` passes of the ratio of two back-ends that run in turn."""
    alike = [w for w in weights if shape_key(w, 2) == key]
    passes = [time_backends(alike, 2, tokens, [chosen, best], AGAIN_S) for _ in range(AGAIN)]
    return statistics.median(statistics.median(p[chosen]) / statistics.median(p[best]) for p in passes)


def auto_repeatedly(options: argparse.Namespace, K: int, folder: Path) -> dict[str, list[float]]:
    """Calibrate and measure in turn, `--repeat` times each, and hold every choice to every measurement.

    `auto` has the ratios of what calibrations chose, at each size, to the best of each measurement; `measured` those
    of what each measurement found best, to the best of the others: so far do two measurements agree.
    """
    policy = load_ours(options)
    routing = attach_ours(policy, make_experts(policy, K, options.rank, folder), backend="fused")
    weights = [policy.base.get_submodule(name).weights for name in routing.experts.modules]
    tables, measured = [], []
    for _ in range(options.repeat):
        tables.append(calibrate(weights, 2))
        measured.append({place: medians(passes) for place, passes in time_all(weights, 2, GRID, AUTO_S).items()})
    found: dict[str, list[float]] = {"auto": [], "measured": []}
    for i, seen in enumerate(measured):
        for (key, n), times in seen.items():
            best = min(times.values())
            found["auto"] += [times[table[key][str(n)]] / best for table in tables]
            others = [other[key, n] for j, other in enumerate(measured) if j != i]
            found["measured"] += [times[min(other, key=other.__getitem__)] / best for other in others]
    return found


def medians(passes: Sequence[dict[Any, float]]) -> dict[Any, float]:
    """Median seconds of each back-end over the passes that it was measured in."""
    return {b: statistics.median([of[b] for of in passes if b in of]) for b in passes[0]}


def load_ours(options: argparse.Namespace) -> Policy:
    return Policy.load(options.model, dtype=options.dtype, device=options.device)


def memory_of(options: argparse.Namespace, K: int, routed: bool) -> int:
    """Peak bytes of a process of its own that generates with the base, or with K experts attached."""
    command = [sys.executable, __file__, "--memory-of", str(K if routed else 0), "--model", options.model]
    command += ["--dtype", options.dtype, "--device", options.device, "--rank", str(options.rank)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def measure_memory(options: argparse.Namespace) -> None:
    policy = load_ours(options)
    if options.memory_of:
        generator = torch.Generator().manual_seed(0)
        K, r = options.memory_of, options.rank
        from tempering.methods.safemoe.experts import ExpertWeights

        modules = {
            name: ExpertWeights(
                torch.randn(K, r, m.in_features, generator=generator, dtype=policy.dtype),
                torch.randn(m.out_features, K, r, generator=generator, dtype=policy.dtype).mul_(1e-3),
                torch.ones(K),
            )
            for name, m in policy.base.named_modules()
            if name.endswith(TARGETS)
        }
        attach_ours(policy, Experts(tuple(map(str, range(K))), modules, {}, ({},) * K))
    ids = torch.randint(100, 1000, (8, 64), generator=torch.Generator().manual_seed(0)).to(options.device)
    generation(policy.model, ids, 16, use_cache=True)()
    if options.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(int(resident_mb() * 2**20))


def memory(options: argparse.Namespace, K: int) -> dict[str, float]:
    """Peak with experts over the base's peak plus one copy of them."""
    base, routed = memory_of(options, K, False), memory_of(options, K, True)
    policy = load_ours(options)
    linears = [m for name, m in policy.base.named_modules() if name.endswith(TARGETS)]
    copy = sum(K * options.rank * (m.in_features + m.out_features) for m in linears) * policy.dtype.itemsize
    return {"base_gb": base / 1e9, "routed_gb": routed / 1e9, "copy_gb": copy / 1e9, "ratio": routed / (base + copy)}


def verdicts(found: dict[str, Any]) -> list[tuple[str, float, bool | None]]:
    """Hold one K's figures against the bars; `None`: there is none, as for X-LoRA and prefill below K = 18."""
    has_bar = found["K"] >= 18
    rows: list[tuple[str, float, bool | None]] = [
        (name, found[name]["median"], found[name]["median"] >= BARS[name] if has_bar else None)
        for name in ("generation", "training")
        if name in found
    ]
    rows += [
        (f"prefill {n}", r["median"], r["median"] <= BARS["prefill"] if has_bar else None)
        for n, r in found["prefill"].items()
    ]
    rows += [("decoding", found["decoding"]["median"], None)]
    worst = max(row["ratio"] for row in found["auto"])
    rows += [("auto, worst", worst, worst <= BARS["auto"])]
    rows += [("trace", found["trace"]["median"], found["trace"]["median"] <= BARS["trace"])]
    if "memory" in found:
        rows += [("memory", found["memory"]["ratio"], found["memory"]["ratio"] <= BARS["memory"])]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "auto"))
    parser.add_argument("--experts", type=int, nargs="+", default=[18, 8, 4, 2])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--train-tokens", type=int, default=256)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--alone", action="store_true", help="without X-LoRA: only what concerns us")
    parser.add_argument("--repeat", type=int, help="only calibrate and measure `auto`, so many times each")
    parser.add_argument("--quick", action="store_true", help="K = 4, two rounds, short: does it work?")
    parser.add_argument("--memory-of", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    options.dtype = str(pick_dtype(options.dtype, torch.device(options.device))).removeprefix("torch.")
    if options.memory_of is not None:
        measure_memory(options)
        return
    if options.quick:
        options.experts, options.rounds, options.new_tokens = [4], 2, 8
        options.prompt_tokens, options.train_tokens, options.prefill_tokens = 16, 32, 64
    print(
        f"{options.model}, {options.device} ({options.dtype}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    sys.stdout.reconfigure(line_buffering=True)
    if options.repeat:
        for K in options.experts:
            with tempfile.TemporaryDirectory() as folder:
                for who, ratios in auto_repeatedly(options, K, Path(folder)).items():
                    beyond = sum(ratio > BARS["auto"] for ratio in ratios)
                    print(
                        f"K = {K}: {who} beyond {BARS['auto']} at {beyond} of {len(ratios)}, worst {max(ratios):.2f}"
                    )
        return
    results = []
    for K in options.experts:
        with tempfile.TemporaryDirectory() as folder:
            found = against_xlora(options, K, Path(folder))
        if max(options.experts) == K and not options.quick:
            found["memory"] = memory(options, K)
        results.append(found)
        speed = f"tokens/s {found['tokens_per_s']}, step {found['step_s']} s" if not options.alone else "ours alone"
        print(f"\nK = {K}, r = {options.rank}: {speed}")
        for name, value, is_met in verdicts(found):
            bar = BARS.get(name.split(",")[0].split(" ")[0])
            word = "no bar" if is_met is None else f"bar {bar:5}   {'met' if is_met else 'MISSED'}"
            print(f"  {name:18} {value:7.3f}   {word}")
        for row in found["auto"]:
            twice = "" if row["first"] == row["ratio"] else f", again {row['ratio']:.2f}"
            print(
                f"    {row['shape']} N={row['tokens']}: auto {row['auto']}, best {row['best']}, "
                f"{row['first']:.2f}{twice}  {row['us']} us"
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
