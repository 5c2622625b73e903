"""What `temper eval` costs beside the model: time and memory for many prompts that a script answers.

    python benchmarks/eval_overhead.py                               # 1,000 and 10,000 prompts, `harm`
    python benchmarks/eval_overhead.py --prompts 1000 100000 --eval over_refusal
    python benchmarks/eval_overhead.py --endpoint                    # a local server answers, over HTTP

Synthetic harmless prompts in a JSONL file go through `tempering.api.evaluate`, all that the command calls, with a
`ScriptedSampler` that refuses 30 % of them, and the rules judge. Each size has a process of its own. Memory is the
peak of the process less what it held before the eval. Exit code 1 where 10,000 prompts or fewer take more than
60 s, or memory grows by more than 4 KiB a prompt from the smallest size to the largest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MOST_SECONDS, OF_PROMPTS = 60.0, 10_000
MOST_GROWTH = 4096
"""Bytes of memory for each further prompt."""
THINGS = ("stone bridges", "river boats", "apple trees", "glass beads", "paper kites")
REFUSED = 3, 10
ANSWER = (
    "Here is how to begin with {}. " + "First find a quiet place, then take your time and note what you see. " * 6
)
REFUSAL = "I'm sorry, but I can't help with that. Perhaps there is something else that you would like to know about."


def write_prompts(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = f"Question {i}: what should somebody know who begins with {THINGS[i % 5]}?"
            file.write(json.dumps({"prompt": text, "category": THINGS[i % 5]}) + "\n")


def script(prompt: Any, sample: int) -> str:
    number = int(prompt.text.removeprefix("Question ").partition(":")[0])
    return REFUSAL if number % REFUSED[1] < REFUSED[0] else ANSWER.format(prompt.text)


def measure(count: int, name: str, url: str | None, folder: str) -> dict[str, float]:
    """Run one eval in this process; return seconds and bytes."""
    import torch  # noqa: F401  # what a local target has loaded anyway

    from tempering.api import evaluate
    from tempering.core.sampling import ScriptedSampler

    data = Path(folder) / f"{count}.jsonl"
    write_prompts(data, count)
    target = ScriptedSampler(script) if url is None else f"openai:m@{url}"
    evaluate(ScriptedSampler(script), [name], data=str(data), limit=50, out=Path(folder) / f"warm{count}")
    before = _peak_bytes()  # so that what is loaded late does not count
    started, processor = time.perf_counter(), time.process_time()
    found = evaluate(target, [name], data=str(data), out=Path(folder) / f"run{count}")[name]
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    metric = next(iter(found["metrics"].values()))
    assert (metric["n"], metric["unscored"]) == (count, 0)
    if url is None:
        rate = found["metrics"]["refusal_rate" if name == "harm" else "over_refusal_rate"]["value"]
        assert rate == REFUSED[0] / REFUSED[1], f"the script refuses 30 %, the eval says {rate}"
    judging = found["cost"]["judge_seconds"]
    return {
        "seconds": seconds,
        "processor": processor,
        "judging": judging,
        "before": before,
        "bytes": _peak_bytes() - before,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10_000], metavar="N")
    parser.add_argument("--eval", choices=["harm", "over_refusal"], default="harm")
    parser.add_argument("--endpoint", action="store_true", help="have a trivial local server answer, 16 at a time")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    url = server = None
    if options.endpoint:
        from endpoint_vs_httpx import serve

        here, there = spawn.Pipe()
        server = spawn.Process(target=serve, args=(there,), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{here.recv()}/v1"
    found = {}
    heads = ("prompts", "seconds", "processor s", "judging s", "ms a prompt", "memory MiB", "on top of")
    print("".join(f"{head:>13}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(options.prompts):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                row = found[count] = pool.submit(measure, count, options.eval, url, folder).result()
            seconds, memory = row["seconds"], row["bytes"] / 2**20
            print(
                f"{count:>13}{seconds:>13.2f}{row['processor']:>13.2f}{row['judging']:>13.2f}"
                f"{1000 * seconds / count:>13.2f}{memory:>13.1f}{row['before'] / 2**20:>13.0f}"
            )
    if server:
        server.terminate()
        server.join()
    least, most = min(found), max(found)
    growth = (found[most]["bytes"] - found[least]["bytes"]) / max(most - least, 1)
    slow = [n for n, row in found.items() if n <= OF_PROMPTS and row["seconds"] > MOST_SECONDS]
    print(f"memory grows by {growth:.0f} bytes a prompt (at most {MOST_GROWTH}); at most {MOST_SECONDS:g} s")
    return int(bool(slow) or growth > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
