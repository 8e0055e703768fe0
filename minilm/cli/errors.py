"""Errors and warnings as one line on standard error, with a traceback on request."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

CLICK_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""Usage errors. Newer releases of typer include a copy of click, older ones import it."""


@dataclass
class State:
    """Settings for the whole run of a command."""

    debug: bool = False


class CommandError(ValueError):
    """A request that a command cannot carry out; the message says what to do instead."""


def report(error: Exception, *, debug: bool) -> int:
    """Print `error` on standard error, as one line unless `debug` is set; returns the exit status."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CLICK_ERROR):
        _say("error", _usage(error))
        return 2
    if isinstance(error, typer.Abort):
        return 130
    if _expected(error):
        _say("error", _message(error))
        return 2
    hint = "" if debug else " (a bug in minilm: run again with --debug for the traceback)"
    _say("error", f"unexpected {type(error).__name__}: {_message(error)}{hint}")
    return 1


def _usage(error: Any) -> str:
    message = str(error.format_message()).strip().rstrip(".")
    ctx = getattr(error, "ctx", None)
    return message if ctx is None else f"{message} (see {ctx.command_path} --help)"


def _expected(error: Exception) -> bool:
    """Whether the message is for the user: bad input, missing files, a backend that cannot run, too little
    memory."""
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    dispatch = sys.modules.get("minilm.ops.dispatch")
    if dispatch is not None and isinstance(error, dispatch.BackendError):
        return True
    torch = sys.modules.get("torch")
    out_of_memory = getattr(torch, "OutOfMemoryError", ())
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, out_of_memory) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if "DefaultCPUAllocator" in str(error):
        return "not enough memory: " + str(error).partition("DefaultCPUAllocator: ")[2].splitlines()[0]
    return str(error) or type(error).__name__


def warn(message: str) -> None:
    """Print a warning on standard error."""
    _say("warning", message)


before_a_line: list[Callable[[], None]] = []
"""Called before a line is written to standard error, to clear a progress line."""


def note(message: str) -> None:
    """Report what was done, if standard error is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        for erase in before_a_line:
            erase()
        print(message, file=sys.stderr, flush=True)


def _say(kind: str, message: str) -> None:
    if sys.stderr is not None:
        for erase in before_a_line:
            erase()
        print(f"{kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.levelname.lower(), record.getMessage())


@contextmanager
def tidy_messages() -> Iterator[None]:
    """Print warnings and log messages as one line each, like errors."""
    log, handler = logging.getLogger("minilm"), _LogLines(logging.WARNING)
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **options: warn(str(message))
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def closed_pipe() -> None:
    """Redirect standard output to the null device, so that Python's flush at exit does not fail again."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # an in-memory stream, in tests
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
