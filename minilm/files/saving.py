"""Saving: many files that take the place of others as one.

A checkpoint is several files that belong together, and the folder may hold files of others beside them, so
that it cannot be swapped as a whole. `saving(folder)` gives a hidden folder to write to, and then

1. makes sure that all of it is on the disk, and writes a plan: which files are to come, which are to go, and
   what is there now, by size and time;
2. renames the hidden folder to `.minilm-switch`. This one rename is the switch. What happens before it leaves
   the folder as it was;
3. moves the files to their places, and removes the rest. config.json and modules.json go first and come back
   last, so that a program that knows nothing of this finds no model, rather than half of one.

A process may die within 3. Then the plan and the files that are left are in `.minilm-switch`, and whoever
next reads or saves the folder (`settle`) finishes it, or says why it cannot. What a process leaves that dies
before 2 is removed by the next save. Both are told from what a living process does by a lock on the hidden
folder.

A folder that does not exist yet is made beside its place, and renamed.
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
"""Folders that saves of this process write to, and the patterns of what they replace."""

Identity = list[int] | None
"""Size and time of a file, None where there is none."""


@contextmanager
def saving(folder: str | os.PathLike[str], *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write files to, which take their places in `folder` together when the block ends.

    `replaces`: patterns of names, relative to `folder`, of files that go if they are not written anew; all
    others stay. When the block raises, or the process dies in it, `folder` is as it was. A `saving` within
    the block, into the folder that it was given or one below, is part of the outer one.

    Raises FileError where `folder` is none, where something else than a file is in a file's place, or where
    an earlier save was interrupted and cannot be finished; OSError as writing does.
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
        for parent in made[1:]:  # the nearest first; not if somebody else has put something there
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        _close(lock)


def settle(folder: Path) -> None:
    """Finishes a save into `folder` whose process died while it was moving the files to their places; waits
    for one that lives. Costs one look at the folder where there is none.

    Raises FileError where it cannot be finished: the folder may not be written, or files in it have changed.
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
                continue  # it was finished meanwhile
            _recover(switch, folder)
            return
        finally:
            _close(descriptor)


def _recover(switch: Path, folder: Path) -> None:
    if not os.path.lexists(switch / _PLAN):  # all files were in their places
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
                f"cannot be finished; delete {switch} to go on with the files as they are, or save the model "
                "again after that"
            )
    try:
        _move(switch, folder, plan)
    except OSError as problem:
        raise FileError(
            f"{folder}: a save into it was interrupted, and its files cannot be put in their places "
            f"({problem}); load or save the model once where the folder may be written"
        ) from problem


def _commit(hidden: Path, folder: Path, patterns: Sequence[str]) -> None:
    new = hidden / _NEW
    names = _files(new)
    usual = stat.S_IMODE(os.stat(hidden).st_mode) & 0o666
    for name in names:
        (new / name).chmod(usual)  # safetensors makes files that only their owner can read
        _sync(new / name)
    for parent in sorted({(new / name).parent for name in names} | {new}):
        _sync(parent)
    if not folder.exists():
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():  # if somebody has made it meanwhile, files are moved into it
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
            os.rename(switch, hidden)  # nothing could be moved, so nothing has happened
            raise
        raise FileError(
            f"{folder}: not all of the saved files could be put in their places ({problem}); the rest is in "
            f"{switch}, and the next load or save of the folder tries again"
        ) from problem
    except BaseException:  # Ctrl-C: what is left to do takes no time
        _move(switch, folder, plan)
        raise


def _move(switch: Path, folder: Path, plan: dict[str, tuple[Identity, Identity]]) -> None:
    """Carries out what is left of a plan."""
    new = switch / _NEW
    coming = sorted(name for name, (identity, _) in plan.items() if identity is not None)
    going = sorted(plan.keys() - coming)
    tells = [name for name in coming if PurePosixPath(name).name in _FIRST_AND_LAST]
    tells.sort(
        key=lambda name: (name.count("/"), name)
    )  # the folder's own config.json goes before all others
    for name in (*tells, *going):
        if name in going or os.path.lexists(new / name):
            (folder / name).unlink(missing_ok=True)
    for name in (*(name for name in coming if name not in tells), *reversed(tells)):
        if os.path.lexists(new / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
    for parent in {(folder / name).parent for name in going} - {folder}:
        with suppress(OSError):
            parent.rmdir()  # if nothing else is in it
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
            raise FileError(f"{file}: written by a newer release, which has to finish this save")
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
    """Raise FileError where `name` cannot become a file of `folder`."""
    for parent in PurePosixPath(name).parents:
        place = folder / parent
        if os.path.lexists(place) and not place.is_dir():
            raise FileError(f"{place}: expected a folder to save into, and this is something else")
    place = folder / name
    if place.is_dir() and not place.is_symlink():
        raise FileError(f"{place}: a directory is where a file is to be written")


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
    """Removes the hidden folders that dead processes left in `home`."""
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
            # Another process may have taken it for one of a dead process, before the lock.
            if _locked(lock) and (lock is None or _same(lock, hidden)):
                (hidden / _NEW).mkdir()
                return hidden, lock
            _close(lock)


def _old(entry: os.DirEntry[str]) -> bool:
    return time.time() - entry.stat().st_mtime > 86_400


def _open_folder(folder: Path) -> int | None:
    """A descriptor to lock, None where a folder has none (Windows)."""
    if os.name == "nt":
        return None
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _locked(descriptor: int | None) -> bool:
    """Whether the lock is ours now. A file system without locks never says that somebody has it."""
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
    """Makes sure that what was written is on the disk; of a folder, the names in it."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)
