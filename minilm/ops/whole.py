"""Ops that stand for several modules: a model's embeddings, all of its blocks, steps of decoding.

Their reference runs the modules one by one, and the folder that has the modules registers it. Another
implementation must look at the modules, and at what the call asks for, before it can say whether it may stand
in for them: `Implementation.examine`. So the modules call the op and know of no implementation. What it
makes of their weights it keeps with the module (`Whole`), and it finds it out of date by itself.
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


MADE = "_made"
"""Key in a module's `__dict__` of what implementations make of its weights."""


class Whole:
    """A module that such an op is called with: what was made of its weights is in none of its copies and not
    written into files, as it is as large as they are and can be made again."""

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy; without what `model.compile()` made, too, as nn.Module leaves it out."""
        return {k: v for k, v in self.__dict__.items() if k not in (MADE, "_compiled_call_impl")}


def register_modules(op: str, call: Callable[..., Any]) -> None:
    """`call` runs the modules one by one: the way of every backend but the native one."""
    for backend in ("triton", "torch", "reference"):
        dispatch.register(dispatch.Implementation(op, backend, call))


def run_whole(op: str, device: torch.device, dtype: torch.dtype, *arguments: Any) -> Any:
    """The op with these arguments, by the implementation that the choice in force gives."""
    found: Any = "torch.compile traces the modules"
    native = None
    if not torch.compiler.is_compiling():
        native = dispatch.implementations(op).get("native")
        wanted = native is not None and "native" in dispatch.candidates(op, device.type)
        found = native.examine(*arguments) if wanted and native and native.examine else None
    obstacle = found if isinstance(found, str) else None
    call = dispatch.select(op, WholeTraits(device.type, dtype, obstacle))
    if native is not None and call is native.call and callable(found):
        call = found
    return call(*arguments)
