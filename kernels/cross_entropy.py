"""Cross-entropy over a vocabulary, mean over the labels that count: forward, and the gradient of the logits.

    m  = max over v of x_v                   top        x: a row of logits, y: its label
    s  = sum over v of e^(x_v - m)           online: s' = s e^(m - m') + the sum over the next block
    loss_t = log s + (m - x_y)               loss = sum of loss_t / n, n rows whose label counts
    dx_v = (e^((x_v - m) - log s) - [v = y]) dloss / n

m and log s are stored separately: near 1e4 float32 has steps of 1e-3, to which log s + m would be rounded,
while x - m is exact where it matters. One program processes a row in blocks; rows with the label
`ignore_index` are not read, and their gradient is zero. A label out of range gives NaN and reads nothing. The
gradient is written over the logits if nothing else uses them (see linear_cross_entropy), or into a new
tensor.

Bytes for [T, V] in a type of b bytes: forward T V b, gradient 2 T V b; one exponential per element in each.
Limited by memory bandwidth. All arithmetic is float32.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .devices import device_of
from .heuristics import vocabulary_block
from .registration import kernel_op

LOG2E = tl.constexpr(1.4426950408889634)


def twin(x: np.ndarray, labels: np.ndarray, ignore_index: int, block: int) -> tuple[float, np.ndarray]:
    """(loss, its gradient) in NumPy, the forward by blocks of columns: x [T, V], labels [T]."""
    m, s = np.full(len(x), -np.inf), np.zeros(len(x))
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        new = np.maximum(m, part.max(1))
        s = s * np.exp(m - new) + np.exp(part - new[:, None]).sum(1)
        m = new
    counted = labels != ignore_index
    rows, columns = np.arange(len(x))[counted], labels[counted]
    gradient = np.exp(x - m[:, None]) / s[:, None]
    gradient[rows, columns] -= 1
    gradient[~counted] = 0
    loss = (np.log(s[rows]) + m[rows] - x[rows, columns]).sum() / counted.sum()
    return float(loss), gradient / counted.sum()


@triton.jit
def _forward(X, LABELS, LOSS, TOP, LOGSUM, columns, stride, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(LOSS + row, 0.0)
        tl.store(TOP + row, 0.0)
        tl.store(LOGSUM + row, 0.0)
        return
    X += row * stride
    m = float("-inf")
    s = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(m, tl.max(x, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        s = s * tl.exp2((m - base) * LOG2E) + tl.sum(tl.exp2((x - base) * LOG2E), axis=0)
        m = new
    known = (label >= 0) & (label < columns)
    logsum = tl.where(known, tl.log(s), float("nan"))
    tl.store(LOSS + row, logsum + (m - tl.load(X + label, mask=known, other=0.0).to(tl.float32)))
    tl.store(TOP + row, m)
    tl.store(LOGSUM + row, logsum)


@triton.jit
def _gradient(
    X, LABELS, TOP, LOGSUM, FACTOR, DX, columns, x_stride, dx_stride, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    label = tl.load(LABELS + row)
    to = DX + row * dx_stride + column
    if label == ignore_index:
        tl.store(to, tl.zeros([BLOCK], DX.dtype.element_ty), mask=inside)
        return
    x = tl.load(X + row * x_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp2(((x - tl.load(TOP + row)) - tl.load(LOGSUM + row)) * LOG2E)
    dx = tl.where(column == label, p - 1.0, p) * tl.load(FACTOR)
    tl.store(to, dx.to(DX.dtype.element_ty), mask=inside)


def row_losses(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, top, logsum), each float32 [T], of logits [T, V] with contiguous rows and contiguous labels."""
    losses, top, logsum = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    if len(logits):
        block = vocabulary_block(logits.shape[1], device_of(logits.device))
        wrap_triton(_forward)[(len(logits),)](
            logits, labels, losses, top, logsum, logits.shape[1], logits.stride(0), ignore_index,
            BLOCK=block.columns, num_warps=block.num_warps,
        )  # fmt: skip
    return losses, top, logsum


def write_gradient(
    logits: Tensor, labels: Tensor, top: Tensor, logsum: Tensor, factor: Tensor, ignore_index: int, to: Tensor
) -> None:
    """(softmax - one at the label) x factor (a float32 scalar) of each row into `to` [T, V], which may be
    `logits`."""
    if logits.numel():
        block = vocabulary_block(logits.shape[1], device_of(logits.device))
        wrap_triton(_gradient)[(len(logits), triton.cdiv(logits.shape[1], block.columns))](
            logits, labels, top, logsum, factor, to, logits.shape[1], logits.stride(0), to.stride(0),
            ignore_index, BLOCK=block.columns, num_warps=block.num_warps,
        )  # fmt: skip


def _contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@kernel_op("minilm_triton::cross_entropy", mutates_args={})
def cross_entropy_op(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, top, logsum): float32, the first two scalars, the others [T]. Logits [T, V], labels int64
    [T]."""
    losses, top, logsum = row_losses(_contiguous_rows(logits), labels.contiguous(), ignore_index)
    count = (labels != ignore_index).sum().float()
    return losses.sum() / count, count, top, logsum


@cross_entropy_op.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, count = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    top, logsum = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    return loss, count, top, logsum


@kernel_op("minilm_triton::cross_entropy_backward", mutates_args={})
def cross_entropy_backward(
    logits: Tensor, labels: Tensor, top: Tensor, logsum: Tensor, factor: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of the logits, in a new tensor, as the caller owns the logits. `factor`: dloss / count."""
    dx = logits.new_empty(logits.shape)
    write_gradient(_contiguous_rows(logits), labels.contiguous(), top, logsum, factor, ignore_index, dx)
    return dx


@cross_entropy_backward.register_fake
def _(
    logits: Tensor, labels: Tensor, top: Tensor, logsum: Tensor, factor: Tensor, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index = inputs
    _, count, top, logsum = output
    ctx.save_for_backward(logits, labels, count, top, logsum)
    ctx.mark_non_differentiable(count, top, logsum)
    ctx.set_materialize_grads(False)


def _loss_gradient(ctx, dloss, *_):
    logits, labels, count, top, logsum = ctx.saved_tensors
    if dloss is None:
        return None, None, None
    dx = cross_entropy_backward(logits, labels, top, logsum, dloss / count, ctx.ignore_index)
    return dx, None, None


cross_entropy_op.register_autograd(_loss_gradient, setup_context=_setup)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """See `minilm.ops.cross_entropy`."""
    return cross_entropy_op(logits, labels, ignore_index)[0]
