"""The routed model: a gate in each block chooses k experts per token, and every target linear adds their updates.

    z = V x;  R = the k largest z;  w = softmax over the selected z                                  Eq. 1-3
    h = W x + sum_{i in R} w_i * scale_i * B_i A_i x                                                  Eq. 4

Only V trains. Experts are buffers that no state dict contains. Routing reads the current token alone, so caching
keys and values is exact; controls that read other tokens keep what they need in `RoutingState`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tempering.core.chat import TokenBatch
from tempering.core.policy import EXPERT_GATE
from tempering.methods.safemoe.backends import BACKENDS, Backend, Dispatch
from tempering.methods.safemoe.experts import ExpertWeights

Granularity = Literal["block", "module", "model"]
Normalisation = Literal["selected", "switch", "sigmoid"]
NULL_BIAS, GAIN = "null_bias", "gain"


class Route(NamedTuple):
    """Decisions for N tokens: selected experts (largest logit first), their weights, and all logits."""

    idx: Tensor  # (N, k) int64
    w: Tensor  # (N, k) float32
    z: Tensor  # (N, K) float32


def route(
    x: Tensor,
    V: Tensor,
    k: int,
    normalisation: Normalisation = "selected",
    temperature: float = 1.0,
    null_bias: Tensor | None = None,
) -> Route:
    """Select k experts for each token. x (N, d), V (K, d); everything in float32, also under autocast.

    `selected`: w = softmax over the selected z (Eq. 3); `switch`: softmax over all, w = p[R]; `sigmoid`: w =
    sigmoid(z)[R]. With `null_bias` the last row of V is the null expert. k >= K gives the dense softmax. Of equal
    logits the lowest index comes first (`torch.topk` breaks ties as it likes).

    Raises:
        RuntimeError: a logit is not finite; sorted as it comes it would silently be the first expert.
    """
    with torch.autocast(x.device.type, enabled=False):
        z = x.float() @ V.float().T
        if null_bias is not None:
            z = torch.cat([z[:, :-1], z[:, -1:] + null_bias], dim=1)
        if temperature != 1.0:
            z = z / temperature
        if not torch.isfinite(z).all():
            raise RuntimeError("a router's logit is not finite: the hidden state or the router went wrong")
        top, idx = (part[:, :k] for part in z.sort(dim=-1, descending=True, stable=True))
        if normalisation == "selected":
            w = top.softmax(-1)
        elif normalisation == "switch":
            w = z.softmax(-1).gather(1, idx)
        else:
            w = top.sigmoid()
    return Route(idx, w, z)


@dataclass(frozen=True)
class Gating:
    """How a routed model decides: every setting that training, serving and the bundle must agree on."""

    granularity: Granularity = "block"
    k: int = 2
    normalisation: Normalisation = "selected"
    temperature: float = 1.0
    null_expert: bool = False
    gain: Literal["off", "layer"] | float = "off"
    last_token: bool = False
    first_tokens: int | None = None


class Router(nn.Module):
    """V of one router, its null bias and its gain; float32 whatever the model around it is turned into."""

    def __init__(
        self, V: Tensor, gating: Gating, null_bias: Tensor | None = None, gain: Tensor | None = None
    ) -> None:
        super().__init__()
        self.gating = gating
        self.V = nn.Parameter(V.float())
        zero = V.new_zeros((), dtype=torch.float32)
        has_gain = gating.gain == "layer"
        self.null_bias = (
            nn.Parameter((zero if null_bias is None else null_bias).clone()) if gating.null_expert else None
        )
        self.gain = nn.Parameter((zero if gain is None else gain).clone()) if has_gain else None

    def forward(self, x: Tensor) -> Route:
        """Decide for tokens (N, d); the weights include the gain, 2 * sigmoid(gain), which starts at 1."""
        g = self.gating
        found = route(x, self.V, g.k, g.normalisation, g.temperature, self.null_bias)
        if self.gain is not None:
            return found._replace(w=found.w * (2 * torch.sigmoid(self.gain)))
        return found._replace(w=found.w * g.gain) if isinstance(g.gain, float) else found

    def tensors(self) -> dict[str, Tensor]:
        """V under the empty name, and the scalars that there are."""
        scalars = {NULL_BIAS: self.null_bias, GAIN: self.gain}
        found: dict[str, Tensor] = {"": self.V}
        return found | {f".{name}": value for name, value in scalars.items() if value is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # `.to(bfloat16)` and `.half()` move it and leave its type: near ties would be decided otherwise.
        super()._apply(lambda t: t.to(fn(t).device), recurse)
        return self


class Statistics(NamedTuple):
    """What one router did with one batch's valid tokens."""

    counts: Tensor  # (K,) selections; of the null expert too, last, where there is one
    entropy: Tensor  # sum over tokens of the entropy of softmax(z), nats
    tokens: int


