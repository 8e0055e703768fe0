"""Safe reading of a model's files: checks the type and the size of a file first.

A name in a folder may be a broken link, a directory, an endless pipe, or a sparse file of a terabyte. Type
and size are checked before reading, and reading stops at a limit in any case.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MOST_JSON = 1 << 30
"""Maximum bytes of a JSON file; tokenizer.json of a large vocabulary has 30 MB."""
MOST_TEXT = 1 << 28
"""Maximum bytes of a text file (vocab.txt, merges.txt)."""
MOST_TEMPLATE = 1 << 24
"""Maximum bytes of a chat template; the longest known have 30 KB."""
MOST_CONFIG = 1 << 26
"""Maximum bytes of config.json and similar files. Names of 100,000 labels take 5 MB."""

_SMALL = 1 << 20  # above this size, numbers are not checked individually

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class WeightError(ValueError):
    """A checkpoint cannot be read or does not fit the model; the message names file, key and fault."""


class FileError(ValueError):
    """A file is missing or has wrong contents. The message names it."""


def has_file(path: Path, *, error: type[Exception] = FileError) -> bool:
    """Whether `path` is a file or a link to one. False only if nothing has that name: a broken link, a
    directory, a pipe or a device in its place raises `error`."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise error(f"{path}: a broken link to {os.readlink(path)}") from None
        return False
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {_why(problem)}") from problem
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected a file, and this is {_kind(mode)}")
    return True


def file_size(path: Path, *, error: type[Exception] = FileError) -> int:
    """Size in bytes of the regular file `path`; raises `error` if it is missing or not a regular file."""
    if not has_file(path, error=error):
        raise error(f"{path}: no such file")
    return os.stat(path).st_size


def read_bytes(path: Path, *, limit: int, error: type[Exception] = FileError) -> bytes:
    """The contents of the file `path`, of at most `limit` bytes. Raises `error` if it is missing, not a
    regular file, larger, or cannot be read. Never blocks, as opening a pipe would."""
    size = file_size(path, error=error)
    if size > limit:
        raise error(f"{path}: {size} bytes are too many for such a file (limit {limit})")
    try:
        # Non-blocking: the file may have been replaced by a pipe in between.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: expected a file, and this is {_kind(status.st_mode)}")
            size = min(status.st_size, limit)
            data = stream.read(size + 1)  # Python allocates this much first, so not the limit
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

    Raises `error` if it is missing, too large, not UTF-8, not JSON, or nested too deeply, if an object has a
    key twice with different values (parsers disagree on which one counts), or if a number is NaN or infinite,
    which JSON does not allow.
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
    except ValueError as problem:  # json.JSONDecodeError, or an integer with too many digits for Python
        raise error(f"{path}: not JSON: {problem}") from problem


def read_json(path: Path, *, limit: int = MOST_JSON, error: type[Exception] = FileError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` like `read_json_value`, and for other values than objects."""
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
    raise ValueError(f"{name} is not allowed in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


def _why(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)
