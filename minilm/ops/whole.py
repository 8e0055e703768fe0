"""Ops that replace several modules: a model's embeddings, all of its blocks, decoding steps.

Their reference runs the modules one by one; the folder with the modules registers it. A faster implementation
first has to examine the modules and the call to decide whether it can replace them
(`Implementation.examine`). The modules only call the op and do not depend on any implementation. An
implementation stores packed copies of the weights in the module (`Whole`), and detects itself when they are
out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import dispatch


class WholeTraits(NamedTuple):
    """Traits of a call that replaces several modules."""

    device: str
    dtype: torch.dtype
    obstacle: str | None = None
    """Why the modules have to run one by one (hooks, gradients, ...); None: they do not."""


MADE = "_made"
"""Key in a module's `__dict__` for what implementations derive from its weights (packed copies)."""


class Whole:
    """Base class of a module that such an op replaces. Packed copies of its weights are neither copied nor
    pickled with it: they are as large as the weights and can be created again."""

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy; without what `model.compile()` made, too, as nn.Module leaves it out."""
        return {k: v for k, v in self.__dict__.items() if k not in (MADE, "_compiled_call_impl")}


def register_modules(op: str, call: Callable[..., Any]) -> None:
    """Register `call`, which runs the modules one by one, for every backend except the native one."""
    for backend in ("triton", "torch", "reference"):
        dispatch.register(dispatch.Implementation(op, backend, call))


def run_whole(op: str, device: torch.device, dtype: torch.dtype, *arguments: Any) -> Any:
    """Run the op with these arguments, by the implementation that the current choice selects."""
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
