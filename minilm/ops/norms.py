"""LayerNorm and RMSNorm over the last axis, alone or fused with the residual sum before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch


class NormTraits(NamedTuple):
    """Traits of a normalisation over the last axis."""

    device: str
    dtype: torch.dtype
    channels: int
    parameter_dtype: torch.dtype
    contiguous: bool


def _norm_traits(x: Tensor, weight: Tensor) -> NormTraits:
    return NormTraits(x.device.type, x.dtype, x.shape[-1], weight.dtype, x.is_contiguous())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016,
    arXiv:1607.06450).

    x [..., C]; weight and bias [C]; statistics in float32. Returns [..., C] in x's dtype. Differentiable.
    """
    checks.affine("layer_norm", x, weight, bias)
    result: Tensor = dispatch.select("layer_norm", _norm_traits(x, weight))(x, weight, bias, eps)
    return result


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass over memory. Shapes as in `layer_norm`; both
    results [..., C]."""
    checks.same_shape("add_layer_norm", "x", x, "residual", residual)
    checks.affine("add_layer_norm", x, weight, bias)
    result: tuple[Tensor, Tensor] = dispatch.select("add_layer_norm", _norm_traits(x, weight))(
        x, residual, weight, bias, eps
    )
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    x [..., C], weight [C]. The normalised row is rounded to x's dtype before the weight is applied, as in
    Llama.
    """
    checks.affine("rms_norm", x, weight, None)
    result: Tensor = dispatch.select("rms_norm", _norm_traits(x, weight))(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass over memory. Shapes as in `rms_norm`; both results
    [..., C]."""
    checks.same_shape("add_rms_norm", "x", x, "residual", residual)
    checks.affine("add_rms_norm", x, weight, None)
    result: tuple[Tensor, Tensor] = dispatch.select("add_rms_norm", _norm_traits(x, weight))(
        x, residual, weight, eps
    )
    return result
