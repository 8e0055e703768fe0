"""The GGUF container: metadata and the table of tensors, read with strict checks.

The data of the tensors are consecutive, each padded with zeros to the alignment, and end where the file ends:
llama.cpp writes and requires it. If the table disagrees, the type, size or offset of a tensor is wrong, and
reading would give wrong values.

A GGUF file is a header (magic, version, two counts), key-value metadata, the table of tensors (name,
dimensions, type, offset), padding, and the data. All numbers are little-endian. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package is not used: it
trusts the counts in the file, and creates an array object for every token of a vocabulary.

Here every count is checked against the length of the file, and only the requested parts are read.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .reading import WeightError, file_size

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 4


class GGUFTensor(NamedTuple):
    """One entry of the table of tensors."""

    shape: tuple[int, ...]  # as in PyTorch, slowest dimension first; the file has the reverse order
    type: Any  # gguf.GGMLQuantizationType
    offset: int  # of the data, from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file without its data: metadata, and `tensors` in the order of their data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a GGUF file: numbers, booleans, strings, and lists of these. Raises WeightError."""
    return _read(Path(path), with_tensors=False).metadata


def read_gguf(path: str | Path) -> GGUFFile:
    """Metadata and table of tensors, all of which are within the file. Raises WeightError."""
    return _read(Path(path), with_tensors=True)


def _read(path: Path, *, with_tensors: bool) -> GGUFFile:
    try:
        file_size(path, error=WeightError)  # only open regular files: a pipe would block
        with open(path, "rb") as file:
            reader = _Reader(path, file)
            tensor_count, metadata_count = reader.header()
            metadata = reader.metadata(metadata_count)
            tensors = reader.tensors(tensor_count, metadata) if with_tensors else {}
    except OSError as error:
        raise WeightError(f"{path}: cannot be read: {error}") from error
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """Reads a file from start to end, with bounds checks."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.left = self.size

    def fail(self, what: str) -> WeightError:
        return WeightError(
            f"{self.path}: not a valid GGUF file: {what} (before byte {self.size - self.left})"
        )

    def take(self, count: int) -> bytes:
        if count <= self.left:
            data = self.file.read(count)
            if len(data) == count:
                self.left -= count
                return data
        raise self.fail(f"it ends early, {count} bytes expected, {self.left} left")

    def number(self, dtype: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0])

    def count(self, what: str, each: int) -> int:
        """A 64-bit count of items that take at least `each` bytes of the file."""
        count = self.number("<u8")
        if count * each > self.left:
            raise self.fail(f"{count} {what} cannot be in the {self.left} bytes that are left")
        return count

    def string(self) -> str:
        (length,) = _LENGTH.unpack(self.take(8))
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8: {error}") from error

    def header(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries."""
        magic = self.take(4)
        if magic != b"GGUF":
            raise self.fail(f"it starts with {magic!r}, not b'GGUF'")
        version = self.number("<u4")
        if version & 0xFFFF == 0:
            raise self.fail("it is a big-endian one, which is not supported")
        if version not in (2, 3):
            raise self.fail(f"version {version} is not supported, only 2 and 3")
        tensors = self.count("tensors", 8 + 4 + 8 + 4 + 8)
        return tensors, self.count("metadata entries", 8 + 4 + 1)

    def metadata(self, count: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in entries:
                raise self.fail(f"metadata {key!r} is there twice")
            entries[key] = self.value(self.number("<u4"))
        return entries

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item = self.number("<u4")
            if item == _STRING:
                return [self.string() for _ in range(self.count("strings", 8))]
            dtype = self.scalar(item)
            count = self.count("numbers", dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        dtype = self.scalar(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise self.fail(f"type {kind} of metadata is not supported")
        return _SCALARS[kind]

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        table = [self.tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two, is {alignment!r}")
        start = -(-(self.size - self.left) // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        end = start
        for name, tensor in sorted(table, key=lambda line: line[1].offset):
            if name in tensors:
                raise self.fail(f"tensor {name} is there twice")
            begin = start + tensor.offset
            expected = -(-end // alignment) * alignment
            if begin != expected:
                raise self.fail(
                    f"the data of {name} are at byte {begin}, expected {expected}, where those before end: a "
                    "tensor's type, size or offset is wrong"
                )
            self.padding(end, begin)
            end = begin + tensor.nbytes
            if end > self.size:
                raise WeightError(
                    f"{self.path}: truncated: the data of {name} ends at byte {end}, the file at {self.size}"
                )
            tensors[name] = tensor._replace(offset=begin)
        if self.size - end >= alignment:
            raise self.fail(
                f"the data of the tensors end at byte {end}, the file at {self.size}: a tensor's type or "
                "size is wrong, or something else follows"
            )
        self.padding(end, self.size)
        return tensors

    def padding(self, start: int, stop: int) -> None:
        """Check that the padding between the data of two tensors is zero."""
        if start < stop:
            self.file.seek(start)
            found = self.file.read(stop - start)
            if found.strip(b"\0"):
                raise self.fail(f"the padding at byte {start} is not zero: a tensor's type or size is wrong")

    def tensor(self) -> tuple[str, GGUFTensor]:
        """An entry of the table; its offset is still relative to the start of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        dimensions = self.number("<u4")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"{name} has {dimensions} dimensions, from 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self.number("<u8") for _ in range(dimensions))[::-1]
        code, offset = self.number("<u4"), self.number("<u8")
        try:
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self.fail(f"{name} is stored in the unknown type {code}") from error
        if shape[-1] % block or 0 in shape:
            raise self.fail(f"{name} of shape {list(shape)} cannot be {kind.name}, in blocks of {block}")
        return name, GGUFTensor(shape, kind, offset, math.prod(shape) // block * block_bytes)
