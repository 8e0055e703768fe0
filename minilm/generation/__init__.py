"""From logits to text: the decoding loop, sampling, stopping, `generate` and `LLM`."""

from .engine import context_window
from .llm import LLM, BeamSearchOutput, BeamSearchParams, RequestOutput, SamplingParams, TextStream
from .model_generate import GenerationConfig, TextIteratorStreamer, TextStreamer, generate

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "GenerationConfig",
    "RequestOutput",
    "SamplingParams",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "context_window",
    "generate",
]
