"""Bias + activation, and gated activation (SwiGLU, GeGLU): the steps of an MLP between its matrix products.

    y = f(x + b)                                 dx = dy f'(x + b),  db = sum over rows of dx
    y = f(gate) up,  [gate, up] = x [.., 2F]     dgate = dy up f'(gate),  dup = dy f(gate)

    gelu: f = x Phi(x), f' = Phi(x) + x phi(x), Phi and phi of the normal distribution (by erf)
    gelu_tanh: f = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), as 1/2 (1 + tanh u) = s(2 u), s the sigmoid
    silu: f = x s(x);  and the other functions that config.json may name, each one line of `activate`

PyTorch's library computes the matrix products; this kernel reads the product without bias once, and the
backward computes f' from the same values, so nothing else is stored. All arithmetic is float32 with one
rounding at the store; eager PyTorch rounds the sum, the activation and the product separately. db is summed
by a fixed number of programs, each over its share of the rows, into one row of a table: no atomics.

Bytes per element of y, in a type of b bytes: 2 b forward, 3 b backward; gated 3 b and 5 b. About 10 to 25
operations with one or two exponentials: limited by memory bandwidth on every GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .devices import device_of
from .heuristics import column_sum_block, pointwise_block, sharing_programs
from .registration import kernel_op

KINDS: dict[str, str] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu")},
    **{name: name for name in ("mish", "hardswish", "sigmoid", "tanh", "linear")},
}
"""The function of `activate` for each name that config.json may use."""


def twin(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(f(x), f'(x)) in plain NumPy."""

    def s(v: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(v / 2))

    t = np.tanh(np.logaddexp(0, x))
    big_phi = np.array([0.5 + 0.5 * math.erf(v / math.sqrt(2)) for v in x.flat]).reshape(x.shape)
    gelu = x * big_phi, big_phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    u, du = (c * math.sqrt(8 / math.pi) for c in (x + 0.044715 * x**3, 1 + 0.134145 * x**2))
    table: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "gelu": lambda: gelu,
        "gelu_tanh": lambda: (x * s(u), s(u) + x * s(u) * (1 - s(u)) * du),
        "gelu_10": lambda: (np.minimum(gelu[0], 10), gelu[1] * (gelu[0] <= 10)),
        "quick_gelu": lambda: (x * s(1.702 * x), s(1.702 * x) * (1 + 1.702 * x * (1 - s(1.702 * x)))),
        "silu": lambda: (x * s(x), s(x) * (1 + x * (1 - s(x)))),
        "relu": lambda: (np.maximum(x, 0), (x > 0) * 1.0),
        "relu2": lambda: (np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)),
        "relu6": lambda: (np.clip(x, 0, 6), (x > 0) * (x < 6) * 1.0),
        "leaky_relu": lambda: (np.where(x > 0, x, 0.01 * x), np.where(x > 0, 1, 0.01)),
        "mish": lambda: (x * t, t + x * (1 - t * t) * s(x)),
        "hardswish": lambda: (
            x * np.clip(x / 6 + 0.5, 0, 1),
            np.where(x <= -3, 0, np.where(x < 3, x / 3 + 0.5, 1)),
        ),
        "sigmoid": lambda: (s(x), s(x) * (1 - s(x))),
        "tanh": lambda: (np.tanh(x), 1 - np.tanh(x) ** 2),
        "linear": lambda: (x, np.ones_like(x)),
    }
    return table[kind]()


@triton.jit
def _sigmoid(x):
    """(s(x), s'(x)) = (s, s (1 - s)), from e^-|x|: it cannot overflow, and 1 - s does not cancel."""
    e = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + e)
    near_zero = e * near_one
    return tl.where(x < 0.0, near_zero, near_one), near_zero * near_one


