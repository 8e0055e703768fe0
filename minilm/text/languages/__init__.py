"""Tokenizers of translation models, which know the languages of their texts."""

from .marian import MarianTokenizer
from .mbart import MBartTokenizer

__all__ = ["MBartTokenizer", "MarianTokenizer"]
