"""Loading and saving weights: declarative rules map a checkpoint's tensor names to the model's and back."""

from .fresh import initialise, resized
from .loading import (
    LoadReport,
    MapEntry,
    load_weights,
    save_weights,
    stored_tensors,
    weight_map,
)
from .quantized import KEEP
from .rules import Rule, affine, copy, fuse, ignore, tied, transpose
from .stored import check_format, own_rules, stored_format, stored_untied

__all__ = [
    "KEEP",
    "LoadReport",
    "MapEntry",
    "Rule",
    "affine",
    "check_format",
    "copy",
    "fuse",
    "ignore",
    "initialise",
    "load_weights",
    "own_rules",
    "resized",
    "save_weights",
    "stored_format",
    "stored_tensors",
    "stored_untied",
    "tied",
    "transpose",
    "weight_map",
]
