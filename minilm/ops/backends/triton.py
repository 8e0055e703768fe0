"""The `triton` backend: kernels of `minilm.kernels` in the dispatch table.

Triton and the kernels are imported when dispatch first considers this backend, not before. On a CUDA device
the kernels are compiled. On a CPU they run in Triton's interpreter, which is for tests and debugging, and
only on request (``MINILM_BACKEND=triton``, ``with minilm.backend("triton")``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .. import dispatch

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST_NORM = 16384
"""Maximum channels of a row that the normalisation kernels can hold in registers."""

LARGEST_HEAD = 256
"""Maximum head size of the attention kernels."""


def _untraced(function: F) -> F:
    """Mark a function for torch.compile to run while tracing (needed for imports) and take its result as a
    constant. Same as torch.compiler.assume_constant_result, which would import much of torch.compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Launcher:
    """Holds the function of an op once it is imported. One object per op, so that nothing that torch.compile
    has guarded changes later."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.function: Any = None


_launchers: dict[str, _Launcher] = {}


@_untraced
def _module(name: str) -> Any:
    """Import minilm.kernels.<name>; without a CUDA device, first turn the interpreter on."""
    if not torch.cuda.is_available() and "triton" not in sys.modules:  # no effect after triton's import
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return importlib.import_module(f"minilm.kernels.{name}")


@_untraced
def unavailable() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("minilm.kernels") is None:
        return "the package minilm.kernels is not installed (pip install -e . maps it)"
    return None


def _refusal(traits: Any) -> str | None:
    """Why no kernel can run the call (Triton, device or dtype), or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if traits.device not in ("cuda", "cpu"):
        return f"Triton kernels run on cuda, and in the interpreter on cpu, not on {traits.device}"
    if traits.dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {traits.dtype}"
    if traits.device == "cpu" and not (_module("registration").INTERPRETED or _module("devices").assumed()):
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


def _paged_supports(traits: Any) -> str | None:
    reason = _attention_supports(traits)
    if reason is None and traits.cache_dtype not in (*DTYPES, torch.int8):
        return f"the Triton kernels take caches of 32 and 16 bits and int8, not {traits.cache_dtype}"
    return reason


def _quantized_supports(traits: Any) -> str | None:
    reason = _refusal(traits)
    if reason is None and traits.grad:
        return "the kernel for quantised weights has no derivative"
    return reason


@_untraced
def _load(op: str) -> None:
    _launchers[op].function = getattr(_module(_launchers[op].module), op)


def _register(op: str, module: str, supports: Callable[[Any], str | None] = _refusal) -> None:
    """Register the function called `op` in minilm.kernels.<module>, imported when it is first chosen."""
    launcher = _launchers[op] = _Launcher(module)

    def supports_and_loads(traits: Any) -> str | None:
        reason = supports(traits)
        if reason is None:
            _load(op)
        return reason

    def call(*args: Any, **options: Any) -> Any:
        return launcher.function(*args, **options)

    dispatch.register(dispatch.Implementation(op, "triton", call, supports_and_loads))


def register_all() -> None:
    """Put the kernels into the dispatch table."""
    _register("attention", "attention", _attention_supports)
    _register("paged_attention", "decode", _paged_supports)
    _register("rope", "rope")
    for op in ("append_kv", "rope_append"):
        _register(op, "rope", _paged_supports)
    for op in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"):
        _register(op, "norm", _norm_supports)
    for op in ("linear", "gated"):
        _register(op, "activation")
    for op in ("cross_entropy", "linear_cross_entropy"):
        _register(op, op)
    _register("quantized_linear", "quantized_matmul", _quantized_supports)