@triton.jit
def _tanh(x):
    """(tanh(x), 1 - tanh(x)^2), from e^(-2 |x|); near zero, where 1 - e cancels, by the series up to x^9."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = 1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    y = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0.0, -t, t))
    return y, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """(f(x), f'(x)) for x in float32; the compiler drops the one that is not used. NaN stays NaN."""
    if KIND == "gelu" or KIND == "gelu_10":
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * phi, phi + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        if KIND == "gelu_10":
            y, slope = tl.where(y > 10.0, 10.0, y), tl.where(y > 10.0, 0.0, slope)
    elif KIND == "gelu_tanh":
        s, ds = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y, slope = x * s, s + x * ds * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif KIND == "quick_gelu":
        s, ds = _sigmoid(1.702 * x)
        y, slope = x * s, s + 1.702 * x * ds
    elif KIND == "silu":
        s, ds = _sigmoid(x)
        y, slope = x * s, s + x * ds
    elif KIND == "relu":
        y, slope = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "relu2":
        r = tl.where(x <= 0.0, 0.0, x)
        y, slope = r * r, 2.0 * r
    elif KIND == "relu6":
        y = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
        slope = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif KIND == "leaky_relu":
        y, slope = tl.where(x > 0.0, x, 0.01 * x), tl.where(x > 0.0, 1.0, 0.01)
    elif KIND == "mish":  # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2), which cancels nowhere
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        t = n / (n + 2.0)
        y, slope = x * t, t + x * (4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0))) * (e / (1.0 + e))
    elif KIND == "hardswish":
        y = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, x, x * (x + 3.0) / 6.0))
        slope = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))
    elif KIND == "sigmoid":
        y, slope = _sigmoid(x)
    elif KIND == "tanh":
        y, slope = _tanh(x)
    else:
        tl.static_assert(KIND == "linear")
        y, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def _forward(
    X, B, Y, rows, columns, x_stride,
    KIND: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_B:
        x += tl.load(B + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    y, _ = activate(x, KIND)
    tl.store(Y + row[:, None] * columns + column[None, :], y.to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _backward(
    DY, X, B, DX, DB, rows, columns, dy_stride, x_stride,
    KIND: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    db = tl.zeros([COLUMNS], tl.float32)
    if HAS_B:
        b = tl.load(B + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        ok = (row < rows)[:, None] & inside[None, :]
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
        if HAS_B:
            x += b
        _, slope = activate(x, KIND)
        dx = dy * slope
        tl.store(DX + row[:, None] * columns + column[None, :], dx.to(DX.dtype.element_ty), mask=ok)
        db += tl.sum(dx, axis=0)  # rows beyond the last have dy = 0
    if HAS_B:
        tl.store(DB + tl.program_id(0) * columns + column, db, mask=inside)


@triton.jit
def _gated(X, Y, rows, columns, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = (row < rows)[:, None] & (column < columns)[None, :]
    at = X + row[:, None] * x_stride + column[None, :]
    gate = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=ok, other=0.0).to(tl.float32)
    y, _ = activate(gate, KIND)
    tl.store(Y + row[:, None] * columns + column[None, :], (y * up).to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _gated_backward(
    DY, X, DX, rows, columns, dy_stride, x_stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = (row < rows)[:, None] & (column < columns)[None, :]
    at = X + row[:, None] * x_stride + column[None, :]
    gate = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=ok, other=0.0).to(tl.float32)
    dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
    y, slope = activate(gate, KIND)
    to = DX + row[:, None] * (2 * columns) + column[None, :]
    tl.store(to, (dy * up * slope).to(DX.dtype.element_ty), mask=ok)
    tl.store(to + columns, (dy * y).to(DX.dtype.element_ty), mask=ok)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C] with contiguous channels."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@kernel_op("minilm_triton::bias_activation", mutates_args={})
def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """f(x + bias): x [..., N], bias [N] or None; `kind` is a value of `KINDS`."""
    y = x.new_empty(x.shape)
    if x.numel():
        x2 = _rows(x)
        rows, columns = x2.shape
        block = pointwise_block(columns, device_of(x.device))
        grid = (triton.cdiv(rows, block.rows), triton.cdiv(columns, block.columns))
        wrap_triton(_forward)[grid](
            x2, x2 if bias is None else bias, y, rows, columns, x2.stride(0), KIND=kind,
            HAS_B=bias is not None, ROWS=block.rows, COLUMNS=block.columns, num_warps=block.num_warps,
        )  # fmt: skip
    return y


@bias_activation.register_fake
def _(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@kernel_op("minilm_triton::bias_activation_backward", mutates_args={})
def bias_activation_backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(dx [..., N], dbias [N]); without a bias, dbias is empty."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    x2, dy2 = _rows(x), _rows(dy)
    rows, columns = x2.shape
    device = device_of(x.device)
    block = column_sum_block(columns, device)
    programs, column_blocks = triton.cdiv(rows, block.rows), triton.cdiv(columns, block.columns)
    if bias is not None:
        programs = sharing_programs(programs, block.programs, column_blocks, device)
    parts = torch.empty(0 if bias is None else programs, columns, dtype=torch.float32, device=x.device)
    wrap_triton(_backward)[(programs, column_blocks)](
        dy2, x2, x2 if bias is None else bias, dx, parts, rows, columns, dy2.stride(0), x2.stride(0),
        KIND=kind, HAS_B=bias is not None, ROWS=block.rows, COLUMNS=block.columns,
        num_warps=block.num_warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if bias is None else parts.sum(0).to(bias.dtype)


@bias_activation_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, db = bias_activation_backward(dy, x, bias, ctx.kind)
    return dx, None if bias is None else db, None


bias_activation.register_autograd(_gradient, setup_context=_setup)


@kernel_op("minilm_triton::gated", mutates_args={})
def gated_op(x: Tensor, kind: str) -> Tensor:
    """f(gate) up for x [..., 2F] -> [..., F]; `kind` is a value of `KINDS`."""
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if y.numel():
        x2 = _rows(x)
        block = pointwise_block(y.shape[-1], device_of(x.device))
        grid = (triton.cdiv(x2.shape[0], block.rows), triton.cdiv(y.shape[-1], block.columns))
        wrap_triton(_gated)[grid](
            x2, y, x2.shape[0], y.shape[-1], x2.stride(0), KIND=kind, ROWS=block.rows,
            COLUMNS=block.columns, num_warps=block.num_warps,
        )  # fmt: skip
    return y


@gated_op.register_fake
def _(x: Tensor, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@kernel_op("minilm_triton::gated_backward", mutates_args={})
def gated_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """dx [..., 2F] from dy [..., F]."""
    dx = x.new_empty(x.shape)
    if x.numel():
        x2, dy2 = _rows(x), _rows(dy)
        rows, columns = dy2.shape
        block = pointwise_block(columns, device_of(x.device))
        grid = (triton.cdiv(rows, block.rows), triton.cdiv(columns, block.columns))
        wrap_triton(_gated_backward)[grid](
            dy2, x2, dx, rows, columns, dy2.stride(0), x2.stride(0), KIND=kind, ROWS=block.rows,
            COLUMNS=block.columns, num_warps=block.num_warps,
        )  # fmt: skip
    return dx


@gated_backward.register_fake
def _(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _gated_setup(ctx, inputs, output) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _gated_gradient(ctx, dy):
    return gated_backward(dy, *ctx.saved_tensors, ctx.kind), None


gated_op.register_autograd(_gated_gradient, setup_context=_gated_setup)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `minilm.ops.linear`. Without an activation PyTorch's library does everything, including the
    bias."""
    if activation is None:
        return F.linear(x, weight, bias)
    return bias_activation(F.linear(x, weight), bias, KINDS[activation])


def gated(x: Tensor, activation: str) -> Tensor:
    """See `minilm.ops.gated`."""
    return gated_op(x, KINDS[activation])
