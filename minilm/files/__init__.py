"""What lies on disk, opened strictly: the hub, safetensors, GGUF, quantised checkpoints."""

from .checkpoint import Checkpoint, TensorInfo, WeightError
from .gguf import GGUFCheckpoint
from .gguf_file import read_gguf_metadata
from .hub import (
    CONFIG_FILES,
    DEFAULT_DECODER,
    DEFAULT_ENCODER,
    SENTENCE_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    WEIGHT_FILES,
    FileError,
    HubError,
    is_bundled,
    read_json,
    resolve,
)
from .opening import open_checkpoint
from .safetensors import INDEX, SINGLE, SafetensorsCheckpoint

__all__ = [
    "CONFIG_FILES",
    "DEFAULT_DECODER",
    "DEFAULT_ENCODER",
    "INDEX",
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
    "is_bundled",
    "open_checkpoint",
    "read_gguf_metadata",
    "read_json",
    "resolve",
]
