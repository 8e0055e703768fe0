"""Rotary embedding, the paged cache and attention in the native extension: the ops, their fake
implementations, and which calls they support.

The kernels compute in float32 and have no derivative; caches are float32, bfloat16, float16 or int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.rope`."""
    turned: tuple[Tensor, Tensor] = torch.ops.minilm.rope.default(q, k, cos.float(), sin.float())
    return turned


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *scales: Tensor) -> None:
    """See `minilm.ops.append_kv`."""
    torch.ops.minilm.append_kv.default(k, v, k_pages, v_pages, slots, *scales)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.rope_append`."""
    turned: tuple[Tensor, Tensor] = torch.ops.minilm.rope_append.default(
        q, k, v, cos.float(), sin.float(), k_pages, v_pages, slots, *scales
    )
    return turned


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float,
    *,
    soft_cap: float | None = None,
) -> tuple[Tensor, None]:
    """See `minilm.ops.attend`; the log-sum-exp is not computed."""
    ends, capped = (cu_seqlens_q, cu_seqlens_k), {} if soft_cap is None else {"soft_cap": soft_cap}
    return torch.ops.minilm.attention.default(q, k, v, *ends, scale, causal, window, **capped), None


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    max_context: int,
    scale: float,
    window: int | None,
    *scales: Tensor,
) -> Tensor:
    """See `minilm.ops.paged_attention`."""
    out: Tensor = torch.ops.minilm.paged_attention.default(
        q, k_pages, v_pages, block_table, cu_seqlens_q, context_lens, scale, window, *scales
    )
    return out


def _refusal(traits: Any) -> str | None:
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype != torch.float32:
        return f"the extension has no kernel for {traits.dtype}"
    if traits.grad:
        return "the extension's kernel has no derivative"
    return None


def supports_rope(traits: Any) -> str | None:
    """None, or why the extension cannot run this call (`minilm.ops.PointwiseTraits`)."""
    return _refusal(traits)


def supports_attention(traits: Any) -> str | None:
    """None, or why the extension cannot run this call (`minilm.ops.AttentionTraits`)."""
    reason = _refusal(traits)
    if reason is not None:
        return reason
    for name, asked in (
        ("dropout", traits.dropout),
        ("log-sum-exp", traits.lse),
        ("bias", traits.bias is not None),
        ("ALiBi", traits.alibi),
    ):
        if asked:
            return f"the extension's attention has no {name}"
    return None if traits.head_dim else "the extension needs at least one channel"


def supports_paged(traits: Any) -> str | None:
    """None, or why the extension cannot run this call (`minilm.ops.PagedTraits`)."""
    reason = _refusal(traits)
    if reason is None and traits.cache_dtype not in CACHE_DTYPES:
        return f"the extension has no kernel for a cache in {traits.cache_dtype}"
    if reason is None and not (traits.head_dim and traits.page_size):
        return "the extension needs at least one channel, and at least one slot per page"
    return reason


def _rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _append_fake(*arguments: Any) -> None:
    return None


def _rope_append_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _attention_fake(q: Tensor, *arguments: Any) -> Tensor:
    return q.new_empty(q.shape)


def register_fakes() -> None:
    """Register the ops' fake implementations, by which torch.compile infers result shapes."""
    for name, fake in (
        ("rope", _rope_fake),
        ("append_kv", _append_fake),
        ("rope_append", _rope_append_fake),
        ("attention", _attention_fake),
        ("paged_attention", _attention_fake),
    ):
        torch.library.register_fake(f"minilm::{name}", fake)
