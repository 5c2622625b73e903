#!/usr/bin/env python3
"""What a client waits for: the first word of an answer behind reasoning, and best of N in front of another server.

    python benchmarks/served_latency.py              # smollm2, two cores, with training 12 minutes
    python benchmarks/served_latency.py --thinking runs/deliberative     # one that is there

Servers are started as a user starts them; requests are sent one at a time, after two that are not counted.

* Seconds to the first word of the answer, streamed: the plain model, and one that thinks first (`temper train
  deliberative -c demo`, unless `--thinking` names another). Reasoning does not count as answer.
* Seconds of a whole request, 1 and 8 candidates of at most `--max-tokens` tokens: asked of a server itself, which
  only draws, and of the proxy before it, which has it draw, scores, and chooses
  (`sampler=attribution attribution.generator=openai:...`). The aligned model is an adapter that has learned next to
  nothing: what is computed is the same. Server and proxy share this machine.

Told: the median with the least and the largest, n, and for the proxy the ratio to drawing alone, request by request.
`results.json` and `table.md` are in `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from serving_load import ASKS, SUBJECTS, server
from unlearning_runs import trained

NOT_COUNTED = 2
CANDIDATES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench_served_latency")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--thinking", default=None, help="a run that thinks first; default: the demo's, trained here")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=16, help="that are counted, of each kind")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer; reasoning comes on top")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {"first_word": first_words(args, out), "request": requests(args, out), "settings": vars(args)}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def first_words(args: argparse.Namespace, out: Path) -> dict[str, list[float]]:
    """Seconds to the first word of the answer, without and with reasoning before it."""
    thinking = args.thinking or str(trained("deliberative", out / "thinking", demo(args.model)).root)
    found = {}
    for name, target in (("answers at once", args.model), ("thinks first", thinking)):
        with server(target, args.dtype, out / "server.log", []) as (url, _):
            found[name] = timed(args, url, first_word)
    return found


def demo(model: str) -> dict[str, Any]:
    """The recipe of the demo, without its evals."""
    import tempering
    from tempering.core.config import read_yaml

    recipe = read_yaml(Path(tempering.__file__).parent / "recipes" / "deliberative" / "demo.yaml")
    recipe.pop("evals", None)
    return {**recipe, "model": model}


def requests(args: argparse.Namespace, out: Path) -> dict[str, list[float]]:
    """Seconds of a request of so many candidates, only drawn, and drawn, scored and chosen among."""
    run = trained("sft", out / "aligned", {"model": args.model, "limit": 8, "epochs": 1}).root
    found = {}
    with server(str(run), args.dtype, out / "drawing.log", ["name=drawing"]) as (drawing, _):
        for n in CANDIDATES:
            found[f"{n}, drawn"] = timed(args, drawing, lambda client, body, n=n: whole(client, {**body, "n": n}))
        for n in CANDIDATES:
            choosing = [
                "sampler=attribution", f"attribution.n={n}", f"attribution.generator=openai:drawing@{drawing}/v1",
            ]  # fmt: skip
            with server(str(run), args.dtype, out / f"choosing-{n}.log", choosing) as (proxy, _):
                found[f"{n}, drawn and scored"] = timed(args, proxy, whole)
    return found


def timed(args: argparse.Namespace, url: str, ask: Callable[[httpx.Client, dict[str, Any]], float]) -> list[float]:
    """Seconds of each counted request, one after the other."""
    seconds = []
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        for i in range(NOT_COUNTED + args.requests):
            text = ASKS[i // len(SUBJECTS) % len(ASKS)].format(SUBJECTS[i % len(SUBJECTS)])
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": args.max_tokens, "temperature": 1.0, "seed": i,
            }  # fmt: skip
            seconds.append(ask(client, body))
    return seconds[NOT_COUNTED:]


def first_word(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds to the first token of the answer; infinite where none came: reasoning that did not end."""
    since = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {") and any(
                choice["delta"].get("content") for choice in json.loads(line[6:])["choices"]
            ):
                return time.perf_counter() - since
    return float("inf")


def whole(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds of a request that is answered in one piece."""
    since = time.perf_counter()
    client.post("/v1/chat/completions", json=body).raise_for_status()
    return time.perf_counter() - since


def table(found: dict[str, Any]) -> str:
    """Both measurements, in Markdown."""
    lines = ["| | seconds to the first word of the answer |", "| --- | ---: |"]
    lines += [f"| {name} | {told(seconds)} |" for name, seconds in found["first_word"].items()]
    lines += ["", "| candidates | seconds a request | over drawing alone |", "| --- | ---: | ---: |"]
    for name, seconds in found["request"].items():
        drawn = found["request"][name.split(",")[0] + ", drawn"]
        ratio = "" if seconds is drawn else told([a / b for a, b in zip(seconds, drawn, strict=True)])
        lines.append(f"| {name} | {told(seconds)} | {ratio} |")
    return "\n".join(lines) + f"\n\nn {found['settings']['requests']} requests of each.\n"


def told(values: Sequence[float]) -> str:
    came = [value for value in values if value != float("inf")]
    lost = f", {len(values) - len(came)} without any" if len(came) < len(values) else ""
    return f"{statistics.median(came):.2f} ({min(came):.2f} to {max(came):.2f}){lost}" if came else "none came"


if __name__ == "__main__":
    main()
