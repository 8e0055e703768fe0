"""Checkpoints: named tensors on disk, known by name, shape and dtype before a byte of data is read.

One tensor at a time is copied straight to where it shall be: `read_into(name, out)` converts to the dtype and
device of `out` on the way. Nothing else is allocated, so that loading takes hardly more memory than the
weights do. Every file is taken for hostile until proven otherwise: whatever is wrong with it is a
`WeightError` that names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from ..ops.quantized import QuantizedWeight
from .reading import WeightError as WeightError

C = TypeVar("C", bound="Checkpoint")


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
