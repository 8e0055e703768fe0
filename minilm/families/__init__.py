"""One file per model family: how it differs from the others, its configuration and its weight names.

To add a family, write a file with a ``FAMILY = Family(...)`` and add a line to `table.FAMILIES`.
"""

from .family import Family, Head, SequenceHead
from .pretrained_config import PretrainedConfig
from .table import ENCODER_DECODERS, FAMILIES, families, family_of

__all__ = [
    "ENCODER_DECODERS", "FAMILIES", "Family", "Head", "PretrainedConfig", "SequenceHead",
    "encoder_decoder", "families", "family_of",
]  # fmt: skip
