"""`minilm.sentence.util`, where programs of sentence-transformers look for it."""

from .sentence.util import *  # noqa: F403
from .sentence.util import __all__ as __all__
