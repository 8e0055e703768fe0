"""The output of a command: a table for people, JSON lines for programs, .npy for arrays."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from .errors import CommandError, note

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Record = dict[str, Any]
Table = Callable[[list[Record]], "RenderableType"]


@dataclass
class Output:
    """Destination and format of results."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write to FILE: .jsonl, or .npy if the results are arrays."
        ),
    ] = None
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines (the default if the output is not a terminal).")
    ] = False

    @property
    def for_people(self) -> bool:
        """Whether results are shown as a table on a terminal."""
        return self.output is None and not self.json and sys.stdout.isatty()

    def check(self, array: str | None = None) -> None:
        """Raise CommandError, before any work is done, if results cannot be written to FILE."""
        if self.output is None:
            return
        if self.output.suffix == ".npy" and array is None:
            raise CommandError(f"--output {self.output}: this command has no arrays for .npy: use .jsonl")
        if self.output.suffix not in (".npy", ".jsonl"):
            raise CommandError(
                f"--output {self.output}: expected a name that ends in .jsonl{' or .npy' if array else ''}"
            )
        folder = self.output.parent
        if not folder.is_dir():
            raise CommandError(f"--output {self.output}: the folder {folder} does not exist")
        if self.output.is_dir():
            raise CommandError(f"--output {self.output}: expected a file, and this is a folder")

    @contextmanager
    def writer(self, table: Table, array: str | None = None) -> Iterator[Callable[[Record], None]]:
        """Yield a function that accepts results one at a time. `array` names the field whose rows make the
        .npy file.

        A file appears only when it is complete: after an error or Ctrl-C, an existing file is unchanged.
        """
        self.check(array)
        if self.output is not None:
            with _complete_file(self.output) as path:
                if self.output.suffix == ".npy":
                    with _array(path, array or "") as write:
                        yield write
                else:
                    with open(path, "w", encoding="utf-8") as stream:
                        yield lambda record: _line(stream, record)
            note(f"wrote {self.output}")
        elif self.for_people:
            records: list[Record] = []
            yield records.append
            console().print(table(records))
        else:
            yield lambda record: _line(sys.stdout, record)


def console() -> Console:
    """The console on standard output."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _line(stream: TextIO, record: Record) -> None:
    stream.write(json.dumps(record, ensure_ascii=False, default=_plain) + "\n")
    if stream is sys.stdout:
        stream.flush()


def _plain(value: Any) -> Any:
    """Arrays and numbers of numpy and torch as JSON. float32 values have the shortest digits that identify
    them."""
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind != "f":
        return array.tolist()
    if array.ndim == 0:
        return float(str(array))
    return [float(str(x)) for x in array] if array.ndim == 1 else [_plain(row) for row in array]


@contextmanager
def _array(path: Path, field: str) -> Iterator[Callable[[Record], None]]:
    import numpy as np

    rows: list[Any] = []
    yield lambda record: rows.append(np.asarray(record[field]))
    with open(path, "wb") as stream:
        np.save(stream, np.stack(rows), allow_pickle=False)


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`; it replaces `path` on success, and is deleted otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def size(count: int) -> str:
    """A number of bytes as text: 90.9 MB (decimal, as in file managers and transformers)."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def quantity(count: int) -> str:
    """A number as text: 22.7 M."""
    number = float(count)
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g} T"
