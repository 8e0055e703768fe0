"""Qwen3 (arXiv:2505.09388): Llama with an RMSNorm over each head of q and k, which keeps attention scores
bounded.

The head size is a separate option (128 for any width), biases are optional, windows are as in Qwen2.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from ..weights import copy
from . import llama, qwen2
from .family import Options
from .positions import layer_windows

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def translate(hf: Options) -> ModelConfig:
    """Qwen3's options -> ModelConfig."""
    window = hf.get("sliding_window") if hf.use_sliding_window else None
    return replace(llama.translate(hf), windows=layer_windows(hf, window), qk_norm=True, mlp_bias=False)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen3",
    class_prefix="Qwen3",
    defaults=DEFAULTS,
    translate=translate,
    body=(
        *llama.BODY,
        copy("layers.{i}.self_attn.q_norm.weight", "body.layers.{i}.attention.q_norm.weight"),
        copy("layers.{i}.self_attn.k_norm.weight", "body.layers.{i}.attention.k_norm.weight"),
    ),
    rejected={**llama.FAMILY.rejected, "mlp_bias": (False,)},
)
