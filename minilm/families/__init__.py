"""One file per model family: how it differs from the others, its configuration and its weight names.

To add a family, write a file with a ``FAMILY = Family(...)`` and add a line to `table.FAMILIES`.
"""

from .family import Family, Head
from .pretrained_config import PretrainedConfig
from .table import FAMILIES, families, family_of

__all__ = ["FAMILIES", "Family", "Head", "PretrainedConfig", "families", "family_of"]
