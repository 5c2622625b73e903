"""Samplers: callables that answer prompts. One over a local policy, one over an endpoint, one scripted.

Used by evals, attacks, judges and methods; refuses to know what the answers are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tempering.core.activations import EndStates, capture
from tempering.core.adapted_layers import adapters_joined_once
from tempering.core.caching import read_once
from tempering.core.chat import Encoded, PromptFormat, encode_prompt
from tempering.core.draws import Key, inverse_transform, uniforms
from tempering.core.loading import Dtype, quiet_libraries
from tempering.core.logprobs import score_groups
from tempering.core.policy import Policy
from tempering.core.progress import note
from tempering.core.quarantine import override, require_override
from tempering.core.records import Completion, Finish, Prompt, Thought
from tempering.core.think import CLOSE, OPEN, Spans, decode, find_spans, parse_think, think_prompt

THINK_TOKENS = "think_tokens"
"""Key in an adapter's lineage.json: it thinks before it answers, in at most so many tokens."""

Job = tuple[int, int]
"""(place of the prompt, index of the sample)"""


class Interrupted(RuntimeError):  # noqa: N818  (what was asked for, not a fault)
    """Sampling ended because `LocalSampler.interrupt` said so; nothing came of it."""


class Ended(NamedTuple):
    """A sample with its states, as `LocalSampler.keeping_ends` has them."""

    prompt_ids: list[int]
    ids: list[int]
    """Sampled tokens; where they were cut, the end-of-turn token behind them."""
    states: Tensor
    """At the last two of `ids`, float32, on the CPU: (2, layers, D)."""


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


def load_sampler(target: str, *, dtype: Dtype = "auto", **endpoint: Any) -> Sampler:
    """Return something that answers: a model reference in this process, or `openai:MODEL@URL`.

    `endpoint`: settings of the latter, such as `concurrency` or `cache`; see `EndpointSampler`.
    """
    if target.startswith("openai:"):
        from tempering.core.endpoint import EndpointSampler

        return EndpointSampler(target, **endpoint)
    return local_sampler(Policy.load(target, dtype=dtype))


def local_sampler(policy: Policy, **settings: Any) -> LocalSampler | ThinkSampler:
    """Return the sampler that fits a policy: one that thinks first where its adapter was trained to."""
    budget = policy.lineage.get(THINK_TOKENS)
    if budget is None:
        return LocalSampler(policy, **settings)
    return ThinkSampler(LocalSampler(policy, thinks=True, **settings), budget)


