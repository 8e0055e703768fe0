"""Whether tensors still hold what something was made of: the writes that no version counter shows.

A weight can be written to in ways that leave its version and its address as they are: ``p.data.mul_(0.5)``, a
NumPy view, `torch._foreach_mul_` on ``p.data``. PyTorch can mark memory as *copy on write*: the first access
for writing, by whatever alias and whatever op, takes the mark off. `Watch` puts the mark on the memory of a
tensor and keeps no second copy, so the access finds itself the only owner: nothing is copied, nothing moves,
and a mark that is gone says that somebody may have written. Asking costs a tenth of a microsecond a tensor.

What is seen, when the watch is next asked:

- every write through PyTorch, in place or by ``.data``, by views and by optimisers, also in inference mode;
- every write through NumPy. A call of ``.numpy()`` takes the mark off too, and shows on the memory for good:
  such a tensor, one that was made of an array, and one whose memory is a mapped file or shared with other
  processes, are compared with a copy, bit by bit, each time: right, and as slow as reading them;
- other memory, another shape or stride (``p.data = new``).

What only takes an address, ``p.data_ptr()`` or DLPack, counts as a write. What it does with an address that
it took *before* the tensor was watched is not seen: `forget` is for programs that write that way.
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
"""Without these (they are PyTorch's own affair) every tensor is compared with a copy."""

_lock = threading.RLock()
_watching: dict[int, WeakSet[Watch]] = {}
"""Number of a tensor object, or of a storage -> who watches it. Numbers are used again: more may be told than
need be, never fewer."""
_tidy_at = 1024

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Watch:
    """The state of some tensors on the CPU, from its making on. It holds none of them.

    It is made before the tensors are read: a write while something is made of them is seen then, too.
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
        """Whether these, which must be the same objects in the same order, are as they were."""
        if self._stale or list(map(Tensor.stride, tensors)) != self._strides:
            return False
        if _addresses(tensors) != self._addresses:
            return False
        if not self._copies and not self._marked:
            return all(map(_is_marked, tensors))
        return all(_is_marked(tensors[place]) for place in self._marked) and all(
            _same_bits(tensors[place], copy) for place, copy in self._copies.items()
        )

    def forget(self) -> None:
        """From now on nothing is as it was."""
        self._stale = True


def forget(tensors: Sequence[Tensor]) -> None:
    """Everything made of these tensors is out of date."""
    with _lock:
        for tensor in tensors:
            _tell(tensor, None)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_address if _address is not None else Tensor.data_ptr, tensors))


def _mark(tensor: Tensor, watch: Watch) -> bool:
    """Put the mark on; False where it cannot be trusted or had."""
    if not _can_mark:
        return False
    storage = tensor.untyped_storage()
    if not storage.resizable():  # NumPy has, or had, a view of it
        return False
    if not _is_marked(tensor):
        _tell(tensor, watch)  # the others would take the new mark for theirs
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
