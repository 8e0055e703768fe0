"""Cross-entropy of logits, also fused with the last linear layer."""

from __future__ import annotations

from torch import Tensor

from . import checks, dispatch
from .traits import PointwiseTraits, needs_grad


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`, in float32.

    logits [T, V], labels integers [T]; a scalar, NaN when no label counts (as PyTorch's). Differentiable.
    Raises ValueError for a label out of range.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: logits must be [T, V] and labels [T], and they are {list(logits.shape)} and "
            f"{list(labels.shape)}"
        )
    labels = checks.labels("cross_entropy", labels, logits.shape[1], ignore_index)
    traits = PointwiseTraits(logits.device.type, logits.dtype, None, needs_grad(logits))
    result: Tensor = dispatch.select("cross_entropy", traits)(logits, labels, ignore_index)
    return result


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """cross_entropy(hidden weight^T, labels) for training loops, without the full logits in memory.

    hidden [T, C], weight [V, C], labels integers [T]; a scalar, NaN when no label counts. Differentiable.
    Only the logits of some rows exist at a time, never all of [T, V] (except in the reference). Models return
    logits, so a training loop calls the body, then this with the head's weight. For a causal model the caller
    shifts the labels: ``linear_cross_entropy(hidden[:-1], weight, ids[1:])`` within one sequence.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden must be [T, C] and weight [V, C], and they are "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be [{hidden.shape[0]}], and are {list(labels.shape)}"
        )
    labels = checks.labels("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    traits = PointwiseTraits(hidden.device.type, hidden.dtype, None, needs_grad(hidden, weight))
    result: Tensor = dispatch.select("linear_cross_entropy", traits)(hidden, weight, labels, ignore_index)
    return result
