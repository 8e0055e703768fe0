"""Attention for torch.compile, if the implementation depends on the lengths.

Eager implementations loop over the sequences, whose lengths are values of a tensor, so they cannot be traced.
In a compiled graph their call is therefore one opaque op, which runs the same function when the graph runs.
The op has a fake implementation, which computes only output shapes, and the derivative of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_implementations: dict[str, Attention] = {}

_OPTIONS = ("bias", "alibi_slopes", "soft_cap")
"""Optional arguments of attention, which are passed only if given."""

_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_KIND = "float scale, bool causal, int? window, Tensor? bias, Tensor? alibi_slopes, float? soft_cap"


def compilable(name: str, attention: Attention) -> Attention:
    """`attention` as one opaque op for torch.compile. Not with dropout, whose backward needs the mask."""
    _implementations[name] = attention

    def call(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        *problem, dropout_p = arguments
        if torch.compiler.is_compiling() and dropout_p == 0:
            given = (*map(options.get, _OPTIONS), options.get("lse", False))
            out, lse = torch.ops.minilm.eager_attention(*problem, *given, name)
            return out, lse
        return attention(*arguments, **options)

    return call


@torch.library.custom_op(
    "minilm::eager_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}, SymInt max_seqlen_q, SymInt max_seqlen_k, {_KIND}, "
    "bool lse, str name) -> (Tensor, Tensor)",
)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *problem, bias, alibi_slopes, soft_cap, wanted, name = arguments
    options = dict(zip(_OPTIONS, (bias, alibi_slopes, soft_cap), strict=True))
    given = {option: value for option, value in options.items() if value is not None}
    out, lse = _implementations[name](*problem, 0.0, **given, **({"lse": True} if wanted else {}))
    return out.clone(), out.new_empty(0) if lse is None else lse  # results may not share memory with q


@_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, wanted = arguments[0], arguments[-2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=wide) if wanted else q.new_empty(0)
    return q.new_empty(q.shape), lse


@torch.library.custom_op(
    "minilm::eager_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_KIND}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbias = reference.attention_backward(*arguments)
    return dq, dk, dv, dq.new_empty(0) if dbias is None else dbias


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    bias = problem[5]
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, scale, causal, window, bias, alibi_slopes, soft_cap, _wanted, _name = inputs
    ctx.save_for_backward(*inputs[:5], bias, alibi_slopes)
    ctx.kind = scale, causal, window, soft_cap
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    *tensors, bias, alibi_slopes = ctx.saved_tensors
    scale, causal, window, soft_cap = ctx.kind
    dq, dk, dv, dbias = torch.ops.minilm.eager_attention_backward(
        grad, *tensors, scale, causal, window, bias, alibi_slopes, soft_cap
    )
    return dq, dk, dv, *(None,) * 7, None if bias is None else dbias, *(None,) * 4


_attention.register_autograd(_backward, setup_context=_setup)
