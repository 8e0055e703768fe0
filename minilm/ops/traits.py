"""Traits that several ops share: the properties of a call by which an implementation is selected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PointwiseTraits(NamedTuple):
    """Traits of ops whose selection depends only on device, dtype and activation."""

    device: str
    dtype: torch.dtype
    activation: str | None = None
    grad: bool = False


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd needs the derivative of an op with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
