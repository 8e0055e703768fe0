"""Converting, quantising and summarising checkpoints."""

from .checkpoints import convert
from .quantization import Perplexities, Quantization, quantize
from .summary import DTYPES, Summary, summarise

__all__ = ["DTYPES", "Perplexities", "Quantization", "Summary", "convert", "quantize", "summarise"]
