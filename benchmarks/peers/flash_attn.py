"""FlashAttention (the flash-attn package, and FlashAttention-3 where flash_attn_interface is installed)."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped, require_package


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """For packed attention in 16 bits on a GPU."""
    if case.op != "attention":
        return []
    found: list[OpPeer | Skipped] = []
    for label, module in (("FlashAttention-2", "flash_attn"), ("FlashAttention-3", "flash_attn_interface")):
        if device != "cuda":
            found.append(Skipped(label, "runs on a GPU only"))
        elif dtype.itemsize != 2:
            found.append(
                Skipped(label, f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}")
            )
        elif reason := require_package(module):
            found.append(Skipped(label, reason))
        else:
            found.append(_peer(case, label, module))
    return found


def _peer(case: Any, label: str, module: str) -> OpPeer:
    from importlib import import_module

    varlen = import_module(module).flash_attn_varlen_func
    dims = case.call.dims
    longest = max(dims["lengths"])

    def call(values: Any) -> Any:
        q, k, v, cu = values[:4]
        out = varlen(q, k, v, cu, cu, longest, longest, causal=dims["causal"])
        return out[0] if isinstance(out, tuple) else out

    return OpPeer(label, call)
