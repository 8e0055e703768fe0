"""Functions shared by the attention kernels: scores of a block, the keys that a block of queries sees,
dropout, layouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registration import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The interpreter stores bfloat16 as integers, and would multiply those.
IN_FLOAT32 = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32."""
    if IN_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(
    qk, i, j, q_len, k_len, BIAS, bias_i, bias_j, slope, scale, cap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """log2(e) times the scores of queries i (column) against keys j (row), -inf where j is not seen. BIAS is
    the head's own."""
    if CAP:
        s = qk * (scale / cap)
        s = cap * (2.0 * tl.sigmoid(2.0 * s) - 1.0) * LOG2E
    else:
        s = qk * (scale * LOG2E)
    inside = (i < q_len) & (j < k_len)
    if HAS_BIAS:
        s += tl.load(BIAS + i * bias_i + j * bias_j, mask=inside, other=0.0).to(tl.float32) * LOG2E
    distance = i + (k_len - q_len) - j
    if ALIBI:
        s -= (slope * LOG2E) * tl.abs(distance).to(tl.float32)
    if MASK:
        seen = inside
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < window) & (distance > -window)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def kept(p, i, j, head, seed, q_start, keys, dropout, DROPOUT: tl.constexpr):
    """The probabilities with a share `dropout` of them zeroed and the others raised, by a counter, so that
    the backward draws the same in another order. It has 32 bits: after 2^32 scores of a head the draws
    repeat."""
    if DROPOUT:
        random = tl.rand(seed + head, (q_start + i) * keys + j)
        p = tl.where(random >= dropout, p / (1.0 - dropout), 0.0)
    return p


@triton.jit
def key_range(
    m0, q_len, k_len, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys for queries m0 .. m0 + BLOCK_M: first seen, bounds of the blocks that all see, last seen."""
    offset = k_len - q_len
    low, high, full_low, full_high = 0, k_len, 0, k_len
    if CAUSAL:
        high = min(high, m0 + BLOCK_M + offset)
        full_high = min(full_high, m0 + 1 + offset)
    if WINDOW:
        low = max(low, m0 + offset - window + 1)
        full_low = max(full_low, m0 + BLOCK_M - 1 + offset - window + 1)
        if not CAUSAL:
            high = min(high, m0 + BLOCK_M - 1 + offset + window)
            full_high = min(full_high, m0 + offset + window)
    low = max(low, 0) // BLOCK_N * BLOCK_N
    full_low = tl.cdiv(full_low, BLOCK_N) * BLOCK_N
    full_high = max(full_high, 0) // BLOCK_N * BLOCK_N
    if full_high < full_low:  # no block is seen in full: the masked loops take all
        full_low, full_high = high, high
    return low, full_low, full_high, high


FAR = 2**31
"""Limit of 32-bit offsets."""
MOST_SEQUENCES = 65520
"""Maximum per launch: axes 2 and 3 of a grid are limited to 65,535. A multiple of 16, for aligned loads."""


def laid_out(x: Tensor, longest: int) -> Tensor:
    """x [T, H, D] with contiguous D, copied if necessary, so that offsets between heads, and between tokens
    of the longest sequence, fit into 32 bits. Raises ValueError if they cannot."""
    reach = max(longest * x.stride(0), x.shape[1] * x.stride(1), x.shape[0] * x.shape[1])
    if x.stride(-1) == 1 and reach < FAR:
        return x
    if longest * x.shape[1] * x.shape[2] >= FAR or x.shape[0] * x.shape[1] >= FAR:
        raise ValueError(
            f"attention: {list(x.shape)} with a sequence of {longest} tokens is beyond what the Triton "
            "kernels can address (2^31)"
        )
    return x.contiguous()


def batches(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The sequences, split into one part per launch."""
    for start in range(0, len(cu_q) - 1, MOST_SEQUENCES):
        part = slice(start, start + MOST_SEQUENCES + 1)
        yield cu_q[part], cu_k[part]


def empty_outputs(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (o, lse)."""
    shape = (q.shape[1], q.shape[0]) if with_lse else (0,)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
