"""Eager PyTorch: the specification of minilm.ops, as a plain PyTorch program would run it."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """Eager PyTorch is listed among minilm's implementations as `reference`. The reference of a quantised
    layer dequantises in every call; this peer dequantises once, which takes more memory."""
    if case.op != "quantized_linear":
        return []
    from minilm.ops import reference
    from minilm.ops.quantized import dequantise

    from ..ops import reference_call

    def once(values: Any) -> Any:
        x, weight, bias = values
        return x, dequantise(weight, dtype), bias

    return [OpPeer("eager, dequantised once", reference_call(case, reference.linear), once)]
