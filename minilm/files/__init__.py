"""Model files on disk, read with strict checks: the hub cache, safetensors, GGUF, quantised checkpoints.

Modules that need PyTorch are imported on first use: finding files and tokenising texts work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .gguf_config import default_token
from .gguf_file import read_gguf_metadata
from .hub import (
    CONFIG_FILES,
    DEFAULT_DECODER,
    DEFAULT_ENCODER,
    SENTENCE_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    WEIGHT_FILES,
    HubError,
    is_bundled,
    resolve,
)
from .reading import (
    MOST_CONFIG,
    MOST_TEMPLATE,
    MOST_TEXT,
    FileError,
    WeightError,
    file_size,
    has_file,
    parse_json,
    read_bytes,
    read_json,
    read_json_value,
    read_text,
)
from .saving import saving, settle

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, TensorInfo
    from .gguf import GGUFCheckpoint
    from .opening import open_checkpoint
    from .safetensors import INDEX, SINGLE, SafetensorsCheckpoint

_LATE = {
    "checkpoint": ("Checkpoint", "TensorInfo"),
    "gguf": ("GGUFCheckpoint",),
    "opening": ("open_checkpoint",),
    "safetensors": ("INDEX", "SINGLE", "SafetensorsCheckpoint"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATE.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CONFIG_FILES",
    "DEFAULT_DECODER",
    "DEFAULT_ENCODER",
    "INDEX",
    "MOST_CONFIG",
    "MOST_TEMPLATE",
    "MOST_TEXT",
    "SENTENCE_FILES",
    "SINGLE",
    "TOKENIZER_FILES",
    "VOCABULARY_FILES",
    "WEIGHT_FILES",
    "Checkpoint",
    "FileError",
    "GGUFCheckpoint",
    "HubError",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "WeightError",
    "default_token",
    "file_size",
    "has_file",
    "is_bundled",
    "open_checkpoint",
    "parse_json",
    "read_bytes",
    "read_gguf_metadata",
    "read_json",
    "read_json_value",
    "read_text",
    "resolve",
    "saving",
    "settle",
]
