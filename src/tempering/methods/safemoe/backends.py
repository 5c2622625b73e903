"""Four ways to compute one sum: sum_i w_i * scale_i * B_i A_i x over the experts that each token selected, Eq. 4.

They differ in speed only. `fused` computes all experts and weighs most with zero; `gather` copies the selected
matrices, for a few tokens; `eager` and `grouped` sort tokens by expert. `auto` measures which is fastest here.
Products are in the type of x; a weight is multiplied by its scale in float32 and then cast. Each adds to `out`
(N, d_out) in place, the base layer's own output: a second addition would cost as much as the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import cycle
from statistics import fmean, median
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tempering.methods.safemoe.experts import ExpertWeights

Backend = Literal["eager", "fused", "gather", "grouped"]

GATHER_TOKENS = 64
"""`gather` materialises N * k * r * d numbers."""
BLOCK_BYTES = 32 * 2**20
"""On a CPU the allocator asks the system anew for each block beyond this, and whether that costs a third of the time
or none changes from one minute to the next. `grouped`, which keeps all products at once, is not used beyond it, and
`eager` then takes each expert's rows by themselves."""
GRID = (1, 4, 16, 64, 256, 1024, 4096)
"""Numbers of tokens at which `auto` measures; the nearest one decides."""
CALIBRATION_S = 5.0
MAX_RUNS = 100
"""Of one size in one pass: more say no more of it."""
PASSES = 5
"""Over all sizes: a machine's speed changes from second to second, and with it which back-end is ahead."""
CLOSE = 1.2
"""Second over first, up to which both are measured further."""


class Dispatch:
    """Which experts N tokens go to, with what weight, and what the back-ends derive from it, each once a router.

    With `has_null`, index K is the null expert: nothing is added for it.
    """

    def __init__(self, idx: Tensor, w: Tensor, experts: int, has_null: bool = False) -> None:
        self.idx, self.w, self.experts = idx, w, experts  # (N, k) int64, (N, k) float32
        self.has_null = has_null
        self._taken: tuple[Tensor, Tensor] | None = None
        self._made: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @cached_property
    def order(self) -> Tensor:
        """Places of the flattened (N, k) decisions, sorted by expert; those of the null expert left out."""
        flat = self.idx.flatten()
        order = flat.argsort(stable=True)
        return order[: sum(self.sizes)] if self.has_null else order

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each place of `order`."""
        return self.order.div(self.idx.shape[1], rounding_mode="floor")

    @cached_property
    def counts(self) -> Tensor:
        """How many places each expert has, (K,)."""
        return self.idx.flatten().bincount(minlength=self.experts)[: self.experts]

    @cached_property
    def sizes(self) -> list[int]:
        """`counts`, on the CPU."""
        return self.counts.tolist()

    @cached_property
    def ends(self) -> Tensor:
        """Where each expert's places end in `order`, (K,) int32."""
        return self.counts.cumsum(0, dtype=torch.int32)

    def take(self, x: Tensor) -> Tensor:
        """The rows of x (N, d) in the sorted order, once for all layers that are given the same x (gate and up)."""
        # By storage: each layer flattens x anew. What is kept alive cannot be another tensor's storage meanwhile.
        if self._taken is None or self._taken[0].data_ptr() != x.data_ptr() or self._taken[0].shape != x.shape:
            self._taken = x, x.index_select(0, self.tokens)  # not x[...]: its backward pass sorts again
        return self._taken[1]

    def forget(self) -> None:
        """Let go of what `take` keeps."""
        self._taken = None

    def sorted_weight(self, scale: Tensor) -> Tensor:
        """W * scale of each place of `order`, (N * k, 1)."""
        return self._once("sorted", scale, lambda: (self.w * self._scale_of(scale)).flatten()[self.order, None])

    def dense_weight(self, scale: Tensor) -> Tensor:
        """W * scale as a matrix, 0 where an expert was not selected, (N, K)."""

        def make() -> Tensor:
            wide = torch.zeros(len(self.idx), self.experts + 1, dtype=self.w.dtype, device=self.w.device)
            return wide.scatter(1, self.idx, self.w)[:, : self.experts] * scale

        return self._once("dense", scale, make)

    def weight(self, scale: Tensor) -> Tensor:
        """W * scale by token, 0 at the null expert, (N, k)."""
        return self.w * self._scale_of(scale)

    def _scale_of(self, scale: Tensor) -> Tensor:
        return (torch.cat([scale, scale.new_zeros(1)]) if self.has_null else scale)[self.idx]

    def _once(self, form: str, scale: Tensor, make: Callable[[], Tensor]) -> Tensor:
        # Layers of a block share their scales, and the weights that follow from them. The tensor is kept beside
        # what was made of it, so that its id stays its own.
        key = form, id(scale)
        if key not in self._made:
            self._made[key] = scale, make()
        return self._made[key][1]


