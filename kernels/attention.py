"""Attention on packed sequences, forward: softmax(scale q k^T + ...) v without storing the scores.

For a block of queries, over blocks of keys j (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023,
arXiv:2307.08691), in base 2, where s = log2(e) (score):

    m'  = max(m, max_j s_j)          the running maximum
    p_j = 2^(s_j - m')
    l   = l 2^(m - m') + sum_j p_j   the running sum
    o   = o 2^(m - m') + p_j v_j     at the end o / l; and, on request, lse = ln(2) (m + log2 l)

    score = scale q k^T;  cap tanh(score / cap);  + bias[h, i, j];  + slope_h * -|i - j|   (each optional)

Query i of a sequence with Sq queries and Sk keys is at the position of key i + Sk - Sq. With `causal` it sees
no later keys, with a window only keys less than `window` away. Blocks of keys that no query of the block sees
are skipped; blocks that all queries see completely are not masked.

Layout: q [Tq, H, D], k and v [Tk, Hkv, D], any strides with contiguous D. A program computes BLOCK_M queries
of one head of one sequence; H / Hkv heads read the same keys, from L2. Operations: 4 Sq Sk D per head, half
of that if causal, and one exponential per score. Bytes: q, k, v, o once, if keys stay in L2: short sequences
are limited by memory bandwidth, long ones by the tensor cores or, for D <= 64, by the exponentials.

Offsets are 64 bits wide where they grow with all tokens, and 32 within a sequence, to save registers:
`laid_out` raises an error for tensors that do not fit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_backward import attention_backward_op, needs_lse
from .attention_shared import LN2, batches, dot, empty_outputs, kept, key_range, laid_out, scores
from .attention_short import attention_short_op
from .devices import device_of
from .heuristics import attention_block, attention_is_short, next_power_of_2
from .registration import kernel_op


def twin(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool, block: int) -> np.ndarray:
    """The algorithm for one head of one sequence, in NumPy: q [Sq, D], k and v [Sk, D] -> [Sq, D]."""
    offset = len(k) - len(q)
    m, l, o = np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), v.shape[1]))
    for start in range(0, len(k), block):
        j = np.arange(start, min(start + block, len(k)))
        s = q @ k[j].T * (scale * 1.4426950408889634)
        if causal:
            s = np.where(np.arange(len(q))[:, None] + offset >= j, s, -np.inf)
        new = np.maximum(m, s.max(1))
        base = np.where(np.isinf(new), 0, new)  # a row that has seen nothing yet
        p, shrink = np.exp2(s - base[:, None]), np.exp2(m - base)
        l, o, m = l * shrink + p.sum(1), o * shrink[:, None] + p @ v[j], new
    return o / np.where(l == 0, 1, l)[:, None]


@triton.jit
def _attend(
    o, l, m, q, K, V, k_stride, v_stride, i, d, low, high, q_len, k_len, q_start, head,
    BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for n0 in range(low, high, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        here = (j[:, None] < k_len) & (d[None, :] < D) if MASK or PAD else None
        zero = 0.0 if MASK or PAD else None
        k = tl.load(K + j[:, None] * k_stride + d[None, :], mask=here, other=zero)
        qk = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        s = scores(
            qk, i[:, None], j[None, :], q_len, k_len, BIAS, bias_i, bias_j, slope, scale, cap, window,
            CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, MASK,
        )  # fmt: skip
        new = tl.maximum(m, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new) if MASK else new
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, axis=1)
        p = kept(p, i[:, None], j[None, :], head, seed, q_start, keys, dropout, DROPOUT)
        v = tl.load(V + j[:, None] * v_stride + d[None, :], mask=here, other=zero)
        o = dot(p.to(v.dtype), v, o * shrink[:, None])
        m = new
    return o, l, m


@triton.jit
def _forward(
    Q, K, V, O, LSE, CU_Q, CU_K, BIAS, SLOPES,
    q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_i, bias_j, tokens, scale, cap, window, seed, keys, dropout,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    WITH_LSE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(CU_Q + sequence)
    q_len = tl.load(CU_Q + sequence + 1) - q_start
    k_start = tl.load(CU_K + sequence)
    k_len = tl.load(CU_K + sequence + 1) - k_start
    m0 = tl.program_id(0) * BLOCK_M
    if CAUSAL:  # the last queries have the most to do: start with them
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if m0 >= q_len:
        return
    i = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = BLOCK_D != D
    real = (i[:, None] < q_len) & (d[None, :] < D)
    Q += q_start.to(tl.int64) * q_t + head * q_h
    K += k_start.to(tl.int64) * k_t + (head // GROUP) * k_h
    V += k_start.to(tl.int64) * v_t + (head // GROUP) * v_h
    BIAS += head.to(tl.int64) * bias_h
    q = tl.load(Q + i[:, None] * q_t + d[None, :], mask=real, other=0.0)
    slope = tl.load(SLOPES + head) if ALIBI else 0.0
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    low, full_low, full_high, high = key_range(m0, q_len, k_len, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    if WINDOW:
        o, l, m = _attend(
            o, l, m, q, K, V, k_t, v_t, i, d, low, min(full_low, high), q_len, k_len, q_start,
            head, BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
            D, PAD, BLOCK_N, CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT, True,
        )  # fmt: skip
    o, l, m = _attend(
        o, l, m, q, K, V, k_t, v_t, i, d, full_low, full_high, q_len, k_len, q_start,
        head, BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
        D, PAD, BLOCK_N, CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT, False,
    )  # fmt: skip
    o, l, m = _attend(
        o, l, m, q, K, V, k_t, v_t, i, d, full_high, high, q_len, k_len, q_start,
        head, BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
        D, PAD, BLOCK_N, CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT, True,
    )  # fmt: skip
    if WITH_LSE:
        lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * LN2)
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    rows = q_start.to(tl.int64) + i
    tl.store(O + (rows[:, None] * H + head) * D + d[None, :], o.to(O.dtype.element_ty), mask=real)
    if WITH_LSE:
        tl.store(LSE + head * tokens + rows, lse, mask=i < q_len)


@kernel_op("minilm_triton::attention", mutates_args={})
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, causal: bool, window: int, cap: float, dropout: float, seed: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [Tq, H, D], lse float32 [H, Tq]). Without `with_lse` lse is empty, and the op is not differentiable.

    bias [H, >= max_q, >= max_k] by the position in the sequence, below 2^31 elements per head, slopes float32
    [H] (ALiBi), both may be None; window 0, cap 0.0 and dropout 0.0 mean none. `seed` is for the dropout.
    """
    q, k, v = laid_out(q, max_q), laid_out(k, max_k), laid_out(v, max_k)
    tokens, heads, head_dim = q.shape
    o, lse = empty_outputs(q, with_lse)
    if tokens == 0:
        return o, lse
    block = attention_block(
        head_dim, q.element_size(), max_q, max_k, bias is not None, dropout > 0, window > 0,
        device_of(q.device),
    )  # fmt: skip
    for part_q, part_k in batches(cu_q, cu_k):
        wrap_triton(_forward)[(triton.cdiv(max_q, block.queries), heads, len(part_q) - 1)](
            q, k, v, o, lse, part_q, part_k, q if bias is None else bias, q if slopes is None else slopes,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *((0, 0, 0) if bias is None else bias.stride()), tokens, scale, cap, window, seed, max_k, dropout,
            H=heads, GROUP=heads // k.shape[1], D=head_dim, BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_M=block.queries, BLOCK_N=block.keys, CAUSAL=causal, WINDOW=window > 0, CAP=cap > 0,
            HAS_BIAS=bias is not None, ALIBI=slopes is not None, DROPOUT=dropout > 0,
            WITH_LSE=with_lse, num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
    return o, lse


@attention_op.register_fake
def _(q, k, v, bias, slopes, cu_q, cu_k, max_q, max_k, scale, causal, window, cap, dropout, seed, with_lse):
    return empty_outputs(q, with_lse)


def _setup(ctx, inputs, output):
    q, k, v, bias, slopes, cu_q, cu_k, *ctx.scalars, ctx.with_lse = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, bias, slopes, cu_q, cu_k)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, _):
    q, k, v, o, lse, bias, slopes, cu_q, cu_k = ctx.saved_tensors
    if do is None:
        return (None,) * 16
    needs_lse(ctx.with_lse)
    dq, dk, dv, db = attention_backward_op(do, q, k, v, o, lse, bias, slopes, cu_q, cu_k, *ctx.scalars)
    return (dq, dk, dv, None if bias is None else db, *(None,) * 12)


