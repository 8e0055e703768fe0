"""Progress messages of long commands, on standard error.

On a terminal, one line is rewritten every half second. Otherwise a plain line is written every few seconds,
so that a log file stays readable. A thread writes the line, since one step may take minutes.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from .errors import before_a_line

EVERY = {True: 0.5, False: 5.0}
"""Seconds between two lines: on a terminal, and otherwise."""


class Progress:
    """``with Progress(words): ...`` writes the text that `words()` returns, at once and then regularly.

    On a terminal the line is erased at the end, so only the results of the command remain.
    """

    def __init__(
        self,
        words: Callable[[], str],
        *,
        stream: TextIO | None = None,
        every: float | None = None,
        quiet: bool = False,
    ) -> None:
        self._words = words
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream is not None and self._stream.isatty()
        self._every = EVERY[self._terminal] if every is None else every
        self._quiet = quiet or self._stream is None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = ""

    def __enter__(self) -> Progress:
        before_a_line.append(self.erase)
        if not self._quiet:
            self._write()
            self._thread = threading.Thread(target=self._run, name="minilm-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.erase()
        before_a_line.remove(self.erase)

    def erase(self) -> None:
        """Erase the line until the next update."""
        with self._lock:
            self._erase()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        with self._lock:
            self._erase()
            if self._stream is not None:
                print(text, file=self._stream, flush=True)

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._write()

    def _write(self) -> None:
        with self._lock:
            text = self._words()
            if self._terminal:
                text = text[: shutil.get_terminal_size().columns - 1]
                self._stream.write(f"\r{text}{' ' * (len(self._last) - len(text))}")
                self._last = text
            elif text != self._last:
                self._stream.write(f"{text}\n")
                self._last = text
            self._stream.flush()

    def _erase(self) -> None:
        if self._terminal and self._last:
            self._stream.write(f"\r{' ' * len(self._last)}\r")
            self._stream.flush()
            self._last = ""


def waiting(what: str) -> Progress:
    """Progress of a step whose length is unknown: "reading the model ... 12 s". Only on a terminal."""
    began = time.monotonic()

    def words() -> str:
        seconds = time.monotonic() - began
        return f"{what} ..." + (f" {duration(seconds)}" if seconds >= 2 else "")

    return Progress(words, quiet=sys.stderr is None or not sys.stderr.isatty())


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Report how many items are done: "2,048 texts, 31 s". Only if standard error is a terminal and standard
    output is not (there the results themselves appear)."""
    began, total = time.monotonic(), 0

    def words() -> str:
        return f"{total:,} {what} done, {duration(time.monotonic() - began)}"

    def more(count: int) -> None:
        nonlocal total
        total += count

    quiet = sys.stderr is None or not sys.stderr.isatty() or sys.stdout.isatty()
    with Progress(words, quiet=quiet):
        yield more


def duration(seconds: float) -> str:
    """A duration in seconds as text: 8 s, 1:05 min, 2:10:00 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
