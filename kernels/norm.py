"""LayerNorm and RMSNorm over the last axis, with an optional residual sum before it: forward, backward.

    s    = x + residual                         rounded to the data's type, as it is returned
    xhat = (s - mean(s)) * rstd                 rstd = 1 / sqrt(variance(s) + eps); RMSNorm: mean = 0
    y    = xhat * w + b

    g    = dy * w                               with c1 = mean(g * xhat), c2 = mean(g) (RMSNorm: 0)
    ds   = (g - xhat * c1 - c2) * rstd + dsum   dsum: the gradient of the returned sum
    dw   = sum over rows of dy * xhat;  db = sum over rows of dy

A row is read once and stays in registers, in two tiles of columns (`heuristics.two_tiles`), so the variance
can be computed from the differences from the mean, which is accurate for means far from zero. The backward
runs a fixed number of programs; each loops over its rows, accumulates its part of dw and db in registers and
writes it once, as one row of a [programs, C] table that is summed afterwards: no atomics, deterministic.

Bytes per row: forward 2 C b, with the residual 4 C b; backward 3 C b (4 C b with dsum) plus programs x C x 8
once. About 10 operations per element forward: limited by memory bandwidth on every GPU.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .devices import device_of
from .heuristics import norm_backward_block, norm_block, sharing_programs
from .registration import kernel_op


def twin(
    x: np.ndarray, residual: np.ndarray | None, w: np.ndarray, b: np.ndarray | None, eps: float, rms: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The forward kernel in plain NumPy: (y, s) of rows [T, C]."""
    s = x if residual is None else x + residual
    d = s if rms else s - s.mean(1, keepdims=True)
    xhat = d / np.sqrt((d * d).mean(1, keepdims=True) + eps)
    return xhat * w + (0 if b is None else b), s


@triton.jit
def _load(pointer, row, row_ok, columns, column_ok, stride, MASKED: tl.constexpr):
    """A [rows, columns] tile in float32, zero outside."""
    mask = row_ok[:, None]
    if MASKED:
        mask = mask & column_ok[None, :]
    return tl.load(pointer + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, row, row_ok, columns, column_ok, stride, MASKED: tl.constexpr):
    mask = row_ok[:, None]
    if MASKED:
        mask = mask & column_ok[None, :]
    tl.store(
        pointer + row[:, None] * stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask
    )


