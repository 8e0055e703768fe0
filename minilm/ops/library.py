"""The `torch` backend: PyTorch's own fused kernels, where they compute one of our ops.

Attention calls `scaled_dot_product_attention` once for each run of consecutive sequences of one length, so
that a batch of equal lengths is one call and nothing is computed for padding.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


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
    bias: Tensor | None = None,
) -> tuple[Tensor, None]:
    """As `minilm.ops.attention`, without the log-sum-exp, which PyTorch keeps to itself; no cap, no ALiBi."""
    if window is not None and window >= max_seqlen_k:
        window = None
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    shapes = [(b - a, d - c) for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)]
    outputs = []
    q0 = k0 = 0
    for (sq, sk), run in groupby(shapes):
        n = len(list(run))
        q1, k1 = q0 + n * sq, k0 + n * sk
        if sq:
            seen = None
            if window is not None or (causal and sq > 1 and (sq != sk or bias is not None)):
                seen = reference.visible(sq, sk, causal, window, q.device)
            mask = seen
            if bias is not None:
                mask = bias[:, :sq, :sk]  # [H, Sq, Sk]
                mask = mask if seen is None else mask.masked_fill(~seen, -math.inf)
            out = F.scaled_dot_product_attention(
                q[q0:q1].view(n, sq, *q.shape[1:]).transpose(1, 2),  # [n, H, Sq, D]
                k[k0:k1].view(n, sk, *k.shape[1:]).transpose(1, 2),
                v[k0:k1].view(n, sk, *v.shape[1:]).transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=causal and mask is None and sq > 1,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n * Sq, H, D]
        q0, k0 = q1, k1
    if not outputs:
        return torch.zeros_like(q), None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """As `minilm.ops.paged_attention`: the pages are gathered, then attended to by `attention`."""
    return reference.paged_attention(
        q,
        k_pages,
        v_pages,
        block_table,
        cu_seqlens_q,
        context_lens,
        max_seqlen_q,
        max_context,
        scale,
        window,
        k_scales,
        v_scales,
        attention,
    )
