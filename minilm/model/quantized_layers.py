"""Layers whose weights are quantised: drop-in for `layers.Linear` and `layers.Embedding`, for inference.

Their planes are buffers, so that they are in `state_dict()` and move with the module; a change of dtype
leaves them as they are and applies to what is computed with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.quantized import QuantizedWeight, check, dequantise

Layer = TypeVar("Layer", bound="Quantized")


class Quantized(nn.Module):
    """What both layers share: the planes of one matrix [out, in] (`minilm.ops.quantized`)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        check(type(self).__name__, weight)
        self.format = weight.format
        for name in ("codes", "scale", "minimum"):
            self.register_buffer(name, getattr(weight, name))
        self.eval()

    @property
    def quantized(self) -> QuantizedWeight:
        """The matrix as the ops take it; it shares the memory of the buffers."""
        return QuantizedWeight(self.format, self.codes, self.scale, self.minimum)

    def train(self: Layer, mode: bool = True) -> Layer:
        """Evaluation mode is the only one."""
        if mode:
            raise RuntimeError(
                f"a {type(self).__name__} ({self.format}) cannot be trained: load the model without weights="
            )
        return super().train(mode)

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        planes = {id(plane) for plane in self.quantized.planes.values()}

        def moved(tensor: Tensor) -> Tensor:
            """`fn`, of which planes follow the device alone: their dtypes are the format's."""
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in planes and new.dtype != tensor.dtype else new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantizedLinear(Quantized):
    """x W^T + b, with an activation if asked for, through `minilm.ops.quantized_linear`."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.quantized_linear(x, self.quantized, self.bias, activation)

    def extra_repr(self) -> str:
        """As of nn.Linear, with the format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


class QuantizedEmbedding(Quantized):
    """A table of vectors, dequantised row by row as they are looked up, to `dtype`."""

    like: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        # Nothing but a dtype and a device, which `.to()` changes as it changes those of parameters.
        self.register_buffer("like", weight.scale.new_empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> [..., C]."""
        rows = {name: plane[tokens.flatten()] for name, plane in self.quantized.planes.items()}
        found = dequantise(QuantizedWeight(self.format, **rows), self.like.dtype)
        return found.view(*tokens.shape, self.embedding_dim)

    def scores(self, hidden: Tensor) -> Tensor:
        """The table as an output matrix: hidden [T, C] -> [T, V]."""
        return ops.quantized_linear(hidden, self.quantized)

    def extra_repr(self) -> str:
        """As of nn.Embedding, with the format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"