class ScriptedSampler:
    """Answer from a list (in turn), or from a function of (prompt, sample index). For tests and planted rates."""

    def __init__(self, script: Sequence[str] | Callable[[Prompt, int], str], name: str = "scripted") -> None:
        self.script, self.name, self._asked = script, name, 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        first: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return the scripted answers, samples `first` to first + n - 1 of each prompt; see `Sampler`."""
        groups = []
        for prompt in prompts:
            texts = [self._next(prompt, index) for index in range(first, first + n)]
            groups.append([Completion(prompt.id, text, "stop", i, seed=seed) for i, text in enumerate(texts, first)])
            if on_done:
                on_done(1)
        return groups

    def _next(self, prompt: Prompt, index: int) -> str:
        if callable(self.script):
            return self.script(prompt, index)
        text = self.script[self._asked % len(self.script)]
        self._asked += 1
        return text


class LocalSampler:
    """Sample from a policy in this process, batched by length with the KV cache on.

    Randomness is keyed by (seed, prompt, sample index, position), so a sample does not depend on what it is
    batched with; in float32 neither do greedy answers (in bfloat16 a near-tie may fall otherwise). `thinks`: ask
    with the think prefix (`core/think.py`); what comes is reasoning and answer in one text, see `ThinkSampler`.
    """

    changes_states: bool = False
    """Whether answers come from other states than the policy's weights compute: these say nothing of it then."""

    def __init__(
        self,
        policy: Policy,
        *,
        batch_rows: int = 64,
        batch_tokens: int = 16_384,
        fmt: PromptFormat = "chat",
        thinks: bool = False,
        name: str | None = None,
    ) -> None:
        self.policy, self.batch_rows, self.batch_tokens = policy, batch_rows, batch_tokens
        self.fmt, self.thinks = fmt, thinks
        self.name = name or policy.source.reference
        self.interrupt: Callable[[], bool] | None = None
        """Asked before every token; where it says yes, the call ends with `Interrupted`."""
        self._keeping: tuple[tuple[int, ...], int, dict[Key, Ended]] | None = None
        self._logprobs: dict[Key, list[float]] | None = None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        first: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt, samples `first` to first + n - 1; see `Sampler`.

        Raises:
            Interrupted: `interrupt` said so.
            ValueError: a prompt that the chat template refuses, or longer than the model's context, by its id.
            UnsafeExpertAccess: the policy is unsafe, and the override with which it was loaded has ended.
        """
        if self.policy.is_unsafe:
            require_override(f"sampling from {self.name}")
        jobs = [(p, i) for p in range(len(prompts)) for i in range(first, first + n)]
        ids = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        order = sorted(jobs, key=lambda job: (len(ids[job[0]]), prompts[job[0]].id, job[1]))
        out: list[list[Completion]] = [[] for _ in prompts]
        left = [n] * len(prompts)
        for batch in self._batches(order, lambda job: len(ids[job[0]]) + max_new_tokens):
            keys = [(seed, prompts[p].id, i) for p, i in batch]
            rows, ends = self._generate([ids[p] for p, _ in batch], keys, max_new_tokens, temperature, top_p)
            for row, ((p, i), tokens) in enumerate(zip(batch, rows, strict=True)):
                out[p].append(self.completion_of(prompts[p], i, tokens, seed))
                left[p] -= 1
                if self._logprobs is not None:
                    self._logprobs[keys[row]] = self._logprobs[keys[row]][: len(out[p][-1].token_ids)]
                if self._keeping and ends is not None and ends.has[row]:
                    _, end_id, kept = self._keeping
                    whole = [*out[p][-1].token_ids, *([end_id] if out[p][-1].finish == "length" else [])]
                    kept[keys[row]] = Ended(ids[p], whole, ends.states[row].cpu())
            if on_done:
                on_done(len({p for p, _ in batch if left[p] == 0}))
        return [sorted(group, key=lambda c: c.index) for group in out]

    @contextmanager
    def keeping_ends(self, layers: Sequence[int], end_id: int) -> Iterator[dict[Key, Ended]]:
        """Keep what the model computes at the end of each sample that is drawn inside the block; see `EndStates`.

        A sample that was cut is kept as if `end_id` followed. What does not fit into the context is not kept.
        """
        found: dict[Key, Ended] = {}
        self._keeping = (tuple(layers), end_id, found)
        try:
            yield found
        finally:
            self._keeping = None

    @contextmanager
    def keeping_logprobs(self) -> Iterator[dict[Key, list[float]]]:
        """Keep the log-probability, in nats, of each token that is drawn inside the block: the model's own, without
        temperature and nucleus. Equal to what scoring gives but for rounding.
        """
        found: dict[Key, list[float]] = {}
        self._logprobs = found
        try:
            yield found
        finally:
            self._logprobs = None

    def _batches(self, jobs: Sequence[Job], length: Callable[[Job], int]) -> Iterator[list[Job]]:
        """Cut jobs, the shortest first, where a batch would pass `batch_rows` rows or `batch_tokens` tokens."""
        batch: list[Job] = []
        for job in jobs:
            if batch and (len(batch) == self.batch_rows or (len(batch) + 1) * length(job) > self.batch_tokens):
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Return (summed log-probability in nats, tokens) of each given completion, end of turn not counted."""
        policy, limit = self.policy, context_of(self.policy)
        groups: list[list[Encoded]] = []
        owners: list[int] = []
        for p, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
            start = self.prompt_ids(prompt)
            answers = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            kept = start[-(limit - max(map(len, answers))) :]
            rows = policy.groups([Encoded(kept + answer, len(kept)) for answer in answers])
            groups += rows
            owners += [p] * len(rows)
        scored = score_groups(policy.scorer, groups, pad_id=policy.tokenizer.pad_token_id, device=policy.device)
        out: list[list[tuple[float, int]]] = [[] for _ in prompts]
        for p, scores in zip(owners, scored, strict=True):
            out[p] += scores
        return out

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens that an answer to this prompt continues."""
        if self.thinks:
            return think_prompt(self.policy.tokenizer, prompt.messages)
        return encode_prompt(self.policy.tokenizer, prompt.messages, self.fmt)

    def tokens_over(self, prompt: Prompt, max_new_tokens: int) -> int:
        """By how many tokens prompt and answer would pass the model's context; 0 where they fit."""
        return max(0, len(self.prompt_ids(prompt)) + max_new_tokens - context_of(self.policy))

    def _encode(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        try:
            ids = self.prompt_ids(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id}: {error}") from error
        limit = context_of(self.policy)
        if len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
                f"model's context of {limit}; shorten it or leave it out, lower max_new_tokens, or "
                "(attack many_shot) shots_per_prompt"
            )
        return ids

    def _generate(
        self,
        rows: Sequence[list[int]],
        keys: Sequence[Key],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> tuple[list[list[int]], EndStates | None]:
        policy = self.policy
        width, pad = max(map(len, rows)), policy.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=policy.end_ids,
            use_cache=True,
            return_dict_in_generate=bool(self._keeping),
        )
        ids, mask, ends = ids.to(policy.device), mask.to(policy.device), None
        pick = LogitsProcessorList([_Told(len(rows), width, max_new_tokens, self.interrupt)])
        said = _Said()
        if self._logprobs is not None:
            pick.append(said)
        if temperature:
            pick.append(KeyedSampling(keys, width, max_new_tokens, temperature, top_p))
        if self._logprobs is not None:
            pick.append(_Chosen(said))
        layers, end_id, _ = self._keeping or ((), 0, None)
        watch = capture(policy.model, layers, keep=EndStates.newest) if layers else nullcontext()
        with torch.inference_mode(), adapters_joined_once(policy.model), quiet_libraries():
            # The model's own generation_config would add its temperature and penalties to ours.
            own, policy.base.generation_config = policy.base.generation_config, config
            try:
                with watch as seen:
                    if seen is not None:
                        ends = EndStates(seen, layers, width, torch.tensor(policy.end_ids, device=policy.device))
                        pick.append(ends)
                    out = policy.model.generate(
                        input_ids=ids, attention_mask=mask, past_key_values=read_once(policy, rows, ids, mask),
                        generation_config=config, logits_processor=pick,
                    )  # fmt: skip
            finally:
                policy.base.generation_config = own
            if self._logprobs is not None:
                self._logprobs |= dict(zip(keys, torch.stack(said.chosen, 1).tolist(), strict=True))
            if ends is None:
                return out[:, width:].tolist(), None
            new = out.sequences[:, width:]
            ends.finish(policy.model, out.past_key_values, new, mask, end_id, context_of(policy))
            return new.tolist(), ends

    def computing(self) -> AbstractContextManager[None]:
        """What the model has to be inside of for the states that answers come from; see `changes_states`."""
        return nullcontext()

    def completion_of(self, prompt: Prompt, index: int, tokens: Sequence[int], seed: int) -> Completion:
        """The answer that these new tokens are, up to the first that ends one."""
        ends = set(self.policy.end_ids)
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[:stop]
        tokenizer = self.policy.tokenizer
        text = decode(tokenizer, kept) if self.thinks else tokenizer.decode(kept, skip_special_tokens=True)
        finish: Finish = "length" if stop is None else "stop"
        kept = tokens if stop is None else tokens[: stop + 1]
        marked = override() is not None
        return Completion(prompt.id, text, finish, index, tuple(kept), seed, unsafe_override=marked)


