"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): Llama whose checkpoints fuse q, k, v into one matrix, and gate
and up into another.

minilm stores them the same way, so two rules become plain copies. If there is a sliding window, all layers
have it; residual sums can have dropout in training. The models for 4,096 tokens are supported; those for
128,000 scale their rotary frequencies by a table (longrope), which raises an error that names it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ConfigError, ModelConfig
from ..weights import copy
from . import llama
from .family import Options

OPTIONS_OF_LLAMA_ALONE = ("attention_bias", "mlp_bias")
DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in llama.DEFAULTS.items() if name not in OPTIONS_OF_LLAMA_ALONE},
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": None,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}


def translate(hf: Options) -> ModelConfig:
    """Phi-3's options -> ModelConfig. (embd_pdrop has no effect in transformers either.)"""
    config = llama.translate(hf)
    if config.rope is not None and config.rope.type != "default":
        raise ConfigError(f"{hf.model_type}: rope_type {config.rope.type!r} is not supported, only 'default'")
    windows = (hf.get("sliding_window"),) * hf.num_hidden_layers
    return replace(config, windows=windows, hidden_dropout=hf.resid_pdrop)


FAMILY = replace(
    llama.FAMILY,
    model_type="phi3",
    class_prefix="Phi3",
    defaults=DEFAULTS,
    translate=translate,
    body=(
        copy("layers.{i}.self_attn.qkv_proj.weight", "body.layers.{i}.attention.qkv.weight"),
        copy("layers.{i}.mlp.gate_up_proj.weight", "body.layers.{i}.mlp.up.weight"),
        *(rule for rule in llama.BODY if rule.transform != "fuse"),
    ),
    heads={head: rules for head, rules in llama.HEADS.items() if head != "question-answering"},
    rejected={**llama.FAMILY.rejected, **dict.fromkeys(OPTIONS_OF_LLAMA_ALONE, (False,))},
    head_prefixes={},
)
