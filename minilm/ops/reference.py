"""The specification: each op in eager PyTorch, as plainly as it can be said. Everything faster is held
against this page.

Signatures and contracts stand in `minilm.ops`; here are only the formulas. Statistics, softmax and losses are
computed in float32 (float64 inputs in float64), whatever the dtype of the inputs, with one cast at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import QuantizedWeight, dequantise


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


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


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, slots, k.to(k_pages.dtype))
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, slots, v.to(v_pages.dtype))


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    q, k = rope(q, k, cos, sin)
    append_kv(k, v, k_pages, v_pages, slots)
    return q, k


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which key each query sees, bool [queries, keys]; the last query stands at the last key. None: all of
    them."""
    if not causal and window is None:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def probabilities(
    q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) of one sequence, [H, Sq, Sk] in float32, and its log-sum-exp [H, Sq]."""
    keys = k.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # [H, Sk, D]
    scores = _wide(q.transpose(0, 1) @ keys.transpose(1, 2)) * scale
    seen = visible(q.shape[0], k.shape[0], causal, window, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


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
) -> tuple[Tensor, Tensor]:
    outputs, lses = [q.new_empty(0, *q.shape[1:])], [q.new_empty(q.shape[1], 0, dtype=_wide(q[:0]).dtype)]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if q0 == q1:
            continue
        p, lse = probabilities(q[q0:q1], k[k0:k1], scale, causal, window)
        values = v[k0:k1].transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], dim=0)  # [H, Sk, D]
        out = F.dropout(p, dropout_p, training=dropout_p > 0).to(v.dtype) @ values
        outputs.append(out.transpose(0, 1))  # [Sq, H, D]
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses, dim=1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of `attention` without dropout: grad [Tq, H, D] -> those of q, k and v."""
    grads = [torch.zeros_like(x, dtype=_wide(x[:0]).dtype) for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if q0 == q1:
            continue
        p = probabilities(q[q0:q1], k[k0:k1], scale, causal, window)[0]  # [H, Sq, Sk]
        queries, dy = (_wide(x[q0:q1]).transpose(0, 1) for x in (q, grad))  # [H, Sq, D]
        keys, values = (_wide(x[k0:k1]).transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
        dp = dy @ values.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        grads[0][q0:q1] = (ds @ keys).transpose(0, 1)
        for total, part in zip(grads[1:], (ds.mT @ queries, p.mT @ dy), strict=True):
            total[k0:k1] = part.view(k.shape[1], group, *part.shape[1:]).sum(1).transpose(0, 1)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


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
    attend: Callable[..., tuple[Tensor, Tensor | None]] = attention,
) -> Tensor:
    """Gather each sequence's pages and attend as if they had never been paged."""
    lens = context_lens.tolist()
    keys, values = [], []
    for row, length in enumerate(lens):
        pages = block_table[row, : -(-length // k_pages.shape[1])].long()
        keys.append(k_pages[pages].flatten(0, 1)[:length])
        values.append(v_pages[pages].flatten(0, 1)[:length])
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
