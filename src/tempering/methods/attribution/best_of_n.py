"""The sampler around a sampler: draw N candidates, score them, return the one with the lowest risk.

    risk  = scorers(prompt, candidates)         every scorer reads one pair of passes
    valid = finished, reasoning closed, answer not empty
    i*    = argmin risk over valid candidates (over all where none is); ties to the lowest index, NaN last

Candidate i of a prompt depends on (seed, prompt, i) alone, so candidate 0 is what the inner sampler answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tempering import judges
from tempering.core.chat import encode_prompt
from tempering.core.records import Completion, Prompt
from tempering.core.sampling import Sampler
from tempering.core.think import OPEN
from tempering.methods.attribution.card import Card
from tempering.methods.attribution.readout import falls_back, find_spans
from tempering.methods.attribution.scores import Evidence, Floats, Likelihood, risk, rounded, window
from tempering.methods.attribution.scoring import Measured, Pair, Response, measure, similarity
from tempering.methods.attribution.selection import select
from tempering.methods.attribution.settings import NEED_BASE, NEED_LOGITS, SelectionConfig


class Ranking(NamedTuple):
    """The candidates of one prompt, weighed."""

    winner: int
    risk: Floats
    """(N,); NaN where a candidate could not be scored."""
    valid: list[bool]
    flags: list[list[str]]
    """What was out of the ordinary with each candidate, such as truncated, reencoded, no_span, over_context."""
    responses: list[Response]
    seconds: float


class AttributionSampler:
    """Answer with the candidate that looks least like the model before alignment.

    `inner` draws; `pair` scores, and is not needed for scorers that read no weights. With temperature 0 candidates
    are drawn at `config.temperature`, since greedy ones are all the same. n > 1 gives n independent choices.

    Raises:
        ValueError: a scorer reads weights and there are none, a layer is not there, or a card is missing.
    """

    def __init__(
        self,
        inner: Sampler,
        pair: Pair | None,
        config: SelectionConfig,
        card: Card | None = None,
        means: Tensor | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.inner, self.pair, self.config, self.card = inner, pair, config, card
        named = set(config.scorers)
        if pair is None and (white := sorted(named & {*NEED_BASE, *NEED_LOGITS})):
            raise ValueError(
                f"attribution.scorer={white[0]} reads hidden states or logits, and {inner.name} gives none; name a "
                "model with weights, or use scorer length, guard, first or random"
            )
        if config.centre and means is None:
            raise ValueError("attribution.centre=true needs a card: calibrate with centre=true, and name that run")
        if config.residual and card is None:
            raise ValueError("attribution.residual=true needs a card: calibrate, and name that run")
        self.layers: tuple[int, ...] = ()
        if pair is not None and "latent" in named:
            self.layers = config.layers or window(pair.blocks)
            if max(self.layers) > pair.blocks:
                raise ValueError(f"attribution.layers: {max(self.layers)} is above {pair.blocks}, the last block")
        self.means = None if means is None or not self.layers else means[:, list(self.layers)][:, None]
        self.guard = judges.load_judge(config.guard, "harmful") if config.guard else None
        self.policy = None if pair is None else pair.policy
        self.keep: Callable[[dict[str, Any]], None] | None = None
        """Told of every prompt's candidates, as a row."""
        told = config.model_dump(mode="json", exclude_defaults=True)
        settings = ",".join(f"{key}={value}" for key, value in told.items())
        self.name = name or f"{inner.name}+attribution({settings})"
        self._end = pair.end_id() if pair is not None else None

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
        """Return the best of `config.n` candidates, n times, for each prompt; see `Sampler`.

        Choice j of n is among samples j, n + j, 2 n + j, ...: its candidate 0 is the inner sampler's sample j.
        """

        def draw(asked: Sequence[Prompt], seed: int) -> list[list[Completion]]:
            return self.inner(
                asked, n=n * self.config.n, max_new_tokens=max_new_tokens,
                temperature=temperature or self.config.temperature, top_p=top_p, seed=seed,
            )  # fmt: skip

        out = []
        for prompt, drawn in zip(prompts, draw(prompts, seed), strict=True):
            chosen = []
            for j in range(n):
                group = drawn[j::n]
                found = self.rank(prompt, group, seed)
                best, fell = group[found.winner], None
                if self._is_too_risky(found):
                    best, fell = self._fall_back(prompt, group, found, draw, seed)
                if self.keep:
                    self.keep(candidate_row(prompt, group, found, fell))
                chosen.append(replace(best, index=j))
            out.append(chosen)
            if on_done:
                on_done(1)
        return out

    def rank(self, prompt: Prompt, candidates: Sequence[Completion], seed: int = 0) -> Ranking:
        """Weigh candidates of one prompt, made here or elsewhere. Texts without token ids are encoded once."""
        began = time.perf_counter()
        evidence, responses, flags = self.evidence(prompt, candidates)
        beta = self.card.length_beta if self.card else 0.0
        found = risk(self.config, evidence, beta=beta, seed=seed)
        failed = np.array([c.finish == "error" for c in candidates])
        found = np.where(failed, np.nan, found)
        valid = [
            c.finish == "stop" and r.spans.is_well_formed and "over_context" not in f
            for c, r, f in zip(candidates, responses, flags, strict=True)
        ]
        allowed = valid if self.config.validity and any(valid) else [not f for f in failed]
        if self.config.validity and not any(valid):
            flags = [[*f, "no_valid_candidate"] for f in flags]
        return Ranking(select(found, allowed), found, valid, flags, responses, time.perf_counter() - began)

    def rerank(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Completion]]) -> list[Ranking]:
        """Weigh the candidates of several prompts; see `rank`."""
        return [self.rank(prompt, group) for prompt, group in zip(prompts, candidates, strict=True)]

    def evidence(
        self, prompt: Prompt, candidates: Sequence[Completion]
    ) -> tuple[Evidence, list[Response], list[list[str]]]:
        """Measure what the configured scorers read, in one pair of passes."""
        prompt_ids, opened = self.prompt_of(prompt)
        responses, flags = [], []
        for completion in candidates:
            response, remarks = self.response_of(completion, opened)
            if falls_back(response.spans, self.config.readout) and self.layers:
                remarks.append("no_span")
            responses.append(response)
            flags.append(remarks)
        guard = self._guard_risk(prompt, candidates, flags) if self.guard is not None else None
        named = set(self.config.scorers)
        found = Measured(None, None)
        fits = list(range(len(responses)))
        wants_logits = bool(named & set(NEED_LOGITS))
        if self.pair is not None and (self.layers or wants_logits):
            fits = self.fitting(prompt_ids, responses)
            for i in set(range(len(responses))) - set(fits):
                flags[i].append("over_context" if responses[i].sampled else "empty")
            if fits:
                against = "kl" in named or (self.config.of == "base" and "perplexity" in named)
                found = measure(
                    self.pair, prompt_ids, [responses[i] for i in fits], layers=self.layers,
                    readouts=[self.config.readout], likelihood=wants_logits, against_base=against,
                )  # fmt: skip
        n = len(responses)
        s = np.full((n, len(self.layers)), np.nan)
        if found.states is not None:
            s[fits] = similarity(found.states, self.config.distance, self.means)[:, 0]
        likelihood = None
        if wants_logits:
            columns = found.likelihood or [np.zeros(0)] * len(Likelihood._fields)
            likelihood = Likelihood(*(_spread(column, fits, n) for column in columns))
        tokens = np.array([float(max(1, r.sampled)) for r in responses])
        return Evidence(prompt.id, tokens, s if self.layers else None, likelihood, guard), responses, flags

    def prompt_of(self, prompt: Prompt) -> tuple[list[int], bool]:
        """The ids that candidates continue, and whether they end inside reasoning."""
        if self.pair is None:
            return [], prompt.prefill.rstrip().endswith(OPEN)
        sampler: Any = self.inner
        while not hasattr(sampler, "prompt_ids") and hasattr(sampler, "inner"):
            sampler = sampler.inner
        tokenizer = self.pair.policy.tokenizer
        if hasattr(sampler, "prompt_ids"):
            ids = list(sampler.prompt_ids(prompt))
        else:
            ids = encode_prompt(tokenizer, prompt.messages)
        tail = tokenizer.decode(ids[-16:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ids, tail.rstrip().endswith(OPEN)

    def fitting(self, prompt_ids: Sequence[int], responses: Sequence[Response]) -> list[int]:
        """Which candidates can be scored: something was sampled, and with the prompt it fits into the context."""
        assert self.pair is not None
        limit = int(getattr(self.pair.policy.base.config, "max_position_embeddings", None) or 1 << 20)
        return [i for i, r in enumerate(responses) if r.sampled and len(prompt_ids) + len(r.ids) <= limit]

    def response_of(self, completion: Completion, opened: bool) -> tuple[Response, list[str]]:
        """A candidate as it is scored, and what is out of the ordinary with it."""
        if self.pair is None:
            ids = list(completion.token_ids) or [0] * max(1, len(completion.text.split()))
            spans = find_spans(lambda some: completion.text if some else "", ids, opened=False)
            return Response(ids, len(ids), spans), []
        tokenizer, ends = self.pair.policy.tokenizer, set(self.pair.policy.end_ids)
        remarks = []
        ids = list(completion.token_ids)
        if not ids and completion.text:
            remarks.append("reencoded")
            ids = list(tokenizer(completion.text, add_special_tokens=False)["input_ids"])
            if completion.finish == "stop":
                ids.append(int(self._end or 0))
        sampled = len(ids)
        if not ids or ids[-1] not in ends:
            remarks.append("truncated")
            ids.append(int(self._end or 0))

        def decode(some: Sequence[int]) -> str:
            return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return Response(ids, sampled, find_spans(decode, ids[:-1], opened=opened)), remarks

    def _guard_risk(self, prompt: Prompt, candidates: Sequence[Completion], flags: list[list[str]]) -> Floats:
        assert self.guard is not None
        scores = [verdict.score for verdict in self.guard(prompt, list(candidates))]
        for score, remarks in zip(scores, flags, strict=True):
            if score is None:
                remarks.append("guard_unscored")
        return np.array([0.5 if score is None else score for score in scores])

    def _is_too_risky(self, found: Ranking) -> bool:
        if self.config.tau is None or self.config.fallback == "none":
            return False
        return not float(rounded(found.risk)[found.winner]) <= self.config.tau

    def _fall_back(
        self,
        prompt: Prompt,
        group: Sequence[Completion],
        found: Ranking,
        draw: Callable[[Sequence[Prompt], int], list[list[Completion]]],
        seed: int,
    ) -> tuple[Completion, str]:
        how = self.config.fallback
        if how == "refuse":
            return Completion(prompt.id, self.config.refusal, "stop", seed=seed), how
        if how == "resample":
            again = draw([prompt], seed + 1)[0][: self.config.n]
            return again[self.rank(prompt, again, seed + 1).winner], how
        guard = self._guard_risk(prompt, group, [[] for _ in group])
        return group[select(guard, found.valid)], how


def candidate_row(
    prompt: Prompt, group: Sequence[Completion], found: Ranking, fell_back: str | None = None
) -> dict[str, Any]:
    """What `data/candidates.jsonl` keeps of one prompt: every candidate, its risk, and which one won."""
    return {
        "prompt_id": prompt.id,
        "prompt": list(prompt.messages),
        "winner": found.winner,
        "fallback": fell_back,
        "seconds": round(found.seconds, 4),
        "candidates": [
            {
                "draw": completion.index,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "spans": response.spans._asdict(),
                "finish": completion.finish,
                "valid": valid,
                "risk": None if np.isnan(value) else float(rounded(value)),
                "flags": remarks,
            }
            for completion, response, valid, value, remarks in zip(
                group, found.responses, found.valid, found.risk, found.flags, strict=True
            )
        ],
    }


def _spread(values: Any, at: Sequence[int], n: int) -> Floats:
    out = np.full(n, np.nan)
    out[list(at)] = values
    return out
