"""The sampler around a sampler: draw N candidates, score them, return the one with the lowest risk.

    risk  = scorers(prompt, candidates)         every scorer reads one pair of passes
    valid = finished, reasoning closed, answer not empty
    i*    = argmin risk over valid candidates (over all where none is); ties to the lowest index, NaN last

Candidate i of a prompt depends on (seed, prompt, i) alone, so candidate 0 is what the inner sampler answers. Where
the aligned model draws in this process, its states at the end of each are kept, and only the base is run again.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempering import judges
from tempering.core.chat import encode_prompt
from tempering.core.draws import Key
from tempering.core.records import Completion, Prompt, tokens_of
from tempering.core.sampling import Ended, LocalSampler, Sampler
from tempering.core.think import OPEN, find_spans, joined
from tempering.methods.attribution.card import Card
from tempering.methods.attribution.readout import falls_back
from tempering.methods.attribution.scores import Evidence, Floats, Likelihood, risk, rounded, window
from tempering.methods.attribution.scoring import Measured, Pair, Response, measure, similarity
from tempering.methods.attribution.selection import select
from tempering.methods.attribution.settings import NEED_BASE, NEED_LOGITS, SelectionConfig

ROWS_KEPT = 512
"""Candidates whose states are in memory at a time."""
FEW_GUARDED = 20
"""Verdicts of a guard below which a share of missing ones means nothing, unless all of them are missing."""
KEPT = {"last_content": 0, "eos": 1}
"""Read-outs that drawing gives, and where they are in `Ended.states`."""


class Ranking(NamedTuple):
    """The candidates of one prompt, weighed."""

    winner: int
    risk: Floats
    """(N,); NaN where a candidate could not be scored."""
    valid: list[bool]
    eligible: list[bool]
    """The valid ones; with `validity=false` all that did not fail."""
    flags: list[list[str]]
    """What was out of the ordinary with each candidate, such as truncated, reencoded, no_span, over_context."""
    responses: list[Response]
    seconds: float


Weighed = tuple[list[Completion], Ranking]
"""Candidates of one prompt, and what was found."""


class AttributionSampler:
    """Answer with the candidate that looks least like the model before alignment.

    `inner` draws; `pair` scores, and is not needed for scorers that read no weights. With temperature 0 candidates
    are drawn at `config.temperature`, since greedy ones are all the same. n > 1 gives n independent choices.
    `connect` makes the sampler of a guard behind an endpoint.

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
        connect: judges.Connect | None = None,
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
        if config.tau is None and (config.enough or config.fallback != "none"):
            raise ValueError(
                f"attribution.{'enough' if config.enough else 'fallback'} needs a largest risk: set attribution.tau, "
                "or name a calibrated run whose card has one for this scorer"
            )
        if config.enough and "first" not in inspect.signature(inner.__call__).parameters:
            raise ValueError(
                f"attribution.enough: {inner.name} cannot draw further samples of a prompt; leave it out"
            )
        self.layers: tuple[int, ...] = ()
        if pair is not None and "latent" in named:
            self.layers = config.layers or window(pair.blocks)
            if max(self.layers) > pair.blocks:
                raise ValueError(f"attribution.layers: {max(self.layers)} is above {pair.blocks}, the last block")
        self.means = None if means is None or not self.layers else means[:, list(self.layers)][:, None]
        self.guard = judges.load_judge(config.guard, "harmful", connect) if config.guard else None
        self.guarded: Counter[str] = Counter()
        """Verdicts of the guard by why there is none; under the empty text those that there are."""
        self.policy = None if pair is None else pair.policy
        self.keep: Callable[[dict[str, Any]], None] | None = None
        """Told of every prompt's candidates, as a row."""
        told = config.model_dump(mode="json", exclude_defaults=True)
        settings = ",".join(f"{key}={value}" for key, value in told.items())
        self.name = name or f"{inner.name}+attribution({settings})"
        self._end = pair.policy.end_id if pair is not None else 0

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

        Raises:
            RuntimeError: the guard could not tell of too many candidates; see `require_guarded`.
        """
        ask = {
            "max_new_tokens": max_new_tokens, "temperature": temperature or self.config.temperature, "top_p": top_p
        }  # fmt: skip
        out = []
        some = max(1, ROWS_KEPT // (n * self.config.n))
        for start in range(0, len(prompts), some):
            part = prompts[start : start + some]
            for prompt, choices in zip(part, self._choose(part, n, seed, ask), strict=True):
                chosen = []
                for j, (group, found) in enumerate(choices):
                    best, fell, again = group[found.winner], None, None
                    if self._is_too_risky(found):
                        fell = self.config.fallback
                        if fell == "resample":
                            again = self._choose([prompt], n, seed + 1, ask)[0][j]
                        best = self._fall_back(prompt, group, found, again, seed)
                    if self.keep:
                        self.keep(candidate_row(prompt, group, found, fell, again))
                    chosen.append(replace(best, index=j))
                out.append(chosen)
                if on_done:
                    on_done(1)
            self.require_guarded()
        return out

    def _choose(self, prompts: Sequence[Prompt], n: int, seed: int, ask: Mapping[str, Any]) -> list[list[Weighed]]:
        """Draw and weigh n groups of candidates for each prompt; with `enough` in rounds, while one has too few."""
        made: list[list[Weighed | None]] = [[None] * n for _ in prompts]
        kept: dict[Key, Ended] = {}
        have = 0
        for upto in self.rounds():
            todo = [p for p, choices in enumerate(made) if not all(c and self._has_enough(c[1]) for c in choices)]
            drawn = self._draw([prompts[p] for p in todo], n * have, n * (upto - have), seed, ask, kept)
            for p, fresh in zip(todo, drawn, strict=True):
                for j, choice in enumerate(made[p]):
                    if choice is None or not self._has_enough(choice[1]):
                        group = [*(choice[0] if choice else []), *fresh[j::n]]
                        made[p][j] = group, self.rank(prompts[p], group, seed, kept)
            have = upto
        return made  # type: ignore[return-value]  # the first round makes all of them

    def rounds(self) -> list[int]:
        """How many candidates there are after each round: `enough`, then twice as many, up to n."""
        counts, n = [self.config.enough or self.config.n], self.config.n
        while counts[-1] < n:
            counts.append(min(2 * counts[-1], n))
        return counts

    def _has_enough(self, found: Ranking) -> bool:
        """Whether so many eligible candidates have a risk of at most `tau` that no more are drawn."""
        enough, tau = self.config.enough, self.config.tau
        if enough is None or tau is None:
            return True
        low = rounded(found.risk) <= tau
        return int((low & np.array(found.eligible)).sum()) >= enough

    def _draw(
        self,
        prompts: Sequence[Prompt],
        first: int,
        n: int,
        seed: int,
        ask: Mapping[str, Any],
        kept: dict[Key, Ended],
    ) -> list[list[Completion]]:
        """Draw samples first..first+n-1 of each prompt, and put what the model computed at their ends into `kept`."""
        if not prompts:
            return []
        inner: Any = self.inner
        more = {"first": first} if first else {}
        local = self._decoder()
        nothing: Any = nullcontext({})
        with local.keeping_ends(self.layers, self._end) if local else nothing as ended:
            drawn: list[list[Completion]] = inner(prompts, n=n, seed=seed, **more, **ask)
        kept.update(ended)
        return drawn

    def _decoder(self) -> LocalSampler | None:
        """The sampler of the pair's own model, where what it computes while drawing is to be kept and read."""
        if self.pair is None or not self.layers or self.config.readout not in KEPT:
            return None
        path = self.config.path or ("decode" if self.pair.policy.dtype == torch.float32 else "prefill")
        if path == "prefill" or set(self.config.scorers) & set(NEED_LOGITS):
            return None
        found = _innermost(self.inner)
        return found if isinstance(found, LocalSampler) and found.policy is self.pair.policy else None

    def rank(
        self, prompt: Prompt, candidates: Sequence[Completion], seed: int = 0, kept: Mapping[Key, Ended] | None = None
    ) -> Ranking:
        """Weigh candidates of one prompt, made here or elsewhere. Texts without token ids are encoded once.

        `kept`: what `LocalSampler.keeping_ends` gave when they were drawn; the model is not run over those again.
        """
        began = time.perf_counter()
        evidence, responses, flags = self.evidence(prompt, candidates, kept)
        beta = self.card.length_beta if self.card else 0.0
        found = risk(self.config, evidence, beta=beta, seed=seed)
        failed = np.array([c.finish == "error" for c in candidates])
        found = np.where(failed, np.nan, found)
        valid = [
            c.finish == "stop" and r.spans.is_well_formed and "over_context" not in f
            for c, r, f in zip(candidates, responses, flags, strict=True)
        ]
        present = [not f for f in failed]
        eligible = valid if self.config.validity else present
        if self.config.validity and not any(valid):
            flags = [[*f, "no_valid_candidate"] for f in flags]
        best = select(found, eligible if any(eligible) else present)
        return Ranking(best, found, valid, eligible, flags, responses, time.perf_counter() - began)

    def rerank(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Completion]]) -> list[Ranking]:
        """Weigh the candidates of several prompts; see `rank`."""
        return [self.rank(prompt, group) for prompt, group in zip(prompts, candidates, strict=True)]

    def evidence(
        self, prompt: Prompt, candidates: Sequence[Completion], kept: Mapping[Key, Ended] | None = None
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
        named = set(self.config.scorers)
        guard = self._guard_risk(prompt, candidates, flags) if "guard" in named else None
        found = Measured(None, None)
        fits = list(range(len(responses)))
        wants_logits = bool(named & set(NEED_LOGITS))
        if self.pair is not None and (self.layers or wants_logits):
            fits = self.fitting(prompt_ids, responses)
            for i in set(range(len(responses))) - set(fits):
                flags[i].append("over_context" if responses[i].sampled else "empty")
            if fits:
                known = {}
                for place, i in enumerate(fits):
                    c, ids = candidates[i], responses[i].ids
                    ended = (kept or {}).get((c.seed or 0, prompt.id, c.index))
                    # An answer that was cut, or read behind another prompt, is not what was drawn.
                    if ended and ended.prompt_ids == prompt_ids and ended.ids == ids and not wants_logits:
                        known[place] = ended.states[[KEPT[self.config.readout]]]
                against = "kl" in named or (self.config.of == "base" and "perplexity" in named)
                found = measure(
                    self.pair, prompt_ids, [responses[i] for i in fits], layers=self.layers,
                    readouts=[self.config.readout], likelihood=wants_logits, against_base=against, known=known,
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
        sampler = _innermost(self.inner)
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
        if not ids and (completion.text or completion.thought):
            remarks.append("reencoded")
            text = completion.text
            if completion.thought:
                text = f"{OPEN}\n{joined(completion.thought.text, text)}"
            if opened:  # the prompt holds the tag already
                text = text.removeprefix(OPEN)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if completion.finish == "stop":
                ids.append(self._end)
        sampled = len(ids)
        if not ids or ids[-1] not in ends:
            remarks.append("truncated")
            ids.append(self._end)

        def decode(some: Sequence[int]) -> str:
            return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return Response(ids, sampled, find_spans(decode, ids[:-1], opened=opened)), remarks

    def _guard_risk(self, prompt: Prompt, candidates: Sequence[Completion], flags: list[list[str]]) -> Floats:
        assert self.guard is not None
        verdicts = self.guard(prompt, list(candidates))
        self.guarded.update("" if v.score is not None else v.reason or "no reason given" for v in verdicts)
        scores = [verdict.score for verdict in verdicts]
        for score, remarks in zip(scores, flags, strict=True):
            if score is None:
                remarks.append("guard_unscored")
        return np.array([0.5 if score is None else score for score in scores])

    def require_guarded(self) -> None:
        """Fail where the guard could not tell of too many candidates: what it then chooses is the first of them.

        Raises:
            RuntimeError: with the share and the most frequent reason.
        """
        total = self.guarded.total()
        missing = total - self.guarded[""]
        if missing > self.config.max_unscored * total and (missing == total or total >= FEW_GUARDED):
            reason = next(why for why, _ in self.guarded.most_common() if why)
            raise RuntimeError(
                f"the guard {self.config.guard} could not tell of {missing} of {total} candidates (limit "
                f'{self.config.max_unscored:.0%}), most often "{reason}"; mend the guard, or raise '
                "attribution.max_unscored"
            )

    def _is_too_risky(self, found: Ranking) -> bool:
        if self.config.tau is None or self.config.fallback == "none":
            return False
        return not float(rounded(found.risk)[found.winner]) <= self.config.tau

    def _fall_back(
        self, prompt: Prompt, group: Sequence[Completion], found: Ranking, again: Weighed | None, seed: int
    ) -> Completion:
        """What is returned in place of a winner that is too risky; `again`: the second draw, for `resample`."""
        if again is not None:
            return again[0][again[1].winner]
        if self.config.fallback == "refuse":
            return Completion(prompt.id, self.config.refusal, "stop", seed=seed)
        guard = self._guard_risk(prompt, group, [[] for _ in group])
        eligible = found.eligible if any(found.eligible) else [c.finish != "error" for c in group]
        return group[select(guard, eligible)]


def candidate_row(
    prompt: Prompt,
    group: Sequence[Completion],
    found: Ranking,
    fell_back: str | None = None,
    again: Weighed | None = None,
) -> dict[str, Any]:
    """What `data/candidates.jsonl` keeps of one prompt: every candidate, its risk, and which one won.

    `again`: the second draw of `fallback=resample`, under `resampled`, with a winner of its own.
    """
    second = {} if again is None else {"resampled": {"winner": again[1].winner, "candidates": _candidates(*again)}}
    return {
        "prompt_id": prompt.id,
        "prompt": list(prompt.messages),
        "winner": found.winner,
        "fallback": fell_back,
        "seconds": round(found.seconds, 4),
        "candidates": _candidates(group, found),
        **second,
    }


def _candidates(group: Sequence[Completion], found: Ranking) -> list[dict[str, Any]]:
    return [
        {
            "draw": completion.index,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "tokens": _tokens(completion, response, remarks),
            "spans": response.spans._asdict(),
            "finish": completion.finish,
            "valid": valid,
            "risk": None if np.isnan(value) else float(rounded(value)),
            "flags": remarks,
        }
        for completion, response, valid, value, remarks in zip(
            group, found.responses, found.valid, found.risk, found.flags, strict=True
        )
    ]


def _tokens(completion: Completion, response: Response, remarks: Sequence[str]) -> int | None:
    """How many were drawn: as who drew says, else as the scorer's tokenizer counts; `None` where there is neither."""
    told = tokens_of([completion])
    return response.sampled if told is None and "reencoded" in remarks else told


def _innermost(sampler: Any) -> Any:
    """The sampler that builds the prompt's tokens, inside those that only change what is asked or returned."""
    while not hasattr(sampler, "prompt_ids") and hasattr(sampler, "inner"):
        sampler = sampler.inner
    return sampler


def _spread(values: Any, at: Sequence[int], n: int) -> Floats:
    out = np.full(n, np.nan)
    out[list(at)] = values
    return out
