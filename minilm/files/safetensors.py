"""safetensors files: one, or the shards that an index lists, read piece by piece.

They are memory-mapped. Touched pages of a mapping count as memory of the process as long as the mapping
exists, so a naive reader of a 10 GB file seems to need 20 GB. Reopening a file drops its pages and is cheap
(0.1 ms for five tensors, 1 ms for a thousand); the reader does so whenever a small part of the checkpoint has
been touched, see `_window`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo, WeightError
from .reading import MOST_CONFIG, file_size, has_file, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that split an array of `shape` into consecutive pieces of at most `limit` elements, in memory
    order.

    [10, 4] with limit 12 gives rows 0-3, 3-6, 6-9, 9-10; a row longer than the limit is split as well.
    """
    if math.prod(shape) <= limit:
        yield ()
        return
    row = math.prod(shape[1:])
    if row <= limit:
        step = limit // row
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])),)
        return
    for start in range(shape[0]):
        for rest in blocks(shape[1:], limit):
            yield (slice(start, start + 1), *rest)


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or the shards that an index lists. Opening it checks the headers of all files.

    An index must agree with its shards: every shard exists in the folder of the index, and has exactly the
    tensors that the index lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        self._handle: tuple[Path, Any] | None = None
        self._touched = 0
        self._window = 0
        if path.name.endswith(".json"):
            for shard, names in _read_index(path).items():
                self._add(shard, names, path)
        else:
            self._add(path, None, path)
        self._window = _window(self.tensors.values())

    def _add(self, file: Path, expected: set[str] | None, index: Path) -> None:
        from safetensors import SafetensorError

        found: dict[str, TensorInfo] = {}
        file_size(file, error=WeightError)  # only open regular files: a pipe would block
        try:
            handle = self._open(file)
            for name in handle.offset_keys():
                entry = handle.get_slice(name)
                stored = str(entry.get_dtype())
                if stored not in _DTYPES:
                    raise WeightError(f"{file}: {name} is stored as {stored}, which PyTorch has no dtype for")
                found[name] = TensorInfo(tuple(entry.get_shape()), _DTYPES[stored], file, stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WeightError(f"{file}: not a valid safetensors file: {error}{_hint(file)}") from error
        finally:
            self.close()
        for name in sorted(found.keys() & self.tensors.keys()):
            raise WeightError(f"{file}: {name} is also in {self.tensors[name].file.name}")
        if expected is not None:
            for name in sorted(expected - found.keys()):
                raise WeightError(f"{file}: {name} is missing, which {index.name} says is in this file")
            for name in sorted(found.keys() - expected):
                raise WeightError(f"{file}: {name} is in this file, but {index.name} does not say so")
        self.tensors.update(found)

    def _open(self, file: Path) -> Any:
        """The open handle of `file`; reopened, with no page touched, after every `_window` bytes."""
        from safetensors import safe_open

        if self._handle is None or self._handle[0] != file or self._touched >= self._window:
            self.close()
            self._handle = (file, safe_open(file, framework="pt"))
        return self._handle[1]

    def _read(self, name: str, info: TensorInfo, out: Tensor) -> None:
        from safetensors import SafetensorError

        try:
            for index in blocks(info.shape, self._window // (2 * info.dtype.itemsize)):
                handle = self._open(info.file)
                piece: Tensor = handle.get_slice(name)[index] if index else handle.get_tensor(name)
                out[index].copy_(piece)
                self._touched += piece.nbytes
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WeightError(f"{info.file}: {name} cannot be read: {error}") from error

    def close(self) -> None:
        self._handle = None
        self._touched = 0


def _window(tensors: Iterable[TensorInfo]) -> int:
    """Bytes that may be touched before a file is reopened: 1/64 of the checkpoint, from 2 to 64 MiB.

    A piece is half a window, so at most 1.5 windows are touched: 2.5 % of the weights (5 % if they are
    converted to half precision). A model of 100 MB is read in windows of 2 MiB, one of 14 GB in 64 MiB.
    """
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors)
    return min(max(total // 64, 2 << 20), 64 << 20)


def _hint(file: Path) -> str:
    """A common reason why a file is not safetensors, or ""."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer: the weights themselves were not downloaded; run `git lfs pull`)"
    return " (it is a pickle under another name)" if start[:2] in (b"PK", b"\x80\x02") else ""


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The shards that an index lists, in its order, and the tensors of each."""
    weight_map = read_json(path, limit=MOST_CONFIG, error=WeightError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path}: not a safetensors index: it has no weight_map of tensor names to files")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
            raise WeightError(f"{path}: {name} should be in a .safetensors file, the index says {file!r}")
        # Only check the name, not the target of links: files in the hub's cache are links out of the folder.
        if "\\" in file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise WeightError(f"{path}: {name} is said to be in {file!r}, outside the folder")
        shards.setdefault(path.parent / file, set()).add(name)
    for shard in shards:
        if not has_file(shard, error=WeightError):
            raise WeightError(f"{path}: the shard {shard.name} is missing")
    return shards
