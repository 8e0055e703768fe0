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


def _own_class(family: str) -> type[Tokenizer]:
    """The class for a family of tokenizers, which translation models have for themselves."""
    if family not in ("MarianTokenizer", "MBartTokenizer", "MBart50Tokenizer"):
        return Tokenizer
    from .languages import MarianTokenizer, MBartTokenizer

    return MarianTokenizer if family == "MarianTokenizer" else MBartTokenizer


Tokenizer.own_class = staticmethod(_own_class)