attention_op.register_autograd(_gradient, setup_context=_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, window: int | None, dropout_p: float,
    bias: Tensor | None = None, alibi_slopes: Tensor | None = None, soft_cap: float | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `minilm.ops.attention_with_lse`; with dropout. The log-sum-exp is computed if `lse` is set or a
    gradient needs it, and is empty otherwise."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    differentiated = (x for x in (q, k, v, bias) if x is not None)
    lse = lse or (torch.is_grad_enabled() and any(x.requires_grad for x in differentiated))
    plain = dropout_p == 0 and bias is None and alibi_slopes is None and soft_cap is None and scale > 0
    sizes = (q.shape[2], q.element_size(), max_seqlen_q, max_seqlen_k)
    if plain and attention_is_short(*sizes, masked=causal or window is not None):
        short: tuple[Tensor, Tensor] = attention_short_op(q, k, v, *lengths, scale, causal, window or 0, lse)
        return short
    seed = int(torch.randint(2**31 - 1, ()).item()) if dropout_p > 0 else 0
    result: tuple[Tensor, Tensor] = attention_op(
        q,
        k,
        v,
        bias,
        alibi_slopes,
        *lengths,
        scale,
        causal,
        window or 0,
        soft_cap or 0.0,
        dropout_p,
        seed,
        lse,
    )
    return result
