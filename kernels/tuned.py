"""Tables of measured configurations, which heuristics look up before they compute a block.

A table is a JSON file {"version": 1, "entries": [...]} of entries

    {"device": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "kernel": "attention",
     "shape": {"head_dim": 64, "itemsize": 2, "max_queries": 512, "max_keys": 512},
     "block": {"queries": 128, "keys": 64, "num_warps": 4, "num_stages": 3}, ...}

and further data from `minilm tune` about the measurement. `shape` has the heuristic's arguments, with sizes
that vary from call to call rounded up to a power of two; `block` is its result. An entry with the device's
own name takes precedence over one with the same compute capability; the user's table (`own_path`) over the
one that is shipped with this file. Nothing is measured during a call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, get_type_hints

from .devices import Device

SHIPPED = Path(__file__).with_name("tuned.json")
VERSION = 1

Shape = tuple[tuple[str, int], ...]
Configurations = dict[tuple[str | tuple[int, int], str, Shape], dict[str, int]]


class Asked(NamedTuple):
    """One call of a heuristic, and its own result (which a table may have overridden)."""

    kernel: str
    shape: Shape
    sizes: dict[str, int]
    answer: Any
    device: Device


class TableError(ValueError):
    """A table of tuned configurations cannot be read; the message names the file."""


def own_path() -> Path | None:
    """The user's table: $MINILM_TUNED, or tuned.json in minilm's folder in the user's cache. If MINILM_TUNED
    is empty, only the shipped table is used."""
    named = os.environ.get("MINILM_TUNED")
    if named is not None:
        return Path(named) if named else None
    cached = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cached).expanduser() / "minilm" / "tuned.json"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a table; raises TableError if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: not JSON ({error})") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise TableError(f"{path}: version {version!r}, and this minilm reads version {VERSION}")
    for entry in data["entries"]:
        missing = {"device", "capability", "kernel", "shape", "block"} - set(entry)
        if missing:
            raise TableError(f"{path}: an entry lacks {', '.join(sorted(missing))}: {entry}")
    entries: list[dict[str, Any]] = data["entries"]
    return entries


def index(entries: Iterable[dict[str, Any]]) -> Configurations:
    """Entries by (name or capability of the device, kernel, shape); later ones replace earlier ones."""
    found: Configurations = {}
    for entry in entries:
        shape = tuple(sorted(entry["shape"].items()))
        for device in (tuple(entry["capability"]), entry["device"]):
            found[device, entry["kernel"], shape] = entry["block"]
    return found


@cache
def _table() -> Configurations:
    own = own_path()
    entries = read_entries(SHIPPED)
    if own is not None and own.is_file():
        entries = entries + read_entries(own)
    return index(entries)


reload = _table.cache_clear
"""Forget the tables, so that the next call reads them again."""

_forced: dict[str, dict[str, int]] = {}
_observers: list[list[Asked]] = []


@contextmanager
def forced(kernel: str, block: dict[str, int]) -> Iterator[None]:
    """Inside, the heuristic of `kernel` returns `block`; used to measure candidates."""
    _forced[kernel] = block
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def observed() -> Iterator[list[Asked]]:
    """Inside, calls of the heuristics are recorded in the list."""
    asked: list[Asked] = []
    _observers.append(asked)
    try:
        yield asked
    finally:
        _observers.pop()


def find(kernel: str, device: Device, shape: Shape) -> dict[str, int] | None:
    """The measured block for this shape on this device, or on one of its compute capability."""
    if kernel in _forced:
        return _forced[kernel]
    table = _table()
    return table.get((device.name, kernel, shape)) or table.get((device.capability, kernel, shape))


P = ParamSpec("P")
B = TypeVar("B")


class Tunable(Generic[P, B]):
    """A heuristic, f(sizes..., device) -> a NamedTuple of integers, that tables can override."""

    def __init__(self, kernel: str, varying: tuple[str, ...], heuristic: Callable[P, B]) -> None:
        self.kernel, self.heuristic = kernel, heuristic
        self.__doc__, self.__name__ = heuristic.__doc__, heuristic.__name__
        self._varying = varying
        self._names = tuple(signature(heuristic).parameters)
        self._block = get_type_hints(heuristic)["return"]
        ALL[kernel] = self

    def shape(self, *sizes: int) -> Shape:
        """The key of a call: names and sizes without the device, sorted by name."""
        named = zip(self._names[:-1], sizes, strict=True)
        return tuple(sorted((n, _power_of_2(v) if n in self._varying else int(v)) for n, v in named))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> B:
        if not (_forced or _observers or _table()):
            return self.heuristic(*args, **kwargs)
        values: list[Any] = [*args, *(kwargs[name] for name in self._names[len(args) :])]
        *sizes, device = values
        shape = self.shape(*sizes)
        for asked in _observers:
            named = dict(zip(self._names, sizes, strict=False))
            asked.append(Asked(self.kernel, shape, named, self.heuristic(*args, **kwargs), device))
        block = find(self.kernel, device, shape)
        return self.heuristic(*args, **kwargs) if block is None else self.block(block)

    def block(self, fields: dict[str, int]) -> B:
        """Convert a table's `block` to the heuristic's result type."""
        if set(fields) != set(self._block._fields):
            expected = ", ".join(self._block._fields)
            raise TableError(f"a tuned block of {self.kernel} is {fields}, and must have {expected}")
        block: B = self._block(**fields)
        return block


ALL: dict[str, Tunable[..., Any]] = {}
"""Heuristics by the name of their kernel in the tables."""


def tunable(kernel: str, *varying: str) -> Callable[[Callable[P, B]], Tunable[P, B]]:
    """Decorator: look up the tables under `kernel` first. `varying`: arguments rounded to powers of two."""

    def decorate(heuristic: Callable[P, B]) -> Tunable[P, B]:
        return Tunable(kernel, varying, heuristic)

    return decorate


def _power_of_2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
