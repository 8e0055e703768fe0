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
from typing import Any, TypeVar

import torch

from .. import dispatch

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST_NORM = 16384
"""Channels of a row that the normalisation kernels can hold in registers."""

LARGEST_HEAD = 256
"""Head size of the attention kernels."""


def _untraced(function: F) -> F:
    """torch.compile runs what is marked so while it traces, as it must an import, and takes the answer. (What
    torch.compiler.assume_constant_result does; that would import half of torch.compile.)"""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Launcher:
    """The function behind an op, once it is imported. An object for each op: what torch.compile has looked at
    does not change afterwards."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.function: Any = None


_launchers: dict[str, _Launcher] = {}


@_untraced
def _module(name: str) -> Any:
    """minilm.kernels.<name>; without a CUDA device, with the interpreter switched on first."""
    if not torch.cuda.is_available() and "triton" not in sys.modules:  # later would be too late
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
    """What every kernel needs: Triton, a device it runs on, a dtype it knows."""
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
        return f"the Triton kernels know no cache of {traits.cache_dtype}, but of 32 and 16 bits and int8"
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
    """`op` is the function of its name in minilm.kernels.<module>, imported when it is first chosen."""
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
