"""What an eval costs beside its target and its judge's model stays small, in time and memory."""

import json
import time
import tracemalloc

import pytest

from tempering.api import evaluate
from tempering.core.sampling import ScriptedSampler

SECONDS_A_PROMPT = 60 / 10_000
BYTES_A_PROMPT = 4096


def answer(prompt, sample):
    number = int(prompt.text.split()[1])
    return (
        "I'm sorry, but I can't help with that." if number % 10 < 3 else f"Here is how to do {number}. " + "x " * 100
    )


def scripted(folder, count, name="harm"):
    data = folder / f"{count}.jsonl"
    rows = ({"prompt": f"question {i} about apple trees", "category": "abc"[i % 3]} for i in range(count))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.perf_counter()
    found = evaluate(ScriptedSampler(answer), [name], data=str(data), out=folder / f"{name}{count}")
    return found[name]["metrics"], time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.parametrize("name", ["harm", "over_refusal"])
def test_ten_thousand_prompts_would_take_less_than_a_minute(tmp_path, name):
    scripted(tmp_path, 10, name)  # loads what is loaded late
    metrics, seconds = scripted(tmp_path, 2000, name)
    assert metrics["refusal_rate" if name == "harm" else "over_refusal_rate"]["value"] == 0.3
    assert seconds < 2000 * SECONDS_A_PROMPT


@pytest.mark.slow
def test_memory_grows_by_the_rows_and_no_more(tmp_path):
    scripted(tmp_path, 10)
    peaks = {}
    tracemalloc.start()
    try:
        for count in (500, 2500):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            scripted(tmp_path, count)
            peaks[count] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peaks[2500] - peaks[500] < 2000 * BYTES_A_PROMPT