def eager(x: Tensor, d: Dispatch, w: ExpertWeights, out: Tensor) -> Tensor:
    """Loop over the experts that were selected, each with its own tokens."""
    weight = d.sorted_weight(w.scale).to(x.dtype).split(d.sizes)
    is_large = not x.is_cuda and d.idx.numel() * x.shape[1] * x.element_size() >= BLOCK_BYTES
    taken = None if is_large else d.take(x).split(d.sizes)
    for e, tokens in enumerate(d.tokens.split(d.sizes)):
        if len(tokens):
            rows = x.index_select(0, tokens) if taken is None else taken[e]
            z = F.linear(rows, w.A[e]) * weight[e]
            out = out.index_add_(0, tokens, F.linear(z, w.B[:, e]))
    return out


def fused(x: Tensor, d: Dispatch, w: ExpertWeights, out: Tensor) -> Tensor:
    """Compute all experts in two products, most of them weighed with zero."""
    K, r, _ = w.A.shape
    gate = d.dense_weight(w.scale).to(x.dtype)
    z = F.linear(x, w.A.flatten(0, 1)).view(len(x), K, r) * gate[..., None]
    return out.addmm_(z.view(len(x), K * r), w.B.permute(1, 2, 0).flatten(0, 1))


def gather(x: Tensor, d: Dispatch, w: ExpertWeights, out: Tensor) -> Tensor:
    """Copy each token's own matrices."""
    idx = d.idx.clamp(max=d.experts - 1)  # the null expert's weight is zero
    z = torch.einsum("nd,nkrd->nkr", x, w.A[idx]) * d.weight(w.scale).to(x.dtype)[..., None]
    return out.add_(torch.einsum("nkr,onkr->no", z, w.B[:, idx]))


def grouped(x: Tensor, d: Dispatch, w: ExpertWeights, out: Tensor) -> Tensor:
    """Sort tokens by expert and multiply group by group in one call."""
    z = F.grouped_mm(d.take(x), w.A.transpose(1, 2), offs=d.ends) * d.sorted_weight(w.scale).to(x.dtype)
    return out.index_add_(0, d.tokens, F.grouped_mm(z, w.B.permute(1, 2, 0), offs=d.ends))


BACKENDS: dict[Backend, Callable[[Tensor, Dispatch, ExpertWeights, Tensor], Tensor]] = {
    "eager": eager,
    "fused": fused,
    "gather": gather,
    "grouped": grouped,
}


def can_group(w: ExpertWeights) -> bool:
    """Whether `torch.nn.functional.grouped_mm` is there and takes these shapes: tried with two tokens."""
    idx = torch.tensor([[0], [len(w.scale) - 1]], device=w.A.device)
    x = w.A.new_zeros(2, w.A.shape[2])
    try:
        with torch.no_grad():
            d = Dispatch(idx, torch.ones_like(idx, dtype=torch.float32), len(w.scale))
            grouped(x, d, w, x.new_zeros(2, w.B.shape[0]))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def usable(w: ExpertWeights, k: int, tokens: int) -> list[Backend]:
    """The back-ends that can compute so many tokens, k experts each, and whose speed can be relied on."""
    found: list[Backend] = ["eager", "fused"]
    if tokens <= GATHER_TOKENS:
        found.append("gather")
    fits = tokens * k * max(w.A.shape[2], w.B.shape[0]) * w.A.element_size() < BLOCK_BYTES
    if can_group(w) and (fits or w.A.is_cuda):
        found.append("grouped")
    return found


def shape_key(w: ExpertWeights, k: int) -> str:
    """What timings depend on: device, type, d_in, d_out, K, r, k."""
    K, r, d_in = w.A.shape
    return f"{w.A.device.type}:{str(w.A.dtype).removeprefix('torch.')}:{d_in}x{w.B.shape[0]}:K{K}:r{r}:k{k}"


Table = dict[str, dict[str, Backend]]
"""shape key -> number of tokens -> the fastest back-end"""


def calibrate(weights: Sequence[ExpertWeights], k: int, seconds: float = CALIBRATION_S) -> Table:
    """Measure which back-end to take for each shape and number of tokens of `GRID`, in about so many seconds."""
    table: Table = {}
    for (key, n), passes in time_all(weights, k, GRID, seconds).items():
        found = regrets(passes)
        table.setdefault(key, {})[str(n)] = min(found, key=lambda name: found[name])
    return table


