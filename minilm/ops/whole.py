"""Ops that stand for several modules: a model's embeddings, all of its blocks, steps of decoding.

Their reference runs the modules one by one, and the folder that has the modules registers it. Another
implementation must look at the modules, and at what the call asks for, before it can say whether it may stand
in for them: `Implementation.examine`. So the modules call the op and know of no implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import dispatch


class WholeTraits(NamedTuple):
    """A call that stands for several modules."""

    device: str
    dtype: torch.dtype
    obstacle: str | None = None
    """Why the call needs the modules one by one; None: it does not."""


def register_modules(op: str, call: Callable[..., Any]) -> None:
    """`call` runs the modules one by one: the way of every backend but the native one."""
    for backend in ("triton", "torch", "reference"):
        dispatch.register(dispatch.Implementation(op, backend, call))


def run_whole(op: str, device: torch.device, dtype: torch.dtype, *arguments: Any) -> Any:
    """The op with these arguments, by the implementation that the choice in force gives."""
    obstacle: str | None = "torch.compile traces the modules"
    if not torch.compiler.is_compiling():
        native = dispatch.implementations(op).get("native")
        obstacle = None if native is None or native.examine is None else native.examine(*arguments)
    return dispatch.select(op, WholeTraits(device.type, dtype, obstacle))(*arguments)
