"""Eval `quantisation`: does what was unlearned come back when the weights are rounded?

Every weight matrix of the blocks is rounded and put back, and the target is asked again:

    int8               W / s rounded to -127..127, s the largest |W| of a row over 127 (symmetric)
    q8_0, q4_0, q4_1   blocks of 32 along a row, through `gguf.quants`, bit for bit as in a .gguf file

Embeddings, norms and output layer stay (our choice). Adapters are merged first, as who publishes such a file does;
rounded values are kept in the dtype of the model. A matrix whose rows are no multiple of 32 stays as it is under
q*_*, and is remarked.

`recovered_fraction/FORMAT` is of the rounded target; `recovered_fraction/quantisation` the largest. The original is
not rounded: it is the reference for all. `snapped_back/FORMAT` is the share of the entries that the edit changed
whose rounded code is the one that the original's weight has too: there the edit is gone. Weights that come from such
a grid (those of `smollm2` do, Q4_1) go back to where they were where the edit is below half a step. RMU partly
returns at Q4_0 (prior work).

NF4 is not among them.

    temper eval runs/mine quantisation
    temper eval runs/mine quantisation quantisations=[q4_0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tempering import judges
from tempering.core.stats import wilson
from tempering.evals.recovery import Values, attacked_metrics, attacked_rows, interval_entry, original, subject
from tempering.evals.results import Cost, EvalResult, Journal, Progress
from tempering.evals.settings import EvalConfig, settled

if TYPE_CHECKING:
    from torch import Tensor

    from tempering.core.policy import Policy
    from tempering.core.sampling import Sampler

BLOCK = 32
NAME = "quantisation"


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    toxicity_judge: judges.Judge | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Ask the target again with its weights in each format; its own are back afterwards.

    Raises:
        FileNotFoundError, ValueError: the target has no weights here, its original or its items are not known.
    """
    del journal  # as many measurements as there are formats
    cost, config = Cost(), settled(NAME, config)
    about = subject(sampler, NAME, config, toxicity_judge, cost)
    policy, formats = about.policy, list(config.quantisations)
    now = {name: _hash(weight) for name, weight in effective(policy)}
    with original(policy, about.run, config) as before:
        start = {name: weight for name, weight in effective(before) if now.get(name) != _hash(weight)}
    edited = sorted(set(start) & set(now))
    attacked: dict[str, Values] = {}
    snapped: dict[str, Any] = {}
    warnings = list(about.warnings)
    for done, fmt in enumerate(formats):
        new, left, count, total = {}, [], 0, 0
        for name, weight in effective(policy):
            found = round_trip(weight, fmt)
            if found is None:
                left.append(name)
            elif name in edited and (old := round_trip(start[name], fmt)) is not None:
                is_edited = weight != start[name]
                count += int((is_edited & (found.codes == old.codes)).sum())
                total += int(is_edited.sum())
            new[name] = as_weight(policy, name, weight if found is None else found.values)
        if left:
            warnings.append(
                f"{fmt}: {len(left)} of {len(now)} matrices have rows of no multiple of {BLOCK} and stay as they "
                f"are, first {left[0]}"
            )
        if total:
            snapped[f"snapped_back/{fmt}"] = interval_entry(wilson(count, total), total, "codes")
        with rounded(policy, new):
            attacked[fmt] = about.measure(policy)
        if progress:
            progress(done + 1, len(formats))
    if not edited:
        warnings.append("no weight differs from the original's: there is no edit to snap back")
    return EvalResult(
        attacked_rows(about, attacked),
        {**attacked_metrics(about, NAME, attacked), **snapped},
        {},
        cost.summary(),
        warnings,
        about.source,
        {"matrices": len(now), "edited_matrices": len(edited)},
    )


class Rounded(NamedTuple):
    """A matrix after the round trip: its values, and the integer code of each entry."""

    values: NDArray[np.float32]
    codes: NDArray[np.int16]


def round_trip(weight: NDArray[np.float32], fmt: str) -> Rounded | None:
    """Round a matrix (out, in) and come back; `None` where the format's blocks do not fit its rows.

    >>> round_trip(np.array([[127.0, -63.4]], dtype=np.float32), "int8").values.tolist()
    [[127.0, -63.0]]
    """
    if fmt == "int8":
        scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        codes = np.round(weight / np.where(scale > 0, scale, 1)).astype(np.int16)
        return Rounded((codes * scale).astype(np.float32), codes)
    if weight.shape[1] % BLOCK:
        return None
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[fmt.upper()]
    packed = quants.quantize(np.ascontiguousarray(weight), kind)
    return Rounded(quants.dequantize(packed, kind).astype(np.float32), codes_of(packed, fmt).reshape(weight.shape))


def codes_of(packed: NDArray[np.uint8], fmt: str) -> NDArray[np.int16]:
    """The integers in packed blocks: after one or two float16, 32 bytes, or 16 of two halves each, low ones first."""
    head, size = {"q8_0": (2, 34), "q4_0": (2, 18), "q4_1": (4, 20)}[fmt]
    body = packed.reshape(-1, size)[:, head:]
    if fmt == "q8_0":
        return np.ascontiguousarray(body).view(np.int8).astype(np.int16)
    return np.concatenate([body & 15, body >> 4], axis=1).astype(np.int16)


def matrices(policy: Policy) -> dict[str, tuple[Any, bool]]:
    """Name -> weight of every linear layer in the blocks, and whether it is kept transposed (GPT-2)."""
    from torch import nn

    from tempering.core.activations import blocks
    from tempering.core.editing import plain_name

    names = {id(p): plain_name(name) for name, p in policy.model.named_parameters()}
    out = {}
    for block in blocks(policy.model):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            is_transposed = type(module).__name__ == "Conv1D"
            is_plain = isinstance(module, nn.Linear) or is_transposed
            if is_plain and weight is not None and ".lora_" not in names[id(weight)]:
                out[names[id(weight)]] = (weight, is_transposed)
    return dict(sorted(out.items()))


def effective(policy: Policy) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the name and a float32 copy of each weight matrix, (out, in), with all adapters added."""
    layers = {id(layer.get_base_layer().weight): layer for _, layer in policy.lora_layers()}
    for name, (weight, is_transposed) in matrices(policy).items():
        value = (weight.T if is_transposed else weight).detach().float()
        layer = layers.get(id(weight))
        for adapter in policy.adapters if layer is not None else ():
            if layer is not None and adapter in layer.lora_A:
                b, a = layer.lora_B[adapter].weight.detach().float(), layer.lora_A[adapter].weight.detach().float()
                value = value + layer.scaling[adapter] * (b @ a)
        yield name, value.cpu().contiguous().numpy().copy()


def as_weight(policy: Policy, name: str, value: NDArray[np.float32]) -> Tensor:
    """Return a matrix as the model keeps it: device, dtype, side."""
    import torch

    weight, is_transposed = matrices(policy)[name]
    tensor = torch.from_numpy(value).to(weight.device, weight.dtype)
    return tensor.T.contiguous() if is_transposed else tensor


@contextmanager
def rounded(policy: Policy, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with these matrices and without adapters; bits and flags are as before on exit, also after an error."""
    from tempering.core.editing import swapped

    own = {name: weight for name, (weight, _) in matrices(policy).items()}
    with policy.using([]), swapped(own, values):
        yield


def _hash(weight: NDArray[np.float32]) -> str:
    return hashlib.sha256(weight.tobytes()).hexdigest()
