"""Checkpoints: files of named tensors, opened strictly and read piece by piece.

A `Checkpoint` knows the name, shape and dtype of every tensor before a byte of data is read, and copies one
tensor at a time straight to where it shall be: `read_into(name, out)` converts to the dtype and device of
`out` on the way. Nothing else is allocated, so that loading takes hardly more memory than the weights do.

safetensors files are memory-mapped. Pages of a mapping that were touched count as memory of the process for
as long as the mapping lives, so that a naive reader of a 10 GB file seems to need 20 GB. Opening a file again
drops its pages and costs little (0.1 ms for five tensors, 1 ms for a thousand); the reader does it whenever a
small part of the checkpoint has been touched, see `_window`.

Every file is taken for hostile until proven otherwise: whatever is wrong with it is a `WeightError` that
names it. Pickled checkpoints (`pytorch_model.bin`) are never read: unpickling a file runs the code in it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops.quantized import QuantizedWeight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


C = TypeVar("C", bound="Checkpoint")


class WeightError(ValueError):
    """A checkpoint cannot be read or does not fit the model; the message names file, key and the fault."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it. `dtype` is what reading gives, `stored` the file's
    own word for how it is kept ("BF16", "Q4_K"), `format` ours (`minilm.ops.quantized`) where it is a matrix
    whose codes can be read as they are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    stored: str
    format: str = ""


class Checkpoint(ABC):
    """Named tensors on disk. `path` is the file or folder as messages name it; `tensors` is in the order of
    the files. Use as a context manager, or call `close()`."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read_into(self, name: str, out: Tensor) -> None:
        """Copies the tensor `name` to `out`, which has its shape and any dtype, device and strides."""
        info = self._known(name, tuple(out.shape))
        with torch.no_grad():
            self._read(name, info, out)

    def read_codes_into(self, name: str, out: QuantizedWeight) -> None:
        """Copies the quantised matrix `name`, as it is stored, to `out` of its shape and format."""
        info = self._known(name, out.shape)
        if out.format != info.format:
            raise WeightError(f"{info.file}: {name} is stored as {info.stored}, not as {out.format}")
        with torch.no_grad():
            self._read_codes(name, info, out)

    def _known(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise WeightError(f"{self.path}: there is no tensor {name!r}")
        if shape != info.shape:
            raise WeightError(f"{info.file}: {name} has shape {list(info.shape)}, not {list(shape)}")
        return info

    @abstractmethod
    def _read(self, name: str, info: TensorInfo, out: Tensor) -> None: ...

    def _read_codes(self, name: str, info: TensorInfo, out: QuantizedWeight) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no quantised tensors")

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files. Reading again opens them again."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array of `shape` into consecutive pieces of at most `limit` elements each, in
    memory order.

    [10, 4] with limit 12 gives rows 0-3, 3-6, 6-9, 9-10; a row longer than the limit is cut itself.
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
    """One safetensors file, or the shards that an index names. Opening it checks the headers of all files.

    With an index, index and shards must agree: every shard exists and lies beside the index, and holds
    exactly the tensors that the index says.
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
        """The open handle of `file`; a new one, with no page touched, after every `_window` bytes."""
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
    """Bytes that may be touched before a file is opened again: 1/64 of the checkpoint, from 2 to 64 MiB.

    A piece is half a window, so that at most 1.5 windows are touched: 2.5 % of the weights, 5 % of them in
    half precision. A model of 100 MB is read through windows of 2 MiB, one of 14 GB through 64 MiB.
    """
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors)
    return min(max(total // 64, 2 << 20), 64 << 20)


def _hint(file: Path) -> str:
    """Why a file that should be safetensors is not, where there is a common reason."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer: the weights themselves were not downloaded; run `git lfs pull`)"
    return " (it is a pickle under another name)" if start[:2] in (b"PK", b"\x80\x02") else ""


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The shards that an index names, in its order, and the tensors that it says each has."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path}: not a readable index: {error}") from error
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path}: not a safetensors index: it has no weight_map of tensor names to files")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
            raise WeightError(f"{path}: {name} should be in a .safetensors file, the index says {file!r}")
        # Only the name is judged, not where links lead: the hub's cache is made of links that leave their
        # folder.
        if "\\" in file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise WeightError(f"{path}: {name} is said to be in {file!r}, outside the folder")
        shards.setdefault(path.parent / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise WeightError(f"{path}: the shard {shard.name} is missing")
    return shards


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens the weights at `path`: a .safetensors or .gguf file, an index of shards, or a folder that has one
    of them (`model.safetensors`, else `model.safetensors.index.json`, else its only .gguf file). Matrices
    that minilm saved quantised are one tensor each."""
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    elif not path.is_file():
        raise WeightError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        plain = SafetensorsCheckpoint(path)
        if any(name.endswith(".weight.codes") for name in plain.tensors):
            from .quantized import QuantizedCheckpoint

            return QuantizedCheckpoint(plain)
        return plain
    if path.suffix in _PICKLED:
        raise WeightError(_no_pickle(path))
    raise WeightError(f"{path}: expected a .safetensors, .safetensors.index.json or .gguf file")


def _find(folder: Path) -> Path:
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise WeightError(f"{folder}: has {len(ggufs)} GGUF files, name one of them: {names}")
    pickled = sorted(file for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise WeightError(_no_pickle(pickled[0]))
    raise WeightError(f"{folder}: no weights here: expected {SINGLE}, {INDEX} or a .gguf file")


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: this is a pickle, and unpickling runs whatever code is in it, so minilm never reads one; "
        "convert it where you trust it: transformers.AutoModel.from_pretrained(folder).save_pretrained(new)"
    )