@dataclass
class RoutingState:
    """What the routers of one model share during a forward pass, and the switches above them."""

    gating: Gating
    experts: int
    enabled: bool = True
    """Off: the base, bit for bit."""
    static: Route | None = None
    """One decision for all tokens, idx and w of shape (1, k), in place of the routers' (guarded)."""
    live: bool = True
    """Off in passes after `first_tokens` (control `first_T`)."""
    decisions: dict[str, Dispatch] = field(default_factory=dict)
    valid: Tensor | None = None  # (B, T) bool: no pads; None where all count
    held: dict[str, Dispatch] = field(default_factory=dict)
    """`last_token`: each row's decision at the last prompt position, reused by cached passes."""
    pins: Tensor | None = None  # (B,) `last_token`: that position, in a pass that is not cached
    late: Tensor | None = None  # (B, T) bool `first_tokens`: answer tokens beyond them, in a pass that is not cached
    routes: dict[str, Route] | None = None
    """A dict while a loss reads the logits (`watching_logits`)."""
    statistics: dict[str, Statistics] | None = None
    """A dict while they are wanted; *assigned* by router, so recomputation counts once."""
    recorder: Any = None
    """Told (`begin`, `decide`) about every pass that keeps no gradient; see `tracing.Recorder`."""
    step: int = 0
    shape: tuple[int, int] = (0, 0)
    _given: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    _latest: Dispatch | None = None

    @property
    def is_on(self) -> bool:
        """Whether experts add anything in this pass."""
        return self.enabled and self.live

    @contextmanager
    def batch(self, valid: Tensor | None = None, pins: Tensor | None = None) -> Iterator[None]:
        """Say what a batch without an attention mask cannot: its valid tokens, and where each row's answer starts."""
        before, self._given = self._given, (valid, pins, None)
        try:
            yield
        finally:
            self._given = before

    @contextmanager
    def scoring(self, batch: TokenBatch) -> Iterator[None]:
        """Say of whole answers, which no cached pass continues, where each starts; nothing where `batch` has."""
        if self._given[1] is not None:
            yield
            return
        B, T = batch.ids.shape
        last = torch.full((B,), T - 1, device=batch.source.device)  # position that predicts the first scored token
        pins = last.scatter_reduce(0, batch.source // T, batch.source % T, "amin")
        late = None
        if self.gating.first_tokens is not None:
            place = torch.arange(T, device=pins.device).expand(B, T) if batch.positions is None else batch.positions
            late = place - place.gather(1, pins[:, None]) >= self.gating.first_tokens
        before, self._given = self._given, (self._given[0], pins, late)
        try:
            yield
        finally:
            self._given = before

    def begin(self, ids: Tensor | None, shape: tuple[int, int], mask: Tensor | None, past: int) -> None:
        """Start a forward pass over (B, T) new tokens, `past` of each row being cached."""
        self.shape = shape
        valid, self.pins, self.late = self._given
        if valid is None and mask is not None and mask.dim() == 2:
            valid = mask[:, -shape[1] :].bool()
        self.valid = valid
        self.step = self.step + 1 if past else 0
        self.live = self.gating.first_tokens is None or self.step < self.gating.first_tokens
        if not past:
            self.held = {}
        if self.recorder is not None and not torch.is_grad_enabled():
            self.recorder.begin(ids, self.valid, shape, is_prefill=past == 0)

    def decide(self, name: str, router: Router, x: Tensor) -> Dispatch:
        """Route the tokens of a pass, (B, T, d) or (N, d), and keep what the switches ask for."""
        found = router(x.reshape(-1, x.shape[-1]))
        if self.static is not None:
            n = len(found.idx)
            found = Route(self.static.idx.expand(n, -1), self.static.w.expand(n, -1), found.z)
        elif self.gating.last_token:
            found = self._hold(name, found)
        if self.late is not None:
            found = found._replace(w=found.w.masked_fill(self.late.flatten()[:, None], 0.0))
        if self.routes is not None:
            self.routes[name] = found
        if self.statistics is not None:
            self.statistics[name] = self._measure(found)
        if self.recorder is not None and not torch.is_grad_enabled():
            self.recorder.decide(name, found)
        if self._latest is not None:
            self._latest.forget()  # one router's copies of its tokens at a time, not one of each
        self._latest = Dispatch(found.idx, found.w, self.experts, self.gating.null_expert)
        self.decisions[name] = self._latest
        return self._latest

    def _hold(self, name: str, found: Route) -> Route:
        """Let positions from the last prompt position on reuse the decision made there."""
        B, T = self.shape
        parts = [part.view(B, T, -1) for part in found]
        if self.step:  # a cached pass: nothing of it is decided anew
            kept = self.held[name]
            held = [kept.idx.view(B, 1, -1), kept.w.view(B, 1, -1)]
            out = [h.expand(-1, T, -1).reshape(B * T, -1) for h in held]
            return Route(out[0], out[1], found.z)
        # Left padding: the last column of a prefill is each row's last prompt position.
        pins = torch.full((B,), T - 1, device=found.idx.device) if self.pins is None else self.pins
        place = torch.arange(T, device=pins.device)[None].minimum(pins[:, None])  # (B, T)
        idx, w = (p.gather(1, place[..., None].expand(-1, -1, p.shape[-1])) for p in parts[:2])
        at = pins[:, None, None]
        last = [p.gather(1, at.expand(-1, 1, p.shape[-1])).squeeze(1).detach() for p in parts[:2]]
        self.held[name] = Dispatch(last[0], last[1], self.experts)
        return Route(idx.flatten(0, 1), w.flatten(0, 1), found.z)

    def _measure(self, found: Route) -> Statistics:
        keep = slice(None) if self.valid is None else self.valid.flatten()
        idx, z = found.idx[keep], found.z[keep].detach()
        log_p = z.log_softmax(-1)
        return Statistics(idx.flatten().bincount(minlength=z.shape[1]), -(log_p.exp() * log_p).sum(), len(idx))


class RoutedLinear(nn.Module):
    """A linear layer plus the updates of the experts that its router selected.

    It calls the base layer and never reads its weight, so that 4-bit, 8-bit and fused layers work.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        weights: ExpertWeights,
        state: RoutingState,
        router: str,
        pick: Callable[[int], Backend],
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not persistent: no state dict, no `save_pretrained`, no checkpoint contains an expert.
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.state, self.router, self.pick = state, router, pick
        self.weights = weights
        """The buffers again, at hand."""
        self.has_own_router = False
        self._picked: dict[int, Backend] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Compute base(x), and add the mixture where experts are on."""
        y = self.base_layer(x)
        if not self.state.is_on:
            return y
        if self.has_own_router:  # granularity `module`: fed by its own input
            dispatch = self.state.decide(self.router, getattr(self, EXPERT_GATE), x)
        else:
            dispatch = self.state.decisions[self.router]
        n = len(dispatch.idx)
        if n not in self._picked:
            self._picked[n] = self.pick(n)
        flat, add = x.reshape(n, x.shape[-1]).to(self.weights.A.dtype), BACKENDS[self._picked[n]]
        if y.dtype == flat.dtype:
            return add(flat, dispatch, self.weights, y.reshape(n, -1)).view_as(y)
        delta = add(flat, dispatch, self.weights, flat.new_zeros(n, y.shape[-1]))
        return y + delta.view_as(y).to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedLinear:
        scale = self.weights.scale
        super()._apply(fn, recurse)
        self._buffers["scale"] = scale.to(fn(scale).device)  # stays float32
        buffers: Any = self._buffers
        self.weights = ExpertWeights(**{name: buffers[name] for name in ExpertWeights._fields})
        return self
