"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT at half the depth, without token types and without a
pooler.

The options have different names (dim, n_heads, hidden_dim). Heads: classification is dense + ReLU on the
first token, then the class logits. All norms, also that of the masked-LM head, have an epsilon of 1e-12,
whatever the configuration.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..weights import affine, copy, fuse, ignore, tied
from .family import NOT_A_DECODER, Family, Options, SequenceHead, equal_heads

DEFAULTS = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "sinusoidal_pos_embds": False,
    "n_layers": 6,
    "n_heads": 12,
    "dim": 768,
    "hidden_dim": 3072,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation": "gelu",
    "initializer_range": 0.02,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}
EPS = 1e-12


def translate(hf: Options) -> ModelConfig:
    """DistilBERT's options -> ModelConfig. (sinusoidal_pos_embds only affects how a new position table is
    initialised.)"""
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.dim,
        num_layers=hf.n_layers,
        num_heads=hf.n_heads,
        num_kv_heads=hf.n_heads,
        head_dim=equal_heads(hf),
        intermediate_size=hf.hidden_dim,
        max_positions=hf.max_position_embeddings,
        causal=False,
        pre_norm=False,
        norm="layer_norm",
        norm_eps=EPS,
        activation=hf.activation,
        embedding_norm=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        pad_token_id=hf.pad_token_id,
        embedding_dropout=hf.dropout,
        attention_dropout=hf.attention_dropout,
        hidden_dropout=hf.dropout,
    )


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"transformer.layer.{{i}}.attention.{name}_lin.{kind}" for name in "qkv")


FAMILY = Family(
    model_type="distilbert",
    class_prefix="DistilBert",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("distilbert.",),
    attribute_map={
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
    },
    body=(
        copy("embeddings.word_embeddings.weight", "body.embeddings.tokens.weight"),
        copy("embeddings.position_embeddings.weight", "body.embeddings.positions.weight"),
        *affine("embeddings.LayerNorm", "body.embeddings.norm"),
        fuse(_qkv("weight"), "body.layers.{i}.attention.qkv.weight", sizes="qkv"),
        fuse(_qkv("bias"), "body.layers.{i}.attention.qkv.bias", sizes="qkv"),
        *affine("transformer.layer.{i}.attention.out_lin", "body.layers.{i}.attention.out"),
        *affine("transformer.layer.{i}.sa_layer_norm", "body.layers.{i}.attention_norm"),
        *affine("transformer.layer.{i}.ffn.lin1", "body.layers.{i}.mlp.up"),
        *affine("transformer.layer.{i}.ffn.lin2", "body.layers.{i}.mlp.down"),
        *affine("transformer.layer.{i}.output_layer_norm", "body.layers.{i}.mlp_norm"),
        ignore("embeddings.position_ids", "the numbers 0, 1, 2, ..., which need no storage"),
    ),
    heads={
        "masked-lm": (
            *affine("vocab_transform", "head.dense"),
            *affine("vocab_layer_norm", "head.norm"),
            tied("vocab_projector.weight", "head.decoder.weight", "tied to the token embeddings"),
            copy("vocab_projector.bias", "head.bias"),
        ),
        "sequence-classification": (
            *affine("pre_classifier", "head.dense"),
            *affine("classifier", "head.out"),
        ),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected=NOT_A_DECODER,
    sequence_head=SequenceHead(hidden="relu"),
    mlm_norm_eps=EPS,
    head_dropout={
        "sequence-classification": ("seq_classif_dropout",),
        "token-classification": ("dropout",),
        "question-answering": ("qa_dropout",),
    },
)
