"""Detects whether tensors have changed since a packed copy was made, also by writes that do not change the
version counter.

Some writes to a weight change neither its version nor its address: ``p.data.mul_(0.5)``, a NumPy view,
`torch._foreach_mul_` on ``p.data``. PyTorch can mark memory as *copy on write*; the first write access,
through any alias and by any op, clears the mark. `Watch` sets the mark on the memory of a tensor without
keeping a second owner, so the write copies and moves nothing, and a cleared mark means that the tensor may
have been written to. A check takes 0.1 microseconds per tensor.

The next check detects:

- every write through PyTorch: in place, by ``.data``, views or optimisers, also in inference mode;
- every write through NumPy. A call of ``.numpy()`` also clears the mark, and such memory cannot be marked
  again. It, memory that came from an array, mapped files and memory shared between processes are compared
  bit by bit with a copy at each check: correct, but as slow as reading them;
- other memory, another shape or stride (``p.data = new``).

Taking an address (``p.data_ptr()``, DLPack) counts as a write. A write through an address taken *before* the
tensor was watched is not detected: programs that do so must call `forget`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_is_marked: Any = getattr(torch._C, "_is_cow_tensor", None)
_address: Any = getattr(torch._C, "_data_address", None)
_can_mark = _is_marked is not None and _address is not None and hasattr(torch, "_lazy_clone")
"""These functions are private to PyTorch; without them every tensor is compared with a copy."""

_lock = threading.RLock()
_watching: dict[int, WeakSet[Watch]] = {}
"""Id of a tensor object or of a storage -> its watches. Ids are reused, so a watch may be invalidated without
need, but never missed."""
_tidy_at = 1024

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Watch:
    """Watches CPU tensors for changes since its creation, without holding references to them.

    Create it before reading the tensors, so that writes during the reading are detected too.
    """

    __slots__ = ("__weakref__", "_addresses", "_copies", "_marked", "_stale", "_strides")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._stale = False
        self._copies: dict[int, Tensor] = {}
        with _lock, torch.no_grad():
            for place, tensor in enumerate(tensors):
                if tensor.nbytes and not _mark(tensor, self):
                    self._copies[place] = tensor.detach().clone()
        self._marked = [n for n, t in enumerate(tensors) if t.nbytes and n not in self._copies]
        if len(self._marked) == len(tensors):
            self._marked = []
        self._addresses = _addresses(tensors)
        self._strides = list(map(Tensor.stride, tensors))

    @property
    def told(self) -> bool:
        """Whether `forget` was called."""
        return self._stale

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors (the same objects, in the same order) are unchanged."""
        if self._stale or list(map(Tensor.stride, tensors)) != self._strides:
            return False
        if _addresses(tensors) != self._addresses:
            return False
        if not self._copies and not self._marked:
            return all(map(_is_marked, tensors))
        return all(_is_marked(tensors[place]) for place in self._marked) and all(
            _same_bits(tensors[place], copy) for place, copy in self._copies.items()
        )

    def part(self, tensors: Sequence[Tensor], places: Sequence[int]) -> Watch:
        """The watch of some of the tensors, since the same moment; `places`: where they stand among all."""
        part = Watch.__new__(Watch)
        with _lock:
            part._stale = self._stale
            part._copies = {n: self._copies[p] for n, p in enumerate(places) if p in self._copies}
            part._marked = [n for n, t in enumerate(tensors) if t.nbytes and n not in part._copies]
            for place in part._marked:
                _register(id(tensors[place]), part)
                _register(tensors[place].untyped_storage()._cdata, part)
            if len(part._marked) == len(tensors):
                part._marked = []
            part._addresses = [self._addresses[place] for place in places]
            part._strides = [self._strides[place] for place in places]
        return part

    def forget(self) -> None:
        """Treat the tensors as changed from now on."""
        self._stale = True


def forget(tensors: Sequence[Tensor]) -> None:
    """Mark everything that was derived from these tensors as out of date."""
    with _lock:
        for tensor in tensors:
            _tell(tensor, None)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_address if _address is not None else Tensor.data_ptr, tensors))


def _mark(tensor: Tensor, watch: Watch) -> bool:
    """Set the mark; False if the memory cannot be marked, or the mark would not be reliable."""
    if not _can_mark:
        return False
    storage = tensor.untyped_storage()
    if not storage.resizable():  # NumPy has, or had, a view of it
        return False
    if not _is_marked(tensor):
        _tell(tensor, watch)  # other watches would take the new mark for their own
        try:
            torch._lazy_clone(tensor)
        except RuntimeError:  # memory of a file, of an array, of several processes
            return False
    _register(id(tensor), watch)
    _register(storage._cdata, watch)
    return bool(_is_marked(tensor))


def _tell(tensor: Tensor, but: Watch | None) -> None:
    for number in (id(tensor), tensor.untyped_storage()._cdata):
        for watch in _watching.get(number, ()):
            if watch is not but:
                watch.forget()


def _register(number: int, watch: Watch) -> None:
    global _tidy_at
    if len(_watching) >= _tidy_at:
        for dead in [number for number, watches in _watching.items() if not watches]:
            del _watching[dead]
        _tidy_at = max(1024, 2 * len(_watching))
    _watching.setdefault(number, WeakSet()).add(watch)


def _same_bits(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.dtype != copy.dtype or tensor.shape != copy.shape:
        return False
    bits = _BITS[tensor.element_size()]
    return torch.equal(tensor.detach().view(bits), copy.view(bits))
