"""Loading and saving weights: declarative rules map a checkpoint's tensor names to the model's and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .fresh import initialise, resized
from .loading import (
    LoadReport,
    MapEntry,
    load_weights,
    save_weights,
    stored_tensors,
    weight_map,
)
from .plan import POOLER, UNFUSED
from .quantized import KEEP
from .rules import Rule, affine, copy, fuse, ignore, older, tied, transpose
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

if TYPE_CHECKING:
    from .relays import OutputMatrix, walk
    from .unfused import foreign, fuse_modules, tied_names, unfuse_modules

__all__ = [
    "CONFIG_KEY",
    "CONFIG_RULE",
    "KEEP",
    "POOLER",
    "UNFUSED",
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
    "older",
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
    "walk",
    "weight_map",
]

_LATE = ("OutputMatrix", "foreign", "fuse_modules", "tied_names", "unfuse_modules", "walk")


def __getattr__(name: str) -> Any:
    """The names of `unfused` are imported when they are used: few models are ever unfused."""
    if name in _LATE:
        return getattr(import_module(".unfused", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
