"""The manifest of a bundle: what it must say, and how tensors and bytes are held against it. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tempering.methods.safemoe.experts import Experts, ExpertWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGNMENT = 64
"""Every tensor begins at a multiple of so many bytes, so that what is decrypted need not be copied to be used."""
SCALARS = (".null_bias", ".gain")
"""End the names of what a router may have beside V."""
PARTS = ("A", "B", "scale")

Size = Annotated[int, Field(gt=0, lt=1 << 31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorRow(_Strict):
    """One tensor of the experts; `offset` in bytes from the end of the sealed table."""

    name: str
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: Annotated[list[Size], Field(min_length=1, max_length=3)]
    offset: Annotated[int, Field(ge=0, lt=1 << 62)]
    nbytes: Annotated[int, Field(gt=0, lt=1 << 62)]


class RouterRow(_Strict):
    """One float32 tensor of the gate."""

    name: str
    shape: Annotated[list[Size], Field(max_length=2)]


class RouterFile(_Strict):
    """The router file that belongs to the experts."""

    sha256: Sha256
    tensors: Annotated[list[RouterRow], Field(min_length=1)]


class ExpertRow(_Strict):
    """One expert, in index order, and where it comes from."""

    domain: str
    source: dict[str, Any]


class Manifest(_Strict):
    """What `bundle.seal` records itself; the method's own keys stand beside it."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1]
    unsafe_experts: Literal[True]
    base: dict[str, Any]
    experts: Annotated[list[ExpertRow], Field(min_length=1)]
    tensors: Annotated[list[TensorRow], Field(min_length=3)]
    routers: RouterFile
    secret: bool
    """Whether a secret is needed to open it."""


def canonical(value: Any) -> bytes:
    """Write JSON of which one value has one spelling: sorted keys, no spaces, no escapes, no NaN.

    >>> canonical({"b": [1, 2.0], "a": "é"}).decode()
    '{"a":"é","b":[1,2.0]}'

    Raises:
        ValueError, TypeError: it is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def strict_json(content: bytes) -> dict[str, Any]:
    """Read canonical JSON of one mapping, and nothing that is spelt otherwise, such as a key that stands twice.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(content.decode("utf-8"))
        is_canonical = isinstance(found, dict) and canonical(found) == content
    except (ValueError, RecursionError):
        is_canonical = False
    if not is_canonical:
        raise ValueError("not canonical JSON of one mapping: cut short, edited, or not a file of this format")
    return dict(found)


def parse(content: bytes) -> tuple[Manifest, dict[str, Any]]:
    """Read a manifest: what is checked, and all of it.

    Raises:
        ValueError: naming the field.
    """
    found = strict_json(content)
    known = Manifest.model_validate(found)
    if known.tensors != laid_out((row.name, row.dtype, row.shape) for row in known.tensors):
        raise ValueError("tensors: offsets and sizes do not follow from the shapes")
    return known, found


def describe(
    experts: Experts, routers: dict[str, Tensor], own: dict[str, Any], router_sha256: str, secret: bool
) -> dict[str, Any]:
    """Write the manifest of these tensors over what the method records.

    Raises:
        ValueError: tensors that do not fit each other, or are not finite.
    """
    rows = [{"domain": d, "source": s} for d, s in zip(experts.domains, experts.sources, strict=True)]
    tensors = sorted((on_disk(name), list(tensor.shape)) for name, tensor in routers.items())
    found = {
        **own,
        "format": 1,
        "unsafe_experts": True,
        "base": experts.base,
        "experts": rows,
        "tensors": [row.model_dump() for row in expert_table(experts)],
        "routers": {"sha256": router_sha256, "tensors": [{"name": n, "shape": s} for n, s in tensors]},
        "secret": secret,
    }
    known, _ = parse(canonical(found))
    require_routers(routers, known)
    require_experts(experts)
    return found


# --- experts ------------------------------------------------------------------------------------------


def expert_tensors(experts: Experts) -> dict[str, Tensor]:
    """Return the tensors in the order in which they are sealed; B as it lies in memory, [K, r, d_out]."""
    return {
        f"{module}/{part}": getattr(weights, part) if part != "B" else weights.B.permute(1, 2, 0)
        for module, weights in sorted(experts.modules.items())
        for part in PARTS
    }