def regrets(passes: Sequence[dict[Backend, float]]) -> dict[Backend, float]:
    """Back-end -> its seconds over the best's, mean over the passes; those measured in every pass.

    Which is ahead changes with the machine's state: the one that is a little behind in each state is preferred to the
    one that is far behind in some.

    >>> found = regrets([{"fused": 1.0, "eager": 1.05}, {"fused": 1.3, "eager": 1.0}, {"fused": 1.0, "eager": 1.05}])
    >>> {name: round(value, 3) for name, value in found.items()}
    {'fused': 1.1, 'eager': 1.033}
    """
    everywhere = [name for name in passes[-1] if all(name in times for times in passes)]
    return {name: fmean(times[name] / min(times.values()) for times in passes) for name in everywhere}


def is_close(passes: Sequence[dict[Backend, float]]) -> bool:
    """Whether more passes could change the choice: the second is within `CLOSE` of the first."""
    first, *others = sorted(regrets(passes).values())
    return bool(others) and others[0] <= CLOSE * first


def time_all(
    weights: Sequence[ExpertWeights], k: int, sizes: Sequence[int], seconds: float
) -> dict[tuple[str, int], list[dict[Backend, float]]]:
    """Median seconds of each back-end for each shape and number of tokens, by pass.

    A few runs at the largest sizes, hundreds of a few tokens, where one takes microseconds and varies by half. After
    the first of `PASSES` a back-end that takes more than twice as long as the best of its size is left alone. Where
    two are close after them, up to twice as many more.
    """
    layers: dict[str, list[ExpertWeights]] = {}
    for w in weights:
        layers.setdefault(shape_key(w, k), []).append(w)
    weight = {n: 1 if n <= GATHER_TOKENS else 3 for n in sizes}  # of time: long runs need more of it
    share = seconds / PASSES / len(layers) / sum(weight.values())
    found: dict[tuple[str, int], list[dict[Backend, float]]] = {}
    for number in range(3 * PASSES):
        for key, alike in layers.items():
            for n in sizes:
                passes = found.setdefault((key, n), [])
                if number >= PASSES and not is_close(passes):
                    continue
                names = usable(alike[0], k, n)
                if passes:
                    best = min(passes[-1].values())
                    names = [name for name in names if passes[-1].get(name, torch.inf) <= 2 * best]
                runs = time_backends(alike, k, n, names, share * weight[n])
                passes.append({name: median(times) for name, times in runs.items()})
    return found


def time_backends(
    layers: Sequence[ExpertWeights], k: int, tokens: int, names: Sequence[Backend], seconds: float
) -> dict[Backend, list[float]]:
    """Seconds of runs of each back-end for one linear layer and so many tokens, in turn; at least one run each.

    Each run takes the next of the layers, as a model does: the same one again would find its experts in the cache.
    """
    generator = torch.Generator().manual_seed(tokens)
    like = layers[0]
    x = torch.randn(tokens, like.A.shape[2], generator=generator).to(like.A.device, like.A.dtype)
    K = len(like.scale)
    idx = torch.rand(tokens, K, generator=generator).argsort(1)[:, :k].to(like.A.device)
    weight = torch.full_like(idx, 1, dtype=torch.float32) / k
    out = x.new_zeros(tokens, like.B.shape[0])
    found: dict[Backend, list[float]] = {name: [] for name in names}
    following = cycle(layers)
    with torch.no_grad():
        for name in names:  # to warm up
            BACKENDS[name](x, Dispatch(idx, weight, K), next(following), out)
        deadline = time.perf_counter() + seconds
        while not found[names[-1]] or (time.perf_counter() < deadline and len(found[names[-1]]) < MAX_RUNS):
            for name in names:
                w = next(following)
                start = time.perf_counter()
                BACKENDS[name](x, Dispatch(idx, weight, K), w, out)
                if x.is_cuda:
                    torch.cuda.synchronize()
                found[name].append(time.perf_counter() - start)
            # With as many layers as a multiple of the back-ends, each would meet its own layers only.
            next(following)
    return found


def choose(table: Table, w: ExpertWeights, k: int, tokens: int) -> Backend:
    """Look up the fastest back-end at the nearest number of tokens, by ratio."""
    nearest = min(GRID, key=lambda n: max(n, tokens) / min(n, tokens))
    return table[shape_key(w, k)][str(nearest)]
