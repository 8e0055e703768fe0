"""The files of an index: vectors as .npy files, which are mapped, texts as JSON lines, and index.json, which
lists them.

A segment is some rows of the index, in four files that are never changed:

    vectors-NAME.npy   [rows, D], float32, float16 or int8
    scales-NAME.npy    float32 [rows], for int8: a vector is its row times its scale
    places-NAME.npy    int64 [rows + 1]: the bytes of row i in the texts are places[i] to places[i + 1]
    texts-NAME.jsonl   {"text": ..., "metadata": {...}} per row

New rows are a new segment, and the new index.json is put in place together with it (`minilm.files.saving`),
so a process that is killed leaves the old index or the new one.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import MOST_CONFIG, FileError, file_size, read_json
from .nearest import Block

LIST = "index.json"
DTYPES = ("float32", "float16", "int8")
FORMAT, VERSION = "minilm search index", 1
_BLOCK = 1 << 22
"""Number of values of a block."""
_PATIENCE = 60.0  # seconds for another process that writes


@dataclass(frozen=True)
class Entry:
    """A segment in index.json."""

    name: str
    rows: int
    bytes: int
    """Of its texts."""

    def files(self, dtype: str) -> list[str]:
        """The names of its files."""
        scales = [f"scales-{self.name}.npy"] if dtype == "int8" else []
        return [f"vectors-{self.name}.npy", *scales, f"places-{self.name}.npy", f"texts-{self.name}.jsonl"]


@dataclass(frozen=True)
class Listing:
    """The contents of index.json."""

    dimension: int
    dtype: str
    similarity: str
    model: str
    prompts: dict[str, str]
    """Of queries and of documents."""
    probe: list[list[float]]
    """Vectors of a few fixed texts, by which another model is recognised."""
    segments: tuple[Entry, ...] = ()

    @property
    def rows(self) -> int:
        """Of all segments."""
        return sum(entry.rows for entry in self.segments)

    def write(self, folder: Path) -> None:
        """Write index.json."""
        stored = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (folder / LIST).write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Listing:
        """Read index.json. Raises FileError if it is missing or something is wrong with it."""
        file = folder / LIST
        stored = read_json(file, limit=MOST_CONFIG)
        if stored.pop("format", None) != FORMAT:
            raise FileError(f"{file}: not the list of a search index")
        if stored.pop("version", None) != VERSION:
            raise FileError(f"{file}: written by another release of minilm: build the index anew")
        try:
            names = {field.name for field in fields(cls)}
            if set(stored) != names:
                raise ValueError(f"expected {', '.join(sorted(names))}, found {', '.join(sorted(stored))}")
            entries = tuple(Entry(**entry) for entry in stored.pop("segments"))
            found = cls(**stored, segments=entries)
            _check(found)
        except (TypeError, ValueError, AttributeError) as problem:
            raise FileError(f"{file}: {problem}") from None
        return found


def _check(found: Listing) -> None:
    """Raise ValueError or TypeError for a value that no index has."""
    if type(found.dimension) is not int or found.dimension < 1:
        raise ValueError(f"dimension must be a positive integer, and is {found.dimension!r:.40}")
    if found.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, and is {found.dtype!r:.40}")
    if found.similarity not in ("cosine", "dot", "euclidean", "manhattan"):
        raise ValueError(f"there is no similarity {found.similarity!r:.40}")
    if not isinstance(found.model, str) or not isinstance(found.prompts, dict):
        raise ValueError("model must be a text and prompts texts by name")
    if set(found.prompts) != {"query", "document"} or not all(
        isinstance(text, str) for text in found.prompts.values()
    ):
        raise ValueError("prompts must have a query and a document")
    probe = np.asarray(found.probe, dtype=np.float32)
    if probe.ndim != 2 or probe.shape[1] != found.dimension:
        raise ValueError(f"probe must be vectors of {found.dimension} numbers")
    for entry in found.segments:
        if not (isinstance(entry.name, str) and entry.name.isalnum()):
            raise ValueError(f"{entry.name!r:.40} is not the name of a segment")
        for count in (entry.rows, entry.bytes):
            if type(count) is not int or count < 1:
                raise ValueError(f"the segment {entry.name} must have a positive size, and has {count!r:.40}")


class Segment:
    """A segment, mapped. Raises FileError for files that are missing, or not as index.json says."""

    def __init__(self, folder: Path, entry: Entry, dimension: int, dtype: str) -> None:
        self.folder, self.entry = folder, entry
        self.vectors = self._array("vectors", (entry.rows, dimension), dtype)
        self.scales = self._array("scales", (entry.rows,), "float32") if dtype == "int8" else None
        self.places = self._array("places", (entry.rows + 1,), "int64")
        self.file = folder / f"texts-{entry.name}.jsonl"
        size = file_size(self.file)
        if size != entry.bytes:
            raise FileError(f"{self.file}: expected {entry.bytes} bytes, found {size}")
        with open(self.file, "rb") as stream:
            self.texts = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def _array(self, kind: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        file = self.folder / f"{kind}-{self.entry.name}.npy"
        size = file_size(file)
        try:
            # "c": pages that are written to would be copied; PyTorch warns about arrays that are read only.
            found: NDArray[Any] = np.load(file, mmap_mode="c", allow_pickle=False)
        except (ValueError, EOFError, OSError) as problem:
            raise FileError(f"{file}: not a whole .npy file: {' '.join(str(problem).split())}") from None
        if found.shape != shape or found.dtype != np.dtype(dtype) or not found.flags.c_contiguous:
            raise FileError(
                f"{file}: expected {list(shape)} of {dtype}, found {list(found.shape)} of {found.dtype}"
            )
        if size != found.nbytes + len(_header(shape, dtype)):
            raise FileError(f"{file}: {size} bytes are more than the array has")
        return found

    def block(self, start: int, end: int) -> Block:
        """Some vectors."""
        scales = None if self.scales is None else torch.from_numpy(self.scales[start:end])
        return Block(start, torch.from_numpy(self.vectors[start:end]).float(), scales)

    def blocks(self) -> Iterator[Block]:
        """All vectors."""
        step = max(1, _BLOCK // self.vectors.shape[1])
        for start in range(0, self.entry.rows, step):
            yield self.block(start, min(start + step, self.entry.rows))

    def line(self, row: int) -> bytes:
        """The JSON line of a row."""
        start, end = int(self.places[row]), int(self.places[row + 1])
        if not 0 <= start < end <= self.entry.bytes:
            raise FileError(f"{self.folder}/places-{self.entry.name}.npy: row {row} is at {start} to {end}")
        return self.texts[start:end]

    def record(self, row: int) -> tuple[str, dict[str, Any]]:
        """Text and metadata of a row."""
        try:
            stored = json.loads(self.line(row))
            text, metadata = stored["text"], stored["metadata"]
            if not isinstance(text, str) or not isinstance(metadata, dict):
                raise TypeError
        except FileError:
            raise
        except (ValueError, KeyError, TypeError):
            raise FileError(f"{self.file}: row {row} is not a text with metadata") from None
        return text, metadata


class Writer:
    """Writes a segment to a folder, some rows at a time; complete at the end of the `with` block."""

    def __init__(self, folder: Path, dimension: int, dtype: str) -> None:
        self.folder, self.name = folder, secrets.token_hex(8)
        self.dimension, self.dtype = dimension, dtype
        self.rows = self.bytes = 0
        kinds = {"vectors": dtype, "places": "int64", **({"scales": "float32"} if dtype == "int8" else {})}
        self._arrays: dict[str, tuple[BinaryIO, str]] = {
            kind: (open(folder / f"{kind}-{self.name}.npy", "wb"), number)  # noqa: SIM115 - see __exit__
            for kind, number in kinds.items()
        }
        self._texts = open(folder / f"texts-{self.name}.jsonl", "wb")  # noqa: SIM115
        for kind, (stream, number) in self._arrays.items():
            stream.write(_header(self._shape(kind), number))
        self._put("places", np.zeros(1, dtype=np.int64))

    def append(self, vectors: Tensor, lines: Sequence[bytes], unit: bool = False) -> None:
        """Vectors in float32 [N, D] and the line of each (`line_of`). `unit`: they have the length 1 (or 0),
        and keep it in int8. Raises ValueError for a vector that the dtype cannot hold."""
        rows = vectors.numpy()
        if self.dtype == "int8":
            scales = np.abs(rows).max(axis=1) / np.float32(127)
            rows = np.rint(rows / np.where(scales == 0, np.float32(1), scales)[:, None])
            if unit:
                lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
                scales = (1 / np.where(lengths == 0, np.inf, lengths)).astype(np.float32)
            self._put("scales", scales)
        elif self.dtype == "float16" and len(rows) and np.abs(rows).max() > np.finfo(np.float16).max:
            raise ValueError(f"a vector has the value {np.abs(rows).max():g}, too large for float16")
        self._put("vectors", rows.astype(self.dtype))
        self.copy(lines)

    def copy(self, lines: Sequence[bytes]) -> None:
        """The lines of rows whose vectors are written already."""
        ends = self.bytes + np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._put("places", ends)
        self._texts.write(b"".join(lines))
        self.rows += len(lines)
        self.bytes = int(ends[-1]) if len(lines) else self.bytes

    def merge(self, segment: Segment) -> None:
        """All rows of a segment, bit by bit."""
        for block in segment.blocks():
            start, end = block.first, block.first + len(block.rows)
            self._put("vectors", segment.vectors[start:end])
            if segment.scales is not None:
                self._put("scales", segment.scales[start:end])
            self.copy([segment.line(row) for row in range(start, end)])

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for kind, (stream, number) in self._arrays.items():
            stream.seek(0)
            stream.write(_header(self._shape(kind), number))
            stream.close()
        self._texts.close()
        if not self.rows:
            self.discard()

    def discard(self) -> None:
        """Remove the files."""
        for file in Entry(self.name, self.rows, self.bytes).files(self.dtype):
            (self.folder / file).unlink()

    def entries(self) -> tuple[Entry, ...]:
        """The segment; none without rows."""
        return (Entry(self.name, self.rows, self.bytes),) if self.rows else ()

    def _shape(self, kind: str) -> tuple[int, ...]:
        return {"vectors": (self.rows, self.dimension), "places": (self.rows + 1,)}.get(kind, (self.rows,))

    def _put(self, kind: str, values: NDArray[Any]) -> None:
        self._arrays[kind][0].write(np.ascontiguousarray(values).tobytes())


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The start of an .npy file, 128 bytes for any number of rows."""
    number = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{number}', 'fortran_order': False, 'shape': {shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def line_of(text: str, metadata: Mapping[str, Any], number: int) -> bytes:
    """The JSON line of a row. Raises ValueError for metadata that JSON cannot hold."""
    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
        raise ValueError(f"the metadata of text {number} must be {{name: value}}, and is {metadata!r:.60}")
    try:
        line = json.dumps({"text": text, "metadata": dict(metadata)}, ensure_ascii=False, allow_nan=False)
        return line.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"text {number} or its metadata cannot be written as JSON: {problem}") from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Excludes other processes and threads that write to `folder`, if it exists. Raises FileError if one does
    for longer than a minute."""
    if os.name == "nt" or not folder.is_dir():
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise FileError(
                        f"{folder}: another process has been writing to it for a minute"
                    ) from None
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
