"""What the gate did: traces of its decisions, and statistics of them. The statistics are pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempering.core.records import Completion, Prompt
from tempering.core.run import atomic_write
from tempering.core.sampling import LocalSampler
from tempering.methods.safemoe.layers import Route, Statistics

ALARM_SHARE = 0.5
ALARM_STARVED = 0.1
ALARM_ENTROPY = 0.5


# --- statistics -----------------------------------------------------------------------------------------


def usage_of(idx: ArrayLike, experts: int, w: ArrayLike | None = None) -> NDArray[np.float64]:
    """Share of each expert among all selections (or, with `w`, of all weight); they sum to 1."""
    flat = np.asarray(idx).ravel()
    weight = None if w is None else np.asarray(w, dtype=float).ravel()
    counts = np.bincount(flat, weight, minlength=experts).astype(float)
    return counts / counts.sum()


def load_entropy(shares: ArrayLike) -> float:
    """H = -sum a ln a of the experts' shares a, in nats (normalised first)."""
    a = np.asarray(shares, dtype=float)
    a = a[a > 0] / a.sum()
    return float(-(a * np.log(a)).sum())


def effective_experts(shares: ArrayLike) -> float:
    """1 / sum a^2: how many equally used experts would be as concentrated."""
    a = np.asarray(shares, dtype=float)
    return float(1 / ((a / a.sum()) ** 2).sum())


class Load(NamedTuple):
    """How evenly experts are used."""

    entropy: float
    """H, nats."""
    normalised: float
    """H / ln K; 1 where there is one expert."""
    effective: float
    max_over_uniform: float
    """Largest share times K."""
    alarms: tuple[str, ...]


def load_of(shares: ArrayLike) -> Load:
    """Summarise shares, and say where routing has collapsed [O]."""
    a = np.asarray(shares, dtype=float)
    a = a / a.sum()
    K = len(a)
    entropy = load_entropy(a)
    normalised = entropy / math.log(K) if K > 1 else 1.0
    alarms = []
    if K > 1 and a.max() > ALARM_SHARE:
        alarms.append(f"expert {int(a.argmax())} has {a.max():.0%} of all selections")
    if (starved := int((a < ALARM_STARVED / K).sum())) > K / 2:
        alarms.append(f"{starved} of {K} experts are hardly used")
    if normalised < ALARM_ENTROPY:
        alarms.append(f"load entropy is {normalised:.2f} of its maximum")
    return Load(entropy, normalised, effective_experts(a), float(a.max() * K), tuple(alarms))


def training_row(found: Sequence[dict[str, Statistics]], experts: int) -> dict[str, Any]:
    """What `metrics.jsonl` says of the routing of one optimiser step, over all routers and its micro-batches."""
    parts = [statistics for micro in found for statistics in micro.values()]
    counts = torch.stack([part.counts for part in parts]).sum(0).tolist()
    tokens = sum(part.tokens for part in parts)
    usage = usage_from_counts(counts[:experts])
    load = load_of(usage)
    row = {
        "load_entropy": load.normalised,
        "router_entropy": float(sum(float(part.entropy) for part in parts) / max(tokens, 1)),
        "max_share": float(usage.max()),
        "usage": [round(float(a), 6) for a in usage],
    }
    return row | ({"null_share": counts[-1] / max(sum(counts), 1)} if len(counts) > experts else {})


def usage_from_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """Shares; uniform where nothing was selected at all (every token took the null expert)."""
    a = np.asarray(counts, dtype=float)
    return a / a.sum() if a.sum() else np.full(len(a), 1 / len(a))


# --- traces ---------------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """Decisions of one answered row: its fed tokens, and (T, R, k) experts and weights."""

    tokens: list[int]
    idx: Tensor
    w: Tensor


