"""torch.compile of the specification: the peer of every fused norm and element-wise kernel."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped

_compiled: dict[str, Any] = {}


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """For ops whose specification is one graph; not for attention, which loops over the sequences
    (FlexAttention is its compiled peer), nor for quantised layers, which would be dequantised in every
    call."""
    if case.op in ("attention", "paged_attention", "quantized_linear"):
        return []
    import torch

    from minilm.ops import reference

    from ..ops import reference_call

    if case.op not in _compiled:
        _compiled[case.op] = torch.compile(getattr(reference, case.op), dynamic=False)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 256)
    call = reference_call(case, _compiled[case.op])
    return [OpPeer("torch.compile", call)]
