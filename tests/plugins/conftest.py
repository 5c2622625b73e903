"""An OpenAI-compatible endpoint on the loopback interface over any of our samplers, for others' programs."""

import threading

import pytest

from tempering.core.records import Prompt


@pytest.fixture
def serve(loopback):
    """A function: sampler -> (URL, list of the request bodies)."""

    def start(sampler):
        lock = threading.Lock()

        def respond(body, count):
            turns = tuple({"role": m["role"], "content": text_of(m["content"])} for m in body["messages"])
            limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
            with lock:
                [group] = sampler(
                    [Prompt(turns)], n=body.get("n") or 1, max_new_tokens=limit, seed=body.get("seed") or 0,
                    temperature=body.get("temperature") or 0.0,
                )  # fmt: skip
            choices = [
                {"index": i, "message": {"role": "assistant", "content": c.text}, "finish_reason": c.finish}
                for i, c in enumerate(group)
            ]
            usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
            told = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
            return 200, told | {"choices": choices, "usage": usage}, {"Content-Type": "application/json"}

        server = loopback(respond)
        return server.url, server.bodies

    return start


def text_of(content):
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
