"""The vocabulary of a checkpoint, from any supported file format, as one `tokenizers.Tokenizer`."""

from .errors import TokenizerError, backend_errors
from .families import FAMILIES, SPECIAL_TOKENS, adds, set_frame
from .files import Parts, from_object, load

__all__ = [
    "FAMILIES",
    "SPECIAL_TOKENS",
    "Parts",
    "TokenizerError",
    "adds",
    "backend_errors",
    "from_object",
    "load",
    "set_frame",
]
