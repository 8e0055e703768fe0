"""Mean pooling: one vector per sequence, the mean of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .traits import needs_grad


class PoolTraits(NamedTuple):
    """Traits of a mean over the tokens of each sequence."""

    device: str
    dtype: torch.dtype
    grad: bool = False


def pool(x: Tensor, cu_seqlens: Tensor, *, unit: bool = False) -> Tensor:
    """The mean of each sequence's tokens; with `unit`, scaled to length 1 (zeros stay zeros).

    x [T, C]; cu_seqlens int32 [B + 1]. A sequence without tokens gives zeros. Sums in float32 (float64 for
    float64). Returns [B, C] in x's dtype. Differentiable.
    """
    if x.dim() != 2:
        raise ValueError(f"pool: x must be [tokens, channels], and is {list(x.shape)}")
    checks.lengths("pool", "cu_seqlens", cu_seqlens, x.shape[0])
    traits = PoolTraits(x.device.type, x.dtype, needs_grad(x))
    result: Tensor = dispatch.select("pool", traits)(x, cu_seqlens, unit)
    return result
