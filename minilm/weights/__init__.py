"""From a checkpoint's names to ours and back, by rules that are data."""

from .loading import (
    Checkpoint,
    LoadReport,
    MapEntry,
    WeightError,
    load_weights,
    open_checkpoint,
    save_weights,
    weight_map,
)
from .quantized import KEEP
from .rules import Rule, affine, copy, fuse, ignore, tied, transpose

__all__ = [
    "KEEP",
    "Checkpoint",
    "LoadReport",
    "MapEntry",
    "Rule",
    "WeightError",
    "affine",
    "copy",
    "fuse",
    "ignore",
    "load_weights",
    "open_checkpoint",
    "save_weights",
    "tied",
    "transpose",
    "weight_map",
]
