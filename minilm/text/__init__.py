"""Texts to tokens and back, and messages to texts."""

from .detokenize import IncrementalDecoder, context, continuation
from .tokenizer import AutoTokenizer, Tokenizer, tokenizer_class

__all__ = ["AutoTokenizer", "IncrementalDecoder", "Tokenizer", "context", "continuation", "tokenizer_class"]
