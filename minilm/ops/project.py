"""Linear layers, with floating or quantised weights, and the gate of a gated MLP."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import checks, dispatch, quantized
from .quantized import QuantizedWeight
from .reference import ACTIVATIONS
from .traits import PointwiseTraits, needs_grad

FEW_ROWS = 16
"""Up to this many rows of x, a matrix product is limited by reading the weights, as in a decoding step."""


class LinearTraits(NamedTuple):
    """Traits of a linear layer."""

    device: str
    dtype: torch.dtype
    activation: str | None = None
    grad: bool = False
    kept: bool = False
    """The weight is a parameter, so a packed copy of it can be kept for later calls."""


class QuantizedTraits(NamedTuple):
    """Traits of a linear layer with quantised weights."""

    device: str
    dtype: torch.dtype
    format: str
    activation: str | None
    few_rows: bool
    """At most `FEW_ROWS` rows."""
    grad: bool
    kept: bool = True
    """A packed copy of the weight can be kept for later calls; not in a graph of torch.compile."""

    @classmethod
    def of(cls, x: Tensor, format: str, bias: Tensor | None, activation: str | None) -> QuantizedTraits:
        """Those of a call."""
        return cls(
            x.device.type,
            x.dtype,
            format,
            activation,
            not torch.compiler.is_exporting() and math.prod(x.shape[:-1]) <= FEW_ROWS,
            needs_grad(x, bias),
            not torch.compiler.is_compiling(),
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias). x [..., in], weight [out, in], bias [out]. Differentiable."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {list(x.shape)} ends in {x.shape[-1]}, and weight {list(weight.shape)} takes "
            f"{weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be [{weight.shape[0]}], and is {list(bias.shape)}")
    checks.activation("linear", activation, ACTIVATIONS)
    traits = LinearTraits(x.device.type, x.dtype, activation, needs_grad(x, weight, bias), _is_kept(weight))
    result: Tensor = dispatch.select("linear", traits)(x, weight, bias, activation)
    return result


def _is_kept(weight: Tensor) -> bool:
    """Whether later calls will use this weight and can find its packed copy: true for parameters in eager
    execution, false in a graph of torch.compile."""
    return isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling()


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(x weight^T + bias) with a quantised weight [out, in] (`minilm.ops.quantized`).

    x [..., in], bias [out]; returns [..., out] in x's dtype. The reference dequantises to x's dtype; other
    implementations may quantise x and multiply integers. Differentiable in x and bias.
    """
    quantized.check("quantized_linear", weight)
    if x.dim() == 0 or x.shape[-1] != weight.columns:
        raise ValueError(
            f"quantized_linear: x {list(x.shape)} must end in {weight.columns}, which the {weight.format} "
            f"weight [{weight.rows}, {weight.columns}] takes"
        )
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"quantized_linear: bias must be [{weight.rows}], and is {list(bias.shape)}")
    checks.activation("quantized_linear", activation, ACTIVATIONS)
    traits = QuantizedTraits.of(x, weight.format, bias, activation)
    result: Tensor = dispatch.select("quantized_linear", traits)(x, weight, bias, activation)
    return result


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for x [..., 2F] = gate and up side by side (SwiGLU with silu). Returns [..., F].
    Differentiable."""
    if x.shape[-1] % 2:
        raise ValueError(
            f"gated: x must end in an even size, gate and up side by side, and is {list(x.shape)}"
        )
    checks.activation("gated", activation, ACTIVATIONS)
    result: Tensor = dispatch.select(
        "gated", PointwiseTraits(x.device.type, x.dtype, activation, needs_grad(x))
    )(x, activation)
    return result
