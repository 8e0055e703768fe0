"""`model.generate`: transformers' way of asking a decoder to write on."""

from __future__ import annotations

from .generation_config import GenerationConfig as GenerationConfig
