"""Atomic saving: replaces several files in a folder together.

A checkpoint is several files that belong together, and the folder may also contain other files, so it cannot
be replaced as a whole. `saving(folder)` yields a hidden folder to write to, and then

1. flushes all files to disk, and writes a plan: which files to add, which to remove, and the size and time of
   the current ones;
2. renames the hidden folder to `.minilm-switch`. This rename is the commit point: a failure before it leaves
   the folder unchanged;
3. moves the files into place, and removes the old ones. config.json and modules.json are removed first and
   added last, so that other programs find no model rather than half of one.

If a process dies during step 3, the plan and the remaining files are in `.minilm-switch`, and the next read
or save of the folder (`settle`) finishes the job, or reports why it cannot. Leftovers of a process that died
before step 2 are removed by the next save. A lock on the hidden folder distinguishes leftovers from the files
of a running process.

A folder that does not exist yet is created under a temporary name next to it, and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from .reading import MOST_CONFIG, FileError, read_json

SWITCH = ".minilm-switch"
_PREFIX = ".saving-"
_NEW, _PLAN = "new", "plan.json"
_FIRST_AND_LAST = ("config.json", "modules.json")
_PATIENCE = 60.0  # seconds for another process to move its files

_roots: list[tuple[Path, list[str]]] = []
"""Folders that saves of this process write to, and the patterns of the files that they replace."""

Identity = list[int] | None
"""Size and time of a file, None if it does not exist."""


@contextmanager
def saving(folder: str | os.PathLike[str], *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder to write files to, which are moved to `folder` together when the block ends.

    `replaces`: patterns of names, relative to `folder`, of files to remove unless they are written again; all
    others stay. If the block raises, or the process dies in it, `folder` is unchanged. A `saving` inside the
    block, into the yielded folder or one below it, becomes part of the outer one.

    Raises FileError if `folder` is not a folder, if something that is not a file is in a file's place, or if
    an earlier save was interrupted and cannot be finished; OSError if writing fails.
    """
    folder = Path(folder)
    for root, patterns in _roots:
        if root == folder or root in folder.parents:
            below = folder.relative_to(root).as_posix()
            patterns += [pattern if below == "." else f"{below}/{pattern}" for pattern in replaces]
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileError(f"{folder}: cannot be written to: expected a folder, and this is something else")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    home, prefix = folder.parent, f".{folder.name}{_PREFIX}"
    _sweep(home, prefix)
    if folder.is_dir():
        home, prefix = folder, _PREFIX
        _sweep(home, prefix)
    hidden, lock = _hidden(home, prefix)
    entry = (hidden / _NEW, list(replaces))
    try:
        _roots.append(entry)
        try:
            yield hidden / _NEW
        finally:
            _roots[:] = [root for root in _roots if root is not entry]
        _commit(hidden, folder, entry[1])
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made[1:]:  # innermost first; not if another process has put something there
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        _close(lock)


def settle(folder: Path) -> None:
    """Finish a save into `folder` whose process died while moving files into place; wait for one that is
    still running. If there is none, this only lists the folder.

    Raises FileError if it cannot be finished: the folder is not writable, or files in it have changed.
    """
    switch = folder / SWITCH
    until = time.monotonic() + _PATIENCE
    while os.path.lexists(switch):
        try:
            descriptor = _open_folder(switch)
        except FileNotFoundError:
            return
        except OSError as problem:
            raise FileError(f"{switch}: cannot be read: {problem.strerror}") from problem
        try:
            if not _locked(descriptor):
                if time.monotonic() > until:
                    raise FileError(
                        f"{folder}: another process has been saving into it for {_PATIENCE:.0f} s"
                    )
                time.sleep(0.02)
                continue
            if descriptor is not None and not _same(descriptor, switch):
                continue  # another process has finished it
            _recover(switch, folder)
            return
        finally:
            _close(descriptor)


def _recover(switch: Path, folder: Path) -> None:
    if not os.path.lexists(switch / _PLAN):  # all files were in place
        shutil.rmtree(switch, ignore_errors=True)
        return
    plan = _read_plan(switch / _PLAN)
    for name, (new, old) in plan.items():
        there = _identity(folder / name)
        waits = new is not None and os.path.lexists(switch / _NEW / name)
        fits = there in (None, old) if waits or new is None else there == new
        if not fits:
            raise FileError(
                f"{folder}: a save into it was interrupted, and {name} has been changed since, so that it "
                f"cannot be finished; delete {switch} to keep the files as they are, or save the model "
                "again after that"
            )
    try:
        _move(switch, folder, plan)
    except OSError as problem:
        raise FileError(
            f"{folder}: a save into it was interrupted, and its files cannot be moved into place "
            f"({problem}); load or save the model once where the folder is writable"
        ) from problem


