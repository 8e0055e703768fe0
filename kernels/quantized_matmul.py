"""A few rows times a quantised weight: y = f(x W^T + b), W dequantised from 8-bit or 4-bit codes in the
kernel.

    int8   w = code                   one scale per row n of W, applied at the end: y = f(scale_n (x w) + b)
    q8_0   w = scale code             one scale per 32 columns
    q4_0   w = scale (code - 8)       likewise; codes 0..15, two per byte
    q4_1   w = scale code + minimum

Byte 16 g + j of a row of 4-bit codes holds the columns 32 g + j (low half) and 32 g + j + 16 (high half).
A tile of bytes [N, G, 16] is therefore two tiles of weights [N, 16 G], whose columns are G runs of 16; the
same columns of x are loaded for each, and nothing is shuffled. w is rounded to x's type, sums are float32.

The product is computed as W x^T: W has at least 64 rows for the long side of the tensor core, while x has 1
to 64. A W with few rows does not fill the chip, so its columns may be split into parts; each part writes its
sums, and a second kernel adds them in order: deterministic, and the same for a row alone or in a batch.

Bytes: N K (8 bits) or N K / 2 (4 bits) and the scales, N K / 16 or N K / 8 with minima; x and y are small.
Operations 2 M N K, and 2 to 4 to unpack each weight: with M below 64, limited by memory bandwidth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .activation import KINDS, activate
from .attention_shared import IN_FLOAT32, dot
from .devices import device_of
from .heuristics import quantized_block
from .registration import kernel_op


def twin(
    x: np.ndarray, format: str, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None
) -> np.ndarray:
    """x W^T in NumPy, group by group of columns: x [M, K], the planes as above."""
    if format == "int8":
        return x @ codes.T.astype(x.dtype) * scale
    y = np.zeros((len(x), len(codes)), x.dtype)
    for g in range(scale.shape[1]):
        if format == "q8_0":
            w = codes[:, 32 * g : 32 * g + 32].astype(x.dtype)
        else:
            both = codes[:, 16 * g : 16 * g + 16]
            w = np.concatenate([both & 15, both >> 4], axis=1).astype(x.dtype)
        w = (w - 8 if format == "q4_0" else w) * scale[:, g, None]
        y += x[:, 32 * g : 32 * g + 32] @ (w if minimum is None else w + minimum[:, g, None]).T
    return y


@triton.jit
def _narrow(w, x):
    """w, float32, in the type of x; not in the interpreter, which would cut instead of round."""
    if not IN_FLOAT32:
        w = w.to(x.dtype)
    return w


@triton.jit
def _epilogue(acc, SCALE, BIAS, n, ok_n, INT8: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr):
    """Sums [N, M] -> what is stored."""
    if INT8:
        acc *= tl.load(SCALE + n, mask=ok_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(BIAS + n, mask=ok_n, other=0.0).to(tl.float32)[:, None]
    y, _ = activate(acc, KIND)
    return y


@triton.jit
def _matmul(
    X, CODES, SCALE, MINIMUM, BIAS, Y, PARTS, rows, outs, ins, x_stride, plane, steps,
    FORMAT: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok_n, ok_m = n < outs, m < rows
    G: tl.constexpr = INS // 32
    X += m[None, :].to(tl.int64) * x_stride
    wide_n = n.to(tl.int64)
    acc = tl.zeros([OUTS, ROWS], tl.float32)
    first = tl.program_id(2) * steps * INS
    for k0 in range(first, min(first + steps * INS, ins), INS):
        if FORMAT == "int8":
            k = k0 + tl.arange(0, INS)
            ok_k = k < ins
            w = tl.load(
                CODES + wide_n[:, None] * ins + k[None, :], mask=ok_n[:, None] & ok_k[None, :], other=0
            )
            x = tl.load(X + k[:, None], mask=ok_m[None, :] & ok_k[:, None], other=0.0)
            acc = dot(_narrow(w.to(tl.float32), x), x, acc)
        else:
            g = k0 // 32 + tl.arange(0, G)
            ok = ok_n[:, None] & (g < ins // 32)[None, :]
            at = wide_n[:, None] * (ins // 32) + g[None, :]  # [N, G]
            scale = tl.load(SCALE + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
            if FORMAT == "q8_0":
                codes = tl.load(
                    CODES + at[:, :, None] * 32 + tl.arange(0, 32)[None, None, :],
                    mask=ok[:, :, None],
                    other=0,
                )
                k = k0 + tl.arange(0, INS)
                x = tl.load(X + k[:, None], mask=ok_m[None, :] & (k < ins)[:, None], other=0.0)
                acc = dot(_narrow(codes.to(tl.float32) * scale, x).reshape([OUTS, INS]), x, acc)
            else:
                codes = tl.load(
                    CODES + at[:, :, None] * 16 + tl.arange(0, 16)[None, None, :],
                    mask=ok[:, :, None],
                    other=0,
                )
                i = tl.arange(0, 16 * G)
                k = k0 + i // 16 * 32 + i % 16
                ok_x = ok_m[None, :] & (k < ins)[:, None]
                x = tl.load(X + k[:, None], mask=ok_x, other=0.0)
                x_high = tl.load(X + k[:, None] + 16, mask=ok_x, other=0.0)
                low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
                if FORMAT == "q4_0":
                    low, high = (low - 8.0) * scale, (high - 8.0) * scale
                else:
                    minimum = tl.load(MINIMUM + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
                    low, high = low * scale + minimum, high * scale + minimum
                acc = dot(_narrow(low, x).reshape([OUTS, 16 * G]), x, acc)
                acc = dot(_narrow(high, x).reshape([OUTS, 16 * G]), x_high, acc)
    ok = ok_n[:, None] & ok_m[None, :]
    at = m[None, :].to(tl.int64) * outs + n[:, None]
    if SPLIT:
        tl.store(PARTS + tl.program_id(2).to(tl.int64) * plane + at, acc, mask=ok)
    else:
        y = _epilogue(acc, SCALE, BIAS, n, ok_n, FORMAT == "int8", HAS_BIAS, KIND)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _combine(
    PARTS, SCALE, BIAS, Y, rows, outs, plane, splits,
    INT8: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok = (n < outs)[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * outs + n[:, None]
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for _ in range(splits):
        total += tl.load(PARTS + at, mask=ok, other=0.0)
        PARTS += plane
    y = _epilogue(total, SCALE, BIAS, n, n < outs, INT8, HAS_BIAS, KIND)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


@kernel_op("minilm_triton::quantized_linear", mutates_args={})
def quantized_linear_op(
    x: Tensor,
    format: str,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    kind: str,
) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype; `kind` is a value of `activation.KINDS`."""
    outs, ins = codes.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], outs))
    if not y.numel():
        return y
    x2 = x.reshape(-1, ins)
    x2 = x2 if x2.stride(1) == 1 else x2.contiguous()
    rows = x2.shape[0]
    codes, scale = codes.contiguous(), scale.contiguous()
    minimum = scale if minimum is None else minimum.contiguous()
    block = quantized_block(rows, outs, ins, x.element_size(), device_of(x.device))
    parts = torch.empty(
        block.splits if block.splits > 1 else 0, rows, outs, dtype=torch.float32, device=x.device
    )
    tiles = triton.cdiv(outs, block.outs), triton.cdiv(rows, block.rows)
    grid = (*tiles, block.splits)
    epilogue = {"HAS_BIAS": bias is not None, "KIND": kind, "ROWS": block.rows, "OUTS": block.outs}
    wrap_triton(_matmul)[grid](
        x2, codes, scale, minimum, scale if bias is None else bias, y, parts, rows, outs, ins,
        x2.stride(0), rows * outs, triton.cdiv(triton.cdiv(ins, block.ins), block.splits),
        FORMAT=format, SPLIT=block.splits > 1, INS=block.ins, **epilogue,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    if block.splits > 1:
        wrap_triton(_combine)[tiles](
            parts, scale, scale if bias is None else bias, y, rows, outs, rows * outs, block.splits,
            INT8=format == "int8", **epilogue, num_warps=block.num_warps,
        )  # fmt: skip
    return y


@quantized_linear_op.register_fake
def _(x, format, codes, scale, minimum, bias, kind):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def quantized_linear(
    x: Tensor, weight: tuple[Any, ...], bias: Tensor | None, activation: str | None
) -> Tensor:
    """See `minilm.ops.quantized_linear`; `weight` is (format, codes, scale, minimum). No derivative."""
    kind = "linear" if activation is None else KINDS[activation]
    return quantized_linear_op(x, *weight, bias, kind)
