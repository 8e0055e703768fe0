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
from .relays import OutputMatrix
from .rules import Rule, affine, copy, fuse, ignore, tied, transpose
from .stored import (
    CONFIG_KEY,
    CONFIG_RULE,
    check_format,
    config_tensor,
    own_rules,
    stored_config,
    stored_format,
    stored_untied,
)
from .unfused import RECORD, foreign, fuse_modules, tied_names, unfuse_modules

__all__ = [
    "CONFIG_KEY",
    "CONFIG_RULE",
    "KEEP",
    "RECORD",
    "LoadReport",
    "MapEntry",
    "OutputMatrix",
    "Rule",
    "affine",
    "check_format",
    "config_tensor",
    "copy",
    "foreign",
    "fuse",
    "fuse_modules",
    "ignore",
    "initialise",
    "load_weights",
    "own_rules",
    "resized",
    "save_weights",
    "stored_config",
    "stored_format",
    "stored_tensors",
    "stored_untied",
    "tied",
    "tied_names",
    "transpose",
    "unfuse_modules",
    "weight_map",
]
