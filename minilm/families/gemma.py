"""Gemma (Gemma Team 2024, arXiv:2403.08295): Llama with a scaled token table and another RMSNorm.

Token embeddings are multiplied by sqrt(C), the output matrix is the same table without the factor. RMSNorms
multiply by 1 + weight. The MLP's gate is the tanh form of GELU, heads have a size of their own (256).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig, RopeConfig
from . import llama
from .family import Options

DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in llama.DEFAULTS.items() if name != "mlp_bias"},
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
    "use_bidirectional_attention": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def translate(hf: Options, rope: RopeConfig | None = None) -> ModelConfig:
    """Gemma's options -> ModelConfig. (`hidden_activation`, where a file has it, counts instead of
    hidden_act.)"""
    return replace(
        llama.translate(hf, rope),
        activation=hf.get("hidden_activation") or hf.hidden_act,
        norm_plus_one=True,
        embedding_scale=hf.hidden_size**0.5,
        mlp_bias=False,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="gemma",
    class_prefix="Gemma",
    defaults=DEFAULTS,
    translate=translate,
    heads={head: rules for head, rules in llama.HEADS.items() if head != "question-answering"},
    rejected={**llama.FAMILY.rejected, "mlp_bias": (False,), "use_bidirectional_attention": (False,)},
    head_prefixes={},
)
