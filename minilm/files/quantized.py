"""Checkpoints of quantised models: safetensors files in which a matrix is stored as several tensors.

minilm saves a quantised matrix `X.weight` as its planes (minilm/ops/quantized.py): `X.weight.codes`,
`X.weight.scale` and, in q4_1, `X.weight.minimum`; always for [out, in], also in families whose checkpoints
store transposed matrices. `QuantizedCheckpoint` presents them as one tensor, so that rules and plan do not
depend on them. The dtypes of the planes determine the format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.quantized import FORMATS, QuantizedWeight, dequantise, empty, plane_shapes
from .checkpoint import Checkpoint, TensorInfo, WeightError

_PLANES = ("codes", "scale", "minimum")


class QuantizedCheckpoint(Checkpoint):
    """`inner`, with the planes of each quantised matrix presented as one tensor.

    Raises WeightError if planes are missing or do not fit any format.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self.path = inner.path
        self.tensors = {}
        self._inner = inner
        matrices = {name.removesuffix(".codes") for name in inner.tensors if name.endswith(".weight.codes")}
        planes = {f"{name}.{plane}" for name in matrices for plane in _PLANES}
        for name, info in inner.tensors.items():
            plane = name.rpartition(".")[2]
            if name not in planes and plane in _PLANES and name.endswith(f".weight.{plane}"):
                raise WeightError(f"{info.file}: {name} is there without {name.removesuffix(plane)}codes")
            if name not in planes:
                self.tensors[name] = info
            elif name.endswith(".codes"):
                matrix = name.removesuffix(".codes")
                if matrix in inner.tensors:
                    raise WeightError(f"{info.file}: {matrix} is there twice, quantised and not")
                self.tensors[matrix] = self._matrix(matrix, info)

    def _matrix(self, name: str, codes: TensorInfo) -> TensorInfo:
        found = {
            plane: self._inner.tensors[f"{name}.{plane}"]
            for plane in _PLANES
            if f"{name}.{plane}" in self._inner.tensors
        }
        format = _format({plane: info.dtype for plane, info in found.items()})
        if format is None:
            has = ", ".join(f"{plane} {info.stored}" for plane, info in found.items())
            raise WeightError(f"{codes.file}: {name} has {has}, which is none of {', '.join(FORMATS)}")
        if len(codes.shape) != 2:
            raise WeightError(f"{codes.file}: {name}.codes has shape {list(codes.shape)}, expected two sizes")
        shape = (codes.shape[0], codes.shape[1] * FORMATS[format].per_byte)
        try:
            shapes = plane_shapes(format, *shape)
        except ValueError as error:
            raise WeightError(f"{codes.file}: {name}: {error}") from None
        for plane, info in found.items():
            if info.shape != shapes[plane][0]:
                raise WeightError(
                    f"{info.file}: {name}.{plane} has shape {list(info.shape)}, expected "
                    f"{list(shapes[plane][0])} for a {format} matrix {list(shape)}"
                )
        return TensorInfo(shape, torch.float32, codes.file, format.upper(), format)

    def _read(self, name: str, info: TensorInfo, out: Tensor) -> None:
        if not info.format:
            self._inner.read_into(name, out)
            return
        weight = empty(info.format, info.shape[0], info.shape[1])
        self._read_codes(name, info, weight)
        out.copy_(dequantise(weight, torch.float32))

    def _read_codes(self, name: str, info: TensorInfo, out: QuantizedWeight) -> None:
        for plane, tensor in out.planes.items():
            self._inner.read_into(f"{name}.{plane}", tensor)
        if info.format == "int8" and out.codes.numel() and int(out.codes.amin()) < -127:
            raise WeightError(f"{info.file}: {name}.codes holds -128, and int8 weights go from -127 to 127")

    def close(self) -> None:
        self._inner.close()


def _format(dtypes: dict[str, torch.dtype]) -> str | None:
    """The format whose planes have these dtypes, which differ between all formats; None: no format."""
    for name, kind in FORMATS.items():
        expected = {"codes": kind.codes, "scale": kind.scale}
        if dtypes == (expected | {"minimum": kind.scale} if kind.minimum else expected):
            return name
    return None
