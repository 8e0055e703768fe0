"""Attention over packed sequences, and the attention probabilities for inspection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .dispatch import BackendError
from .traits import needs_grad


class AttentionTraits(NamedTuple):
    """Traits of attention over packed sequences."""

    device: str
    dtype: torch.dtype
    head_dim: int
    group: int
    """Number of query heads that share a key/value head."""
    causal: bool
    window: bool
    dropout: bool
    lse: bool
    grad: bool
    bias: torch.dtype | None = None
    """Dtype of the additive bias, if there is one."""
    alibi: bool = False
    soft_cap: bool = False


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, sequence by sequence (Vaswani et al. 2017, arXiv:1706.03762).

    q [Tq, H, D]; k, v [Tk, Hkv, D] with H a multiple of Hkv; cu_seqlens int32 [B + 1]. With `causal`, the
    last query of a sequence is at the position of its last key, and no query sees later keys. `window`: a
    query sees the keys less than `window` away (on both sides unless causal). `dropout_p` drops probabilities
    (training).

    Optional changes to score = scale q k^T before the softmax, in this order: `soft_cap`, cap
    tanh(score / cap) (Gemma 2); `bias` [H, >= max_seqlen_q, >= max_seqlen_k], finite: bias[h, i, j] is added
    for query i and key j of every sequence (T5, arXiv:1910.10683); `alibi_slopes` [H]: slope times distance
    is subtracted (Press et al. 2021, arXiv:2108.12409). Returns [Tq, H, D]. Differentiable in q, k, v, bias.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _score_options(q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    return _attention(q, k, v, lengths, scale, causal, window, dropout_p, options, lse=False)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the log-sum-exp of each query's scores, float32 [H, Tq] (not differentiable)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _score_options(q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    out, lse = _attention(q, k, v, lengths, scale, causal, window, 0.0, options, lse=True)
    assert lse is not None
    return out, lse


def writes_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None = None) -> bool:
    """Whether a fused kernel would run `attention_with_lse` on these arguments. (The reference also can, but
    holds the full attention matrix in memory.)"""
    traits = _attention_traits(q, k, v, causal, window, 0.0, {}, lse=True)
    try:
        return dispatch.decide("attention", traits).chosen.backend != "reference"
    except BackendError:
        return False


def _score_options(
    q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
) -> dict[str, Any]:
    """The score options that are given, checked; options not in use are not passed to implementations."""
    checks.score_options("attention", q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    slopes = None if alibi_slopes is None else alibi_slopes.detach()
    options = {"bias": bias, "alibi_slopes": slopes, "soft_cap": soft_cap}
    return {name: value for name, value in options.items() if value is not None}


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float,
    options: dict[str, Any],
    *,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    checks.heads("attention", q, k, v)
    checks.window("attention", window)
    cu_seqlens_q, cu_seqlens_k, *_ = lengths
    q_ends = checks.lengths("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    k_ends = checks.lengths("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention: {len(cu_seqlens_q) - 1} sequences of queries and {len(cu_seqlens_k) - 1} of keys"
        )
    if q_ends and k_ends and (causal or window is not None):
        checks.queries_stand_at_keys("attention", q_ends, k_ends)
    traits = _attention_traits(q, k, v, causal, window, dropout_p, options, lse=lse)
    wanted = {"lse": True} if lse else {}
    result: tuple[Tensor, Tensor | None] = dispatch.select("attention", traits)(
        q, k, v, *lengths, scale, causal, window, dropout_p, **options, **wanted
    )
    return result


def _attention_traits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    dropout_p: float,
    options: dict[str, Any],
    *,
    lse: bool,
) -> AttentionTraits:
    return AttentionTraits(
        q.device.type,
        q.dtype,
        q.shape[2],
        q.shape[1] // k.shape[1],
        causal,
        window is not None,
        dropout_p > 0,
        lse,
        needs_grad(q, k, v, options.get("bias")),
        options["bias"].dtype if "bias" in options else None,
        "alibi_slopes" in options,
        "soft_cap" in options,
    )


def attention_probs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    heads: slice | Sequence[int] = slice(None),
    queries: slice | Sequence[int] = slice(None),
    lse: Tensor | None = None,
) -> list[Tensor]:
    """The attention probabilities, by which `attention` multiplies v: one [H, Sq, Sk] in q's dtype per
    sequence.

    `heads` and `queries` (positions within their sequence) select rows; only those are computed, so a few
    rows need little memory. With `lse` from `attention_with_lse`, a row is exp(score - lse): the
    probabilities that the fused kernel used, recomputed.
    """
    checks.heads("attention_probs", q, k, k)
    ends = cu_seqlens_q, cu_seqlens_k
    options = _score_options(q, 0, 0, bias, alibi_slopes, soft_cap)
    return reference.attention_probs(q, k, *ends, scale, causal, window, heads, queries, lse, **options)
