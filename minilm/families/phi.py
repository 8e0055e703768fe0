"""Phi-1, Phi-1.5 and Phi-2 (Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023, arXiv:2309.05463).

Attention and MLP read the same x through one norm, and both are added. LayerNorm, rope on a part of each head
(`partial_rotary_factor`), the tanh form of GELU, biases everywhere, also in the head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from ..weights import affine, copy, fuse, ignore
from . import llama
from .family import Options, equal_heads
from .positions import rope_config, rotary_dim

DEFAULTS: dict[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "classifier_dropout": None,
    "hidden_dropout": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def translate(hf: Options) -> ModelConfig:
    """Phi's options -> ModelConfig."""
    head_dim = hf.get("head_dim") or equal_heads(hf)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.get("num_key_value_heads", hf.num_attention_heads),
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        causal=True,
        pre_norm=True,
        norm="layer_norm",
        norm_eps=hf.layer_norm_eps,
        activation=hf.hidden_act,
        parallel_norms=1,
        positions="rope",
        rope=rope_config(hf, partial=True),
        rotary_dim=rotary_dim(hf, head_dim, "partial_rotary_factor", 0.5),
        final_norm=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=True,
        pad_token_id=hf.pad_token_id,
        embedding_dropout=hf.embd_pdrop,
        attention_dropout=hf.get("attention_dropout", 0.0),
        hidden_dropout=hf.resid_pdrop,
    )


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.self_attn.{name}_proj.{kind}" for name in "qkv")


FAMILY = replace(
    llama.FAMILY,
    model_type="phi",
    class_prefix="Phi",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("model.",),
    body=(
        copy("embed_tokens.weight", "body.embeddings.tokens.weight"),
        *affine("layers.{i}.input_layernorm", "body.layers.{i}.attention_norm"),
        fuse(_projections("weight"), "body.layers.{i}.attention.qkv.weight", sizes="qkv"),
        fuse(_projections("bias"), "body.layers.{i}.attention.qkv.bias", sizes="qkv"),
        *affine("layers.{i}.self_attn.dense", "body.layers.{i}.attention.out"),
        *affine("layers.{i}.mlp.fc1", "body.layers.{i}.mlp.up"),
        *affine("layers.{i}.mlp.fc2", "body.layers.{i}.mlp.down"),
        *affine("final_layernorm", "body.norm"),
        ignore("layers.{i}.self_attn.rotary_emb.inv_freq", "the rotary frequencies, which are computed"),
        ignore("rotary_emb.inv_freq", "the rotary frequencies, which are computed"),
    ),
    heads={
        "causal-lm": (*llama.HEADS["causal-lm"], copy("lm_head.bias", "head.bias")),
        "sequence-classification": llama.HEADS["sequence-classification"],
        "token-classification": llama.HEADS["token-classification"],
    },
    rejected={"qk_layernorm": (False,), "add_cross_attention": (False,), "pruned_heads": ({},)},
    head_prefixes={},
)
