"""PyTorch's scaled_dot_product_attention, each of its backends by name: by default PyTorch prefers its flash
backend, which is not always its fastest."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped

BACKENDS = {
    "cpu": ("MATH", "FLASH_ATTENTION"),
    "cuda": ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"),
}


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """For attention over sequences of one length, which need no mask in its padded interface."""
    if case.op != "attention":
        return []
    dims = case.call.dims
    if len(set(dims["lengths"])) > 1 or dims["window"] is not None:
        return [Skipped("SDPA", "sequences of different lengths or a window need a mask")]
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, S, H, Hkv, D = len(dims["lengths"]), dims["lengths"][0], dims["H"], dims["Hkv"], dims["D"]

    def prepare(values: Any) -> Any:
        q, k, v = values[:3]
        shape = ((q, H), (k, Hkv), (v, Hkv))
        return tuple(x.view(B, S, heads, D).transpose(1, 2).contiguous() for x, heads in shape)

    def call(values: Any) -> Any:
        q, k, v = values
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=dims["causal"], enable_gqa=Hkv != H
        )

    def result(out: Any) -> Any:
        return out.transpose(1, 2).reshape(B * S, H, D)

    found: list[OpPeer | Skipped] = []
    for name in BACKENDS.get(device, ()):
        backend = getattr(SDPBackend, name)
        label = f"SDPA {name.removesuffix('_ATTENTION').lower()}"
        probe = torch.zeros(1, H, 8, D, dtype=dtype, device=device)
        keys = torch.zeros(1, Hkv, 8, D, dtype=dtype, device=device)
        try:
            with sdpa_kernel(backend), torch.no_grad():
                call((probe, keys, keys))
        except RuntimeError as error:
            found.append(Skipped(label, str(error).splitlines()[0]))
            continue
        found.append(OpPeer(label, call, prepare, result, lambda backend=backend: sdpa_kernel(backend)))
    return found
