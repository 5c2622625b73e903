"""Samplers: callables that answer prompts. One over a local policy, one over an endpoint, one scripted.

Used by evals, attacks, judges and methods; refuses to know what the answers are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tempering.core.records import Completion, Prompt


class Sampler(Protocol):
    """Answer prompts. Same seed, same text, whatever the batch size and the order of the prompts."""

    name: str
    """What was asked, for provenance: a model reference or `openai:MODEL@URL`."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order of the prompts.

        `temperature` 0 is greedy. A prompt whose last turn is the assistant's is continued. A sample that
        failed has `finish == "error"` and says why. `on_done` is told how many prompts were just finished.
        """
        ...


class ScriptedSampler:
    """Answer from a list (in turn), or from a function of (prompt, sample index). For tests and planted rates."""

    def __init__(self, script: Sequence[str] | Callable[[Prompt, int], str], name: str = "scripted") -> None:
        self.script, self.name, self._asked = script, name, 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return the scripted answers; see `Sampler`."""
        groups = []
        for prompt in prompts:
            texts = [self._next(prompt, index) for index in range(n)]
            groups.append([Completion(prompt.id, text, "stop", i, seed=seed) for i, text in enumerate(texts)])
            if on_done:
                on_done(1)
        return groups

    def _next(self, prompt: Prompt, index: int) -> str:
        if callable(self.script):
            return self.script(prompt, index)
        text = self.script[self._asked % len(self.script)]
        self._asked += 1
        return text
