"""Attention on packed sequences, backward: only o and the log-sum-exp of the forward are stored.

    p  = exp(score - lse)                 the probabilities, recomputed block by block
    dv = p^T do                           p with its dropout
    dp = do v^T                           with the dropout of p
    ds = p (dp - delta)                   delta_i = sum over D of do o
    dq = scale ds k,  dk = scale ds^T q   ds times (1 - tanh^2) first, if the scores are capped
    dbias[h, i, j] = sum over the batch of ds

There are three kernels, so that every sum is computed by one program and results are deterministic: dq by
blocks of queries over keys; dk and dv by blocks of keys over the queries of all heads that share them; dbias
by blocks of [i, j] over the batch. Operations: 14 Sq Sk D per head (the forward has 4), of which 6 compute
the probabilities and dp twice, once in each of the first two kernels.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_shared import LOG2E, batches, dot, kept, key_range, laid_out, scores
from .devices import device_of
from .heuristics import AttentionBlock, attention_dkdv_block, attention_dq_block
from .registration import kernel_op


def twin(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, o: np.ndarray, lse: np.ndarray,
    bias: np.ndarray, scale: float, causal: bool, block: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(dq, dk, dv, dbias) of one head of one sequence, in NumPy: q, do, o [Sq, D], k, v [Sk, D], lse [Sq],
    bias [Sq, Sk]. The kernels compute dq in one pass over the blocks and dk, dv in another."""
    delta, offset = (do * o).sum(1), len(k) - len(q)
    dq, dk, dv, db = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(bias)
    for start in range(0, len(k), block):
        j = np.arange(start, min(start + block, len(k)))
        p = np.exp(scale * q @ k[j].T + bias[:, j] - lse[:, None])
        if causal:
            p = np.where(np.arange(len(q))[:, None] + offset >= j, p, 0)
        ds = p * (do @ v[j].T - delta[:, None])
        dv[j] = p.T @ do
        dk[j] = scale * ds.T @ q
        dq += scale * ds @ k[j]
        db[:, j] = ds
    return dq, dk, dv, db


