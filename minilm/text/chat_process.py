"""Runs chat templates in a process of their own, chat_worker.py, whose memory and time are limited.

A template can take any time and any memory, before it runs (constants are folded as it is compiled) and
within one call of C code (`center`, `replace`, a range that becomes a list), where nothing in this process
could stop it. The process is started with the first template, which takes about 0.1 s, and is kept: after
that a turn costs what two JSON texts through a pipe cost, less than a millisecond. A process that broke a
limit is ended and the next template gets another.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

_TAG = "\ufdd0"  # a noncharacter, which no key has; those that have it are sent as pairs
_MEMORY = 512 << 20  # bytes of address space, and so many more for each byte that was sent:
_MEMORY_OF_BYTE = 24
_START_SECONDS = 120.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")


class ProcessError(Exception):
    """The process could not be started, or is gone."""


def run(
    template: str,
    variables: Mapping[str, Any],
    *,
    seconds: float,
    characters: int,
    marks: tuple[str, str] | None,
) -> tuple[str, str]:
    """(what became of it, text). The first is "text", or "long" (it writes more than `characters`),
    "memory", "late" (it runs for more than `seconds`), "ended" (the process broke down), or "damaged",
    "forbidden", "refuses", "fails" with what was wrong as text.

    What JSON does not know, such as an image, is there for the template, but only as its text. Raises
    ProcessError, and ValueError or RecursionError for variables that cannot be sent."""
    request = {
        "template": template,
        "variables": _plain(variables),
        "seconds": seconds,
        "characters": characters,
        "marks": marks,
        "now": datetime.now().isoformat(),
    }
    data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
    with _state.lock:
        worker = _state.worker
        if worker is None or worker.poll() is not None:
            worker = _state.worker = _start()
        kind = "ended"
        try:
            reply, late = _exchange(worker, data, seconds)
            if reply is None:
                return ("late" if late else kind), ""
            kind, text = json.loads(reply.decode("utf-8", "surrogatepass"))
            return kind, text
        finally:
            if kind in ("ended", "memory"):
                _end()


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: subprocess.Popen[bytes] | None = None


_state = _State()


def _plain(value: Any) -> Any:
    """`value` as JSON has it; tuples, sets, other keys than strings and any other object are tagged."""
    kind = type(value)
    if kind is str or value is None or kind is bool or kind is int or kind is float:
        return value
    if kind is list:
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _plain(item) for key, item in value.items()}
        return {_TAG: "dict", "value": [{_TAG: "tuple", "value": _plain(list(p))} for p in value.items()]}
    for known in (str, int, float):  # members of an enum, numpy's float64
        if isinstance(value, known):
            return known.__str__(value) if known is str else known(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(item) for item in value]
        if isinstance(value, list):
            return items
        return {_TAG: "tuple" if isinstance(value, tuple) else "set", "value": items}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item())
    return {_TAG: "object", "value": str(value)}


def _start() -> subprocess.Popen[bytes]:
    folders = []
    for package in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ProcessError(f"the package {package} is missing")
        folders.append(str(Path(spec.origin).parent.parent))
    program = str(Path(__file__).with_name("chat_worker.py"))
    try:
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", program, *dict.fromkeys(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
    except (OSError, ValueError, TypeError) as problem:
        raise ProcessError(f"no process for it can be started: {problem}") from problem
    _state.worker = worker
    ready, _ = _read(worker, 6, _START_SECONDS)
    if ready != b"ready\n":
        _end()
        raise ProcessError("the process for it does not start")
    return worker


def _exchange(worker: subprocess.Popen[bytes], data: bytes, seconds: float) -> tuple[bytes | None, bool]:
    """The reply to a request, None if the process did not live to give it; and whether the time was up."""
    assert worker.stdin is not None
    memory = _MEMORY + _MEMORY_OF_BYTE * len(data)
    try:
        _write(worker.stdin, len(data).to_bytes(8, "big") + memory.to_bytes(8, "big") + data)
    except OSError:
        return None, False
    head, late = _read(worker, 8, seconds)
    if head is None:
        return None, late
    return _read(worker, int.from_bytes(head, "big"), seconds)


def _write(stream: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _read(worker: subprocess.Popen[bytes], size: int, seconds: float) -> tuple[bytes | None, bool]:
    """`size` bytes from the process, which is ended if they take more than `seconds`."""
    assert worker.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        worker.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        pieces = []
        while size > 0:
            piece = worker.stdout.read(min(size, 1 << 20))
            if not piece:
                return None, late.is_set()
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces), False
    finally:
        timer.cancel()


def _end() -> None:
    worker, _state.worker = _state.worker, None
    if worker is not None:
        worker.kill()
        worker.wait()
        _close(worker)


def _close(worker: subprocess.Popen[bytes]) -> None:
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _forget() -> None:
    """After a fork: the process belongs to the parent, and the pipes are its as well."""
    worker = _state.worker
    _state.__init__()  # type: ignore[misc]
    if worker is not None:
        _close(worker)
        worker.returncode = 0  # not a child of this process, which must not wait for it


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
