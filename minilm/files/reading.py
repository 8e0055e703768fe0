"""Files of a model, read with nothing taken on trust: not that they are files, nor that they are small.

A name in a folder may be a link that leads nowhere, a directory, a pipe that never ends, or a sparse file of
a terabyte. Type and size are asked before a byte is read, and reading stops at a limit whatever the size
said.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MOST_JSON = 1 << 30
"""Bytes of a JSON file: tokenizer.json of a large vocabulary has 30 MB."""
MOST_TEXT = 1 << 28
"""Bytes of a text file: vocab.txt, merges.txt."""
MOST_TEMPLATE = 1 << 24
"""Bytes of a chat template; the longest known have 30 KB."""
MOST_CONFIG = 1 << 26
"""Bytes of a config.json and its like. Names of 100,000 labels take 5 MB."""

_SMALL = 1 << 20  # from here on, numbers are not checked one by one

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class WeightError(ValueError):
    """A checkpoint cannot be read or does not fit the model; the message names file, key and the fault."""


class FileError(ValueError):
    """A file that is missing or does not hold what it should. The message names it."""


def has_file(path: Path, *, error: type[Exception] = FileError) -> bool:
    """Whether `path` is a file, through links or not. False only where there is nothing of that name: a link
    that leads nowhere, a directory, a pipe or a device in its place raises `error`."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise error(f"{path}: a link to {os.readlink(path)}, where there is no file") from None
        return False
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {_why(problem)}") from problem
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected a file, and this is {_kind(mode)}")
    return True


def file_size(path: Path, *, error: type[Exception] = FileError) -> int:
    """Bytes of the regular file `path`; `error` if it is missing or is none."""
    if not has_file(path, error=error):
        raise error(f"{path}: no such file")
    return os.stat(path).st_size


def read_bytes(path: Path, *, limit: int, error: type[Exception] = FileError) -> bytes:
    """The contents of the file `path`, of at most `limit` bytes. Raises `error` when it is missing, no
    regular file, larger, or cannot be read. Never waits, as opening a pipe would."""
    size = file_size(path, error=error)
    if size > limit:
        raise error(f"{path}: {size} bytes are too many for such a file (limit {limit})")
    try:
        # Not blocking: the name may have become that of a pipe in between.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: expected a file, and this is {_kind(status.st_mode)}")
            size = min(status.st_size, limit)
            data = stream.read(size + 1)  # which Python allocates before it reads: so not of the limit
    except OSError as problem:
        raise error(f"{path}: cannot be read: {_why(problem)}") from problem
    if len(data) > size:
        raise error(f"{path}: more than {size} bytes, while it is read")
    return data


def read_text(path: Path, *, limit: int = MOST_TEXT, error: type[Exception] = FileError) -> str:
    """The UTF-8 text in `path`, line ends as they are. Raises `error`."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text: {problem.reason} at byte {problem.start}") from problem


def read_json_value(path: Path, *, limit: int = MOST_JSON, error: type[Exception] = FileError) -> Any:
    """The JSON value in `path`.

    `error` is raised when it is missing, too large, not UTF-8, not JSON, nested too deeply, when an object
    has a key twice with different values (readers take either), or a number is NaN or infinite, which JSON
    does not have.
    """
    return parse_json(read_bytes(path, limit=limit, error=error), path, error=error)


def parse_json(data: bytes, path: Path, *, error: type[Exception] = FileError) -> Any:
    """The JSON value in `data`, which `path` holds; `error` as `read_json_value` raises it."""
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_finite if len(data) < _SMALL else None,
        )
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text: {problem.reason} at byte {problem.start}") from problem
    except RecursionError:
        raise error(f"{path}: nested too deeply for a JSON file of a model") from None
    except ValueError as problem:  # json.JSONDecodeError, or an integer of more digits than Python reads
        raise error(f"{path}: not JSON: {problem}") from problem


def read_json(path: Path, *, limit: int = MOST_JSON, error: type[Exception] = FileError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` as `read_json_value` does, and for anything but an object."""
    value = read_json_value(path, limit=limit, error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value or type(found[key]) is not type(value):
                raise ValueError(f"the key {key!r:.60} is there twice, with different values")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


def _why(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)
