"""Attention on short packed sequences, forward: all keys of a sequence in one block, several heads per
program.

    s = q k^T                               [BLOCK_M, BLOCK_N], -inf where a query does not see a key
    m = max_j s_j                           one maximum per row, and no rescaling: there is no second block
    p = 2^(c s - c m),  c = log2(e) scale   one multiply-add and one exponential per score
    o = p v / sum_j p_j,  lse = scale m + ln sum_j p_j (on request)

With one block of keys there is no loop over blocks, but a loop over heads: a program computes BLOCK_M queries
of HEADS neighbouring heads of one sequence, and loads the next head while it multiplies this one. The heads
of a token are contiguous, in [T, (H + 2 Hkv) D] as the fused projection writes it: q, k and v are views of
that (any strides with contiguous D), and nothing is copied.

Scale is positive; full, causal or window attention, as in `attention`. The backward is that of `attention`,
which needs only o and lse. Operations: 4 Sq Sk D per head, and one exponential per score. Bytes: q, k, v and
o once, 4 D b per token and head, and keys again from L2 for each further block of queries. At S = 256 in 16
bits that is 128 operations per byte, far below what tensor cores need: memory is the limit, and the number of
bytes in flight matters.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_backward import attention_backward_op, needs_lse
from .attention_shared import LN2, LOG2E, batches, dot, empty_outputs, laid_out
from .devices import device_of
from .heuristics import attention_short_block
from .registration import kernel_op


def twin(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """The algorithm for one sequence, in NumPy: q [Sq, H, D], k and v [Sk, Hkv, D] -> [Sq, H, D]."""
    o = np.empty_like(q)
    group, offset = q.shape[1] // k.shape[1], len(k) - len(q)
    for head in range(q.shape[1]):
        s = q[:, head] @ k[:, head // group].T
        if causal:
            s = np.where(np.arange(len(q))[:, None] + offset >= np.arange(len(k)), s, -np.inf)
        p = np.exp2((s - s.max(1, keepdims=True)) * (scale * 1.4426950408889634))
        o[:, head] = p @ v[:, head // group] / p.sum(1, keepdims=True)
    return o


@triton.jit
def _forward(
    Q, K, V, O, LSE, CU_Q, CU_K, q_t, q_h, k_t, k_h, v_t, v_h, tokens, scale, window,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WITH_LSE: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2)
    q_start = tl.load(CU_Q + sequence)
    q_len = tl.load(CU_Q + sequence + 1) - q_start
    k_start = tl.load(CU_K + sequence)
    k_len = tl.load(CU_K + sequence + 1) - k_start
    m0 = tl.program_id(0) * BLOCK_M
    if m0 >= q_len:
        return
    i = m0 + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    rows = q_start.to(tl.int64) + i
    columns = k_start.to(tl.int64) + j
    Q += rows[:, None] * q_t + d[None, :]
    K += columns[:, None] * k_t + d[None, :]
    V += columns[:, None] * v_t + d[None, :]
    O += rows[:, None] * (H * D) + d[None, :]
    place = i + (k_len - q_len)
    low, high = place * 0, place * 0 + k_len  # the keys that a query sees
    if CAUSAL:
        high = tl.minimum(high, place + 1)
    if WINDOW:
        low = place - window + 1
        high = tl.minimum(high, place + window)
    first = tl.program_id(1) * HEADS
    for head in range(first, first + HEADS):
        q = tl.load(Q + head * q_h, mask=i[:, None] < q_len, other=0.0)
        k = tl.load(K + (head // GROUP) * k_h, mask=j[:, None] < k_len, other=0.0)
        v = tl.load(V + (head // GROUP) * v_h, mask=j[:, None] < k_len, other=0.0)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        seen = j[None, :] < high[:, None]
        if WINDOW:
            seen = seen & (j[None, :] >= low[:, None])
        s = tl.where(seen, s, float("-inf"))
        m = tl.max(s, axis=1)
        m = tl.where(m == float("-inf"), 0.0, m) * (scale * LOG2E)  # a query may see nothing
        p = tl.exp2(s * (scale * LOG2E) - m[:, None])
        l = tl.sum(p, axis=1)
        o = dot(p.to(v.dtype), v, tl.zeros([BLOCK_M, D], tl.float32))
        o = o / tl.where(l == 0.0, 1.0, l)[:, None]
        tl.store(O + head * D, o.to(O.dtype.element_ty), mask=i[:, None] < q_len)
        if WITH_LSE:
            lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * LN2)
            tl.store(LSE + head * tokens + rows, lse, mask=i < q_len)


@kernel_op("minilm_triton::attention_short", mutates_args={})
def attention_short_op(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
    causal: bool, window: int, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [Tq, H, D], lse float32 [H, Tq] or empty); arguments as in `attention_op`. Only for sizes for which
    `heuristics.attention_is_short` is true."""
    q, k, v = laid_out(q, max_q), laid_out(k, max_k), laid_out(v, max_k)
    tokens, heads, head_dim = q.shape
    o, lse = empty_outputs(q, with_lse)
    if tokens == 0:
        return o, lse
    sequences = len(cu_q) - 1
    sizes = (head_dim, q.element_size(), heads, sequences, max_q, max_k)
    block = attention_short_block(*sizes, device_of(q.device))
    for part_q, part_k in batches(cu_q, cu_k):
        grid = (triton.cdiv(max_q, block.queries), heads // block.heads, len(part_q) - 1)
        wrap_triton(_forward)[grid](
            q, k, v, o, lse, part_q, part_k,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), tokens, scale,
            window, H=heads, GROUP=heads // k.shape[1], D=head_dim, HEADS=block.heads,
            BLOCK_M=block.queries, BLOCK_N=block.keys, CAUSAL=causal, WINDOW=window > 0, WITH_LSE=with_lse,
            num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
    return o, lse


@attention_short_op.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, with_lse):
    return empty_outputs(q, with_lse)


def _setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.scalars, ctx.with_lse = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, _):
    if do is None:
        return (None,) * 11
    needs_lse(ctx.with_lse)
    q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
    dq, dk, dv, _ = attention_backward_op(
        do, q, k, v, o, lse, None, None, cu_q, cu_k, *ctx.scalars, 0.0, 0.0, 0
    )
    return (dq, dk, dv, *(None,) * 8)


attention_short_op.register_autograd(_gradient, setup_context=_setup)
