"""Loading matrices as quantised ones: what becomes of one parameter of the plan.

`formats` of `minilm.weights.load_weights` says for which parameters, and to which format; `KEEP` takes the
one that the file has. A matrix is read whole, in float32, and quantised, before the next one is read: never
more than one is in memory in full. Codes that the file has in the wanted format are copied as they are.
"""

from __future__ import annotations

import torch

from ..files import Checkpoint, WeightError
from ..ops.quantized import QuantizedWeight, empty, is_finite, plane_shapes, quantise
from .plan import Fill, Shape

KEEP = "keep"
"""In place of a format: the one that the file has, and floating where that is none of ours."""

_FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
"""Types in files that are kept as they are by staying floating."""

COMMON = "q8_0"
"""For a matrix whose parts have different formats in the file."""


def target_format(fill: Fill, checkpoint: Checkpoint, shape: Shape, wanted: str) -> tuple[str | None, str]:
    """The format that a parameter of `shape` gets, None if it stays floating; and a remark for the report,
    "" where all went as asked."""
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

    Raises WeightError where the values cannot be quantised.
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
