"""Checkpoints: named tensors on disk, whose names, shapes and dtypes are known before any data is read.

Tensors are copied one at a time, directly to their destination: `read_into(name, out)` converts to the dtype
and device of `out`. Nothing else is allocated, so loading takes hardly more memory than the weights. Every
file is untrusted: any fault is a `WeightError` that names the file.
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
    """Metadata of a stored tensor. `dtype` is the dtype after reading, `stored` the file's name of its type
    ("BF16", "Q4_K"), `format` minilm's format (`minilm.ops.quantized`) if it is a matrix whose codes can be
    read directly."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    stored: str
    format: str = ""


class Checkpoint(ABC):
    """Named tensors on disk. `path` is the file or folder, for messages; `tensors` is in the order of the
    files. Use it as a context manager, or call `close()`."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy the tensor `name` to `out`, which has the same shape and any dtype, device and strides."""
        info = self._known(name, tuple(out.shape))
        with torch.no_grad():
            self._read(name, info, out)

    def read_codes_into(self, name: str, out: QuantizedWeight) -> None:
        """Copy the quantised matrix `name` unchanged to `out`, which has the same shape and format."""
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
        """Close the files. Reading again reopens them."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
