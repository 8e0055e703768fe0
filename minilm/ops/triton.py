"""The `triton` backend: kernels of `minilm.kernels` in the dispatch table.

Triton and the kernels are imported when a call first asks whether this backend supports it, not before. On a
CUDA device the kernels are compiled. On a CPU they run in Triton's interpreter, which is for tests and for
reading: it is taken only when asked for (``MINILM_BACKEND=triton``, ``with minilm.backend("triton")``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST_NORM = 16384
"""Channels of a row that the normalisation kernels can hold in registers."""

LARGEST_HEAD = 256
"""Head size of the attention kernels."""


@cache
def _module(name: str) -> Any:
    """minilm.kernels.<name>; without a CUDA device, with the interpreter switched on first."""
    if not torch.cuda.is_available() and "triton" not in sys.modules:  # later would be too late
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return importlib.import_module(f"minilm.kernels.{name}")


@cache
def unavailable() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("minilm.kernels") is None:
        return "the package minilm.kernels is not installed (pip install -e . maps it)"
    return None


def _refusal(traits: Any) -> str | None:
    """What every kernel needs: Triton, a device it runs on, a dtype it knows."""
    reason = unavailable()
    if reason is not None:
        return reason
    if traits.device not in ("cuda", "cpu"):
        return f"Triton kernels run on cuda, and in the interpreter on cpu, not on {traits.device}"
    if traits.dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {traits.dtype}"
    if traits.device == "cpu" and not _module("registration").INTERPRETED:
        return "on a CPU, Triton runs only in its interpreter (set TRITON_INTERPRET=1 before the start)"
    return None


def _norm_supports(traits: Any) -> str | None:
    reason = _refusal(traits)
    if reason is None and traits.channels > LONGEST_NORM:
        return f"a row of {traits.channels} channels does not fit in registers (at most {LONGEST_NORM})"
    return reason


def _attention_supports(traits: Any) -> str | None:
    reason = _refusal(traits)
    if reason is None and traits.head_dim > LARGEST_HEAD:
        return f"heads of {traits.head_dim} are larger than the kernels' tiles (at most {LARGEST_HEAD})"
    return reason


def _lazy(module: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(_module(module), function)(*args, **options)

    return call


def register_all() -> None:
    """Put the kernels into the dispatch table."""
    attention = _lazy("attention", "attention")
    dispatch.register(dispatch.Implementation("attention", "triton", attention, _attention_supports))
    for op in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"):
        dispatch.register(dispatch.Implementation(op, "triton", _lazy("norm", op), _norm_supports))
