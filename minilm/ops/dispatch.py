"""Dispatch: selects the implementation of an op, records why the others did not run, and lets users choose.

Every op of `minilm.ops` has a *reference* (eager PyTorch, the specification) and may have faster
implementations, all in one table, ``(op, backend) -> Implementation``. Before a call, the op summarises it in
a small hashable tuple, its *traits* (device, dtype, head size, ...). `select` tries the backends in the
device's order of preference and takes the first whose ``supports(traits)`` returns None; otherwise it returns
the reason why it cannot run the call.

There are two kinds of choice:

- automatic: an unsuitable backend is skipped, and its reason is kept for `explain`;
- explicit (``with backend("triton"):`` or ``MINILM_BACKEND=triton``): only the named backends, in this order.
  If none of them can run the call, `BackendError` gives the reasons. There is no silent fallback.

A decision depends only on the traits and on the choice, so it is made once and then cached.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch


class Traits(Protocol):
    """The properties of a call by which an implementation decides whether it supports it. Each op has its own
    tuple; these two are in all of them."""

    @property
    def device(self) -> str: ...  # "cpu", "cuda", "meta", ...

    @property
    def dtype(self) -> torch.dtype: ...


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run a call; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute `op`: `call` has the op's own signature; `supports` returns None, or the reason why
    it cannot run the call."""

    op: str
    backend: str
    call: Callable[..., Any]
    supports: Callable[[Any], str | None] = lambda traits: None
    examine: Callable[..., str | Callable[..., Any] | None] | None = None
    """For an op that replaces modules (`minilm.ops.whole`). Takes the arguments of a call and returns the
    reason why the modules have to run one by one, else None, or a function to call instead of `call`; the
    function holds the state that was examined, since another thread may change it before the call."""


@dataclass
class Decision:
    """The result for one op and one set of traits: the chosen implementation, and why each of the others did
    not run."""

    op: str
    traits: Any
    wanted: tuple[str, ...] | None
    chosen: Implementation
    refused: dict[str, str]
    calls: int = 0


BACKENDS = ("native", "triton", "torch", "reference")
"""native: the C++/CUDA extension · triton: `minilm.kernels` · torch: PyTorch's own fused kernels · reference:
eager."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    # On a CPU, Triton runs in its interpreter: correct, but far too slow to be chosen automatically.
    "cpu": ("native", "torch", "reference"),
    "cuda": ("native", "triton", "torch", "reference"),
}
DEFAULT_PREFERENCE = ("torch", "reference")

PLUGINS = {"embed": "minilm.native", "blocks": "minilm.native", "decode_step": "minilm.native"}
"""Ops whose implementations are in a folder that imports this one: op -> the module that registers them. The
module is imported when such an op is first looked up."""

_table: dict[str, dict[str, Implementation]] = {}
_plugged: set[str] = set()
_unavailable: dict[str, str] = {}
_decisions: dict[tuple[str, Any, tuple[str, ...] | None], Decision] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation to the table (the last registration of an (op, backend) pair wins)."""
    if implementation.backend not in BACKENDS:
        raise ValueError(f"unknown backend {implementation.backend!r}; expected one of {', '.join(BACKENDS)}")
    _table.setdefault(implementation.op, {})[implementation.backend] = implementation
    _decisions.clear()


def register_unavailable(backend: str, reason: str) -> None:
    """Record why a whole backend is unavailable in this process ("triton is not installed"), for `explain`
    and errors."""
    _unavailable[backend] = reason
    _decisions.clear()


def implementations(op: str) -> dict[str, Implementation]:
    """The implementations of `op` by backend (read-only)."""
    if not torch.compiler.is_compiling() and op in PLUGINS and op not in _plugged:
        _plugged.add(op)
        import_module(PLUGINS[op])
    return _table.get(op, {})


def ops() -> list[str]:
    """Names of all ops in the table."""
    return sorted({*_table, *PLUGINS})


@dataclass(frozen=True)
class _Choice:
    default: tuple[str, ...] | None = None
    per_op: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _parse(names: str | Sequence[str]) -> tuple[str, ...]:
    parts = tuple(p.strip() for p in names.split(",")) if isinstance(names, str) else tuple(names)
    for part in parts:
        if part not in BACKENDS:
            raise ValueError(f"unknown backend {part!r}; expected one of {', '.join(BACKENDS)}")
    return parts


def _choice_from_environment() -> _Choice:
    value = os.environ.get("MINILM_BACKEND", "").strip()
    if not value or value == "auto":
        return _Choice()
    try:
        return _Choice(_parse(value))
    except ValueError as error:
        raise BackendError(f"MINILM_BACKEND={value}: {error}") from None


class _Thread(threading.local):  # not a ContextVar: torch.compile cannot trace one
    def __init__(self) -> None:  # torch.compile would not guard a class attribute
        self.choice: _Choice | None = None


_thread = _Thread()
_environment: _Choice | None = None
_EXPORTED = _Choice(("reference",))
"""What is exported runs without minilm, so it is made of PyTorch's own ops."""


