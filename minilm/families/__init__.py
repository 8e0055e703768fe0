"""One file a family: how it differs from the others, its configuration and its weight names.

To add one: a file that says how it differs (`FAMILY = Family(...)`), and a line in `table.FAMILIES`.
"""

from .family import Family, Head
from .pretrained_config import PretrainedConfig
from .table import FAMILIES, families, family_of

__all__ = ["FAMILIES", "Family", "Head", "PretrainedConfig", "families", "family_of"]
