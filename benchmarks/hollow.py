"""Large tensors without values, for dry runs.

A dry run only finds the sizes with which launchers are called, and never runs a kernel. Inside `hollow()`,
operations on large tensors return uninitialised tensors of the right shape, dtype and strides, whose memory
is never touched, or ones if the result is small. Small tensors, which hold lengths and positions, are
computed normally."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LARGE = 1 << 14
"""Tensors of at least this many elements have no values."""


class _Hollow(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # minilm's ops are the launchers in question.
        if func.namespace != "aten" or func.is_view or not _large(args, kwargs):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            written = kwargs.get("out", args[0] if args else None)
            return written if len(func._schema.returns) == 1 else None
        try:
            asked = {name: value for name, value in kwargs.items() if name != "generator"}
            if "device" in asked:
                asked["device"] = torch.device("meta")
            shapes = func(*tree_map(_on_meta, args), **tree_map(_on_meta, asked))
        except (RuntimeError, NotImplementedError, TypeError):  # its shape depends on values
            return func(*args, **kwargs)
        return tree_map(_empty, shapes)


def _large(args: Any, kwargs: Any) -> bool:
    """Whether an operand is large or, for functions that create tensors, the result."""
    leaves, _ = tree_flatten((args, kwargs))
    if any(isinstance(leaf, torch.Tensor) and leaf.numel() >= LARGE for leaf in leaves):
        return True
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return all(isinstance(n, int) for n in sizes) and math.prod(sizes) >= LARGE


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _empty(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() < LARGE:  # somebody may read it: a sum, a largest value, whether all are finite
        return torch.ones(value.size(), dtype=value.dtype)
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")


@contextmanager
def hollow() -> Iterator[None]:
    """See the module. For tensors on the CPU."""
    with _Hollow():
        yield
