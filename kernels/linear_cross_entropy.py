"""The last linear layer and its cross-entropy fused: the logits [T, V] are never in memory as a whole.

    for each chunk of rows h of hidden [T, C]:
        x  = h W^T                              [rows, V], logits of this chunk only
        loss += losses of x                     (see cross_entropy)
        x <- softmax(x) - onehot                in place
        dh = x W;  dW += x^T h                  dW in float32
    loss = loss / n;  in the backward dh and dW are multiplied by dloss / n

The gradients, if needed, are computed in the forward, while the chunk's logits are in memory: recomputing
them in the backward would be a fourth matrix product. Only dh and dW have to be stored, which the backward
would return anyway. They are scaled by dloss / n at the end: in float16 a probability over n underflows, and
a gradient scaler's factor is part of dloss.

The size of a chunk keeps its logits smaller than dW (`heuristics.loss_chunk`). Operations: 2 T V C forward, 6
with gradients, by the library's matrix products. Bytes in addition to the products: the logits five times
(written, read for the loss, read and written for the gradient, read by the two products), from L2 if a chunk
fits into it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cross_entropy import row_losses, write_gradient
from .devices import device_of
from .heuristics import loss_chunk


def twin(h: np.ndarray, w: np.ndarray, labels: np.ndarray, ignore_index: int, rows: int) -> tuple[Any, ...]:
    """(loss, dh, dW) in NumPy: h [T, C], w [V, C], labels [T]."""
    loss, dh, dw, n = 0.0, np.zeros_like(h), np.zeros_like(w), (labels != ignore_index).sum()
    for start in range(0, len(h), rows):
        part = start + np.flatnonzero(labels[start : start + rows] != ignore_index)
        x = h[part] @ w.T
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        at = np.arange(len(part)), labels[part]
        loss -= np.log(p[at]).sum()
        p[at] -= 1
        dh[part] = p @ w / n
        dw += p.T @ h[part] / n
    return loss / n, dh, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


# Not a triton_op: torch.compile would unroll the loop, and cannot improve the library's products.
@torch.library.custom_op("minilm_triton::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, rows: int, need_h: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, dh [T, C], dW float32 [V, C]), the gradients not yet multiplied by dloss / count, and
    empty if they are not needed. `rows` is the size of a chunk; 0: by `heuristics.loss_chunk`."""
    if rows == 0 and len(hidden):
        sizes = len(hidden), len(weight), weight.shape[1], hidden.element_size()
        rows = loss_chunk(*sizes, device_of(hidden.device)).rows
    loss, count, dh, dw = _outputs(hidden, weight, need_h, need_w)
    losses, one = hidden.new_empty(len(hidden), dtype=torch.float32), torch.ones_like(loss)
    labels = labels.contiguous()
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
    dw.zero_()
    for start in range(0, len(hidden), max(rows, 1)):
        part = slice(start, start + rows)
        h, targets = hidden[part], labels[part]
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        losses[part], top, logsum = row_losses(logits, targets, ignore_index)
        if need_h or need_w:
            write_gradient(logits, targets, top, logsum, one, ignore_index, logits)
        if need_h:
            torch.mm(logits, weight, out=dh[part])
        if need_w:
            _add_product(dw, logits.t(), h)
    count.copy_((labels != ignore_index).sum())
    return loss.copy_(losses.sum() / count), count, dh, dw


def _outputs(hidden: Tensor, weight: Tensor, need_h: bool, need_w: bool) -> tuple[Tensor, ...]:
    loss, count = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    dh = hidden.new_empty(hidden.shape if need_h else 0)
    return loss, count, dh, weight.new_empty(weight.shape if need_w else 0, dtype=torch.float32)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, ignore_index, rows, need_h, need_w):
    return _outputs(hidden, weight, need_h, need_w)


def _setup(ctx, inputs, output) -> None:
    ctx.dtype, (ctx.need_h, ctx.need_w) = inputs[1].dtype, inputs[5:]
    _, count, dh, dw = output
    ctx.save_for_backward(count, dh, dw)
    ctx.mark_non_differentiable(count, dh, dw)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    count, dh, dw = ctx.saved_tensors
    # No label counts: the loss is NaN, and the gradients are zero, as in PyTorch.
    factor = torch.where(count > 0, dloss / count, 0.0)
    grad_h = dh * factor if ctx.need_h else None
    return grad_h, (dw * factor).to(ctx.dtype) if ctx.need_w else None, *(None,) * 5


linear_cross_entropy_op.register_autograd(_gradient, setup_context=_setup)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """See `minilm.ops.linear_cross_entropy`. Under autocast both matrices are cast, as by F.linear."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    grad = torch.is_grad_enabled()
    need_h, need_w = grad and hidden.requires_grad, grad and weight.requires_grad
    return linear_cross_entropy_op(hidden, weight, labels, ignore_index, 0, need_h, need_w)[0]
