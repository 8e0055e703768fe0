"""Quantised weights: the formats, quantisation and dequantisation.

A matrix [out, in] is stored as small integers, its *codes*, and their scales. `int8` has one scale per row.
The other formats split a row into groups of 32 like the blocks of GGUF, but store codes, scales and minima in
separate tensors (*planes*), so that a kernel reads each with one stride:

    format   codes                    scale              minimum            value                   bits
    int8     int8  [out, in]          float32 [out]      -                  scale * code            8
    q8_0     int8  [out, in]          float16 [out, G]   -                  scale * code            8.5
    q4_0     uint8 [out, in / 2]      float16 [out, G]   -                  scale * (code - 8)      4.5
    q4_1     uint8 [out, in / 2]      float16 [out, G]   float16 [out, G]   scale * code + minimum  5

G = in / 32. Byte 16 g + j of a row of 4-bit codes holds element 32 g + j in its low half and element
32 g + j + 16 in its high half. `quantise` rounds as llama.cpp's reference does, to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
"""Elements of a row that share a scale, in all formats except int8."""

_PIECE = 1 << 17
"""Elements that are quantised at a time, to keep temporary memory small."""


class Format(NamedTuple):
    """The planes of a format (see `FORMATS`)."""

    codes: torch.dtype
    per_byte: int
    """Number of codes per byte."""
    grouped: bool
    """True: one scale per group of 32; False: one per row."""
    scale: torch.dtype
    minimum: bool


FORMATS: dict[str, Format] = {
    "int8": Format(torch.int8, 1, grouped=False, scale=torch.float32, minimum=False),
    "q8_0": Format(torch.int8, 1, grouped=True, scale=torch.float16, minimum=False),
    "q4_0": Format(torch.uint8, 2, grouped=True, scale=torch.float16, minimum=False),
    "q4_1": Format(torch.uint8, 2, grouped=True, scale=torch.float16, minimum=True),
}


class QuantizedWeight(NamedTuple):
    """A quantised matrix [out, in]; for the planes see the top of this file."""

    format: str
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    @property
    def rows(self) -> int:
        """out."""
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """in."""
        return self.codes.shape[1] * FORMATS[self.format].per_byte

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.rows, self.columns

    @property
    def planes(self) -> dict[str, Tensor]:
        """Codes, scale, and the minimum if the format has one, by name."""
        planes = {"codes": self.codes, "scale": self.scale}
        return planes if self.minimum is None else planes | {"minimum": self.minimum}

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes.values())

    def split(self, sizes: Sequence[int]) -> tuple[QuantizedWeight, ...]:
        """Split into matrices of ``sizes[i]`` rows each, which share memory with this one."""
        cut = {name: torch.split(plane, list(sizes)) for name, plane in self.planes.items()}
        return tuple(
            QuantizedWeight(self.format, **{name: parts[i] for name, parts in cut.items()})
            for i in range(len(sizes))
        )


def plane_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each plane of a matrix [rows, columns] in the format `name`.

    Raises ValueError if the format does not exist or cannot hold the matrix.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no weight format {name!r}; expected one of {', '.join(FORMATS)}")
    kind = FORMATS[name]
    if columns < 1:
        raise ValueError(f"a quantised matrix needs columns, and this is [{rows}, {columns}]")
    if kind.grouped and columns % GROUP:
        raise ValueError(
            f"{name} splits rows into groups of {GROUP}, and {columns} columns are not a multiple of {GROUP}"
        )
    scales = (rows, columns // GROUP) if kind.grouped else (rows,)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, columns // kind.per_byte), kind.codes),
        "scale": (scales, kind.scale),
    }
    return shapes | ({"minimum": (scales, kind.scale)} if kind.minimum else {})


def empty(name: str, rows: int, columns: int, device: torch.device | str | None = None) -> QuantizedWeight:
    """An uninitialised matrix [rows, columns] in the format `name`. Errors: see `plane_shapes`."""
    shapes = plane_shapes(name, rows, columns)
    return QuantizedWeight(
        name, **{plane: torch.empty(s, dtype=d, device=device) for plane, (s, d) in shapes.items()}
    )


def check(op: str, weight: QuantizedWeight) -> None:
    """Raise ValueError unless the planes of `weight` fit its format and are on one device. Values are not
    checked."""
    if weight.format not in FORMATS:
        raise ValueError(f"{op}: there is no weight format {weight.format!r}; expected {', '.join(FORMATS)}")
    if weight.codes.dim() != 2:
        raise ValueError(f"{op}: codes must have two dimensions, and are {list(weight.codes.shape)}")
    try:
        expected = plane_shapes(weight.format, weight.rows, weight.columns)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    for name in ("codes", "scale", "minimum"):
        plane: Tensor | None = getattr(weight, name)
        if (plane is not None) != (name in expected):
            has = "has no minimum" if plane is not None else "needs a minimum"
            raise ValueError(f"{op}: the format {weight.format} {has}")
        if plane is None:
            continue
        shape, dtype = expected[name]
        if tuple(plane.shape) != shape or plane.dtype != dtype:
            raise ValueError(
                f"{op}: {name} of a {weight.format} matrix [{weight.rows}, {weight.columns}] must be {dtype} "
                f"{list(shape)}, and is {plane.dtype} {list(plane.shape)}"
            )
        if plane.device != weight.codes.device:
            raise ValueError(f"{op}: codes are on {weight.codes.device}, and {name} is on {plane.device}")


def dequantise(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The floating-point matrix [out, in], computed in float32 (float64 for float64) and cast once."""
    check("dequantise", weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kind = FORMATS[weight.format]
    if not kind.grouped:
        return weight.codes.to(wide).mul_(weight.scale[:, None]).to(dtype)
    groups = weight.codes.reshape(*weight.scale.shape, GROUP // kind.per_byte)  # [out, G, bytes]
    if kind.per_byte == 2:
        groups = torch.cat((groups & 15, groups >> 4), dim=-1)
    values = groups.to(wide)
    if weight.format == "q4_0":
        values -= 8
    values *= weight.scale.to(wide)[..., None]
    if weight.minimum is not None:
        values += weight.minimum.to(wide)[..., None]
    return values.flatten(1).to(dtype)


def quantise(tensor: Tensor, format: str) -> QuantizedWeight:
    """Quantise the matrix `tensor` [out, in], of any floating dtype, to `format`, on its device.

    Raises ValueError if the format cannot hold it: columns that are not a multiple of the group, NaN,
    infinity, or values whose scale exceeds float16.
    """
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"quantise: expected a floating-point matrix, got {tensor.dtype} {list(tensor.shape)}"
        )
    rows, columns = tensor.shape
    result = empty(format, rows, columns, tensor.device)
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        found = _quantise_rows(tensor[piece].detach().float(), format)
        for plane, values in zip(result.planes.values(), found, strict=True):
            plane[piece].copy_(values)
    if not is_finite(result):
        raise ValueError(
            f"quantise: the matrix has {_extent(tensor)}, and {FORMATS[format].scale} scales of {format} "
            "cannot hold that"
        )
    return result


def is_finite(weight: QuantizedWeight) -> bool:
    """Whether all values are finite (only scales and minima are checked)."""
    return all(bool(torch.isfinite(p).all()) for name, p in weight.planes.items() if name != "codes")


def _quantise_rows(x: Tensor, format: str) -> tuple[Tensor, ...]:
    """x float32 [rows, in] -> its planes: codes packed, the others still in float32."""
    if not FORMATS[format].grouped:
        return _eight_bits(x)
    groups = x.reshape(len(x), -1, GROUP)  # [rows, G, 32]
    if format == "q8_0":
        codes, *scales = _eight_bits(groups)
    else:
        codes, *scales = _four_bits(groups) if format == "q4_0" else _four_bits_from_minimum(groups)
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    return codes.flatten(1), *scales


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> codes from -127 to 127, and the scale [...] that maps the largest magnitude to 127."""
    scale = x.abs().amax(-1) / 127
    scaled = x * _inverse(scale)[..., None]
    whole = scaled.trunc()  # round half away from zero, as C's roundf; torch.round rounds half to even
    codes = whole + ((scaled - whole) * 2).trunc()
    return codes.to(torch.int8), scale


def _four_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., 32] -> codes 0 to 15, with 8 for zero and 0 for the value of largest magnitude; and the scale,
    whose sign is opposite to that value's."""
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    codes = (x * _inverse(scale)[..., None] + 8.5).clamp(0, 15)
    return codes.to(torch.uint8), scale


def _four_bits_from_minimum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., 32] -> codes 0 to 15 from the smallest value to the largest, scale, smallest value."""
    low = x.amin(-1)
    scale = (x.amax(-1) - low) / 15
    codes = ((x - low[..., None]) * _inverse(scale)[..., None] + 0.5).clamp(0, 15)
    return codes.to(torch.uint8), scale, low


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, or 0 where that is infinite: for groups of zeros, or of numbers close to zero."""
    return scale.reciprocal().nan_to_num(posinf=0.0, neginf=0.0)


def _extent(x: Tensor) -> str:
    largest = float(x.abs().max())
    return f"values up to {largest:.4g}" if math.isfinite(largest) else "NaN or infinite values"
