"""Eager PyTorch: the specification of minilm.ops itself, which is what a plain PyTorch program would run."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """Listed among our own implementations as `reference`. That of a quantised layer dequantises at every
    call; who has the memory does it once, and here is what that gives."""
    if case.op != "quantized_linear":
        return []
    from minilm.ops import reference
    from minilm.ops.quantized import dequantise

    from ..ops import reference_call

    def once(values: Any) -> Any:
        x, weight, bias = values
        return x, dequantise(weight, dtype), bias

    return [OpPeer("eager, dequantised once", reference_call(case, reference.linear), once)]