class ThinkSampler:
    """Answer after thinking: a completion's `text` is the answer, its `thought` the reasoning before it.

    `max_new_tokens` is the length of an answer, as for any other sampler: `think_tokens` come on top of it, and an
    answer that goes on for longer is cut. Reasoning that is not closed within both leaves an empty answer (`finish`
    is `length`). After a prefill that does not think, all is answer.
    """

    def __init__(self, inner: LocalSampler, think_tokens: int) -> None:
        self.inner, self.think_tokens, self.name = inner, think_tokens, inner.name
        self.policy = inner.policy

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        first: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return n completions for each prompt; see `Sampler`."""
        groups = self.inner(
            prompts, n=n, first=first, max_new_tokens=self.think_tokens + max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed, on_done=on_done,
        )  # fmt: skip
        return [[self.split(p, c, max_new_tokens) for c in group] for p, group in zip(prompts, groups, strict=True)]

    def tokens_over(self, prompt: Prompt, max_new_tokens: int) -> int:
        """By how many tokens prompt, reasoning and answer would pass the model's context; 0 where they fit."""
        return self.inner.tokens_over(prompt, self.think_tokens + max_new_tokens)

    def split(self, prompt: Prompt, completion: Completion, max_answer: int | None = None) -> Completion:
        """Take a completion apart into reasoning and answer; the answer is then cut to `max_answer` tokens."""
        tokenizer, ends, ids = self.policy.tokenizer, self.policy.end_ids, completion.token_ids
        thinks = not prompt.prefill or (OPEN in prompt.prefill and CLOSE not in prompt.prefill)
        content = ids[:-1] if ids and ids[-1] in ends else ids
        spans = (
            find_spans(lambda some: decode(tokenizer, some), content, opened=True) if thinks else Spans((0, len(ids)))
        )
        start, end = spans.answer or (0, 0)
        cut = ids if max_answer is None or end - start <= max_answer else ids[: start + max_answer]
        is_cut = len(cut) < len(ids)
        if is_cut:
            spans = spans._replace(answer=(start, len(cut)))

        def text_of(tokens: Sequence[int]) -> str:
            kept = decode(tokenizer, tokens[:-1] if tokens and tokens[-1] in ends else tokens)
            return (prompt.prefill or OPEN) + kept if thinks else kept

        found = replace(completion, token_ids=cut, finish="length" if is_cut else completion.finish)
        if not thinks:
            return replace(found, text=text_of(cut))
        status = parse_think(text_of(ids), completion.finish).status
        cot, answer, _ = parse_think(text_of(cut), found.finish)
        return replace(found, text=answer, thought=Thought(cot, status, spans.present))


