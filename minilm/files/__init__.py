"""What lies on disk, opened strictly: the hub, safetensors, GGUF, quantised checkpoints."""

from .checkpoint import Checkpoint, TensorInfo, WeightError
from .gguf import GGUFCheckpoint
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
from .opening import open_checkpoint
from .reading import (
    MOST_CONFIG,
    MOST_TEMPLATE,
    MOST_TEXT,
    FileError,
    file_size,
    has_file,
    read_bytes,
    read_json,
    read_json_value,
    read_text,
)
from .safetensors import INDEX, SINGLE, SafetensorsCheckpoint
from .saving import saving, settle

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
    "read_bytes",
    "read_gguf_metadata",
    "read_json",
    "read_json_value",
    "read_text",
    "resolve",
    "saving",
    "settle",
]
