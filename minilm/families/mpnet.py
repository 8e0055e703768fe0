"""MPNet (Song et al. 2020, arXiv:2004.09297); all-mpnet-base-v2 and other sentence models are built on it.

RoBERTa's body without token types, and with a learned bias per head on the scores, by the distance of query
and key in 32 buckets as in T5; all layers share its table. Distances count columns of the batch. The heads
are RoBERTa's. transformers has the padding index 1 and the 32 buckets built in: another `pad_token_id`
changes neither positions nor tables, and another number of buckets is refused.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import LARGEST, ConfigError, ModelConfig
from ..weights import Rule, affine, copy, fuse, ignore
from . import bert, roberta
from .family import Options, equal_heads

DEFAULTS = {
    "vocab_size": 30527,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "relative_attention_num_buckets": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
PADDING = 1


def translate(hf: Options) -> ModelConfig:
    """MPNet's options -> ModelConfig."""
    offset = PADDING + 1
    if not offset < hf.max_position_embeddings <= LARGEST:
        raise ConfigError(
            f"mpnet: positions start at {offset}, so max_position_embeddings must be from {offset + 1} to "
            f"{LARGEST}, and is {hf.max_position_embeddings}"
        )
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=equal_heads(hf),
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings - offset,
        position_offset=offset,
        positions_skip_padding_id=PADDING,
        relative_buckets=hf.relative_attention_num_buckets,
        causal=False,
        pre_norm=False,
        norm="layer_norm",
        norm_eps=hf.layer_norm_eps,
        activation=hf.hidden_act,
        embedding_norm=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        pad_token_id=PADDING,
        embedding_dropout=hf.hidden_dropout_prob,
        attention_dropout=hf.attention_probs_dropout_prob,
        hidden_dropout=hf.hidden_dropout_prob,
    )


def _qkv(kind: str) -> Rule:
    names = [f"encoder.layer.{{i}}.attention.attn.{name}.{kind}" for name in "qkv"]
    return fuse(names, f"body.layers.{{i}}.attention.qkv.{kind}", sizes="qkv")


FAMILY = replace(
    roberta.FAMILY,
    model_type="mpnet",
    class_prefix="MPNet",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("mpnet.",),
    body=(
        copy("embeddings.word_embeddings.weight", "body.embeddings.tokens.weight"),
        copy("embeddings.position_embeddings.weight", "body.embeddings.positions.weight"),
        *affine("embeddings.LayerNorm", "body.embeddings.norm"),
        copy("encoder.relative_attention_bias.weight", "body.distances.weight"),
        _qkv("weight"),
        _qkv("bias"),
        *affine("encoder.layer.{i}.attention.attn.o", "body.layers.{i}.attention.out"),
        *affine("encoder.layer.{i}.attention.LayerNorm", "body.layers.{i}.attention_norm"),
        *affine("encoder.layer.{i}.intermediate.dense", "body.layers.{i}.mlp.up"),
        *affine("encoder.layer.{i}.output.dense", "body.layers.{i}.mlp.down"),
        *affine("encoder.layer.{i}.output.LayerNorm", "body.layers.{i}.mlp_norm"),
        ignore("embeddings.position_ids", "the numbers 0, 1, 2, ..., which need no storage"),
    ),
    rejected={**bert.FAMILY.rejected, "relative_attention_num_buckets": (32,)},
    head_dropout={
        "sequence-classification": ("hidden_dropout_prob",),
        "token-classification": ("hidden_dropout_prob",),
    },
)
