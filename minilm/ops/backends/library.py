"""The `torch` backend: ops for which PyTorch has its own fused kernels.

Attention calls `scaled_dot_product_attention` once per run of consecutive sequences of equal length, so a
batch of equal lengths needs one call and nothing is computed for padding.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, reference
from .opaque import compilable


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
    """See `minilm.ops.attend`; without the log-sum-exp, which PyTorch does not return, soft cap and ALiBi."""
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
    """See `minilm.ops.paged_attention`: gathers the pages, then calls `attention`."""
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


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """See `minilm.ops.linear_cross_entropy`; in chunks of C rows, so that the logits of a chunk are as large
    as the weight. Under autocast both matrices are cast, as by F.linear."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedLoss.apply(hidden, weight, labels, ignore_index)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist, and multiplies them by
    dloss / count in the backward pass (in float16, a probability / count would underflow)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss, counted = hidden.new_zeros((), dtype=wide), labels != ignore_index
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        rows = max(16, hidden.shape[1])
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, logits = hidden[part], F.linear(hidden[part], weight).to(wide)
            loss += F.cross_entropy(logits, labels[part], ignore_index=ignore_index, reduction="sum")
            if not (needs_hidden or needs_weight):
                continue
            p = logits.softmax(-1)
            label = labels[part].masked_fill(~counted[part], 0)[:, None]
            p.scatter_add_(1, label, p.new_full(label.shape, -1.0))
            p = p.masked_fill_(~counted[part, None], 0).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = p @ weight
            if grad_weight is not None:
                grad_weight.addmm_(p.t().to(wide), h.to(wide))
        count = counted.sum().to(wide)
        ctx.save_for_backward(count, grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        count, grad_hidden, grad_weight = ctx.saved_tensors
        factor = torch.where(count > 0, dloss / count, 0.0)  # no label counts: zeros, as in PyTorch
        return (
            None if grad_hidden is None else grad_hidden * factor,
            None if grad_weight is None else (grad_weight * factor).to(ctx.dtype),
            None,
            None,
        )


def _supports_attention(traits: Any) -> str | None:
    if traits.lse:
        return "PyTorch's fused attention does not return the log-sum-exp"
    if traits.alibi or traits.soft_cap:
        return "PyTorch's fused attention has no ALiBi and no soft-cap"
    if traits.bias not in (None, traits.dtype):
        return f"PyTorch's fused attention takes a bias in {traits.dtype}, and it is in {traits.bias}"
    return None


def register_all() -> None:
    """Add the ops that PyTorch has fused kernels for to the dispatch table."""
    for op, call, supports in (
        ("attention", compilable("torch", attention), _supports_attention),
        ("linear_cross_entropy", linear_cross_entropy, _anything),
        ("paged_attention", paged_attention, _anything),
    ):
        dispatch.register(dispatch.Implementation(op, "torch", call, supports))


def _anything(traits: Any) -> None:
    return None
