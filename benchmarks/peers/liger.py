"""Liger-Kernel's Triton kernels (GPU only)."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped, require_package


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """For the norms, the gated activation and the cross entropies."""
    if case.op not in ("layer_norm", "rms_norm", "gated", "cross_entropy", "linear_cross_entropy"):
        return []
    if device != "cuda":
        return [Skipped("Liger", "its kernels are Triton for a GPU")]
    if reason := require_package("liger_kernel"):
        return [Skipped("Liger", reason)]
    if case.op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return [OpPeer("Liger", lambda v: LigerLayerNormFunction.apply(v[0], v[1], v[2], case.spec.norm_eps))]
    if case.op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return [
            OpPeer(
                "Liger",
                lambda v: LigerRMSNormFunction.apply(v[0], v[1], case.spec.norm_eps, 0.0, "llama", False),
            )
        ]
    if case.op == "gated":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        inner = case.call.dims["F"]

        def halves(values: Any) -> Any:
            return values[0][:, :inner].contiguous(), values[0][:, inner:].contiguous()

        return [OpPeer("Liger", lambda v: LigerSiLUMulFunction.apply(*v), halves)]
    if case.op == "linear_cross_entropy":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        from ..ops import reference_call

        def fused(hidden: Any, weight: Any, labels: Any, ignore_index: int) -> Any:
            return liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index)

        return [OpPeer("Liger", reference_call(case, fused))]
    from liger_kernel.transformers.functional import liger_cross_entropy

    return [OpPeer("Liger", lambda v: liger_cross_entropy(v[0], v[1]))]
