"""Checkpoints into other checkpoints, and what they are."""

from .checkpoints import convert
from .quantization import Perplexities, Quantization, quantize
from .summary import DTYPES, Summary, summarise

__all__ = ["DTYPES", "Perplexities", "Quantization", "Summary", "convert", "quantize", "summarise"]
