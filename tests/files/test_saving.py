"""Saving: a set of files takes the place of another whole, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from killed import killed_everywhere

from minilm.files import FileError, resolve, saving, settle

OLD = {
    "config.json": "old",
    "a.txt": "old",
    "sub/config.json": "old",
    "gone-1.txt": "old",
    "2_Old/x.json": "old",
}
NEW = {"config.json": "new", "b.txt": "new", "a.txt": "new", "sub/config.json": "new", "deep/er/c.txt": "new"}
MINE = {"thesis.txt": "mine", "sub/notes.md": "mine", "runs/1/gone-1.txt": "mine", ".hidden": "mine"}
REPLACED = ("gone-*.txt", "[0-9]_*/*.json", "a.txt")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    """All files but those that a process has left that did not come to its end."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    return {name: f.read_text() for name, f in files.items() if not name.startswith(".saving-")}


def save(folder: Path, files: dict[str, str] = NEW) -> None:
    with saving(folder, replaces=REPLACED) as new:
        write(new, files)


def test_the_new_files_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {**OLD, **MINE})
    save(folder)
    assert read(folder) == {**NEW, **MINE}
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert not (folder / "2_Old").exists()
    save(folder, {"gone-1.txt": "1"})
    assert read(folder) == {**{k: v for k, v in NEW.items() if k != "a.txt"}, **MINE, "gone-1.txt": "1"}