def expert_table(experts: Experts) -> list[TensorRow]:
    """List the tensors with their places.

    Raises:
        ValueError: a type that is not sealed.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in expert_tensors(experts).items():
        if tensor.dtype not in names:
            raise ValueError(f"expert tensor {name} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    return laid_out((name, names[t.dtype], list(t.shape)) for name, t in expert_tensors(experts).items())


def laid_out(tensors: Iterable[tuple[str, Any, list[int]]]) -> list[TensorRow]:
    """Give (name, dtype, shape) their places one after the other; there is no other layout."""
    rows, end = [], 0
    for name, dtype, shape in tensors:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        rows.append(TensorRow(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=end - offset))
    return rows


def end_of(table: list[TensorRow]) -> int:
    """Return the number of bytes that all tensors take."""
    return table[-1].offset + table[-1].nbytes


def experts_from(known: Manifest, raw: Tensor) -> Experts:
    """View decrypted bytes as experts; nothing is copied.

    Raises:
        ValueError: names or shapes that are not those of experts, or values that are not finite.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for row in known.tensors:
        module, _, part = row.name.rpartition("/")
        bytes_ = raw[row.offset : row.offset + row.nbytes]
        tensor = bytes_.view(DTYPES[row.dtype]).view(row.shape)
        if part == "B" and tensor.dim() == 3:
            tensor = tensor.permute(2, 0, 1)
        found.setdefault(module, {})[part] = tensor
    for module, parts in found.items():
        if not module or set(parts) != set(PARTS):
            raise ValueError(f"layer {module!r} has {', '.join(sorted(parts))} instead of A, B and scale")
    experts = Experts(
        domains=tuple(row.domain for row in known.experts),
        modules={module: ExpertWeights(**parts) for module, parts in found.items()},
        base=known.base,
        sources=tuple(row.source for row in known.experts),
    )
    require_experts(experts)
    return experts


def require_experts(experts: Experts) -> None:
    """Refuse experts whose tensors do not fit each other.

    Raises:
        ValueError: naming the layer.
    """
    count = len(experts.domains)
    if len(set(experts.domains)) != count:
        raise ValueError(f"two experts have one domain: {', '.join(experts.domains)}")
    for module, w in experts.modules.items():
        if w.A.dim() != 3 or w.B.dim() != 3 or w.A.shape[:2] != w.B.shape[1:] or w.A.shape[0] != count:
            raise ValueError(
                f"{module}: A {list(w.A.shape)} and B {list(w.B.shape)} are not "
                f"[{count}, r, d_in] and [d_out, {count}, r]"
            )
        if w.scale.shape != (count,) or w.scale.dtype != torch.float32:
            raise ValueError(f"{module}: scale must be {count} float32 numbers, got {list(w.scale.shape)}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (w.A, w.B, w.scale)):
            raise ValueError(f"{module}: an expert's weights are not finite")


# --- routers ------------------------------------------------------------------------------------------


def on_disk(name: str) -> str:
    """Return the name of a router's tensor in the file: no loader of models takes it for a weight.

    >>> on_disk("model.layers.0.mlp"), on_disk("model.layers.0.mlp.gain")
    ('router.model.layers.0.mlp.V', 'router.model.layers.0.mlp.gain')
    """
    return f"router.{name}" + ("" if name.endswith(SCALARS) else ".V")


def in_memory(name: str) -> str:
    """Undo `on_disk`."""
    return name.removeprefix("router.").removesuffix(".V")


def router_bytes(known: Manifest) -> int:
    """Return the number of bytes that the gate's numbers take."""
    return sum(4 * math.prod(row.shape) for row in known.routers.tensors)


def require_routers(routers: dict[str, Tensor], known: Manifest) -> None:
    """Hold the gate against the manifest: names, shapes, float32, finite, a row for each expert (and null expert).

    Raises:
        ValueError: naming the router.
    """
    want = {in_memory(row.name): row.shape for row in known.routers.tensors}
    if want.keys() != routers.keys():
        raise ValueError(
            f"the routers are not those of the manifest: {', '.join(sorted(want.keys() ^ routers.keys()))}"
        )
    count = len(known.experts)
    for name, tensor in routers.items():
        if list(tensor.shape) != want[name] or tensor.dtype != torch.float32:
            raise ValueError(f"router {name} is {tensor.dtype} {list(tensor.shape)}, not float32 {want[name]}")
        if not name.endswith(SCALARS) and (tensor.dim() != 2 or tensor.shape[0] not in (count, count + 1)):
            raise ValueError(f"router {name} has {list(tensor.shape)}, not a row for each of {count} experts")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"router {name} is not finite")
