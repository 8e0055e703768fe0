"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 2, arXiv:2307.09288; Llama 3, arXiv:2407.21783),
SmolLM2, TinyLlama.

A decoder with pre-norm like GPT-2, and everything else different: RMSNorm instead of LayerNorm, rotary
positions instead of a table, a gated MLP (SwiGLU), no biases, fewer key/value heads than query heads (since
Llama 2 70B). Llama 3.1 scales its rotary frequencies (`llama3`). Small models tie the output matrix to the
token table.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig, RopeConfig
from ..weights import Rule, affine, copy, fuse, ignore, tied
from .family import DECODER_ONLY, Family, Head, Options, SequenceHead, equal_heads
from .positions import rope_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "original_max_position_embeddings": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "classifier_dropout": None,
    "hidden_dropout": None,
    "token_classification_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def translate(hf: Options, rope: RopeConfig | None = None) -> ModelConfig:
    """Llama's options -> ModelConfig. `rope` is that of a family with other rope options."""
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.get("num_key_value_heads", hf.num_attention_heads),
        head_dim=hf.get("head_dim") or equal_heads(hf),
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        causal=True,
        pre_norm=True,
        norm="rms_norm",
        norm_eps=hf.rms_norm_eps,
        activation=hf.hidden_act,
        gated_mlp=True,
        positions="rope",
        rope=rope or rope_config(hf),
        final_norm=True,
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        pad_token_id=hf.pad_token_id,
        attention_dropout=hf.get("attention_dropout", 0.0),
    )


def _fused(module: str, names: str, kind: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.{module}.{name}_proj.{kind}" for name in names.split())


BODY: tuple[Rule, ...] = (
    copy("embed_tokens.weight", "body.embeddings.tokens.weight"),
    copy("layers.{i}.input_layernorm.weight", "body.layers.{i}.attention_norm.weight"),
    fuse(_fused("self_attn", "q k v", "weight"), "body.layers.{i}.attention.qkv.weight", sizes="qkv"),
    fuse(_fused("self_attn", "q k v", "bias"), "body.layers.{i}.attention.qkv.bias", sizes="qkv"),
    *affine("layers.{i}.self_attn.o_proj", "body.layers.{i}.attention.out"),
    copy("layers.{i}.post_attention_layernorm.weight", "body.layers.{i}.mlp_norm.weight"),
    fuse(_fused("mlp", "gate up", "weight"), "body.layers.{i}.mlp.up.weight", sizes="gate_up"),
    fuse(_fused("mlp", "gate up", "bias"), "body.layers.{i}.mlp.up.bias", sizes="gate_up"),
    *affine("layers.{i}.mlp.down_proj", "body.layers.{i}.mlp.down"),
    copy("norm.weight", "body.norm.weight"),
    ignore(
        "layers.{i}.self_attn.rotary_emb.inv_freq",
        "the rotary frequencies, which follow from the configuration",
    ),
    ignore("rotary_emb.inv_freq", "the rotary frequencies, which follow from the configuration"),
)
HEADS: dict[Head, tuple[Rule, ...]] = {
    "causal-lm": (tied("lm_head.weight", "head.decoder.weight", "tied to the token embeddings"),),
    "sequence-classification": (copy("score.weight", "head.out.weight"),),
    "token-classification": affine("score", "head.out"),
    "question-answering": affine("qa_outputs", "head.out"),
}

FAMILY = Family(
    model_type="llama",
    class_prefix="Llama",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("model.", "transformer."),
    body=BODY,
    heads=HEADS,
    rejected=DECODER_ONLY,
    sequence_head=SequenceHead(pool="last", bias=False),
    head_dropout={"token-classification": ("classifier_dropout", "hidden_dropout", 0.1)},
    head_prefixes={"question-answering": "transformer."},
)
