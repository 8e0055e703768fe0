"""Texts to vectors, and pairs of texts to scores."""

from .batching import Tokens, by_length, check_batch_size, chunks, run, window
from .cross_encoder import CrossEncoder
from .encoder import SentenceEncoder, SentenceTransformer

__all__ = [
    "CrossEncoder",
    "SentenceEncoder",
    "SentenceTransformer",
    "Tokens",
    "by_length",
    "check_batch_size",
    "chunks",
    "run",
    "window",
]
