"""The output layer of a model, fed in one piece.

Where only the last token's logits are wanted, transformers hands a slice of the hidden states to the output layer. Of
a slice PyTorch's half-precision product on a CPU copies the layer's weights once for each row: of smollm2 57 MB.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def feed_in_one_piece(model: Any) -> None:
    """Let the output layer of a transformers model see contiguous states; what it computes stays the same."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