def _current() -> _Choice:
    global _environment
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        return _EXPORTED
    if _thread.choice is not None:
        return _thread.choice
    if _environment is None:
        _environment = _choice_from_environment()
    return _environment


@contextmanager
def backend(*names: str, **per_op: str | Sequence[str]) -> Iterator[None]:
    """Choose implementations for the calls inside the ``with`` block, in this thread.

    ``backend("reference")`` allows one backend for every op; ``backend("native", "reference")`` several, in
    this order; ``backend(attention="torch")`` changes one op only; ``backend("auto")`` restores the automatic
    choice. A call that none of the named backends can run raises `BackendError`.
    """
    outer = _current()
    default = outer.default if not names else None if names == ("auto",) else _parse(names)
    for op in per_op:
        if op not in ops():
            raise ValueError(f"unknown op {op!r}; expected one of {', '.join(ops())}")
    kept = outer.per_op if not names else {}
    chosen = _Choice(default, {**kept, **{op: _parse(value) for op, value in per_op.items()}})
    before, _thread.choice = _thread.choice, chosen
    try:
        yield
    finally:
        _thread.choice = before


def _decide(op: str, traits: Traits, wanted: tuple[str, ...] | None) -> Decision:
    refused: dict[str, str] = {}
    candidates = wanted or PREFERENCE.get(traits.device, DEFAULT_PREFERENCE)
    known = implementations(op)
    for name in candidates:
        implementation = known.get(name)
        if implementation is None:
            refused[name] = _unavailable.get(name, f"there is no {name} implementation of {op}")
            continue
        reason = implementation.supports(traits)
        if reason is None:
            for other in BACKENDS:
                if other not in refused and other != name and other in known:
                    refused[other] = (
                        f"not requested (chosen: {', '.join(wanted)})"
                        if wanted and other not in wanted
                        else "comes later in the order of preference"
                        if other in candidates
                        else f"is not chosen automatically on {traits.device}"
                    )
            return Decision(op, traits, wanted, implementation, refused)
        refused[name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise BackendError(
        f"{op} cannot run on {traits.device} in {traits.dtype} with the requested backend: {why}"
    )


def select(op: str, traits: Traits) -> Callable[..., Any]:
    """The implementation of `op` for a call with these traits, under the current choice. Raises
    `BackendError`."""
    choice = _current()
    wanted = choice.per_op.get(op, choice.default)
    if torch.compiler.is_compiling():  # a graph would be made again when others add decisions
        return _decide(op, traits, wanted).chosen.call
    key = (op, traits, wanted)
    decision = _decisions.get(key)
    if decision is None:
        decision = _decisions[key] = _decide(op, traits, wanted)
    decision.calls += 1
    return decision.chosen.call


def candidates(op: str, device: str) -> tuple[str, ...]:
    """The backends that may run the op under the current choice, in order of preference."""
    choice = _current()
    return choice.per_op.get(op, choice.default) or PREFERENCE.get(device, DEFAULT_PREFERENCE)


def decide(op: str, traits: Traits) -> Decision:
    """What `select` would choose for these traits, and why not the others; the call counts do not change."""
    choice = _current()
    return _decide(op, traits, choice.per_op.get(op, choice.default))


class Explanation:
    """What ran since the start (or the last `explain(reset=True)`); print it, or read `decisions`."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = list(decisions)

    def backends(self, op: str) -> set[str]:
        """The backends that ran `op`."""
        return {d.chosen.backend for d in self.decisions if d.op == op}

    def __str__(self) -> str:
        if not self.decisions:
            return "no op of minilm has run yet"
        lines = []
        for d in sorted(self.decisions, key=lambda d: (d.op, -d.calls)):
            detail = ", ".join(
                f"{name}={str(value).removeprefix('torch.')}"
                for name, value in zip(getattr(d.traits, "_fields", ()), d.traits, strict=False)
                if value not in (None, False)
            )
            lines.append(f"{d.op}: {d.chosen.backend} ({d.calls} call{'s' * (d.calls != 1)}; {detail})")
            lines.extend(f"    not {name}: {reason}" for name, reason in d.refused.items())
        return "\n".join(lines)

    __repr__ = __str__


def explain(*, reset: bool = False) -> Explanation:
    """What ran and why: for each op and kind of call, the implementation, the number of calls, and why others
    did not run. On a CPU without gradients all blocks of a model are one op, `blocks`, in one native call;
    otherwise the ops that `minilm.model.layers` calls are listed one by one.

    >>> import minilm
    >>> model(**batch); print(minilm.explain())          # doctest: +SKIP
    add_layer_norm: native (12 calls; device=cpu, dtype=float32, channels=384)
        not reference: comes later in the order of preference
    """
    result = Explanation([Decision(**vars(d)) for d in _decisions.values() if d.calls])
    if reset:
        for decision in _decisions.values():
            decision.calls = 0
    return result
