"""What the ops of all topics say of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PointwiseTraits(NamedTuple):
    """Ops that look at no more than device, dtype and an activation."""

    device: str
    dtype: torch.dtype
    activation: str | None = None
    grad: bool = False


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the derivative of an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
