"""SmolLM3 (Bakouch et al. 2025, huggingface.co/blog/smollm3): Llama without rope in every fourth layer.

Attention in these layers does not see positions (NoPE, Yang et al. 2025, arXiv:2501.18795), which helps on
long texts. With `use_sliding_window` they have a window as well, or those layers that `layer_types` names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ConfigError, ModelConfig
from . import llama
from .family import Options
from .positions import layer_windows, rope_config

DEFAULTS: dict[str, Any] = {
    **llama.DEFAULTS,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "tie_word_embeddings": True,
}


def translate(hf: Options) -> ModelConfig:
    """SmolLM3's options -> ModelConfig. (In `no_rope_layers`, 1 is a layer with rope.)"""
    layers, ropes = hf.num_hidden_layers, hf.get("no_rope_layers")
    if ropes is None:
        ropes = [(layer + 1) % hf.no_rope_layer_interval for layer in range(layers)]
    whole = isinstance(ropes, list) and all(isinstance(rope, int) for rope in ropes)
    if not whole or len(ropes) < layers:
        raise ConfigError(
            f"{hf.model_type}: no_rope_layers must be a list of 0 or 1 for each of the {layers} layers, and "
            f"is {ropes!r:.60}"
        )
    window = hf.get("sliding_window") if hf.use_sliding_window else None
    usual = ["full_attention" if ropes[i] or window is None else "sliding_attention" for i in range(layers)]
    return replace(
        llama.translate(hf, rope_config(hf, 2_000_000.0)),
        windows=layer_windows(hf, window, usual),
        layers_without_rope=tuple(layer for layer in range(layers) if not ropes[layer]),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="smollm3",
    class_prefix="SmolLM3",
    defaults=DEFAULTS,
    translate=translate,
    head_prefixes={"question-answering": "transformer."},
)