@pytest.mark.parametrize("there", [True, False])
def test_killed_anywhere_it_is_old_or_new(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "top" / "m"

    def fresh() -> None:
        shutil.rmtree(tmp_path / "top", ignore_errors=True)
        if there:
            write(folder, {**OLD, **MINE})

    seen = set()
    for number in killed_everywhere(lambda: save(folder), tmp_path, fresh):
        if folder.is_dir():
            config = folder / "config.json"
            unaware = config.read_text() if config.exists() else None
            states = {"old": OLD, "new": NEW}
            raw = read(folder)
            if unaware:  # a program that knows nothing of this finds one model or none
                assert all(raw[name] == text for name, text in states[unaware].items()), number
            settle(folder)
            found = read(folder)
            kept = MINE if there else {}
            assert found in ({**OLD, **kept} if there else {}, {**NEW, **kept}), number
            seen.add(found["config.json"] if found else "none")
        save(folder)  # which also takes away what the dead process left
        assert read(folder) == {**NEW, **(MINE if there else {})}
        assert os.listdir(folder.parent) == ["m"]
    assert seen >= {"old" if there else "new", "new"}
    assert number > 10


def test_killed_while_finishing(tmp_path: Path) -> None:
    folder, half = tmp_path / "m", tmp_path / "half"
    for _ in killed_everywhere(lambda: save(folder), folder, lambda: _again(folder, {**OLD, **MINE})):
        if (folder / ".minilm-switch" / "plan.json").exists() and (folder / "b.txt").exists():
            break
    shutil.move(folder, half)

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(half, folder)  # with the times of the files

    for _ in killed_everywhere(lambda: settle(folder), folder, fresh):
        settle(folder)
        assert read(folder) == {**NEW, **MINE}


def _again(folder: Path, files: dict[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, files)


def interrupted(folder: Path) -> Path:
    """A folder whose switch has been decided, and has moved nothing yet."""
    for _ in killed_everywhere(lambda: save(folder), folder, lambda: _again(folder, {**OLD, **MINE})):
        if (folder / ".minilm-switch").exists():
            return folder
    raise AssertionError("the switch was never seen")


def test_changed_since(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "m")
    (folder / "a.txt").write_text("by another program")
    for enter in (settle, resolve, save):
        with pytest.raises(
            FileError, match=r"interrupted, and a\.txt has been changed since.*delete .*switch"
        ):
            enter(folder)
    assert (folder / "a.txt").read_text() == "by another program"
    shutil.rmtree(folder / ".minilm-switch")
    save(folder)
    assert read(folder) == {**NEW, **MINE}


def test_a_plan_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "m")
    (tmp_path / "victim").write_text("precious")
    plan = folder / ".minilm-switch" / "plan.json"
    for name in ("../victim", "/etc/hostname", "sub/../../victim", ""):
        plan.write_text(f'{{"version": 1, "files": {{"{name}": [null, null]}}}}')
        with pytest.raises(FileError, match="outside the folder"):
            settle(folder)
    for text in ("{}", "[]", "x", '{"version": 1, "files": {"a": 3}}', '{"version": 2, "files": {}}'):
        plan.write_text(text)
        with pytest.raises(FileError, match=r"plan\.json: "):
            settle(folder)
    assert (tmp_path / "victim").read_text() == "precious"


def test_readers_wait_for_a_living_process(tmp_path: Path) -> None:
    import fcntl

    folder = interrupted(tmp_path / "m")
    lock = os.open(folder / ".minilm-switch", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    reader = threading.Thread(target=settle, args=(folder,))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert (folder / "config.json").read_text() == "old"
    os.close(lock)
    reader.join()
    assert read(folder) == {**NEW, **MINE}


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", OLD)
    with saving(folder) as one:
        write(one, {"one.txt": "1"})
        save(folder)
        assert (one / "one.txt").exists()
    assert read(folder) == {**NEW, "one.txt": "1"}


class Stop(BaseException):
    """Something that nobody catches."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("lasting", [True, False])
def test_errors_at_every_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], lasting: bool
) -> None:
    folder = tmp_path / "m"
    number = 0
    done = False
    while not done:
        number += 1
        _again(folder, {**OLD, **MINE})
        count = [0]

        def failing(name: str, count: list[int] = count, at: int = number) -> Any:
            real = getattr(os, name)

            def call(*args: Any, **options: Any) -> Any:
                count[0] += 1
                if count[0] == at or (lasting and count[0] > at):
                    raise kind("stop")
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "fsync"):
                patch.setattr(os, name, failing(name))
            try:
                save(folder)
                done = True
            except (kind, FileError):
                pass
        settle(folder)
        assert read(folder) in ({**OLD, **MINE}, {**NEW, **MINE})
    assert number > 10


def fail_to_save(folder: Path) -> None:
    with saving(folder) as new:
        with saving(new / "sub", replaces=("old.txt",)) as below:
            write(below, {"new.txt": "new"})
        raise Stop


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", OLD)
    for place in (folder, tmp_path / "new", tmp_path / "deep" / "er"):
        with pytest.raises(Stop):
            fail_to_save(place)
    assert os.listdir(tmp_path) == ["m"]
    assert read(folder) == OLD


def test_saves_within_a_save_are_part_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"sub/old.txt": "old", "sub/mine.txt": "mine", "old.txt": "mine"})
    with pytest.raises(Stop):
        fail_to_save(folder)
    assert read(folder) == {"sub/old.txt": "old", "sub/mine.txt": "mine", "old.txt": "mine"}
    with saving(folder) as new, saving(new / "sub", replaces=("old.txt",)) as below:
        write(below, {"new.txt": "new"})
    assert read(folder) == {"sub/new.txt": "new", "sub/mine.txt": "mine", "old.txt": "mine"}


@pytest.mark.parametrize("name", ["config.json", "deep", "deep/er/c.txt"])
def test_something_else_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", {"a.txt": "old"})
    if name == "deep":
        (folder / name).write_text("a file where a folder is to be")
    else:
        (folder / name / "full").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileError, match=rf"{name}: "):
        save(folder)
    assert sorted(folder.rglob("*")) == before
    assert (folder / "a.txt").read_text() == "old"


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileError, match=f"{name}: cannot be written to: expected a folder"):
            save(tmp_path / name)


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("shared")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a.txt").symlink_to(blob)
    (tmp_path / "name").symlink_to(folder)
    save(tmp_path / "name")
    assert blob.read_text() == "shared"
    assert read(folder) == NEW
    assert (tmp_path / "name").is_symlink()


def test_modes_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    usual = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    for _ in range(2):
        with saving(tmp_path / "m") as new:
            (new / "a.txt").write_text("")
            (new / "a.txt").chmod(0o600)
        assert stat.S_IMODE((tmp_path / "m" / "a.txt").stat().st_mode) == usual
    assert (
        stat.S_IMODE((tmp_path / "m").stat().st_mode)
        == stat.S_IMODE(tmp_path.stat().st_mode | 0o055) & ~_umask()
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
