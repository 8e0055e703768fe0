"""Sentence embeddings, and scores for pairs of texts."""

from .batching import Ran, Tokens, by_length, check_batch_size, chunks, in_order, run, window
from .cross_encoder import CrossEncoder
from .encoder import SentenceEncoder, SentenceTransformer

__all__ = [
    "CrossEncoder",
    "Ran",
    "SentenceEncoder",
    "SentenceTransformer",
    "Tokens",
    "by_length",
    "check_batch_size",
    "chunks",
    "in_order",
    "run",
    "util",
    "window",
]
