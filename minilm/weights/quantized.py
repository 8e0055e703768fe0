"""Quantising matrices while loading them, one parameter of the plan at a time.

`formats` of `minilm.weights.load_weights` gives the format of each parameter; `KEEP` keeps the format in the
file. A matrix is read completely, in float32, and quantised before the next one is read, so that only one at
a time is in memory as float32. Codes that are already in the wanted format are copied unchanged.
"""

from __future__ import annotations

import torch

from ..files import Checkpoint, WeightError
from ..ops.quantized import QuantizedWeight, empty, is_finite, plane_shapes, quantise
from .plan import Fill, Shape

KEEP = "keep"
"""In place of a format: keep the file's format; floating point if minilm does not have it."""

_FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
"""Floating-point types in files."""

COMMON = "q8_0"
"""Format for a matrix whose parts have different formats in the file."""


def target_format(fill: Fill, checkpoint: Checkpoint, shape: Shape, wanted: str) -> tuple[str | None, str]:
    """The format for a parameter of `shape`, None if it stays floating point; and a remark for the report, ""
    if it is in the requested format."""
    stored = list(dict.fromkeys(checkpoint.tensors[key].format for key in fill.sources))
    format, remark = wanted, ""
    if wanted == KEEP:
        types = dict.fromkeys(checkpoint.tensors[key].stored for key in fill.sources)
        kinds = " and ".join(types)
        if not any(stored):
            return None, f"stored as {kinds}, and dequantised" if types.keys() - _FLOATING else ""
        format = stored[0] if len(stored) == 1 else COMMON
        remark = f"its parts are stored as {kinds}" if len(stored) > 1 else ""
    try:
        plane_shapes(format, *shape)
    except ValueError as error:
        return None, str(error)
    return format, remark


def read_quantised(
    fill: Fill, checkpoint: Checkpoint, shape: Shape, format: str, device: torch.device | str
) -> tuple[QuantizedWeight, list[str]]:
    """The matrix of `fill` in `format`, and the names in the checkpoint of parts that have infinite scales.

    Raises WeightError if the values cannot be quantised.
    """
    if all(checkpoint.tensors[key].format == format for key in fill.sources):
        rows, columns = shape
        weight = empty(format, rows, columns, device)
        parts = weight.split(fill.sizes or shape[:1])
        for key, part in zip(fill.sources, parts, strict=True):
            checkpoint.read_codes_into(key, part)
        return weight, [key for key, part in zip(fill.sources, parts, strict=True) if not is_finite(part)]
    matrix = torch.empty(shape, dtype=torch.float32, device=device)
    for key, view in zip(fill.sources, fill.views(matrix), strict=True):
        checkpoint.read_into(key, view)
    try:
        return quantise(matrix, format), []
    except ValueError as error:
        raise WeightError(f"{checkpoint.path}: {', '.join(fill.sources)}: {error}") from None
