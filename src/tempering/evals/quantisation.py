"""Eval `quantisation`: does what was unlearned come back when the weights are rounded?

Every weight matrix of the blocks is rounded and put back, and the target is asked again:

    int8               W / s rounded to -127..127, s the largest |W| of a row over 127 (symmetric)
    q8_0, q4_0, q4_1   blocks of 32 along a row, through `gguf.quants`, bit for bit as in a .gguf file
    nf4                blocks of 64 of the whole matrix: W / s to the nearest of 16 quantiles of a Gaussian, s the
                       largest |W| of the block (Dettmers et al. 2023, arXiv:2305.14314), s itself not rounded

Embeddings, norms and output layer stay (our choice). Adapters are merged first, as who publishes such a file does;
rounded values are kept in the dtype of the model. A matrix whose rows are no multiple of 32 stays as it is under
q*_*, and is remarked.

`recovered_fraction/FORMAT` is of the rounded target, `recovered_fraction/quantisation` the largest, both of the gap
to the original as it is. Controls are rounded, too (`METRIC/undefended/FORMAT`, `METRIC/gold/FORMAT`).
`snapped_back/FORMAT` is the share of the entries that the edit changed whose rounded code is the one that the
original's weight has too: there the edit is gone. Weights that come from such a grid (those of `smollm2` do, Q4_1) go
back to where they were where the edit is below half a step. RMU partly returns at Q4_0 (prior work).

Finished measurements are kept, and not made again with `--resume`.

    temper eval runs/mine quantisation
    temper eval runs/mine quantisation quantisations=[q4_0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tempering import judges
from tempering.core.stats import wilson
from tempering.evals.recovery import (
    Subject,
    Values,
    attacked_metrics,
    attacked_rows,
    controls,
    interval_entry,
    kept,
    original,
    subject,
)
from tempering.evals.results import Cost, EvalResult, Journal, Progress
from tempering.evals.settings import EvalConfig, settled

if TYPE_CHECKING:
    from torch import Tensor

    from tempering.core.policy import Policy
    from tempering.core.sampling import Sampler

BLOCK, NF4_BLOCK = 32, 64
NAME = "quantisation"
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of the 16 codes of NF4 (appendix E there)."""


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
    journal, cost, config = journal or Journal(), Cost(), settled(NAME, config)
    about = subject(sampler, NAME, config, toxicity_judge, cost, journal)
    warnings, formats, models = list(about.warnings), list(config.quantisations), controls(about, config)
    snapped, edited = snapped_back(about, config)
    attacked: dict[str, Values] = {}
    for who, opened in models.items():
        with opened() as policy:
            for fmt in formats:
                name = f"{who}/{fmt}" if who else fmt
                attacked[name] = kept(journal, name, partial(measured_at, about, policy, fmt))
                if progress:
                    progress(len(attacked), len(models) * len(formats))
    shapes = {name: weight.shape for name, weight in effective(about.policy)}
    for fmt in formats:
        if left := [name for name, shape in shapes.items() if not fits(shape, fmt)]:
            warnings.append(
                f"{fmt}: {len(left)} of {len(shapes)} matrices have rows of no multiple of {BLOCK} and stay as they "
                f"are, first {left[0]}"
            )
    if not edited:
        warnings.append("no weight differs from the original's: there is no edit to snap back")
    return EvalResult(
        attacked_rows(about, attacked),
        {**attacked_metrics(about, NAME, attacked), **snapped},
        {},
        cost.summary(),
        warnings,
        about.source,
        {"levels": about.levels, "matrices": len(shapes), "edited_matrices": edited},
    )


def measured_at(about: Subject, policy: Policy, fmt: str) -> Values:
    """Ask a model whose matrices are rounded; its own are back afterwards."""
    values = {
        name: as_weight(policy, name, weight if (found := round_trip(weight, fmt)) is None else found.values)
        for name, weight in effective(policy)
    }
    with rounded(policy, values):
        return about.measure(policy)


def snapped_back(about: Subject, config: EvalConfig) -> tuple[dict[str, dict[str, Any]], int]:
    """Share of the edited entries whose code is the original's, by format; and how many matrices are edited."""
    now = {name: _hash(weight) for name, weight in effective(about.policy)}
    with original(about.policy, about.run, config) as before:
        start = {name: weight for name, weight in effective(before) if now.get(name) not in (None, _hash(weight))}
    counts = {fmt: [0, 0] for fmt in config.quantisations}
    for name, weight in effective(about.policy):
        if name not in start:
            continue
        is_edited = weight != start[name]
        for fmt, count in counts.items():
            new, old = round_trip(weight, fmt), round_trip(start[name], fmt)
            if new is not None and old is not None:
                count[0] += int((is_edited & (new.codes == old.codes)).sum())
                count[1] += int(is_edited.sum())
    entries = {f"snapped_back/{fmt}": interval_entry(wilson(k, n), n, "codes") for fmt, (k, n) in counts.items() if n}
    return entries, len(start)


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
    if fmt == "nf4":
        return nf4(weight)
    if not fits(weight.shape, fmt):
        return None
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[fmt.upper()]
    packed = quants.quantize(np.ascontiguousarray(weight), kind)
    return Rounded(quants.dequantize(packed, kind).astype(np.float32), codes_of(packed, fmt).reshape(weight.shape))


def fits(shape: Sequence[int], fmt: str) -> bool:
    """Whether a format has blocks for rows of this length."""
    return fmt in ("int8", "nf4") or shape[1] % BLOCK == 0


def nf4(weight: NDArray[np.float32]) -> Rounded:
    """Round to NF4 and come back; a last block that is not full is one all the same.

    >>> nf4(np.array([[2.0, -2.0, 0.1, 0.9]], dtype=np.float32)).values.astype(float).round(3).tolist()
    [[2.0, -2.0, 0.159, 0.881]]
    """
    values = np.array(NF4, dtype=np.float32)
    flat = np.ravel(weight)
    blocks = np.pad(flat, (0, -len(flat) % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.searchsorted((values[1:] + values[:-1]) / 2, blocks / np.where(scale > 0, scale, 1))
    back = (values[codes] * scale).ravel()[: len(flat)]
    return Rounded(back.reshape(weight.shape), codes.ravel()[: len(flat)].astype(np.int16).reshape(weight.shape))


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
