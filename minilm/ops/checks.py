"""Checks at the border of the ops: each failure names the op, what was expected and what came. Kernels behind
it assume."""

from __future__ import annotations

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


def lengths(op: str, name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """`cu_seqlens` is [B + 1] int32. That it rises from 0 to `tokens` is looked at on a CPU only (elsewhere
    it would wait)."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: {name} must be int32 [sequences + 1], and is {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
            raise ValueError(
                f"{op}: {name} must rise from 0 to {tokens}, the number of tokens, and is {values}"
            )
