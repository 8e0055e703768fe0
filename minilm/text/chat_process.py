"""Runs chat templates in a separate process, chat_worker.py, with limited memory and time.

A template can use any amount of time and memory, even before it runs (constants are folded when it is
compiled) and within one call of C code (`center`, `replace`, a range turned into a list), which cannot be
interrupted from this process. The process is started for the first template, which takes about 0.1 s, and
reused: each further call sends and receives one JSON text through a pipe, in less than a millisecond. A
process that exceeds a limit is killed, and the next template gets a new one.
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

_TAG = "\ufdd0"  # a noncharacter, unlikely in keys; dicts whose keys have it are sent as pairs
_MEMORY = 512 << 20  # bytes of address space, plus this many per byte sent:
_MEMORY_OF_BYTE = 24
_START_SECONDS = 120.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")


class ProcessError(Exception):
    """The process could not be started, or has ended."""


def run(
    template: str,
    variables: Mapping[str, Any],
    *,
    seconds: float,
    characters: int,
    marks: tuple[str, str] | None,
) -> tuple[str, str]:
    """Returns (outcome, text). The outcome is "text", or "long" (more than `characters` of output), "memory",
    "late" (more than `seconds`), "ended" (the process crashed), or "damaged", "forbidden", "refuses", "fails"
    with the error message as text.

    Objects that JSON cannot represent, such as an image, reach the template only as their str(). Raises
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
    """`value` in JSON types; tuples, sets, keys that are not strings and other objects are tagged."""
    kind = type(value)
    if kind is str or value is None or kind is bool or kind is int or kind is float:
        return value
    if kind is list:
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _plain(item) for key, item in value.items()}
        return {_TAG: "dict", "value": [{_TAG: "tuple", "value": _plain(list(p))} for p in value.items()]}
    for known in (str, int, float):  # enum members, numpy's float64
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
    """The reply to a request, None if the process ended before it; and whether the time ran out."""
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
    """Read `size` bytes from the process; kill it if they take more than `seconds`."""
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
    """After a fork: forget the process and the pipes, which belong to the parent."""
    worker = _state.worker
    _state.__init__()  # type: ignore[misc]
    if worker is not None:
        _close(worker)
        worker.returncode = 0  # not a child of this process, so never wait for it


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
