"""Putting experts and routers into a model, and taking them out again; the handle in between; how routers start.

A router is a part of the module whose input it reads; the experts stand where the target layers stood.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.core.chat import TokenBatch
from tempering.core.policy import EXPERT_GATE, Policy
from tempering.methods.safemoe.backends import GATHER_TOKENS, Backend, Table, calibrate, can_group, choose
from tempering.methods.safemoe.experts import Experts, ExpertWeights
from tempering.methods.safemoe.guards import require_override
from tempering.methods.safemoe.layers import (
    GAIN,
    NULL_BIAS,
    Gating,
    Granularity,
    Route,
    RoutedLinear,
    Router,
    RoutingState,
)

MODEL_ROUTER = "model"


@dataclass
class Routing:
    """A routed model's handle: its state, its routers by name, and the way back. `Policy.routing` holds it."""

    state: RoutingState
    experts: Experts
    routers: dict[str, Router]
    table: Table
    detach: Callable[[], None]
    has_other_routers: bool = False

    @property
    def is_loose(self) -> bool:
        """Whether something else than the verified gate decides: each answer then needs the override."""
        return self.state.static is not None or self.has_other_routers

    @property
    def enabled(self) -> bool:
        """Whether the experts are on."""
        return self.state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.state.enabled = value

    def scoring(self, batch: TokenBatch) -> AbstractContextManager[None]:
        """Tell the routers where the answers of a batch start, for switches that depend on it."""
        return self.state.scoring(batch)

    def refuse(self, operation: str) -> None:
        """Refuse what would let an expert act without its gate.

        Raises:
            UnsafeExpertAccess: unless it is overridden.
            RuntimeError: it is, and still cannot be done.
        """
        require_override(operation)
        raise RuntimeError(
            f"{operation}: experts are mixed anew for every token, so no one adapter or weight holds them"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the routers' tensors: V under the router's name, scalars under NAME.null_bias and NAME.gain."""
        return {
            f"{name}{suffix}": value.detach().cpu().clone()
            for name, router in self.routers.items()
            for suffix, value in router.tensors().items()
        }

    def use_static_gate(self, weights: Tensor | None) -> None:
        """Mix all tokens with one weight an expert, (K,), instead of the routers; `None`: the routers again.

        Raises:
            UnsafeExpertAccess: a static gate, without the override.
        """
        if weights is None:
            self.state.static = None
            return
        require_override("a static gate, which lets experts act whatever the token is")
        (idx,) = weights.nonzero(as_tuple=True)
        self.state.static = Route(idx[None], weights[idx][None].float(), weights[None])

    def replace_routers(self, tensors: dict[str, Tensor]) -> None:
        """Put other router tensors in place.

        Raises:
            UnsafeExpertAccess: without the override: they were not verified.
            ValueError: a name or shape that differs.
        """
        require_override("replacing the routers by unverified ones")
        own = {f"{n}{s}": value for n, router in self.routers.items() for s, value in router.tensors().items()}
        if own.keys() != tensors.keys() or any(own[n].shape != t.shape for n, t in tensors.items()):
            raise ValueError("these routers are not those of this model and these settings")
        self.has_other_routers = True
        for name, tensor in tensors.items():
            own[name].data.copy_(tensor)


def attach(
    policy: Policy,
    experts: Experts,
    gating: Gating,
    routers: dict[str, Tensor],
    *,
    backend: Backend | Literal["auto"] = "auto",
    table: Table | None = None,
) -> Routing:
    """Put experts and routers into a policy's model: all, or on any error nothing.

    `table`: choices of `auto` that were measured before. The routed part is the policy's newest adapter, named
    `expert_gate`: `reference()` computes without it, `train_only(EXPERT_GATE)` trains the routers.

    Raises:
        ValueError: an expert's layer is not in the model or of another shape, a router is missing or of another
            shape, or the back-end cannot compute these shapes.
    """
    if policy.adapters:
        raise ValueError("experts go on plain weights: merge the adapters of the start model first")
    model = policy.base
    moved = experts.to(policy.device, policy.dtype)
    order = [name for name, _ in model.named_modules() if name in moved.modules]
    targets = require_layers(model, moved.modules)
    shared: dict[tuple[float, ...], Tensor] = {}
    weights = {}
    for name in order:  # layers of one scale share the tensor, and with it the weights of a router's decisions
        w = moved.modules[name]
        weights[name] = w._replace(scale=shared.setdefault(tuple(w.scale.tolist()), w.scale))
    if backend == "grouped" and not all(can_group(w) for w in weights.values()):
        raise ValueError("backend=grouped cannot compute these experts here; use auto or eager")
    k = min(gating.k, len(experts.domains))
    if table is None:
        table = calibrate(list(weights.values()), k) if backend == "auto" else {}
    state = RoutingState(gating, len(experts.domains))
    names = router_names(order, gating.granularity)
    made = {name: _router(name, routers, gating, len(experts.domains)) for name in dict.fromkeys(names.values())}
    if extra := sorted(set(routers) - {f"{n}{s}" for n, r in made.items() for s in r.tensors()}):
        raise ValueError(f"router {extra[0]}: these experts and settings have no such router")
    for name in order:
        pick = _picker(backend, table, weights[name], k)
        layer = RoutedLinear(targets[name], weights[name], state, names[name], pick)
        parent, leaf = _parent(model, name)
        setattr(parent, leaf, layer)
    hooks = [_body(model).register_forward_pre_hook(_begin(state), with_kwargs=True)]
    for name, router in made.items():
        home = model.get_submodule(_home(name, order))
        home.add_module(EXPERT_GATE, router.to(policy.device))
        if isinstance(home, RoutedLinear):
            home.has_own_router = True
        else:
            hooks.append(home.register_forward_pre_hook(_decide(state, name, router), with_kwargs=True))

    def detach() -> None:
        for hook in hooks:
            hook.remove()
        for name in made:
            delattr(model.get_submodule(_home(name, order)), EXPERT_GATE)
        for name in order:
            parent, leaf = _parent(model, name)
            setattr(parent, leaf, targets[name])

    routing = Routing(state, experts, made, table, detach)
    policy.set_routing(routing)
    return routing


def router_names(modules: list[str], granularity: Granularity) -> dict[str, str]:
    """Return module path -> name of the router that decides for it.

    >>> router_names(["m.0.mlp.gate_proj", "m.0.mlp.down_proj"], "block")
    {'m.0.mlp.gate_proj': 'm.0.mlp', 'm.0.mlp.down_proj': 'm.0.mlp'}
    """
    if granularity == "model":
        return dict.fromkeys(modules, MODEL_ROUTER)
    return {name: name if granularity == "module" else name.rpartition(".")[0] for name in modules}


def router_widths(policy: Policy, experts: Experts, granularity: Granularity) -> dict[str, int]:
    """Return router name -> width of what it reads, in the order of the model."""
    order = [name for name, _ in policy.base.named_modules() if name in experts.modules]
    names = router_names(order, granularity)
    hidden = policy.base.config.hidden_size  # what a block's attention and MLP are given
    own = granularity == "module"
    return {router: experts.modules[module].A.shape[2] if own else hidden for module, router in names.items()}


def initial_routers(policy: Policy, experts: Experts, gating: Gating, init: str, seed: int) -> dict[str, Tensor]:
    """Return V of every router: N(0, 0.02^2), `zero`, or `arrow`; never zero to train from (all tokens would tie).

    `arrow`: row i is the top right-singular vector of B_i A_i of the router's first target of that width, its largest
    entry positive. Keyed by (seed, index of the router).
    """
    K, out = len(experts.domains), {}
    order = [name for name, _ in policy.base.named_modules() if name in experts.modules]
    names = router_names(order, gating.granularity)
    for index, (router, width) in enumerate(router_widths(policy, experts, gating.granularity).items()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        rows = torch.randn(K + gating.null_expert, width, generator=generator) * 0.02
        if init == "zero":
            rows = torch.zeros_like(rows)
        elif init == "arrow":
            first = next(m for m in order if names[m] == router and experts.modules[m].A.shape[2] == width)
            rows[:K] = _directions(experts.modules[first])
        out[router] = rows
        out |= {f"{router}.{NULL_BIAS}": torch.zeros(())} if gating.null_expert else {}
        out |= {f"{router}.{GAIN}": torch.zeros(())} if gating.gain == "layer" else {}
    return out


def _directions(w: ExpertWeights) -> Tensor:
    """The input direction that each expert amplifies most, (K, d_in), by an SVD of r x d_in after a QR of B."""
    A, B = w.A.float(), w.B.float().permute(1, 0, 2)
    _, R = torch.linalg.qr(B)
    top = torch.linalg.svd(R @ A, full_matrices=False).Vh[:, 0]
    largest = top.gather(1, top.abs().argmax(1, keepdim=True))
    return top * largest.sign()


def require_layers(model: nn.Module, modules: dict[str, ExpertWeights]) -> dict[str, nn.Module]:
    """Return the layers that experts are for, by path.

    Raises:
        ValueError: the model has no such layer, or one of another shape.
    """
    return {name: _target(model, name, w) for name, w in modules.items()}


def _target(model: nn.Module, name: str, w: ExpertWeights) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"experts: the base has no layer {name}; they were trained on another architecture"
        ) from None
    found = (
        getattr(layer, "in_features", getattr(layer, "nx", None)),
        getattr(layer, "out_features", getattr(layer, "nf", None)),
    )
    wanted = w.A.shape[2], w.B.shape[0]
    if None not in found and found != wanted:
        raise ValueError(
            f"experts: {name} is {found[0]} -> {found[1]} in the base, {wanted[0]} -> {wanted[1]} in them"
        )
    return layer


def _router(name: str, tensors: dict[str, Tensor], gating: Gating, experts: int) -> Router:
    if name not in tensors:
        raise ValueError(f"router {name}: missing")
    V = tensors[name]
    rows = experts + gating.null_expert
    if V.dim() != 2 or V.shape[0] != rows or not torch.isfinite(V).all():
        raise ValueError(f"router {name}: has shape {tuple(V.shape)}, expected {rows} finite rows")
    return Router(V, gating, tensors.get(f"{name}.{NULL_BIAS}"), tensors.get(f"{name}.{GAIN}"))


def _picker(backend: Backend | Literal["auto"], table: Table, w: ExpertWeights, k: int) -> Callable[[int], Backend]:
    if backend == "auto":
        return lambda n: choose(table, w, k, n)
    # `gather` copies matrices by token: beyond a few it would fill the memory.
    return lambda n: "eager" if backend == "gather" and n > GATHER_TOKENS else backend


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _home(router: str, order: list[str]) -> str:
    """The module that a router is part of: the one whose input it reads."""
    return order[0].rpartition(".")[0] if router == MODEL_ROUTER else router


def _body(model: Any) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _decide(state: RoutingState, name: str, router: Router) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state.is_on:
            state.decide(name, router, _first_input(args, kwargs))

    return hook


def _begin(state: RoutingState) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        state.begin(ids, (tokens.shape[0], tokens.shape[1]), kwargs.get("attention_mask"), past)

    return hook
