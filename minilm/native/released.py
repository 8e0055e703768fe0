"""Quantised layers whose planes are held once: in the packed form of the native kernels.

A quantised layer that the native kernels run keeps two copies of its matrix: its planes (`codes`, `scale`,
`minimum`) and the packed form, which has the same numbers in another order. `release` drops the planes, if
nobody but the layer holds them, and makes the layer one of a *released* class: whatever then asks for the
planes (an attribute, `state_dict()`, `buffers()`, `.to()`, a copy, a pickle) unpacks them first, bit for bit,
and makes the layer an ordinary one again. So no code but this file has to know; what looks into a layer
without asking for planes reads its `__dict__`. A call of the layer runs on the packed form, if that is what
the dispatch would choose and the layer has no bias (which may have been written to); else it asks.

Planes that somebody asked for stay from then on, and are watched like all weights: they are not released a
second time.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.backends import packed
from ..quantized import QuantizedEmbedding, QuantizedLinear

PLANES = ("codes", "scale", "minimum")

_lock = threading.RLock()
_FORM = "_packed_form"
"""Key in the `__dict__` of a released layer: its `Form`."""
_ASKED = "_planes_stay"
"""Key in the `__dict__` of a layer whose planes were asked for once."""


class Form(NamedTuple):
    """The packed form of a released layer, and what it takes to unpack it (its part of an arena)."""

    packed: packed.Packed
    format: str
    rows: int
    columns: int
    names: tuple[str, ...]
    """Names of all buffers, in order."""


class _Released(nn.Module):
    """What released classes add to the class of the layer."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PLANES or name == "_buffers":
            restore(self)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in PLANES:
            restore(self)
            delattr(self, name)
        else:
            super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        restore(self)
        return self.__reduce_ex__(protocol)


class _ReleasedLinear(_Released):
    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """See `QuantizedLinear.forward`."""
        y = _product(self, x, activation)
        return QuantizedLinear.forward(self, x, activation) if y is None else y  # type: ignore[arg-type]


class _ReleasedTable(_Released):
    def scores(self, hidden: Tensor) -> Tensor:
        """See `QuantizedEmbedding.scores`."""
        y = _product(self, hidden, None)
        return QuantizedEmbedding.scores(self, hidden) if y is None else y  # type: ignore[arg-type]


def _product(layer: nn.Module, x: Tensor, activation: str | None) -> Tensor | None:
    """x times the packed matrix; None if another implementation is to run, or the call is wrong."""
    if torch.compiler.is_compiling() or layer.__dict__["_parameters"].get("bias") is not None:
        return None
    form = form_of(layer)
    if form is None or x.dim() == 0 or x.shape[-1] != form.columns or activation not in packed.ACTIVATIONS:
        return None
    traits = ops.QuantizedTraits.of(x, form.format, None, activation)
    if ops.dispatch.decide("quantized_linear", traits).chosen.call is not packed.quantized_linear:
        return None
    ops.dispatch.select("quantized_linear", traits)  # counts the call
    return packed.product(x, form.packed, activation)


def _property(name: str) -> property:
    def get(self: nn.Module) -> Any:
        restore(self)
        return getattr(self, name)

    return property(get)


def _released(kind: type[nn.Module], base: type[_Released]) -> type[nn.Module]:
    """The released class of a class of layers; messages show the same name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    found: type[nn.Module] = type(
        kind.__name__, (base, kind), {**names, **{n: _property(n) for n in (*PLANES, "_buffers")}}
    )
    return found


_OF: dict[type, type[nn.Module]] = {
    QuantizedLinear: _released(QuantizedLinear, _ReleasedLinear),
    QuantizedEmbedding: _released(QuantizedEmbedding, _ReleasedTable),
}
_BACK: dict[type, type] = {released: kind for kind, released in _OF.items()}


def type_of(module: nn.Module) -> type:
    """The class of a module; of a released layer, the one that it will have again."""
    kind = type(module)
    return _BACK.get(kind, kind)


def form_of(module: nn.Module) -> Form | None:
    """The packed form of a released layer; None for any other module."""
    found: Form | None = module.__dict__.get(_FORM)
    return found


def may_release(layer: nn.Module) -> bool:
    """Whether `release` would try."""
    return type(layer) in _OF and _ASKED not in layer.__dict__


def release(layer: nn.Module, form: packed.Packed) -> bool:
    """Drop the planes of a quantised layer that was packed as `form`; False if they have to stay: somebody
    else holds them or shares their memory, or asked for them before."""
    with _lock:
        if not may_release(layer):
            return False
        matrix: Any = layer.quantized
        (rows, columns), format = matrix.shape, matrix.format
        del matrix
        names = tuple(layer.__dict__["_buffers"])
        layer.__dict__[_FORM] = Form(form, format, rows, columns, names)
        # From here on, other threads find the layer released, and wait for this lock.
        object.__setattr__(layer, "__class__", _OF[type(layer)])
        held = {"buffers": layer.__dict__["_buffers"]}
        alone = False
        try:
            layer.__dict__["_buffers"] = {k: v for k, v in held["buffers"].items() if k not in PLANES}
            alone = _references(held, "buffers") == _references({"buffers": {}}, "buffers") and all(
                _is_alone(held["buffers"], name) for name in PLANES
            )
        finally:
            if not alone:
                layer.__dict__["_buffers"] = held["buffers"]
                _make_ordinary(layer)
        return alone


def restore(layer: nn.Module, *, asked: bool = True) -> None:
    """Unpack the planes of a released layer; others stay as they are. `asked`: they are to stay."""
    with _lock:
        form = form_of(layer)
        if form is None:
            return
        with torch.inference_mode(False):
            planes = packed.unpack(form.packed, form.format, form.rows, form.columns)
        rest = layer.__dict__["_buffers"]
        found = {n: getattr(planes, n) if n in PLANES else rest[n] for n in form.names}
        layer.__dict__["_buffers"] = found | {n: t for n, t in rest.items() if n not in found}
        if asked:
            layer.__dict__[_ASKED] = True
            if getattr(layer, "bias", None) is None:  # else it may have been written to
                packed.share(packed.sources_of(planes, None), form.packed)
        _make_ordinary(layer)


def _make_ordinary(layer: nn.Module) -> None:
    object.__setattr__(layer, "__class__", type_of(layer))
    layer.__dict__.pop(_FORM, None)


def _references(holder: dict[str, Any], name: str) -> int:
    """References to an object that a dict holds. How many there are of one that only the dict holds depends
    on the interpreter; so this is compared with that of a new object."""
    return sys.getrefcount(holder[name])


def _is_alone(planes: dict[str, Any], name: str) -> bool:
    """Whether a plane is nobody else's, and can be unpacked bit for bit."""
    plane = planes[name]
    if plane is None:
        return True
    plain = type(plane) is Tensor and not plane.requires_grad and not plane.__dict__
    if not plain or plane.device.type != "cpu" or plane.layout != torch.strided or not plane.is_contiguous():
        return False
    storage = plane.untyped_storage()
    if storage.nbytes() != plane.nbytes or not storage.resizable():  # NumPy has, or had, a view of it
        return False
    del storage
    if plane.is_floating_point() and not bool(plane.isfinite().all()):  # NaN may become another NaN
        return False
    del plane
    new = {name: torch.empty(1)}
    return _references(planes, name) == _references(new, name) and packed.has_one_owner(planes[name])
