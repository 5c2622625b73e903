"""Does a server that is not ours get the same verdicts as the model in this process? `transformers serve`, greedy.

    pip install 'transformers[serving]'
    python benchmarks/served_equivalence.py                   # smollm2, 100 prompts of each eval, float32
    python benchmarks/served_equivalence.py --stream --limit 20

Starts transformers' own OpenAI-compatible server on this machine with the same weights, runs `harm` and
`over_refusal` with the embedded prompts on both targets, and compares the rows by prompt. Printed: how many
verdicts and texts are equal, and each pair of texts that is not. Exit code 1 where a verdict differs.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tempering.api import evaluate, load
from tempering.core.loading import EMBEDDED, embedded_folder
from tempering.core.run import Run

EVALS = ("harm", "over_refusal")
VERDICTS = ("verdict", "refusal")
SETUP = "this benchmark needs the dependencies of transformers' server: pip install 'transformers[serving]'"


def served_name(model: str) -> str:
    """Return the folder, or Hub id and revision, under which the server finds the same weights."""
    if model != EMBEDDED:
        return model
    folder, revision = embedded_folder()
    return folder if revision is None else f"{folder}@{revision}"


@contextmanager
def server(name: str, dtype: str, log: Path, wait_s: float = 300) -> Iterator[str]:
    """Run `transformers serve` with one model, and yield the URL of its API.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", dtype]
    environment = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if Path(name).is_dir() else {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + wait_s
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not answer; it says:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def compare(a: Run, b: Run, name: str) -> tuple[int, int, int, list[tuple[str, str, str]]]:
    """Return prompts, equal verdicts, equal texts, and prompt and texts of each pair that differs."""
    here, there = ({row["id"]: row for row in run.read_rows(f"evals/{name}.jsonl")} for run in (a, b))
    assert here.keys() == there.keys(), "both targets are asked the same prompts"
    pairs = [(here[key], there[key]) for key in here]
    verdicts = sum(_verdicts(x) == _verdicts(y) for x, y in pairs)
    texts = [(x["prompt"], x["completion"], y["completion"]) for x, y in pairs]
    differing = [text for text in texts if text[1] != text[2]]
    return len(pairs), verdicts, len(pairs) - len(differing), differing


def _verdicts(row: dict[str, Any]) -> list[Any]:
    return [(row[key]["label"], row[key]["score"]) for key in VERDICTS if key in row]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="smollm2, a model folder, or a Hub id with @revision")
    parser.add_argument("--limit", type=int, default=100, help="prompts of each eval")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both sides")
    parser.add_argument("--stream", action="store_true", help="ask the server to stream its replies")
    parser.add_argument("--out", type=Path, help="folder to keep both runs and the server's log in")
    options = parser.parse_args()
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        print(SETUP, file=sys.stderr)
        return 2
    settings = {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.out or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        evaluate(load(options.model, dtype=options.dtype), EVALS, out=root / "here", **settings)
        here_s = time.perf_counter() - started
        name = served_name(options.model)
        with server(name, options.dtype, root / "server.log") as url:
            started = time.perf_counter()
            endpoint = {"stream": options.stream, "timeout_s": 600}
            evaluate(f"openai:{name}@{url}", EVALS, out=root / "served", endpoint=endpoint, **settings)
            served_s = time.perf_counter() - started
        here, served = Run.open(root / "here"), Run.open(root / "served")
        found = {name: compare(here, served, name) for name in EVALS}
    print(f"{options.model}, {options.dtype}, greedy, {options.max_new_tokens} tokens, stream={options.stream}")
    print(f"in this process {here_s:.0f} s, served one prompt at a time {served_s:.0f} s")
    print(f"{'eval':<14}{'prompts':>8}{'equal verdicts':>16}{'equal texts':>13}")
    for name, (prompts, verdicts, texts, differing) in found.items():
        print(f"{name:<14}{prompts:>8}{verdicts:>16}{texts:>13}")
        for prompt, ours, theirs in differing:
            print(f"  prompt {prompt!r}\n    here   {ours!r}\n    served {theirs!r}")
    return int(any(verdicts < prompts for prompts, verdicts, _, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
