"""The specification: each op as plain eager PyTorch. Faster implementations are tested against this file.

Signatures and contracts are in `minilm.ops`; this file has only the formulas. Statistics, softmax and losses
are computed in float32 (float64 inputs in float64), whatever the dtype of the inputs, and cast once at the
end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import QuantizedWeight, dequantise


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, (len(weight),), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)  # [T, H, D/2]: pairs are (i, i + D/2)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    for x, pages, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        if scales is not None:
            x, scale = quantise(x)
            scales.view(-1, scales.shape[2]).index_copy_(0, slots, scale)
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, x.to(pages.dtype))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and scales float32 [...]; the largest magnitude of each D becomes 127. Ties
    round to even."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    steps = wide / torch.where(scale == 0, 1, scale)[..., None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


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
    q, k = rope(q, k, cos, sin)
    append_kv(k, v, k_pages, v_pages, slots, k_scales, v_scales)
    return q, k


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, bool [queries, keys]; the last query is at the position of the last key.
    None: all of them."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return _seen(distance, causal, window)


def _seen(distance: Tensor, causal: bool, window: int | None) -> Tensor | None:
    if not causal and window is None:
        return None
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Attention scores before the softmax, for one sequence: [H, Sq, Sk] in float32, -inf where masked.

    The queries are at the key positions `places`, int64 [Sq]; None: at the last ones.
    """
    keys = k.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # [H, Sk, D]
    if places is None:
        places = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device)
    distance = places[:, None] - torch.arange(k.shape[0], device=q.device)  # [Sq, Sk]
    s = _wide(q.transpose(0, 1) @ keys.transpose(1, 2)) * scale
    if soft_cap is not None:
        s = soft_cap * torch.tanh(s / soft_cap)
    if bias is not None:
        s = s + bias[:, : q.shape[0], : k.shape[0]].to(s.dtype)
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None].to(s.dtype) * distance.abs()
    seen = _seen(distance, causal, window)
    return s if seen is None else s.masked_fill(~seen, -math.inf)


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
    lse: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    outputs, lses = [q.new_empty(0, *q.shape[1:])], [q.new_empty(q.shape[1], 0, dtype=_wide(q[:0]).dtype)]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if q0 == q1:
            continue
        s = scores(q[q0:q1], k[k0:k1], scale, causal, window, **options)
        values = v[k0:k1].transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], dim=0)  # [H, Sk, D]
        out = F.dropout(s.softmax(-1), dropout_p, training=dropout_p > 0).to(v.dtype) @ values
        outputs.append(out.transpose(0, 1))  # [Sq, H, D]
        if lse:
            lses.append(s.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, dim=1) if lse else None


def attention_probs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    heads: slice | Sequence[int],
    queries: slice | Sequence[int],
    lse: Tensor | None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> list[Tensor]:
    chosen = torch.arange(q.shape[1], device=q.device)[heads]
    shared = chosen // (q.shape[1] // k.shape[1])
    q, k, lse = q[:, chosen], k[:, shared], None if lse is None else lse[chosen]
    bias, slopes = (None if x is None else x[chosen] for x in (bias, alibi_slopes))
    maps = []
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        rows = torch.arange(q1 - q0, device=q.device)[queries]
        part = None if bias is None else bias[:, rows]
        places = rows + (k1 - k0) - (q1 - q0)
        s = scores(q[q0 + rows], k[k0:k1], scale, causal, window, part, slopes, soft_cap, places)
        p = s.softmax(-1) if lse is None else (s - lse[:, q0 + rows, None]).exp()
        maps.append(p.to(q.dtype))
    return maps


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The backward pass of `attention` without dropout: grad [Tq, H, D] -> gradients of q, k, v and bias."""
    grads = [torch.zeros_like(x, dtype=_wide(x[:0]).dtype) for x in (q, k, v)]
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(q[:0]).dtype)
    group = q.shape[1] // k.shape[1]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if q0 == q1:
            continue
        part_q, part_k = q[q0:q1], k[k0:k1]
        p = scores(part_q, part_k, scale, causal, window, bias, alibi_slopes, soft_cap).softmax(-1)
        queries, dy = (_wide(x[q0:q1]).transpose(0, 1) for x in (q, grad))  # [H, Sq, D]
        keys, values = (_wide(x[k0:k1]).transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
        dp = dy @ values.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))  # [H, Sq, Sk]
        if of_bias is not None:
            of_bias[:, : q1 - q0, : k1 - k0] += ds
        if soft_cap is not None:
            ds = ds * (1 - (scores(part_q, part_k, scale, False, None, None, None, soft_cap) / soft_cap) ** 2)
        ds = ds * scale
        grads[0][q0:q1] = (ds @ keys).transpose(0, 1)
        for total, part in zip(grads[1:], (ds.mT @ queries, p.mT @ dy), strict=True):
            total[k0:k1] = part.view(k.shape[1], group, *part.shape[1:]).sum(1).transpose(0, 1)
    dbias = None if bias is None or of_bias is None else of_bias.to(bias.dtype)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype), dbias


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
    attend: Callable[..., tuple[Tensor, Tensor | None]] = attention,
) -> Tensor:
    """Gather each sequence's pages into contiguous keys and values, then attend."""
    lens = context_lens.tolist()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for row, length in enumerate(lens):
        pages = block_table[row, : -(-length // k_pages.shape[1])].long()
        for found, store, scales in ((keys, k_pages, k_scales), (values, v_pages, v_scales)):
            gathered = store[pages] if scales is None else store[pages] * scales[pages][..., None]
            found.append(gathered.flatten(0, 1)[:length])
    cu_seqlens_k = F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    k, v = torch.cat(keys).to(q.dtype), torch.cat(values).to(q.dtype)
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_context, scale, True, window, 0.0)[0]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10, 10)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_10": gelu_10,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
"""Activation functions by the names that config.json uses."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    return linear(x, dequantise(weight, x.dtype), bias, activation)


def gated(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(_wide(logits), labels, ignore_index=ignore_index)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return cross_entropy(F.linear(hidden, weight), labels, ignore_index)


def pool(x: Tensor, cu_seqlens: Tensor, unit: bool) -> Tensor:
    """See `minilm.ops.pool`."""
    wide = x if x.dtype == torch.float64 else x.float()
    rows = torch.arange(len(x), device=x.device)
    y = F.embedding_bag(rows, wide, cu_seqlens.long(), mode="mean", include_last_offset=True).to(x.dtype)
    eps = max(1e-12, torch.finfo(x.dtype).tiny)  # 1e-12 is zero in float16
    return F.normalize(y, dim=-1, eps=eps) if unit else y
