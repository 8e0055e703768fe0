"""Texts to tokens and back, and messages to texts."""

from .chat_template import ChatTemplateError, render
from .detokenize import IncrementalDecoder, context, continuation
from .tokenizer import AutoTokenizer, Tokenizer, tokenizer_class

__all__ = [
    "AutoTokenizer",
    "ChatTemplateError",
    "IncrementalDecoder",
    "Tokenizer",
    "context",
    "continuation",
    "render",
    "tokenizer_class",
]
