"""How good a model is."""

from .scores import Likeness, likeness, perplexity

__all__ = ["Likeness", "likeness", "perplexity"]
