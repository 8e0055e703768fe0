"""Attention of new tokens over a paged cache: for decoding, and for chunks of a long prompt.

The context of each sequence is split into parts, one per program (Flash-Decoding, Dao et al. 2023). For part
s, over its blocks of keys j, in base 2, where s_j = log2(e) scale q k_j (kernels/attention.py has the
recurrence for m, l, o):

    o_s = sum_j 2^(s_j - m_s) v_j / l_s      l_s = sum_j 2^(s_j - m_s)      e_s = m_s + log2 l_s
    o   = sum_s 2^(e_s - e) o_s / sum_s 2^(e_s - e)      e = max_s e_s      a part without keys: e_s = -inf

With one part o_0 is the result. The heads of a group read the same keys, so they and the new tokens of the
sequence are the rows of one product: row r is token r // G of head r % G.

The size of a part depends only on the sequence's own context, max(KEYS, context / PARTS) in whole blocks, and
the combine step adds parts in a fixed order. So a sequence's result is bit-identical alone and in any batch
with at most as many new tokens (in decoding: one). The price: even a batch that fills the chip without
splitting is split, and writes and reads partial results, a fraction 2 G / keys of its reads: 6 % for a 16-bit
cache with G = 4 and 128 keys. The grid covers the longest context; a program beyond its sequence's own parts
writes one -inf per row and ends.

Layout: q [T, H, D]; pages [pages, page size, Hkv, D], any strides; token t of sequence b is in slot
t % page size of page block_table[b, t // page size]. The values of int8 pages are pages * scales, with one
float32 per slot and head: k's scales are applied to the scores, and v is converted to q's type in registers.

Bytes: each visible key and value once, 2 S Hkv D (D + 4 in int8) per sequence, q and o; with parts also their
results, 4 (D + 1) per row and part, written and read. Operations: 4 S D per head. A step of one token has
2 G operations per byte of a 16-bit cache, far below what a GPU can do, so memory is the limit: enough loads
must be in flight on every multiprocessor (`heuristics.context_parts`).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_shared import LOG2E, dot
from .devices import device_of
from .heuristics import ContextParts, combine_block, context_parts, next_power_of_2, paged_block
from .registration import kernel_op


def twin(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None, parts: int, keys: int,
    block: int,
) -> np.ndarray:  # fmt: skip
    """The algorithm for one sequence and the heads of one group, in NumPy: q [new tokens, G, D], k and v
    [S, D] -> [new tokens, G, D]; at most `parts` parts, of `keys` keys at least."""
    new, group, size = q.shape
    at = len(k) - new + np.arange(new * group) // group  # the key at which row r stands
    low = 0 if window is None else max(0, at[0] - window + 1)
    part = -(-max(keys, -(-(len(k) - low) // parts)) // block) * block
    splits = -(-(len(k) - low) // part)
    o, e = np.zeros((splits, new * group, size)), np.full((splits, new * group), -np.inf)
    for split in range(splits):
        j = np.arange(low + split * part, min(low + (split + 1) * part, len(k)))
        distance = at[:, None] - j
        seen = (distance >= 0) & (distance < (window or len(k)))
        s = np.where(seen, q.reshape(-1, size) @ k[j].T * (scale * 1.4426950408889634), -np.inf)
        m = s.max(1, initial=-np.inf)
        p = np.exp2(s - np.where(np.isinf(m), 0, m)[:, None])
        l = p.sum(1)
        e[split] = np.where(l == 0, -np.inf, m + np.log2(np.where(l == 0, 1, l)))
        o[split] = p @ v[j] / np.where(l == 0, 1, l)[:, None]
    weight = np.exp2(e - e.max(0))
    return ((weight[..., None] * o).sum(0) / weight.sum(0)[:, None]).reshape(q.shape)


@triton.jit
def _slots(TABLE, j, stop, PAGE: tl.constexpr):
    """Where the keys j below `stop` lie."""
    return tl.load(TABLE + j // PAGE, mask=j < stop, other=0).to(tl.int64) * PAGE + j % PAGE


@triton.jit
def _attend(
    o, l, m, q, K, V, K_SCALES, V_SCALES, TABLE, k_s, k_d, v_s, v_d, at, d, start, stop, high,
    scale, window, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, INT8: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    slot = _slots(TABLE, start + tl.arange(0, BLOCK_N), stop, PAGE)
    for n0 in range(start, stop, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        real = j < high if MASK else None
        here = (j[:, None] < high) & (d[None, :] < D) if MASK or BLOCK_D != D else None
        zero = 0.0 if MASK or BLOCK_D != D else None
        k = tl.load(K + slot[:, None] * k_s + d[None, :] * k_d, mask=here, other=zero)
        v = tl.load(V + slot[:, None] * v_s + d[None, :] * v_d, mask=here, other=zero)
        if INT8:
            scale_k = tl.load(K_SCALES + slot * HKV, mask=real, other=0.0 if MASK else None)
            scale_v = tl.load(V_SCALES + slot * HKV, mask=real, other=0.0 if MASK else None)
            k = k.to(tl.float32)  # straight to bfloat16 the interpreter gets it wrong
        # For the next round already: loads that wait for this one would wait for each other in every round.
        slot = _slots(TABLE, j + BLOCK_N, stop, PAGE)
        s = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * (scale * LOG2E)
        if INT8:
            s *= scale_k[None, :]
            v = v.to(tl.float32) * scale_v[:, None]
        if MASK:
            distance = at[:, None] - j[None, :]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < window)
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new) if MASK else new
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, axis=1)
        o = dot(p.to(q.dtype), v.to(q.dtype), o * shrink[:, None])
        m = new
    return o, l, m


@triton.jit
def _decode(
    Q, K, V, K_SCALES, V_SCALES, O, LSE, TABLE, CU_Q, CONTEXT,
    q_t, q_h, q_d, k_s, k_h, k_d, v_s, v_h, v_d, table_b, tokens, row_tiles, parts, keys, scale,
    window, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, INT8: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % HKV  # heads of one page run side by side
    tile = tl.program_id(0) // HKV
    sequence = tile // row_tiles
    q_start = tl.load(CU_Q + sequence)
    q_len = tl.load(CU_Q + sequence + 1) - q_start
    m0 = (tile % row_tiles) * BLOCK_M
    GROUP: tl.constexpr = H // HKV
    if m0 >= q_len * GROUP:
        return
    row = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (row[:, None] < q_len * GROUP) & (d[None, :] < D)
    token = q_start.to(tl.int64) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    q = tl.load(Q + token[:, None] * q_t + head[:, None] * q_h + d[None, :] * q_d, mask=real, other=0.0)

    # Keys that the first and the last row see end at `first` and `last`.
    offset = tl.load(CONTEXT + sequence) - q_len
    first = offset + m0 // GROUP
    last = offset + min((m0 + BLOCK_M - 1) // GROUP, q_len - 1)
    high = last + 1
    low = max(first - window + 1, 0) if WINDOW else 0
    if SPLIT:
        part = tl.cdiv(max(keys, tl.cdiv(high - low, parts)), BLOCK_N) * BLOCK_N
        start = low + tl.program_id(1) * part
        stop = min(start + part, high)
        if start >= stop:
            place = (tl.program_id(1).to(tl.int64) * tokens + token) * H + head
            tl.store(LSE + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row < q_len * GROUP)
            return
    else:
        start, stop = low, high

    K += kv_head * k_h
    V += kv_head * v_h
    K_SCALES += kv_head
    V_SCALES += kv_head
    TABLE += sequence.to(tl.int64) * table_b
    at = offset + row // GROUP
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BLOCK_M > 16:  # else masks are cheaper than to fill the pipeline of a second loop
        full_low = max(last - window + 1, 0) if WINDOW else 0
        full_start = max(start, min(low + tl.cdiv(full_low - low, BLOCK_N) * BLOCK_N, stop))
        full_stop = max(full_start, min(low + max(first + 1 - low, 0) // BLOCK_N * BLOCK_N, stop))
        if WINDOW:
            o, l, m = _attend(
                o, l, m, q, K, V, K_SCALES, V_SCALES, TABLE, k_s, k_d, v_s, v_d, at, d, start, full_start,
                high, scale, window, HKV, D, BLOCK_D, BLOCK_N, PAGE, WINDOW, INT8, True,
            )  # fmt: skip
        o, l, m = _attend(
            o, l, m, q, K, V, K_SCALES, V_SCALES, TABLE, k_s, k_d, v_s, v_d, at, d, full_start, full_stop,
            high, scale, window, HKV, D, BLOCK_D, BLOCK_N, PAGE, WINDOW, INT8, False,
        )  # fmt: skip
        start = full_stop
    o, l, m = _attend(
        o, l, m, q, K, V, K_SCALES, V_SCALES, TABLE, k_s, k_d, v_s, v_d, at, d, start, stop, high,
        scale, window, HKV, D, BLOCK_D, BLOCK_N, PAGE, WINDOW, INT8, True,
    )  # fmt: skip
    nothing = l == 0.0
    o = o / tl.where(nothing, 1.0, l)[:, None]
    place = token * H + head
    if SPLIT:
        place += tl.program_id(1).to(tl.int64) * tokens * H
        lse = tl.where(nothing, float("-inf"), m + tl.log2(tl.where(nothing, 1.0, l)))
        tl.store(LSE + place, lse, mask=row < q_len * GROUP)
    tl.store(O + place[:, None] * D + d[None, :], o.to(O.dtype.element_ty), mask=real)


@triton.jit
def _combine(
    PARTS, LSE, O, rows, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """The parts of a row, BLOCK_S at a time. How many there are is the batch's affair, so it must not change
    a bit: parts without keys add zeros to sums, in an order that does not depend on them."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m = float("-inf")
    total = 0.0
    o = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S).to(tl.int64)
        lse = tl.load(LSE + s * rows + row, mask=s < parts, other=float("-inf"))
        new = tl.maximum(m, tl.max(lse, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(m - base)
        weight = tl.exp2(lse - base)
        # A part without keys has weight 0, and 0 times what its memory holds need not be 0: it is not read.
        here = (lse > float("-inf"))[:, None] & (d < D)[None, :]
        part = tl.load(PARTS + (s[:, None] * rows + row) * D + d[None, :], mask=here, other=0.0)
        o = o * shrink + tl.sum(part * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        m = new
    o = o / tl.where(total == 0.0, 1.0, total)
    tl.store(O + row * D + d, o.to(O.dtype.element_ty), mask=d < D)


@kernel_op("minilm_triton::paged_attention", mutates_args={})
def paged_attention_op(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None,
    block_table: Tensor, cu_q: Tensor, context_lens: Tensor, max_q: int, max_context: int, scale: float,
    window: int, splits: int,
) -> Tensor:  # fmt: skip
    """[T, H, D] in q's dtype. Scales of int8 pages are contiguous; window 0 means none. `splits`: maximum
    number of parts, however few keys they have; 0: `heuristics.context_parts` chooses both."""
    block_table = block_table.contiguous()
    tokens, heads, size = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    group = heads // kv_heads
    device = device_of(q.device)
    itemsize = max(q.element_size(), k_pages.element_size())
    block = paged_block(size, itemsize, k_scales is not None, max_q * group, device)
    row_tiles = triton.cdiv(max_q * group, block.queries)
    programs = len(context_lens) * row_tiles * kv_heads
    parts = ContextParts(splits, 1) if splits else context_parts(size, row_tiles * kv_heads, device)
    visible = min(max_context, window + max_q - 1) if window else max_context
    most = max(1, min(parts.parts, triton.cdiv(visible, max(parts.keys, block.keys))))
    results, lse = out, out
    if most > 1:
        results = torch.empty(most, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(most, tokens, heads, dtype=torch.float32, device=q.device)
    k, v = k_pages.view(-1, kv_heads, size), v_pages.view(-1, kv_heads, size)
    block_d = max(16, next_power_of_2(size))
    wrap_triton(_decode)[(programs, most)](
        q, k, v, k if k_scales is None else k_scales, v if v_scales is None else v_scales, results, lse,
        block_table, cu_q, context_lens, *q.stride(), *k.stride(), *v.stride(), block_table.stride(0), tokens,
        row_tiles, *parts, scale, window, H=heads, HKV=kv_heads, D=size, BLOCK_D=block_d,
        BLOCK_M=block.queries, BLOCK_N=block.keys, PAGE=page_size,
        WINDOW=window > 0, INT8=k_scales is not None, SPLIT=most > 1,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    if most > 1:
        combine = combine_block(size, device)
        wrap_triton(_combine)[(tokens * heads,)](
            results, lse, out, tokens * heads, most, D=size, BLOCK_D=block_d, BLOCK_S=combine.parts,
            num_warps=combine.num_warps,
        )  # fmt: skip
    return out


@paged_attention_op.register_fake
def _(q, k_pages, v_pages, k_scales, v_scales, block_table, cu_q, context_lens, *rest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, max_seqlen_q: int, max_context: int, scale: float, window: int | None,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `minilm.ops.paged_attention`."""
    return paged_attention_op(
        q, k_pages, v_pages, k_scales, v_scales, block_table, cu_seqlens_q, context_lens, max_seqlen_q,
        max_context, scale, window or 0, 0,
    )  # fmt: skip
