"""Rotary embedding and the paged cache: rotate q and k, store k and v, attend to stored keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .traits import PointwiseTraits, needs_grad


class PagedTraits(NamedTuple):
    """Traits of attention over a paged cache, or of an append to one."""

    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    group: int
    page_size: int
    window: bool
    single_query: bool
    """Every sequence has exactly one new token: a decode step."""
    grad: bool = False


def _paged_traits(
    q: Tensor, pages: Tensor, window: int | None, max_seqlen_q: int, *others: Tensor
) -> PagedTraits:
    return PagedTraits(
        q.device.type,
        q.dtype,
        pages.dtype,
        q.shape[2],
        q.shape[1] // pages.shape[2],
        pages.shape[1],
        window is not None,
        max_seqlen_q == 1,
        needs_grad(q, *others),
    )


def _scales(op: str, pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> tuple[Tensor, ...]:
    """The last arguments of an implementation: both scales for int8 pages, otherwise none."""
    checks.scales(op, pages, k_scales, v_scales)
    return () if k_scales is None or v_scales is None else (k_scales, v_scales)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding: the pairs (i, i + D/2) of each head are rotated by the token's angles.

    q [T, H, D], k [T, Hkv, D]; cos, sin float32 [T, D/2]. Returns the rotated q and k. Differentiable.
    """
    checks.angles("rope", q, k, cos, sin)
    result: tuple[Tensor, Tensor] = dispatch.select(
        "rope", PointwiseTraits(q.device.type, q.dtype, None, needs_grad(q, k))
    )(q, k, cos, sin)
    return result


def append_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write k, v [T, Hkv, D] into the pages (in place); token t goes to ``slots[t]`` (int64) = page * page
    size + offset. int8 pages store round(x / scale), and the scales store scale = max |x| / 127 over the
    head."""
    checks.appended("append_kv", k, v, k_pages, v_pages, slots)
    scales = _scales("append_kv", k_pages, k_scales, v_scales)
    dispatch.select("append_kv", _paged_traits(k, k_pages, None, 0, v))(
        k, v, k_pages, v_pages, slots, *scales
    )


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope`, and `append_kv` of the rotated k and of v, in one pass. Writes the pages; returns the rotated q
    and k."""
    checks.angles("rope_append", q, k, cos, sin)
    checks.appended("rope_append", k, v, k_pages, v_pages, slots)
    scales = _scales("rope_append", k_pages, k_scales, v_scales)
    result: tuple[Tensor, Tensor] = dispatch.select("rope_append", _paged_traits(q, k_pages, None, 0, k, v))(
        q, k, v, cos, sin, k_pages, v_pages, slots, *scales
    )
    return result


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    max_context: int,
    *,
    scale: float,
    window: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens over a paged cache that already holds them (Kwon et al. 2023,
    arXiv:2309.06180).

    q [T, H, D]; pages [pages, page size, Hkv, D]; block_table int32 [B, >= pages of the longest sequence];
    context_lens int32 [B], the new tokens included. Returns [T, H, D]. Not differentiable.
    """
    if block_table.shape[0] != context_lens.shape[0] or cu_seqlens_q.shape[0] != context_lens.shape[0] + 1:
        raise ValueError(
            f"paged_attention: block_table {list(block_table.shape)}, context_lens "
            f"{list(context_lens.shape)} and cu_seqlens_q {list(cu_seqlens_q.shape)} must have the same "
            "number of sequences"
        )
    checks.window("paged_attention", window)
    checks.pages("paged_attention", q.shape[1], q.shape[2], k_pages, v_pages)
    lengths = (block_table, cu_seqlens_q, context_lens, max_seqlen_q, max_context)
    result: Tensor = dispatch.select("paged_attention", _paged_traits(q, k_pages, window, max_seqlen_q))(
        q, k_pages, v_pages, *lengths, scale, window, *_scales("paged_attention", k_pages, k_scales, v_scales)
    )
    return result
