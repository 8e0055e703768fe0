"""The op interface: what a Transformer is made of, each op a function whose docstring is its contract.

Every function checks its arguments, describes the call by its traits, and lets `minilm.ops.dispatch` choose
between the implementations: the reference (eager PyTorch, the specification), PyTorch's fused kernels, the
native extension, Triton.

Layout: tokens of all sequences end to end. q is [T, H, D], k and v are [T, Hkv, D]; sequence b owns the
tokens ``cu_seqlens[b]:cu_seqlens[b + 1]`` (int32, [B + 1]). The cache is in pages, [pages, page size, Hkv, D]
a layer; int8 pages have scales beside them, float32 [pages, page size, Hkv], and stand for ``pages *
scales``. All ops return fresh tensors, except `append_kv` and `rope_append`, which write the pages (and
scales) they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, quantized, reference
from .backends import cuda, library, native, packed, triton
from .backends.opaque import compilable
from .dispatch import BackendError, Implementation, backend, explain, register, select
from .quantized import QuantizedWeight
from .reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "add_layer_norm",
    "add_rms_norm",
    "append_kv",
    "attention",
    "attention_probs",
    "attention_with_lse",
    "backend",
    "cross_entropy",
    "dispatch",
    "explain",
    "gated",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_append",
    "writes_lse",
]


class NormTraits(NamedTuple):
    """A normalisation over the last axis."""

    device: str
    dtype: torch.dtype
    channels: int
    parameter_dtype: torch.dtype
    contiguous: bool


class AttentionTraits(NamedTuple):
    """Attention over packed sequences."""

    device: str
    dtype: torch.dtype
    head_dim: int
    group: int
    """Query heads that share a key/value head."""
    causal: bool
    window: bool
    dropout: bool
    lse: bool
    grad: bool
    bias: torch.dtype | None = None
    """Of the additive bias, if there is one."""
    alibi: bool = False
    soft_cap: bool = False


class PagedTraits(NamedTuple):
    """Attention over a paged cache, or an append to one."""

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


class PointwiseTraits(NamedTuple):
    """Ops that look at no more than device, dtype and an activation."""

    device: str
    dtype: torch.dtype
    activation: str | None = None
    grad: bool = False


FEW_ROWS = 16
"""Rows of x up to which a matrix product is bound by reading the weights: a step of decoding."""


class LinearTraits(NamedTuple):
    """A linear layer."""

    device: str
    dtype: torch.dtype
    activation: str | None = None
    grad: bool = False
    kept: bool = False
    """The weight is a parameter, so that its layout may be changed for the calls to come."""


class QuantizedTraits(NamedTuple):
    """A linear layer with quantised weights."""

    device: str
    dtype: torch.dtype
    format: str
    activation: str | None
    few_rows: bool
    """At most `FEW_ROWS` rows."""
    grad: bool
    kept: bool = True
    """The weight's layout may be changed for the calls to come; not in a graph of torch.compile."""


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _norm_traits(x: Tensor, weight: Tensor) -> NormTraits:
    return NormTraits(x.device.type, x.dtype, x.shape[-1], weight.dtype, x.is_contiguous())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016,
    arXiv:1607.06450).

    x [..., C]; weight and bias [C]; statistics in float32. Returns [..., C] in x's dtype. Differentiable.
    """
    checks.affine("layer_norm", x, weight, bias)
    result: Tensor = select("layer_norm", _norm_traits(x, weight))(x, weight, bias, eps)
    return result


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass over memory. Shapes as in `layer_norm`; both
    results [..., C]."""
    checks.same_shape("add_layer_norm", "x", x, "residual", residual)
    checks.affine("add_layer_norm", x, weight, bias)
    result: tuple[Tensor, Tensor] = select("add_layer_norm", _norm_traits(x, weight))(
        x, residual, weight, bias, eps
    )
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    x [..., C], weight [C]. The scaled row is rounded to x's dtype before the weight is applied, as Llama
    does.
    """
    checks.affine("rms_norm", x, weight, None)
    result: Tensor = select("rms_norm", _norm_traits(x, weight))(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass over memory. Shapes as in `rms_norm`; both results
    [..., C]."""
    checks.same_shape("add_rms_norm", "x", x, "residual", residual)
    checks.affine("add_rms_norm", x, weight, None)
    result: tuple[Tensor, Tensor] = select("add_rms_norm", _norm_traits(x, weight))(x, residual, weight, eps)
    return result


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
    last query of a sequence stands at its last key and none sees beyond itself. `window`: a query sees the
    keys at a distance below it (to both sides unless causal). `dropout_p` drops probabilities (training).

    What may be done to a score = scale q k^T before the softmax, in this order: `soft_cap`, cap
    tanh(score / cap) (Gemma 2); `bias` [H, >= max_seqlen_q, >= max_seqlen_k], finite, of which [h, i, j] is
    added for query i and key j of every sequence (T5, arXiv:1910.10683); `alibi_slopes` [H], of which
    slope times the distance is subtracted (Press et al. 2021, arXiv:2108.12409).
    Returns [Tq, H, D]. Differentiable in q, k, v and the bias.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _score_options(q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    return _attention(q, k, v, *lengths, scale, causal, window, dropout_p, options, lse=False)[0]


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
    """`attention`, and the log-sum-exp of the scores of each query, float32 [H, Tq] (not differentiable)."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _score_options(q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    out, lse = _attention(q, k, v, *lengths, scale, causal, window, 0.0, options, lse=True)
    assert lse is not None
    return out, lse


def writes_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None = None) -> bool:
    """Whether a kernel would run `attention_with_lse` of these: the reference, which can, holds whole
    maps."""
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
    """Those that are given, checked: what an implementation has no use for it is not handed."""
    checks.score_options("attention", q, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, soft_cap)
    slopes = None if alibi_slopes is None else alibi_slopes.detach()
    options = {"bias": bias, "alibi_slopes": slopes, "soft_cap": soft_cap}
    return {name: value for name, value in options.items() if value is not None}


def _attention(
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
    options: dict[str, Any],
    *,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    checks.heads("attention", q, k, v)
    checks.window("attention", window)
    q_ends = checks.lengths("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    k_ends = checks.lengths("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention: {len(cu_seqlens_q) - 1} sequences of queries and {len(cu_seqlens_k) - 1} of keys"
        )
    if q_ends and k_ends and (causal or window is not None):
        checks.queries_stand_at_keys("attention", q_ends, k_ends)
    traits = _attention_traits(q, k, v, causal, window, dropout_p, options, lse=lse)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    wanted = {"lse": True} if lse else {}
    result: tuple[Tensor, Tensor | None] = select("attention", traits)(
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
        _needs_grad(q, k, v, options.get("bias")),
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
    """The attention maps themselves, for readers: what `attention` multiplies v by, one [H, Sq, Sk] in q's
    dtype for each sequence.

    `heads`, and `queries` by their places in their own sequence, choose rows of the maps: no others are
    computed, so a look at a few holds no whole map. With `lse`, that of `attention_with_lse`, a row is
    exp(score - lse): what the fast path summed with, made again.
    """
    checks.heads("attention_probs", q, k, k)
    ends = cu_seqlens_q, cu_seqlens_k
    options = _score_options(q, 0, 0, bias, alibi_slopes, soft_cap)
    return reference.attention_probs(q, k, *ends, scale, causal, window, heads, queries, lse, **options)


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
        _needs_grad(q, *others),
    )


def _scales(op: str, pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> tuple[Tensor, ...]:
    """The last arguments of an implementation: both scales for int8 pages, else none."""
    checks.scales(op, pages, k_scales, v_scales)
    return () if k_scales is None or v_scales is None else (k_scales, v_scales)


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
            f"{list(context_lens.shape)} and cu_seqlens_q {list(cu_seqlens_q.shape)} must be about equally "
            "many sequences"
        )
    checks.window("paged_attention", window)
    checks.pages("paged_attention", q.shape[1], q.shape[2], k_pages, v_pages)
    lengths = (block_table, cu_seqlens_q, context_lens, max_seqlen_q, max_context)
    result: Tensor = select("paged_attention", _paged_traits(q, k_pages, window, max_seqlen_q))(
        q, k_pages, v_pages, *lengths, scale, window, *_scales("paged_attention", k_pages, k_scales, v_scales)
    )
    return result


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding: the pairs (i, i + D/2) of each head are turned by the token's angles.

    q [T, H, D], k [T, Hkv, D]; cos, sin float32 [T, D/2]. Returns the turned q and k. Differentiable.
    """
    checks.angles("rope", q, k, cos, sin)
    result: tuple[Tensor, Tensor] = select(
        "rope", PointwiseTraits(q.device.type, q.dtype, None, _needs_grad(q, k))
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
    size + offset. Into int8 pages goes round(x / scale), where scale = max |x| / 127 over the head goes into
    the scales."""
    checks.appended("append_kv", k, v, k_pages, v_pages, slots)
    scales = _scales("append_kv", k_pages, k_scales, v_scales)
    select("append_kv", _paged_traits(k, k_pages, None, 0, v))(k, v, k_pages, v_pages, slots, *scales)


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
    """`rope`, and `append_kv` of the turned k and of v, in one pass. Writes the pages; returns the turned q
    and k."""
    checks.angles("rope_append", q, k, cos, sin)
    checks.appended("rope_append", k, v, k_pages, v_pages, slots)
    scales = _scales("rope_append", k_pages, k_scales, v_scales)
    result: tuple[Tensor, Tensor] = select("rope_append", _paged_traits(q, k_pages, None, 0, k, v))(
        q, k, v, cos, sin, k_pages, v_pages, slots, *scales
    )
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias). x [..., in], weight [out, in], bias [out]. Differentiable."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {list(x.shape)} ends in {x.shape[-1]}, and weight {list(weight.shape)} takes "
            f"{weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be [{weight.shape[0]}], and is {list(bias.shape)}")
    checks.activation("linear", activation, ACTIVATIONS)
    traits = LinearTraits(
        x.device.type, x.dtype, activation, _needs_grad(x, weight, bias), packed.is_kept(weight)
    )
    result: Tensor = select("linear", traits)(x, weight, bias, activation)
    return result


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(x weight^T + bias) with a quantised weight [out, in] (`minilm.ops.quantized`).

    x [..., in], bias [out]; returns [..., out] in x's dtype. The reference dequantises to x's dtype; others
    may multiply the codes themselves, and quantise x to do so. Differentiable in x and bias.
    """
    quantized.check("quantized_linear", weight)
    if x.dim() == 0 or x.shape[-1] != weight.columns:
        raise ValueError(
            f"quantized_linear: x {list(x.shape)} must end in {weight.columns}, which the {weight.format} "
            f"weight [{weight.rows}, {weight.columns}] takes"
        )
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"quantized_linear: bias must be [{weight.rows}], and is {list(bias.shape)}")
    checks.activation("quantized_linear", activation, ACTIVATIONS)
    traits = QuantizedTraits(
        x.device.type,
        x.dtype,
        weight.format,
        activation,
        math.prod(x.shape[:-1]) <= FEW_ROWS,
        _needs_grad(x, bias),
        not torch.compiler.is_compiling(),
    )
    result: Tensor = select("quantized_linear", traits)(x, weight, bias, activation)
    return result


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for x [..., 2F] = gate and up side by side (SwiGLU with silu). Returns [..., F].
    Differentiable."""
    if x.shape[-1] % 2:
        raise ValueError(
            f"gated: x must end in an even size, gate and up side by side, and is {list(x.shape)}"
        )
    checks.activation("gated", activation, ACTIVATIONS)
    result: Tensor = select("gated", PointwiseTraits(x.device.type, x.dtype, activation, _needs_grad(x)))(
        x, activation
    )
    return result


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`, in float32.

    logits [T, V], labels int64 [T]; a scalar, NaN when no label counts (as PyTorch's). Differentiable.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: logits must be [T, V] and labels [T], and they are {list(logits.shape)} and "
            f"{list(labels.shape)}"
        )
    traits = PointwiseTraits(logits.device.type, logits.dtype, None, _needs_grad(logits))
    result: Tensor = select("cross_entropy", traits)(logits, labels, ignore_index)
    return result


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """cross_entropy(hidden weight^T, labels), for training loops: the loss of a vocabulary, not its logits.

    hidden [T, C], weight [V, C], labels int64 [T]; a scalar, NaN when no label counts. Differentiable. The
    logits of some rows exist at a time, those of all rows [T, V] never, save in the reference. Models return
    logits, so a loop calls the body and this with the head's weight; a causal model's labels are shifted by
    the caller: ``linear_cross_entropy(hidden[:-1], weight, ids[1:])`` within one sequence.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden must be [T, C] and weight [V, C], and they are "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be [{hidden.shape[0]}], and are {list(labels.shape)}"
        )
    traits = PointwiseTraits(hidden.device.type, hidden.dtype, None, _needs_grad(hidden, weight))
    result: Tensor = select("linear_cross_entropy", traits)(hidden, weight, labels, ignore_index)
    return result


def _sdpa_supports(traits: Any) -> str | None:
    if traits.lse:
        return "PyTorch's fused attention does not return the log-sum-exp"
    if traits.alibi or traits.soft_cap:
        return "PyTorch's fused attention has no ALiBi and no soft-cap"
    if traits.bias not in (None, traits.dtype):
        return f"PyTorch's fused attention takes a bias in {traits.dtype}, and it is in {traits.bias}"
    return None


for _op in (
    "layer_norm",
    "add_layer_norm",
    "rms_norm",
    "add_rms_norm",
    "paged_attention",
    "rope",
    "append_kv",
    "rope_append",
    "linear",
    "quantized_linear",
    "gated",
    "cross_entropy",
    "linear_cross_entropy",
):
    register(Implementation(_op, "reference", getattr(reference, _op)))
register(Implementation("attention", "reference", compilable("reference", reference.attention)))
register(Implementation("attention", "torch", compilable("torch", library.attention), _sdpa_supports))
register(Implementation("linear_cross_entropy", "torch", library.linear_cross_entropy))
register(Implementation("paged_attention", "torch", library.paged_attention))
native.register_all()
cuda.register_all()
triton.register_all()