@triton.jit
def _forward(
    X, R, W, B, Y, S, MEAN, RSTD, rows, channels, x_stride, r_stride, eps,
    RMS: tl.constexpr, HAS_R: tl.constexpr, HAS_B: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    ok = row < rows
    c0 = tl.arange(0, FIRST)
    x0 = _load(X, row, ok, c0, c0 < channels, x_stride, False)
    if HAS_R:
        x0 += _load(R, row, ok, c0, c0 < channels, r_stride, False)
        x0 = x0.to(S.dtype.element_ty).to(tl.float32)
        _store(S, x0, row, ok, c0, c0 < channels, channels, False)
    total = tl.sum(x0, axis=1)
    if SECOND > 0:
        c1 = FIRST + tl.arange(0, SECOND)
        ok1 = c1 < channels
        x1 = _load(X, row, ok, c1, ok1, x_stride, MASKED)
        if HAS_R:
            x1 += _load(R, row, ok, c1, ok1, r_stride, MASKED)
            x1 = x1.to(S.dtype.element_ty).to(tl.float32)
            _store(S, x1, row, ok, c1, ok1, channels, MASKED)
        total += tl.sum(x1, axis=1)
    mean = total / channels
    if not RMS:
        x0 -= mean[:, None]
    squares = tl.sum(x0 * x0, axis=1)
    if SECOND > 0:
        if not RMS:
            x1 -= mean[:, None]
            if MASKED:
                x1 = tl.where(ok1[None, :], x1, 0.0)
        squares += tl.sum(x1 * x1, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / channels + eps)
    if not RMS:
        tl.store(MEAN + row, mean, mask=ok)
    tl.store(RSTD + row, rstd, mask=ok)
    y0 = x0 * rstd[:, None]
    if RMS:  # Llama rounds the scaled row to the data's type before the weight
        y0 = y0.to(Y.dtype.element_ty).to(tl.float32)
    y0 *= tl.load(W + c0).to(tl.float32)[None, :]
    if HAS_B:
        y0 += tl.load(B + c0).to(tl.float32)[None, :]
    _store(Y, y0, row, ok, c0, c0 < channels, channels, False)
    if SECOND > 0:
        y1 = x1 * rstd[:, None]
        if RMS:
            y1 = y1.to(Y.dtype.element_ty).to(tl.float32)
        y1 *= tl.load(W + c1, mask=ok1, other=0.0).to(tl.float32)[None, :]
        if HAS_B:
            y1 += tl.load(B + c1, mask=ok1, other=0.0).to(tl.float32)[None, :]
        _store(Y, y1, row, ok, c1, ok1, channels, MASKED)


@triton.jit
def _backward(
    DY, DSUM, S, W, MEAN, RSTD, DS, DW, DB, rows, channels, dy_stride, dsum_stride,
    RMS: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_B: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c0 = tl.arange(0, FIRST)
    w0 = tl.load(W + c0).to(tl.float32)[None, :]
    dw0 = tl.zeros([FIRST], tl.float32)
    db0 = tl.zeros([FIRST], tl.float32)
    if SECOND > 0:
        c1 = FIRST + tl.arange(0, SECOND)
        ok1 = c1 < channels
        w1 = tl.load(W + c1, mask=ok1, other=0.0).to(tl.float32)[None, :]
        dw1 = tl.zeros([SECOND], tl.float32)
        db1 = tl.zeros([SECOND], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        ok = row < rows
        rstd = tl.load(RSTD + row, mask=ok, other=0.0)[:, None]
        dy0 = _load(DY, row, ok, c0, c0 < channels, dy_stride, False)
        xhat0 = _load(S, row, ok, c0, c0 < channels, channels, False)
        if not RMS:
            mean = tl.load(MEAN + row, mask=ok, other=0.0)[:, None]
            xhat0 -= mean
        xhat0 *= rstd
        g0 = dy0 * w0
        c1_sum = tl.sum(g0 * xhat0, axis=1)
        c2_sum = tl.sum(g0, axis=1)
        dw0 += tl.sum(dy0 * xhat0, axis=0)
        db0 += tl.sum(dy0, axis=0)
        if SECOND > 0:
            dy1 = _load(DY, row, ok, c1, ok1, dy_stride, MASKED)
            xhat1 = _load(S, row, ok, c1, ok1, channels, MASKED)
            if not RMS:
                xhat1 -= mean
            xhat1 *= rstd  # columns beyond the row are harmless: their dy and w are zero
            g1 = dy1 * w1
            c1_sum += tl.sum(g1 * xhat1, axis=1)
            c2_sum += tl.sum(g1, axis=1)
            dw1 += tl.sum(dy1 * xhat1, axis=0)
            db1 += tl.sum(dy1, axis=0)
        a = (c1_sum / channels)[:, None]
        ds0 = g0 - xhat0 * a
        if not RMS:
            b = (c2_sum / channels)[:, None]
            ds0 -= b
        ds0 *= rstd
        if HAS_DSUM:
            ds0 += _load(DSUM, row, ok, c0, c0 < channels, dsum_stride, False)
        _store(DS, ds0, row, ok, c0, c0 < channels, channels, False)
        if SECOND > 0:
            ds1 = g1 - xhat1 * a
            if not RMS:
                ds1 -= b
            ds1 *= rstd
            if HAS_DSUM:
                ds1 += _load(DSUM, row, ok, c1, ok1, dsum_stride, MASKED)
            _store(DS, ds1, row, ok, c1, ok1, channels, MASKED)
    tl.store(DW + program * channels + c0, dw0)
    if HAS_B:
        tl.store(DB + program * channels + c0, db0)
    if SECOND > 0:
        tl.store(DW + program * channels + c1, dw1, mask=ok1)
        if HAS_B:
            tl.store(DB + program * channels + c1, db1, mask=ok1)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C] with contiguous channels."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()


def _outputs(x: Tensor, has_residual: bool, rms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised (y, sum, mean, rstd); those that a variant does not need are empty."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(x.shape if has_residual else 0)
    return x.new_empty(x.shape), total, rstd.new_empty(0 if rms else rstd.shape), rstd


@kernel_op("minilm_triton::norm", mutates_args={})
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd): x, residual, y, sum [..., C]; statistics float32 [...]. Without a residual the
    sum is empty, with `rms` the mean."""
    y, total, mean, rstd = _outputs(x, residual is not None, rms)
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        block = norm_block(channels, rows, device_of(x.device))
        x2, r2 = _rows(x), _rows(x if residual is None else residual)
        wrap_triton(_forward)[(triton.cdiv(rows, block.rows),)](
            x2, r2, weight, weight if bias is None else bias, y, total, mean, rstd,
            rows, channels, x2.stride(0), r2.stride(0), eps,
            RMS=rms, HAS_R=residual is not None, HAS_B=bias is not None,
            ROWS=block.rows, FIRST=block.first, SECOND=block.second,
            MASKED=block.first + block.second > channels, num_warps=block.num_warps,
        )  # fmt: skip
    return y, total, mean, rstd


@norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, residual is not None, rms)


@kernel_op("minilm_triton::norm_backward", mutates_args={})
def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ds [..., C], dw [C], db [C]) from the gradients of y and, if it was used, of the sum."""
    channels = total.shape[-1]
    rows = total.numel() // channels
    ds = total.new_empty(total.shape)
    if not rows:
        return ds, torch.zeros_like(weight), torch.zeros_like(weight)
    device = device_of(total.device)
    block = norm_backward_block(channels, rows, device)
    programs = sharing_programs(triton.cdiv(rows, block.rows), block.programs, 1, device)
    dw = torch.empty(programs, channels, dtype=torch.float32, device=total.device)
    db = torch.empty_like(dw) if bias else dw
    dy2, dsum2 = _rows(dy), _rows(dy if dsum is None else dsum)
    wrap_triton(_backward)[(programs,)](
        dy2, dsum2, total.contiguous(), weight, mean, rstd, ds, dw, db,
        rows, channels, dy2.stride(0), dsum2.stride(0),
        RMS=rms, HAS_DSUM=dsum is not None, HAS_B=bias,
        ROWS=block.rows, FIRST=block.first, SECOND=block.second,
        MASKED=block.first + block.second > channels, num_warps=block.num_warps,
    )  # fmt: skip
    dw_sum = dw.sum(0).to(weight.dtype)
    return ds, dw_sum, db.sum(0).to(weight.dtype) if bias else torch.zeros_like(dw_sum)


@norm_backward.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, rms = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.has_residual, ctx.has_bias, ctx.rms = residual is not None, bias is not None, rms
    ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (total,)))
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx, dy, dsum, *_):
    total, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(total)
    ds, dw, db = norm_backward(dy, dsum, total, weight, mean, rstd, ctx.has_bias, ctx.rms)
    return ds, ds if ctx.has_residual else None, dw, db if ctx.has_bias else None, None, None


norm.register_autograd(_norm_gradient, setup_context=_setup)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C] normalised."""
    return norm(x, None, weight, bias, eps, False)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + residual normalised, x + residual)."""
    y, total, _, _ = norm(x, residual, weight, bias, eps, False)
    return y, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] scaled to a root mean square of one."""
    return norm(x, None, weight, None, eps, True)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual scaled, x + residual)."""
    y, total, _, _ = norm(x, residual, weight, None, eps, True)
    return y, total
