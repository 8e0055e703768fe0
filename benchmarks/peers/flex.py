"""FlexAttention, compiled, with a causal block mask where the model is causal."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped

_compiled: list[Any] = []


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """For attention over sequences of one length."""
    if case.op != "attention":
        return []
    dims = case.call.dims
    if len(set(dims["lengths"])) > 1 or dims["window"] is not None:
        return []
    import torch
    from torch.nn.attention import flex_attention as flex

    B, S, H, Hkv, D = len(dims["lengths"]), dims["lengths"][0], dims["H"], dims["Hkv"], dims["D"]
    if not _compiled:
        _compiled.append(torch.compile(flex.flex_attention, dynamic=False))
    mask = None
    if dims["causal"]:

        def past(b: Any, h: Any, q: Any, k: Any) -> Any:
            return q >= k

        mask = flex.create_block_mask(past, None, None, S, S, device=device)

    def prepare(values: Any) -> Any:
        return tuple(x.view(B, S, -1, D).transpose(1, 2).contiguous() for x in values[:3])

    def call(values: Any) -> Any:
        return _compiled[0](*values, block_mask=mask, enable_gqa=Hkv != H)

    return [OpPeer("FlexAttention", call, prepare, lambda out: out.transpose(1, 2).reshape(B * S, H, D))]
