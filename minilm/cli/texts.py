"""The input of a command: texts from arguments, standard input, text files and JSON lines."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from .errors import CommandError, warn

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Item:
    """One text. `record` is the JSON object that contained it, whose other fields are copied to the
    result."""

    text: str
    record: dict[str, Any] = field(default_factory=dict)


FileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="Read texts from FILE: one per line, or JSON lines (.jsonl). Repeatable.",
    ),
]
FieldOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Read JSON lines, with the text in this field.")
]


@dataclass
class Texts:
    """Texts of a command: its arguments, otherwise its files, otherwise standard input (also as `-`)."""

    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts. Without any, or with -, standard input is read."),
    ] = None
    file: FileOption = None
    field: FieldOption = None

    def read(self) -> Iterator[Item]:
        """The texts in order. Raises CommandError if there are none."""
        return read_items(self.texts or [], self.file or [], self.field)


def read_items(
    texts: list[str],
    files: list[Path],
    field: str | None,
    *,
    whole: bool = False,
    default_field: str = "text",
) -> Iterator[Item]:
    """All texts, one at a time. With `whole`, a text file or standard input is one text, rather than one per
    line.

    Raises, at once, CommandError if there is nothing to read and OSError if a file cannot be opened; errors
    inside a file are raised when it is read.
    """
    sources: list[str | Path] = [*(Path("-") if text == "-" else text for text in texts), *files]
    if not sources:
        if sys.stdin is None or sys.stdin.isatty():
            raise CommandError("no text was given: pass it as an argument, with --file, or on standard input")
        sources = [Path("-")]
    for source in sources:
        if isinstance(source, Path) and str(source) != "-":
            source.open("rb").close()  # raises an error before any work is done
    return _items(sources, field, whole, default_field)


def _items(sources: list[str | Path], field: str | None, whole: bool, default_field: str) -> Iterator[Item]:
    count = 0
    for source in sources:
        items = [Item(source)] if isinstance(source, str) else _from_file(source, field, whole, default_field)
        for item in items:
            count += 1
            yield item
    if count == 0:
        names = ", ".join("standard input" if str(s) == "-" else str(s) for s in sources)
        raise CommandError(f"there is no text in {names}")


def _from_file(path: Path, field: str | None, whole: bool, default_field: str) -> Iterator[Item]:
    name = "standard input" if str(path) == "-" else str(path)
    if str(path) == "-":
        yield from _from_stream(sys.stdin.buffer, name, field, whole, default_field)
        return
    if path.suffix in JSON_LINES:
        field = field or default_field
    with open(path, "rb") as stream:
        yield from _from_stream(stream, name, field, whole, default_field)


def _from_stream(
    stream: BinaryIO, name: str, field: str | None, whole: bool, default_field: str
) -> Iterator[Item]:
    lines = _lines(stream, name)
    if field is not None:
        yield from _json_items(lines, name, field)
    elif whole:
        text = "".join(line for _, line in lines).strip()
        if text:
            yield Item(text)
    else:
        empty = 0
        for _, line in lines:
            text = line.strip()
            if text:
                yield Item(text)
            empty += not text
        if empty:
            warn(f"{name}: {empty} empty line{'s were' if empty > 1 else ' was'} skipped")


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), start=1):
            yield number, line
    except UnicodeDecodeError as error:
        raise CommandError(f"{name}: line {number + 1} or later is not UTF-8 text: {error.reason}") from error


def _json_items(lines: Iterable[tuple[int, str]], name: str, field: str) -> Iterator[Item]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise CommandError(f"{name}: line {number} is not JSON: {reason}") from error
        if not isinstance(record, dict):
            raise CommandError(f"{name}: line {number} is not a JSON object, but {type(record).__name__}")
        text = record.get(field)
        if not isinstance(text, str):
            has = (
                f"has {', '.join(record) or 'none'}" if text is None else f"holds {type(text).__name__} there"
            )
            raise CommandError(f"{name}: line {number} has no text in the field {field!r}; it {has}")
        yield Item(text, record)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`, so that a long file is processed while it is read."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