def _commit(hidden: Path, folder: Path, patterns: Sequence[str]) -> None:
    new = hidden / _NEW
    names = _files(new)
    usual = stat.S_IMODE(os.stat(hidden).st_mode) & 0o666
    for name in names:
        (new / name).chmod(usual)  # safetensors creates files that only their owner can read
        _sync(new / name)
    for parent in sorted({(new / name).parent for name in names} | {new}):
        _sync(parent)
    if not folder.exists():
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():  # if another process has created it, move the files into it
                raise
        else:
            _sync(folder.parent)
            shutil.rmtree(hidden, ignore_errors=True)
            return
    switch = folder / SWITCH
    while True:
        settle(folder)
        plan: dict[str, tuple[Identity, Identity]] = {}
        for name in names:
            _check_place(folder, name)
            plan[name] = (_identity(new / name), _identity(folder / name))
        for name in _files(folder, patterns):
            plan.setdefault(name, (None, _identity(folder / name)))
        (hidden / _PLAN).write_text(json.dumps({"version": 1, "files": plan}), encoding="utf-8")
        _sync(hidden / _PLAN)
        _sync(hidden)
        try:
            os.rename(hidden, switch)
            break
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    try:
        _sync(folder)
        _move(switch, folder, plan)
    except OSError as problem:
        if all(_identity(folder / name) == old for name, (_, old) in plan.items()):
            os.rename(switch, hidden)  # nothing was moved, so undo the rename
            raise
        raise FileError(
            f"{folder}: not all of the saved files could be moved into place ({problem}); the rest is in "
            f"{switch}, and the next load or save of the folder tries again"
        ) from problem
    except BaseException:  # Ctrl-C: the rest takes no time
        _move(switch, folder, plan)
        raise


def _move(switch: Path, folder: Path, plan: dict[str, tuple[Identity, Identity]]) -> None:
    """Execute the rest of a plan."""
    new = switch / _NEW
    coming = sorted(name for name, (identity, _) in plan.items() if identity is not None)
    going = sorted(plan.keys() - coming)
    tells = [name for name in coming if PurePosixPath(name).name in _FIRST_AND_LAST]
    tells.sort(key=lambda name: (name.count("/"), name))  # the folder's own config.json first
    for name in (*tells, *going):
        if name in going or os.path.lexists(new / name):
            (folder / name).unlink(missing_ok=True)
    for name in (*(name for name in coming if name not in tells), *reversed(tells)):
        if os.path.lexists(new / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
    for parent in {(folder / name).parent for name in going} - {folder}:
        with suppress(OSError):
            parent.rmdir()  # if it is empty
    for parent in {(folder / name).parent for name in plan} | {folder}:
        if parent.is_dir():
            _sync(parent)
    (switch / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(switch, ignore_errors=True)


def _read_plan(file: Path) -> dict[str, tuple[Identity, Identity]]:
    stored = read_json(file, limit=MOST_CONFIG)
    plan: dict[str, tuple[Identity, Identity]] = {}
    try:
        if stored["version"] != 1:
            raise FileError(f"{file}: written by a newer release of minilm, which must finish this save")
        for name, (new, old) in stored["files"].items():
            parts = PurePosixPath(name).parts
            if (
                not parts
                or PurePosixPath(name).is_absolute()
                or ".." in parts
                or "\\" in name
                or "\0" in name
            ):
                raise FileError(f"{file}: names {name!r}, outside the folder")
            plan[name] = (_as_identity(new), _as_identity(old))
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        if isinstance(problem, FileError):
            raise
        raise FileError(f"{file}: not the plan of a save") from problem
    return plan


def _as_identity(value: Any) -> Identity:
    if value is None:
        return None
    size, changed = map(int, value)
    return [size, changed]


def _identity(file: Path) -> Identity:
    try:
        found = os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _check_place(folder: Path, name: str) -> None:
    """Raise FileError if `name` cannot become a file in `folder`."""
    for parent in PurePosixPath(name).parents:
        place = folder / parent
        if os.path.lexists(place) and not place.is_dir():
            raise FileError(f"{place}: expected a folder to save into, and this is something else")
    place = folder / name
    if place.is_dir() and not place.is_symlink():
        raise FileError(f"{place}: expected a file to write, and this is a directory")


def _files(folder: Path, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the files below `folder`, relative to it, that match one of the patterns (None: all)."""
    if patterns is not None and not patterns:
        return []
    depth = None if patterns is None else max(pattern.count("/") for pattern in patterns)
    found = []
    for place, folders, names in os.walk(folder):
        below = Path(place).relative_to(folder)
        folders[:] = [
            each
            for each in folders
            if (depth is None or len(below.parts) < depth) and not each.startswith((SWITCH, _PREFIX))
        ]
        found += [(below / name).as_posix() for name in names]
    if patterns is None:
        return sorted(found)
    return sorted(
        name
        for name in found
        if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)
    )


def _sweep(home: Path, prefix: str) -> None:
    """Remove hidden folders that dead processes left in `home`."""
    ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")
    for entry in list(os.scandir(home)):
        if ours.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):
                descriptor = _open_folder(Path(entry))
                if _locked(descriptor) and (descriptor is not None or _old(entry)):
                    shutil.rmtree(entry, ignore_errors=True)
                _close(descriptor)


def _hidden(home: Path, prefix: str) -> tuple[Path, int | None]:
    """A new hidden folder in `home`, and its lock."""
    while True:
        hidden = home / f"{prefix}{secrets.token_hex(4)}"
        with suppress(FileExistsError, FileNotFoundError):
            hidden.mkdir()
            lock = _open_folder(hidden)
            # Before the lock, another process may have removed it as a leftover.
            if _locked(lock) and (lock is None or _same(lock, hidden)):
                (hidden / _NEW).mkdir()
                return hidden, lock
            _close(lock)


def _old(entry: os.DirEntry[str]) -> bool:
    return time.time() - entry.stat().st_mtime > 86_400


def _open_folder(folder: Path) -> int | None:
    """A file descriptor to lock, None if folders have none (Windows)."""
    if os.name == "nt":
        return None
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _locked(descriptor: int | None) -> bool:
    """Try to lock; True if successful, or if the file system has no locks."""
    if descriptor is None:
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except FileNotFoundError:
        return False


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Flush a file to disk; for a folder, the names in it."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by the file system
            raise
    finally:
        os.close(descriptor)
