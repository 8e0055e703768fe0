"""From logits to text: the decoding loop, sampling, stopping, `generate` and `LLM`."""

from .engine import context_window
from .llm import LLM, RequestOutput, SamplingParams, TextStream
from .model_generate import GenerationConfig, TextIteratorStreamer, TextStreamer, generate

__all__ = [
    "LLM",
    "GenerationConfig",
    "RequestOutput",
    "SamplingParams",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "context_window",
    "generate",
]