class KeyedSampling(LogitsProcessor):
    """Sample one token a row by inverse transform, from a uniform number keyed by row and position.

    It leaves a single finite logit in each row, so that generation goes on greedily.
    """

    def __init__(self, keys: Sequence[Key], width: int, steps: int, temperature: float, top_p: float) -> None:
        self.width, self.temperature, self.top_p = width, temperature, top_p
        self.uniform = np.stack([uniforms(key, steps) for key in keys])  # (B, steps)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits that are finite at the sampled token only. (B, T), (B, V) -> (B, V)."""
        u = torch.from_numpy(self.uniform[:, input_ids.shape[1] - self.width]).to(scores.device)
        token = inverse_transform(scores, u, self.temperature, self.top_p)
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


class _Told(LogitsProcessor):
    """Tell whoever shows progress at which token a batch is, ask whether to go on, and change nothing."""

    def __init__(self, rows: int, width: int, steps: int, interrupt: Callable[[], bool] | None) -> None:
        self.rows, self.width, self.steps, self.interrupt = rows, width, steps, interrupt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.interrupt is not None and self.interrupt():
            raise Interrupted(f"interrupted at token {input_ids.shape[1] - self.width + 1} of at most {self.steps}")
        note(f"token {input_ids.shape[1] - self.width + 1} of at most {self.steps}, {self.rows} at a time")
        return scores


class _Said(LogitsProcessor):
    """Remember what the model says of every token, and change nothing."""

    def __init__(self) -> None:
        self.logprob: Tensor | None = None  # (B, V), of the last step
        self.chosen: list[Tensor] = []  # (B,) each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprob = scores.float().log_softmax(-1)
        return scores


class _Chosen(LogitsProcessor):
    """Note what the model said of the token that is chosen now."""

    def __init__(self, said: _Said) -> None:
        self.said = said

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.said.logprob is not None
        self.said.chosen.append(self.said.logprob.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1))
        return scores


def context_of(policy: Policy) -> int:
    """The longest sequence that the model reads, in tokens."""
    return int(getattr(policy.base.config, "max_position_embeddings", None) or 1 << 20)
