"""From a checkpoint's names to ours and back, by rules that are data."""

from .loading import (
    LoadReport,
    MapEntry,
    load_weights,
    save_weights,
    weight_map,
)
from .quantized import KEEP
from .rules import Rule, affine, copy, fuse, ignore, tied, transpose

__all__ = [
    "KEEP",
    "LoadReport",
    "MapEntry",
    "Rule",
    "affine",
    "copy",
    "fuse",
    "ignore",
    "load_weights",
    "save_weights",
    "tied",
    "transpose",
    "weight_map",
]
