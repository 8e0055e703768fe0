"""Encoder-decoders (T5, BART): a text in, another text out."""

from .cache import EncoderDecoderCache
from .heads import AutoModelForSeq2SeqLM
from .outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from .pretrained import alias, alias_names, class_of

__all__ = [
    "AutoModelForSeq2SeqLM",
    "EncoderDecoderCache",
    "Seq2SeqLMOutput",
    "Seq2SeqModelOutput",
    "alias",
    "alias_names",
    "class_of",
]
