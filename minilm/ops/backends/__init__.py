"""The implementations of the ops beside the reference, by backend: PyTorch, the native extension, Triton."""

from . import cuda, library, native, packed, triton, watch

__all__ = ["cuda", "library", "native", "packed", "triton", "watch"]
