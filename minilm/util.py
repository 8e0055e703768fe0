"""`minilm.sentence.util` under the name that programs for sentence-transformers import."""

from .sentence.util import *  # noqa: F403
from .sentence.util import __all__ as __all__