class Recorder:
    """Keep every router's decision for every valid token of passes without gradient.

    A row's last generated token is never fed to the model, and so has no decision.
    """

    def __init__(self) -> None:
        self.routers: list[str] = []
        self._passes: list[tuple[bool, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]] = []

    def begin(self, ids: Tensor | None, valid: Tensor | None, shape: tuple[int, int], *, is_prefill: bool) -> None:
        """Note a forward pass over (B, T) tokens."""
        if ids is None:
            raise RuntimeError("traces need token ids; this pass was given embeddings")
        mask = torch.ones(shape, dtype=torch.bool) if valid is None else valid.cpu()
        self._passes.append((is_prefill, ids.cpu(), mask, {}))

    def decide(self, name: str, found: Route) -> None:
        """Note a router's decision in the pass."""
        if name not in self.routers:
            self.routers.append(name)
        small = torch.uint8 if found.z.shape[1] <= 255 else torch.uint16
        self._passes[-1][3][name] = found.idx.to("cpu", small), found.w.detach().to("cpu", torch.float16)

    def rows(self) -> list[Traced]:
        """Put the passes together, row by row of each generation, and forget them."""
        out: list[Traced] = []
        group: list[Any] = []
        for item in [*self._passes, None]:
            if group and (item is None or item[0]):
                out += self._join(group)
                group = []
            if item is not None:
                group.append(item)
        self._passes = []
        return out

    def _join(self, passes: list[Any]) -> list[Traced]:
        ids = torch.cat([p[1] for p in passes], 1)
        valid = torch.cat([p[2] for p in passes], 1)
        B = ids.shape[0]
        # (B, T, R, k)
        idx, w = (
            torch.cat(
                [torch.stack([p[3][n][i].view(B, p[1].shape[1], -1) for n in self.routers], 2) for p in passes], 1
            )
            for i in (0, 1)
        )
        return [Traced(ids[b, valid[b]].tolist(), idx[b, valid[b]], w[b, valid[b]]) for b in range(B)]


def write_trace(path: Path, rows: Sequence[tuple[dict[str, Any], int, Traced]], routers: Sequence[str]) -> None:
    """Write `NAME.safetensors` and `NAME.jsonl`: of each row what it answers, its prompt's tokens, and its trace.

    idx uint8 (T, R, k) (uint16 beyond 255 experts), w float16, row, pos, token int32, part uint8 (0 prompt,
    1 completion), over all rows' tokens; the JSONL has a line a row, in the same order.
    """
    part = [torch.arange(len(t.tokens)) >= prompt for _, prompt, t in rows]
    tensors = {
        "idx": torch.cat([t.idx for _, _, t in rows]),
        "w": torch.cat([t.w for _, _, t in rows]),
        "row": torch.cat([torch.full((len(t.tokens),), i) for i, (_, _, t) in enumerate(rows)]).int(),
        "pos": torch.cat([torch.arange(len(t.tokens)) for _, _, t in rows]).int(),
        "token": torch.tensor([token for _, _, t in rows for token in t.tokens], dtype=torch.int32),
        "part": torch.cat(part).to(torch.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    file, temporary = path.with_suffix(".safetensors"), path.with_suffix(".tmp")
    save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata={"routers": json.dumps(routers)})
    temporary.replace(file)
    lines = [
        {**facts, "prompt_tokens": prompt, "completion_tokens": len(t.tokens) - prompt} for facts, prompt, t in rows
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write(path.with_suffix(".jsonl"), text.encode("utf-8", "surrogatepass"))


def read_trace(path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Read what `write_trace` wrote: tensors by name, and the rows."""
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8", errors="surrogatepass").splitlines()
    return load_file(path.with_suffix(".safetensors")), [json.loads(line) for line in lines]


class TracingSampler:
    """The ordinary sampler of a routed model, keeping the decisions of every token that it was fed.

    `traced` returns them, `write` puts them into `traces/`; both for all answers since the last `write`.
    """

    def __init__(self, inner: LocalSampler) -> None:
        self.inner, self.name, self.policy = inner, inner.name, inner.policy
        self.routers: list[str] = []
        self.traced: list[tuple[dict[str, Any], int, Traced]] = []

    def __call__(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        """Return completions, see `Sampler`; settings are those of the inner sampler."""
        state = self.policy.routing.state
        state.recorder = recorder = Recorder()
        try:
            groups = self.inner(prompts, **settings)
        finally:
            state.recorder = None
        self.routers = recorder.routers
        starts = [self.inner.prompt_ids(prompt) for prompt in prompts]
        rows: dict[tuple[int, ...], list[Traced]] = {tuple(ids): [] for ids in starts}
        for traced in recorder.rows():
            for length in {len(ids) for ids in starts}:
                if (head := tuple(traced.tokens[:length])) in rows:
                    rows[head].append(traced)
        for prompt, ids, group in zip(prompts, starts, groups, strict=True):
            for completion in group:
                fed = [*ids, *completion.token_ids[:-1]]  # its last token was never fed
                found = next(row for row in rows[tuple(ids)] if row.tokens[: len(fed)] == fed)
                kept = Traced(fed, found.idx[: len(fed)], found.w[: len(fed)])
                facts = {
                    "id": prompt.id,
                    "domain": prompt.category or prompt.extra.get("domain"),
                    "index": completion.index,
                }
                self.traced.append((facts, len(ids), kept))
        return groups

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Score given completions, as the ordinary sampler does; nothing is kept of it."""
        return self.inner.score(prompts, completions)

    def write(self, path: Path) -> None:
        """Write what was traced (`write_trace`), and forget it; nothing, where nothing was."""
        if self.traced:
            write_trace(path, self.traced, self.routers)
        self.traced = []
