"""Text to tokens and back, and chat messages to prompts."""

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
