"""Processes that are killed while they write: at every name that they touch, one after the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_TOUCHING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink"}


def killed_everywhere(write: Callable[[], object], inside: Path, fresh: Callable[[], None]) -> Iterator[int]:
    """Runs `write` in a child process that dies (SIGKILL) just before the n-th change of a name below
    `inside`, or the n-th opening of a file there for writing, for n = 1, 2, ..., until it lives to its end;
    yields n after each. `fresh` makes the folder as it was before, in this process."""
    number = 0
    while True:
        number += 1
        fresh()
        child = os.fork()
        if child == 0:
            try:
                _kill_at(number, os.fspath(inside))
                write()
                os._exit(0)
            except BaseException as problem:
                print(f"the child failed: {type(problem).__name__}: {problem}", file=sys.stderr)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        yield number
        if not os.WIFSIGNALED(status):
            return


def _kill_at(number: int, inside: str) -> None:
    left = [number]

    def hook(event: str, args: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in _TOUCHING):
            return
        if isinstance(args[0], (str, bytes, os.PathLike)) and inside in os.fsdecode(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
