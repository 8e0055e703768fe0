"""Argument checks of the ops: each error names the op, what was expected and what came. The kernels rely on
them and do not check again."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import torch
from torch import Tensor


def same_shape(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """`a` and `b` have the same shape."""
    if a.shape != b.shape:
        raise ValueError(
            f"{op}: {name_a} {list(a.shape)} and {name_b} {list(b.shape)} must have the same shape"
        )


def affine(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`weight` and `bias` are [C] for x [..., C]."""
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, and is a scalar")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must be [{x.shape[-1]}], the last size of x, and is {list(parameter.shape)}"
            )


def heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [Tq, H, D], k and v [Tk, Hkv, D], H a multiple of Hkv."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{op}: {name} must be [tokens, heads, head size], and is {list(x.shape)}")
    same_shape(op, "k", k, "v", v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: head size of q is {q.shape[2]} and that of k is {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: {q.shape[1]} query heads cannot be shared evenly by {k.shape[1]} key/value heads"
        )


def lengths(op: str, name: str, cu_seqlens: Tensor, tokens: int) -> list[int] | None:
    """`cu_seqlens` is [B + 1] int32. That it rises from 0 to `tokens` is checked on a CPU only (a GPU would
    have to synchronise); the values are returned if they were read."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: {name} must be int32 [sequences + 1], and is {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    values: list[int] = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"{op}: {name} must rise from 0 to {tokens}, the number of tokens, and is {values}")
    return values


def queries_stand_at_keys(op: str, q_ends: list[int], k_ends: list[int]) -> None:
    """No sequence has more queries than keys: the queries are the last tokens of the sequence."""
    for row, ((a, b), (c, d)) in enumerate(zip(pairwise(q_ends), pairwise(k_ends), strict=True)):
        if b - a > d - c:
            raise ValueError(f"{op}: sequence {row} has {b - a} queries and only {d - c} keys")


def window(op: str, size: int | None) -> None:
    """The window is at least 1: a query sees itself."""
    if size is not None and size < 1:
        raise ValueError(f"{op}: window must be at least 1, and is {size}")


def score_options(
    op: str,
    q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
) -> None:
    """bias [H, >= longest queries, >= longest keys], alibi_slopes [H], soft_cap above 0."""
    heads = q.shape[1]
    if bias is not None and (
        bias.dim() != 3
        or bias.shape[0] != heads
        or bias.shape[1] < max_seqlen_q
        or bias.shape[2] < max_seqlen_k
        or not bias.is_floating_point()
    ):
        raise ValueError(
            f"{op}: bias must be floating point, [{heads}, at least {max_seqlen_q}, at least "
            f"{max_seqlen_k}], and is {bias.dtype} {list(bias.shape)}"
        )
    if alibi_slopes is not None and list(alibi_slopes.shape) != [heads]:
        raise ValueError(f"{op}: alibi_slopes must be [{heads}], and is {list(alibi_slopes.shape)}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{op}: soft_cap must be above 0, and is {soft_cap}")


def angles(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos and sin are [T, D/2] for q [T, H, D] and k [T, Hkv, D]."""
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or x.shape[2] % 2:
            raise ValueError(f"{op}: {name} must be [tokens, heads, even head size], and is {list(x.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{op}: q {list(q.shape)} and k {list(k.shape)} must have the same tokens and head size"
        )
    expected = [q.shape[0], q.shape[2] // 2]
    for name, x in (("cos", cos), ("sin", sin)):
        if list(x.shape) != expected:
            raise ValueError(
                f"{op}: {name} must be [tokens, head size / 2] = {expected}, and is {list(x.shape)}"
            )


def pages(op: str, heads: int, head_dim: int, k_pages: Tensor, v_pages: Tensor) -> None:
    """Pages are [pages, page size, Hkv, D], for keys and values alike."""
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        if x.dim() != 4 or x.shape[3] != head_dim or x.shape[2] == 0 or heads % x.shape[2]:
            raise ValueError(
                f"{op}: {name} must be [pages, page size, key/value heads, head size] for {heads} heads of "
                f"size {head_dim}, and is {list(x.shape)}"
            )
    same_shape(op, "k_pages", k_pages, "v_pages", v_pages)


def appended(op: str, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] go to `slots` [T] of the pages."""
    same_shape(op, "k", k, "v", v)
    if k.dim() != 3 or k_pages.dim() != 4 or k.shape[1:] != k_pages.shape[2:]:
        raise ValueError(
            f"{op}: k {list(k.shape)} must end in the key/value heads and head size of the pages, which are "
            f"{list(k_pages.shape)}"
        )
    same_shape(op, "k_pages", k_pages, "v_pages", v_pages)
    if list(slots.shape) != [k.shape[0]]:
        raise ValueError(
            f"{op}: slots must be one for each of the {k.shape[0]} tokens, and is {list(slots.shape)}"
        )


def labels(op: str, x: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The labels as int64, each a class or `ignore_index`: any other would index outside the logits."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{op}: labels must be integers, and are {x.dtype}")
    x = x.long()
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x
    wrong = x[((x < 0) | (x >= classes)) & (x != ignore_index)]
    if len(wrong):
        raise ValueError(
            f"{op}: labels must be from 0 to {classes - 1}, or {ignore_index} for none, and one is "
            f"{int(wrong[0])}"
        )
    return x


def scales(op: str, pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    """int8 pages [pages, page size, Hkv, D] need float32 scales [pages, page size, Hkv]; other pages have
    none."""
    for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (x is not None) != (pages.dtype == torch.int8):
            raise ValueError(
                f"{op}: int8 pages need {name} and other pages take none; the pages are {pages.dtype}, and "
                f"{name} is {'None' if x is None else f'{x.dtype} {list(x.shape)}'}"
            )
        if x is None:
            continue
        if x.shape != pages.shape[:3] or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be float32 {list(pages.shape[:3])}, one for each head in each slot and "
                f"contiguous, and is {x.dtype} {list(x.shape)} with strides {list(x.stride())}"
            )


def activation(op: str, name: str | None, known: Collection[str]) -> None:
    """`name` is a known activation function."""
    if name is not None and name not in known:
        raise ValueError(f"{op}: there is no activation {name!r}; expected one of {', '.join(known)}")
