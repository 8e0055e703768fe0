"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with sliding-window attention in every layer.

A query sees `sliding_window` keys, itself included; over several layers, information travels further. Later
releases (since v0.2) switch the window off with null.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from . import llama
from .family import Options

DEFAULTS = {
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def translate(hf: Options) -> ModelConfig:
    """Mistral's options -> ModelConfig: as for Llama, without biases and with the window."""
    windows = (hf.get("sliding_window"),) * hf.num_hidden_layers
    return replace(llama.translate(hf), windows=windows, qkv_bias=False, out_bias=False, mlp_bias=False)


FAMILY = replace(
    llama.FAMILY,
    model_type="mistral",
    class_prefix="Mistral",
    defaults=DEFAULTS,
    translate=translate,
    rejected={**llama.FAMILY.rejected, "attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
    head_prefixes={},
)
