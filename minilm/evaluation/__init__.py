"""How good a model is."""

from .perplexity import Likeness, likeness, perplexity

__all__ = ["Likeness", "likeness", "perplexity"]
