"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), Pythia (Biderman et al. 2023, arXiv:2304.01373).

GPT-2 with rope on a part of each head (`rotary_pct`) instead of a position table, an output matrix of its
own, and exact GELU. Attention and MLP read the same x, each through its own norm, and both are added (unless
`use_parallel_residual` is false). Checkpoints have one matrix for q, k and v, with the rows of each head
together.
"""

from __future__ import annotations

from typing import Any

from ..config import ConfigError, ModelConfig
from ..weights import affine, copy, ignore, tied
from .family import Family, Options, SequenceHead, equal_heads
from .positions import rope_config, rotary_dim

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "rotary_pct": None,
    "rotary_emb_base": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "classifier_dropout": 0.1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}


def translate(hf: Options) -> ModelConfig:
    """GPT-NeoX's options -> ModelConfig. (Files of transformers 4 repeat `rotary_emb_base` as rope_theta.)"""
    base = hf.get("rotary_emb_base", 10_000.0)
    if hf.get("rope_theta", base) != base:
        raise ConfigError(
            f"{hf.model_type}: rope_theta {hf.rope_theta!r}, rotary_emb_base {base!r}: they must agree"
        )
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=equal_heads(hf),
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        causal=True,
        pre_norm=True,
        norm="layer_norm",
        norm_eps=hf.layer_norm_eps,
        activation=hf.hidden_act,
        parallel_norms=2 if hf.use_parallel_residual else 0,
        positions="rope",
        rope=rope_config(hf, base, partial=True),
        rotary_dim=rotary_dim(hf, equal_heads(hf), "rotary_pct", 0.25),
        final_norm=True,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qkv_by_head=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        embedding_dropout=hf.hidden_dropout,
        attention_dropout=hf.attention_dropout,
        hidden_dropout=hf.hidden_dropout,
    )


FAMILY = Family(
    model_type="gpt_neox",
    class_prefix="GPTNeoX",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("gpt_neox.",),
    body=(
        copy("embed_in.weight", "body.embeddings.tokens.weight"),
        *affine("layers.{i}.input_layernorm", "body.layers.{i}.attention_norm"),
        *affine("layers.{i}.post_attention_layernorm", "body.layers.{i}.mlp_norm"),
        *affine("layers.{i}.attention.query_key_value", "body.layers.{i}.attention.qkv"),
        *affine("layers.{i}.attention.dense", "body.layers.{i}.attention.out"),
        *affine("layers.{i}.mlp.dense_h_to_4h", "body.layers.{i}.mlp.up"),
        *affine("layers.{i}.mlp.dense_4h_to_h", "body.layers.{i}.mlp.down"),
        *affine("final_layer_norm", "body.norm"),
        ignore("layers.{i}.attention.bias", "the causal mask, which needs no storage"),
        ignore("layers.{i}.attention.masked_bias", "the value of masked scores"),
        ignore("layers.{i}.attention.rotary_emb.inv_freq", "the rotary frequencies, which are computed"),
        ignore("rotary_emb.inv_freq", "the rotary frequencies, which are computed"),
    ),
    heads={
        "causal-lm": (  # transformers 5 has the second name in memory, and the first in files
            tied(
                "embed_out.weight",
                "head.decoder.weight",
                "tied to the token embeddings",
                also=("lm_head.weight",),
            ),
        ),
        "sequence-classification": (copy("score.weight", "head.out.weight"),),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected={"partial_rotary_factor": (), "pruned_heads": ({},), "add_cross_attention": (False,)},
    sequence_head=SequenceHead(pool="last", bias=False),
    head_dropout={"token-classification": ("classifier_dropout", 0.1)},
)
