"""The faster implementations of the ops, by backend: PyTorch's fused kernels, the native extension, Triton.

Performance layer: skip on first reading. Each computes what `minilm.ops.reference` defines.
"""

from . import cuda, library, native, packed, triton, watch

__all__ = ["cuda", "library", "native", "packed", "triton", "watch"]
