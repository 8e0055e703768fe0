"""The operations (ops) that a Transformer is made of: one function each, whose docstring is its contract.

Every function checks its arguments, summarises the call as *traits* (a tuple of device, dtype, sizes), and
`minilm.ops.dispatch` selects an implementation by them: the reference (eager PyTorch, the specification),
PyTorch's fused kernels, the native extension or Triton. The last three are in `backends/`, the performance
layer: skip it on first reading.

Layout: tokens of all sequences are concatenated. q is [T, H, D], k and v are [T, Hkv, D]; sequence b owns the
tokens ``cu_seqlens[b]:cu_seqlens[b + 1]`` (int32, [B + 1]). The cache has pages, [pages, page size, Hkv, D]
per layer; int8 pages come with scales, float32 [pages, page size, Hkv], and their values are ``pages *
scales``. All ops return new tensors, except `append_kv` and `rope_append`, which write into the given pages
(and scales).
"""

from __future__ import annotations

from . import dispatch, reference
from .attend import AttentionTraits, attention, attention_probs, attention_with_lse, writes_lse
from .backends import cuda, library, native, triton
from .backends.opaque import compilable
from .cached import PagedTraits, append_kv, paged_attention, rope, rope_append
from .dispatch import BackendError, Implementation, backend, explain, register
from .losses import cross_entropy, linear_cross_entropy
from .norms import NormTraits, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .pooling import PoolTraits, pool
from .project import FEW_ROWS, LinearTraits, QuantizedTraits, gated, linear, quantized_linear
from .quantized import FORMATS, QuantizedWeight, dequantise
from .reference import ACTIVATIONS
from .traits import PointwiseTraits
from .whole import MADE, Whole, WholeTraits, register_modules, run_whole

__all__ = [
    "ACTIVATIONS", "FEW_ROWS", "FORMATS", "MADE", "AttentionTraits", "BackendError", "LinearTraits",
    "NormTraits", "PagedTraits", "PointwiseTraits", "PoolTraits", "QuantizedTraits", "QuantizedWeight",
    "Whole", "WholeTraits", "add_layer_norm", "add_rms_norm", "append_kv", "attention", "attention_probs",
    "attention_with_lse", "backend", "backends", "cross_entropy", "dequantise", "dispatch", "explain",
    "gated", "layer_norm", "linear", "linear_cross_entropy", "paged_attention", "pool", "quantized",
    "quantized_linear", "register_modules", "rms_norm", "rope", "rope_append", "run_whole", "writes_lse",
]  # fmt: skip

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
    "pool",
    "cross_entropy",
    "linear_cross_entropy",
):
    register(Implementation(_op, "reference", getattr(reference, _op)))
register(Implementation("attention", "reference", compilable("reference", reference.attention)))
for _backend in (library, native, cuda, triton):
    _backend.register_all()
