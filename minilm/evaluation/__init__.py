"""Quality metrics: perplexity, and cosine similarity to reference embeddings."""

from .scores import Likeness, likeness, perplexity

__all__ = ["Likeness", "likeness", "perplexity"]
