"""From logits to text: the decoding loop, sampling, stopping, `generate` and `LLM`."""

from .config import DEFAULTS, OPTIONS, UNSUPPORTED, WITHOUT_EFFECT
from .engine import context_window
from .llm import LLM, RequestOutput, SamplingParams, TextStream
from .model_generate import GenerationConfig, TextIteratorStreamer, TextStreamer, generate
from .sampling import Sampling, draw, draw_rows, process
from .values import in_vocabulary, token_ids, whole

__all__ = [
    "DEFAULTS",
    "LLM",
    "OPTIONS",
    "UNSUPPORTED",
    "WITHOUT_EFFECT",
    "GenerationConfig",
    "RequestOutput",
    "Sampling",
    "SamplingParams",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "context_window",
    "draw",
    "draw_rows",
    "generate",
    "in_vocabulary",
    "process",
    "token_ids",
    "whole",
]
