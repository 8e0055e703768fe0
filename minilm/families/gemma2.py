"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): Gemma with more norms, soft caps, and windows in turn.

Each sub-layer has a norm of its input and one of its output. Attention scores and logits s become
cap * tanh(s / cap). Every other layer, the first included, has a sliding window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig, RopeConfig
from ..weights import Rule, copy
from . import gemma
from .family import Options
from .positions import layer_windows

DEFAULTS: dict[str, Any] = {
    **gemma.DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def translate(hf: Options, rope: RopeConfig | None = None, every: int = 2) -> ModelConfig:
    """Gemma 2's options -> ModelConfig. Without `layer_types`, each `every`-th layer has full attention."""
    kinds = ("full_attention", *["sliding_attention"] * (every - 1))
    usual = [kinds[(layer + 1) % every] for layer in range(hf.num_hidden_layers)]
    return replace(
        gemma.translate(hf, rope),
        output_norm=True,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        windows=layer_windows(hf, hf.get("sliding_window"), usual),
        attention_soft_cap=hf.attn_logit_softcapping,
        head_soft_cap=hf.final_logit_softcapping,
    )


BODY: tuple[Rule, ...] = (
    *(rule for rule in gemma.FAMILY.body if not rule.sources[0].endswith("post_attention_layernorm.weight")),
    copy("layers.{i}.post_attention_layernorm.weight", "body.layers.{i}.attention_out_norm.weight"),
    copy("layers.{i}.pre_feedforward_layernorm.weight", "body.layers.{i}.mlp_norm.weight"),
    copy("layers.{i}.post_feedforward_layernorm.weight", "body.layers.{i}.mlp_out_norm.weight"),
)

FAMILY = replace(
    gemma.FAMILY,
    model_type="gemma2",
    class_prefix="Gemma2",
    defaults=DEFAULTS,
    translate=translate,
    body=BODY,
)