@triton.jit
def _probabilities_and_ds(
    q, k, v, do, lse, delta, i, j, q_len, k_len, q_start, head,
    BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(p with dropout, ds, q k^T) of queries i [M, 1] and keys j [1, N]; ds does not know of the cap yet."""
    nothing = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    qk = dot(q, tl.trans(k), nothing)
    s = scores(
        qk, i, j, q_len, k_len, BIAS, bias_i, bias_j, slope, scale, cap, window,
        CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, True,
    )  # fmt: skip
    base = tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
    p = tl.exp2(s - base)
    dp = kept(dot(do, tl.trans(v), nothing), i, j, head, seed, q_start, keys, dropout, DROPOUT)
    return kept(p, i, j, head, seed, q_start, keys, dropout, DROPOUT), p * (dp - delta), qk


@triton.jit
def _through_cap(ds, qk, scale, cap, CAP: tl.constexpr):
    if CAP:
        t = 2.0 * tl.sigmoid(2.0 * qk * (scale / cap)) - 1.0
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def _dq(
    Q, K, V, DO, LSE, DELTA, DQ, CU_Q, CU_K, BIAS, SLOPES,
    q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_i, bias_j, tokens, scale, cap, window, seed, keys, dropout,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(CU_Q + sequence)
    q_len = tl.load(CU_Q + sequence + 1) - q_start
    k_start = tl.load(CU_K + sequence)
    k_len = tl.load(CU_K + sequence + 1) - k_start
    m0 = tl.program_id(0) * BLOCK_M
    if m0 >= q_len:
        return
    i = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (i[:, None] < q_len) & (d[None, :] < D)
    rows = q_start.to(tl.int64) + i
    BIAS += head.to(tl.int64) * bias_h
    q = tl.load(Q + rows[:, None] * q_t + head * q_h + d[None, :], mask=real, other=0.0)
    do = tl.load(DO + (rows[:, None] * H + head) * D + d[None, :], mask=real, other=0.0)
    lse = tl.load(LSE + head * tokens + rows, mask=i < q_len, other=0.0)
    delta = tl.load(DELTA + head * tokens + rows, mask=i < q_len, other=0.0)
    slope = tl.load(SLOPES + head) if ALIBI else 0.0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, _full_low, _full_high, high = key_range(m0, q_len, k_len, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for n0 in range(low, high, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        here = (j[:, None] < k_len) & (d[None, :] < D)
        at = k_start.to(tl.int64) + j
        k = tl.load(K + at[:, None] * k_t + (head // GROUP) * k_h + d[None, :], mask=here, other=0.0)
        v = tl.load(V + at[:, None] * v_t + (head // GROUP) * v_h + d[None, :], mask=here, other=0.0)
        _p, ds, qk = _probabilities_and_ds(
            q, k, v, do, lse[:, None], delta[:, None], i[:, None], j[None, :], q_len, k_len, q_start, head,
            BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
            CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT,
        )  # fmt: skip
        ds = _through_cap(ds, qk, scale, cap, CAP)
        dq = dot(ds.to(k.dtype), k, dq)
    tl.store(
        DQ + (rows[:, None] * H + head) * D + d[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=real
    )


@triton.jit
def _dkdv(
    Q, K, V, DO, LSE, DELTA, DK, DV, CU_Q, CU_K, BIAS, SLOPES,
    q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_i, bias_j, tokens, scale, cap, window, seed, keys, dropout,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(CU_Q + sequence)
    q_len = tl.load(CU_Q + sequence + 1) - q_start
    k_start = tl.load(CU_K + sequence)
    k_len = tl.load(CU_K + sequence + 1) - k_start
    n0 = tl.program_id(0) * BLOCK_N
    if n0 >= k_len:
        return
    j = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    here = (j[:, None] < k_len) & (d[None, :] < D)
    at = k_start.to(tl.int64) + j
    k = tl.load(K + at[:, None] * k_t + kv_head * k_h + d[None, :], mask=here, other=0.0)
    v = tl.load(V + at[:, None] * v_t + kv_head * v_h + d[None, :], mask=here, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offset = k_len - q_len
    low, high = 0, q_len  # the queries that see any of these keys
    if CAUSAL:
        low = max(low, n0 - offset)
    if WINDOW:
        high = min(high, n0 + BLOCK_N - 1 - offset + window)
        if not CAUSAL:
            low = max(low, n0 - offset - window + 1)
    low = low // BLOCK_M * BLOCK_M
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        BIAS_H = BIAS + tl.cast(head, tl.int64) * bias_h
        slope = tl.load(SLOPES + head) if ALIBI else 0.0
        for m0 in range(low, high, BLOCK_M):
            i = m0 + tl.arange(0, BLOCK_M)
            real = (i[:, None] < q_len) & (d[None, :] < D)
            rows = q_start.to(tl.int64) + i
            q = tl.load(Q + rows[:, None] * q_t + head * q_h + d[None, :], mask=real, other=0.0)
            do = tl.load(DO + (rows[:, None] * H + head) * D + d[None, :], mask=real, other=0.0)
            lse = tl.load(LSE + head * tokens + rows, mask=i < q_len, other=0.0)
            delta = tl.load(DELTA + head * tokens + rows, mask=i < q_len, other=0.0)
            p, ds, qk = _probabilities_and_ds(
                q, k, v, do, lse[:, None], delta[:, None], i[:, None], j[None, :], q_len, k_len, q_start,
                head, BIAS_H, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
                CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT,
            )  # fmt: skip
            ds = _through_cap(ds, qk, scale, cap, CAP)
            dv = dot(tl.trans(p.to(do.dtype)), do, dv)
            dk = dot(tl.trans(ds.to(q.dtype)), q, dk)
    out = (at[:, None] * (H // GROUP) + kv_head) * D + d[None, :]
    tl.store(DK + out, (dk * scale).to(DK.dtype.element_ty), mask=here)
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=here)


@triton.jit
def _dbias(
    Q, K, V, DO, LSE, DELTA, DB, CU_Q, CU_K, BIAS, SLOPES,
    q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_i, bias_j, tokens, scale, cap, window, seed, keys, dropout,
    sequences, rows_of_bias, columns_of_bias,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    slope = tl.load(SLOPES + head) if ALIBI else 0.0
    BIAS += head * bias_h
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence in range(sequences):
        q_start = tl.load(CU_Q + sequence)
        q_len = tl.load(CU_Q + sequence + 1) - q_start
        k_start = tl.load(CU_K + sequence)
        k_len = tl.load(CU_K + sequence + 1) - k_start
        real = (i[:, None] < q_len) & (d[None, :] < D)
        here = (j[:, None] < k_len) & (d[None, :] < D)
        rows = q_start.to(tl.int64) + i
        at = k_start.to(tl.int64) + j
        q = tl.load(Q + rows[:, None] * q_t + head * q_h + d[None, :], mask=real, other=0.0)
        do = tl.load(DO + (rows[:, None] * H + head) * D + d[None, :], mask=real, other=0.0)
        lse = tl.load(LSE + head * tokens + rows, mask=i < q_len, other=0.0)
        delta = tl.load(DELTA + head * tokens + rows, mask=i < q_len, other=0.0)
        k = tl.load(K + at[:, None] * k_t + (head // GROUP) * k_h + d[None, :], mask=here, other=0.0)
        v = tl.load(V + at[:, None] * v_t + (head // GROUP) * v_h + d[None, :], mask=here, other=0.0)
        _p, ds, _qk = _probabilities_and_ds(
            q, k, v, do, lse[:, None], delta[:, None], i[:, None], j[None, :], q_len, k_len, q_start, head,
            BIAS, bias_i, bias_j, slope, scale, cap, window, seed, keys, dropout,
            CAUSAL, WINDOW, CAP, HAS_BIAS, ALIBI, DROPOUT,
        )  # fmt: skip
        total += ds
    inside = (i[:, None] < rows_of_bias) & (j[None, :] < columns_of_bias)
    out = (head * rows_of_bias + i[:, None]) * columns_of_bias + j[None, :]
    tl.store(DB + out, total.to(DB.dtype.element_ty), mask=inside)


def _launch(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, bias: Tensor | None,
    slopes: Tensor | None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    window: int, cap: float,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dbias) from the gradient `do` [Tq, H, D] of the forward's o. Arguments as there."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    do = do.contiguous()
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    db = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if tokens == 0 or len(k) == 0:
        return dq, dk, dv, None if db is None else db.zero_()
    delta = (do.float() * o.float()).sum(-1).t().contiguous()  # [H, Tq]
    sizes = (head_dim, q.element_size(), max_q, max_k, device_of(q.device))
    by_queries, by_keys = attention_dq_block(*sizes), attention_dkdv_block(*sizes)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    tensors = (q if bias is None else bias, q if slopes is None else slopes)
    scalars = (
        *strides, *((0, 0, 0) if bias is None else bias.stride()),
        tokens, scale, cap, window, seed, max_k, dropout,
    )  # fmt: skip
    constants = {
        "H": heads, "GROUP": heads // kv_heads,
        "D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CAUSAL": causal, "WINDOW": window > 0, "CAP": cap > 0,
        "HAS_BIAS": bias is not None, "ALIBI": slopes is not None, "DROPOUT": dropout > 0,
    }  # fmt: skip

    def tiles(block: AttentionBlock) -> dict[str, int]:
        return {
            "BLOCK_M": block.queries, "BLOCK_N": block.keys,
            "num_warps": block.num_warps, "num_stages": block.num_stages,
        }  # fmt: skip

    for part in batches(cu_q, cu_k):
        sequences = len(part[0]) - 1
        wrap_triton(_dq)[(triton.cdiv(max_q, by_queries.queries), heads, sequences)](
            q, k, v, do, lse, delta, dq, *part, *tensors, *scalars, **constants, **tiles(by_queries)
        )
        wrap_triton(_dkdv)[(triton.cdiv(max_k, by_keys.keys), kv_heads, sequences)](
            q, k, v, do, lse, delta, dk, dv, *part, *tensors, *scalars, **constants, **tiles(by_keys)
        )
    if db is not None:
        rows, columns = db.shape[1:]
        grid = (triton.cdiv(rows, by_queries.queries), triton.cdiv(columns, by_queries.keys), heads)
        wrap_triton(_dbias)[grid](
            q, k, v, do, lse, delta, db, cu_q, cu_k, *tensors, *scalars, len(cu_q) - 1, rows, columns,
            **constants, **tiles(by_queries),
        )  # fmt: skip
    return dq, dk, dv, db


@kernel_op("minilm_triton::attention_backward", mutates_args={})
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, bias: Tensor | None,
    slopes: Tensor | None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    window: int, cap: float,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbias); dbias is empty without a bias."""
    q, k, v = laid_out(q, max_q), laid_out(k, max_k), laid_out(v, max_k)
    dq, dk, dv, db = _launch(
        do, q, k, v, o, lse, bias, slopes, cu_q, cu_k, max_q, max_k, scale, causal, window, cap, dropout, seed
    )
    return dq, dk, dv, q.new_empty(0) if db is None else db


@attention_backward_op.register_fake
def _(do, q, k, v, o, lse, bias, slopes, *rest):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if bias is None else torch.empty_like(bias)


def needs_lse(with_lse: bool) -> None:
    """Raise RuntimeError without the log-sum-exp, from which the backward recomputes the probabilities."""
    if not with_lse:
        raise RuntimeError("attention without the log-sum-exp has no derivative: ask for it (with_lse)")
