"""From logits to text: the decoding loop, sampling, stopping, `generate` and `LLM`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import DEFAULTS, OPTIONS, UNSUPPORTED, WITHOUT_EFFECT, unsupported
from .engine import context_window
from .llm import LLM, BeamSearchOutput, BeamSearchParams, RequestOutput, SamplingParams, TextStream
from .model_generate import GenerationConfig, TextIteratorStreamer, TextStreamer, generate
from .sampling import Sampling, draw, draw_rows, process
from .values import in_vocabulary, token_ids, whole

if TYPE_CHECKING:
    from .beam_generate import (
        BeamExtras,
        BeamPrompts,
        GenerateBeamEncoderDecoderOutput,
        beam_noise,
        generate_beams,
    )
    from .beams import BeamOptions
    from .processors import rules_of

__all__ = [
    "DEFAULTS",
    "LLM",
    "OPTIONS",
    "UNSUPPORTED",
    "WITHOUT_EFFECT",
    "BeamExtras",
    "BeamOptions",
    "BeamPrompts",
    "BeamSearchOutput",
    "BeamSearchParams",
    "GenerateBeamEncoderDecoderOutput",
    "GenerationConfig",
    "RequestOutput",
    "Sampling",
    "SamplingParams",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "beam_noise",
    "context_window",
    "draw",
    "draw_rows",
    "generate",
    "generate_beams",
    "in_vocabulary",
    "process",
    "rules_of",
    "token_ids",
    "unsupported",
    "whole",
]

_WHEN_USED = {
    "beam_generate": (
        "BeamExtras",
        "BeamPrompts",
        "GenerateBeamEncoderDecoderOutput",
        "beam_noise",
        "generate_beams",
    ),
    "beams": ("BeamOptions",),
    "processors": ("rules_of",),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHEN_USED.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
