"""Attention for torch.compile, where the implementation looks at the lengths.

Eager implementations loop over the sequences, whose lengths are values of a tensor: nothing that can be
traced. While a graph is compiled their call is therefore one op, which runs the very same function when the
graph runs; the op says what its results look like (the fake), and has the derivative of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_implementations: dict[str, Attention] = {}

_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_KIND = "float scale, bool causal, int? window"


def compilable(name: str, attention: Attention) -> Attention:
    """`attention`, as one op to torch.compile. Not with dropout, whose derivative needs the draw."""
    _implementations[name] = attention

    def call(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        *problem, dropout_p = arguments
        if torch.compiler.is_compiling() and dropout_p == 0:
            out, lse = torch.ops.minilm.eager_attention(*problem, name)
            return out, lse
        return attention(*arguments)

    return call


@torch.library.custom_op(
    "minilm::eager_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}, SymInt max_seqlen_q, SymInt max_seqlen_k, {_KIND}, "
    "str name) -> (Tensor, Tensor)",
)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *problem, name = arguments
    out, lse = _implementations[name](*problem, 0.0)
    return out.clone(), out.new_empty(0) if lse is None else lse  # results may not share memory with q


@_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, name = arguments[0], arguments[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(0) if name == "torch" else q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    return q.new_empty(q.shape), lse


@torch.library.custom_op(
    "minilm::eager_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_KIND}) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.attention_backward(*arguments)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.kind = inputs[7:10]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    gradients = torch.ops.minilm.eager_attention_backward(grad, *ctx.saved_tensors, *ctx.kind)
    return (*gradients, *(None,) * 8)


_attention.register_autograd(_backward, setup_context=_setup)
