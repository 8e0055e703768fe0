"""Detects changes to modules that a native forward pass replaces; checked at every call.

The native call replaces modules, so users' changes to them must take effect: replaced weights, modules and
settings, hooks, an overridden `forward`. `Structure` records everything that a body contains and checks in a
few microseconds whether it is unchanged; `other_code` finds changes to all modules at once. Writes to the
values of weights are detected by `minilm.ops.backends.watch`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from operator import attrgetter, is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..model import (
    MLP,
    Attention,
    AutoModelForCausalLM,
    Block,
    CausalLMHead,
    Embedding,
    Embeddings,
    Linear,
    Norm,
    Transformer,
)
from ..ops import MADE
from ..ops.backends import native
from ..quantized import QuantizedEmbedding, QuantizedLinear

SETTINGS: dict[type, tuple[str, ...]] = {
    Embedding: ("max_norm",),
    Transformer: ("config",),
    Block: ("pre_norm", "parallel", "dropout"),
    Attention: ("config", "layer", "scale", "window"),
    MLP: ("activation", "gated"),
    Norm: ("eps", "rms", "plus_one"),
    Embeddings: ("config",),
    CausalLMHead: ("soft_cap",),
}
"""Attributes of a module that affect its result, apart from submodules and parameters."""

_CLASSES: tuple[type, ...] = (
    *SETTINGS,
    Linear,
    QuantizedLinear,
    QuantizedEmbedding,
    AutoModelForCausalLM,
)


def _methods() -> Iterator[tuple[type, str, object]]:
    """The methods of these classes."""
    for cls in _CLASSES:
        names = {name for name, value in vars(cls).items() if isinstance(value, FunctionType | property)}
        for name in sorted(names | {"forward", "__call__", "_call_impl"}):
            yield cls, name, getattr(cls, name)
    yield AutoModelForCausalLM, "run_packed", AutoModelForCausalLM.run_packed


def _foreign(cls: type, name: str, method: object) -> bool:
    """Whether a method of a class was replaced before this module was imported."""
    if name not in vars(cls) or not isinstance(method, FunctionType):
        return False
    return method.__qualname__ != f"{cls.__qualname__}.{name}" or hasattr(method, "__wrapped__")


_OWNERS, _NAMES, _FUNCTIONS = zip(*_methods(), strict=True)
_EARLY = next((f"{c.__name__}.{n}" for c, n, f in _methods() if _foreign(c, n, f)), None)


def other_code() -> str | None:
    """A change to all modules, or to this call, that needs the modules; or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are forward hooks for all modules"
    if not all(map(is_, map(getattr, _OWNERS, _NAMES), _FUNCTIONS)):
        found = zip(_OWNERS, _NAMES, _FUNCTIONS, strict=True)
        name = next((f"{c.__name__}.{n}" for c, n, f in found if getattr(c, n) is not f), "a method")
        return f"{name} was replaced"
    if _EARLY is not None:
        return f"{_EARLY} was replaced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    return None


def own_code(modules: Iterable[nn.Module], names: Collection[str] | None = None) -> str | None:
    """A method (with one of these names, or any) that one of these modules overrides; or None."""
    for module in modules:
        kind = type(module)
        methods = _method_names(kind)  # type: ignore[arg-type]
        if not methods.isdisjoint(module.__dict__):
            own = [n for n in module.__dict__ if n in methods and (names is None or n in names)]
            if own:
                return f"a {kind.__name__} has its own {own[0]}"
    return None


@lru_cache(maxsize=256)
def _method_names(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if isinstance(getattr(kind, name, None), FunctionType))


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has forward hooks."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


class Structure:
    """The contents of some modules: submodules, parameters and buffers, settings, hooks, own attributes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = tuple(modules)
        held = [item for module in self.modules for item in _held(module)]
        owners, keys, things = zip(*held, strict=True) if held else ((), (), ())
        dicts = [
            table
            for module in self.modules
            for table in (module.__dict__, module._forward_hooks, module._forward_pre_hooks)
        ]
        self._all = (
            owners,
            keys,
            things,
            tuple(dicts),
            tuple(map(len, dicts)),
            self.modules,
            tuple(map(type, self.modules)),
        )

    def stands(self) -> bool:
        """Whether everything is unchanged."""
        return bool(_same(*self._all))

    def kinds(self) -> list[object]:
        """Dtypes and devices of all tensors, which ``module.double()`` changes in place."""
        things = [thing for thing in self._all[2] if isinstance(thing, Tensor)]
        return [*map(_DTYPE, things), *map(_DEVICE, things)]


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, object]]:
    own = module.__dict__
    # Not `module._buffers`, which asks for released planes (`released`).
    for table in (own["_parameters"], own["_buffers"], own["_modules"]):
        for key, value in table.items():
            yield table, key, value
    for name in (*SETTINGS.get(type(module), ()), "training"):
        yield own, name, own.get(name)


_same: Any = None if native.unavailable is not None else importlib.import_module("minilm._C").same


class Made:
    """The packed copy of one module's weights, with a lock, so that concurrent threads pack only once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.blocks: Any = None
        self.ends: Any = None


def made_of(module: nn.Module) -> Made:
    """The storage for packed copies of a module's weights; neither copied nor pickled with the module
    (`minilm.ops.Whole`)."""
    made: Made | None = module.__dict__.get(MADE)
    return module.__dict__.setdefault(MADE, Made()) if made is None else made
