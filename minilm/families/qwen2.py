"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases on q, k and v only.

With `use_sliding_window`, layers from `max_window_layers` on, or those that `layer_types` names, have a
sliding window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from . import llama
from .family import Options
from .positions import layer_windows

DEFAULTS: dict[str, Any] = {
    **{k: v for k, v in llama.DEFAULTS.items() if k != "attention_bias"},
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def translate(hf: Options) -> ModelConfig:
    """Qwen2's options -> ModelConfig."""
    window = hf.get("sliding_window") if hf.use_sliding_window else None
    return replace(
        llama.translate(hf), windows=layer_windows(hf, window), qkv_bias=True, out_bias=False, mlp_bias=False
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2",
    class_prefix="Qwen2",
    defaults=DEFAULTS,
    translate=translate,
    rejected={**llama.FAMILY.rejected, "attention_bias": (True,), "mlp_bias": (False,)},
)
