"""ALBERT (Lan et al. 2019, arXiv:1909.11942): BERT with few parameters.

All layers are one block with the same weights, and the tables have fewer channels (`embedding_size`); a
projection follows their norm, also if both sizes are equal. The masked-LM head goes back to the tables' size.
Pre-training has sentence order in place of the next sentence (`AlbertForPreTraining`). Several groups of
layers, or several blocks in a group, which no published model has, are refused.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from ..weights import Rule, affine, copy, fuse, ignore, tied
from . import bert
from .family import NOT_A_DECODER, Family, Options, SequenceHead

DEFAULTS = {
    **{name: value for name, value in bert.DEFAULTS.items() if name != "classifier_dropout"},
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_hidden_groups": 1,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "inner_group_num": 1,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def translate(hf: Options) -> ModelConfig:
    """ALBERT's options -> ModelConfig: as for BERT, with tables of another size and one block."""
    return replace(bert.translate(hf), embedding_size=hf.embedding_size, shared_layers=True)


_BLOCK, _LAYER = "encoder.albert_layer_groups.0.albert_layers.0", "body.layers.0"


def _qkv(kind: str) -> Rule:
    names = [f"{_BLOCK}.attention.{name}.{kind}" for name in ("query", "key", "value")]
    return fuse(names, f"{_LAYER}.attention.qkv.{kind}", sizes="qkv")


MASKED_LM = (
    *affine("predictions.dense", "head.dense"),
    *affine("predictions.LayerNorm", "head.norm"),
    tied("predictions.decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
    copy("predictions.decoder.bias", "head.bias", also=("predictions.bias",), write_also=True),  # as for BERT
)

FAMILY = Family(
    model_type="albert",
    class_prefix="Albert",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("albert.",),
    body=(
        copy("embeddings.word_embeddings.weight", "body.embeddings.tokens.weight"),
        copy("embeddings.position_embeddings.weight", "body.embeddings.positions.weight"),
        copy("embeddings.token_type_embeddings.weight", "body.embeddings.types.weight"),
        *affine("embeddings.LayerNorm", "body.embeddings.norm"),
        *affine("encoder.embedding_hidden_mapping_in", "body.project"),
        _qkv("weight"),
        _qkv("bias"),
        *affine(f"{_BLOCK}.attention.dense", f"{_LAYER}.attention.out"),
        *affine(f"{_BLOCK}.attention.LayerNorm", f"{_LAYER}.attention_norm"),
        *affine(f"{_BLOCK}.ffn", f"{_LAYER}.mlp.up"),
        *affine(f"{_BLOCK}.ffn_output", f"{_LAYER}.mlp.down"),
        *affine(f"{_BLOCK}.full_layer_layer_norm", f"{_LAYER}.mlp_norm"),
        ignore("embeddings.position_ids", "the numbers 0, 1, 2, ..., which need no storage"),
        ignore("embeddings.token_type_ids", "zeros, which need no storage"),
    ),
    pooler=affine("pooler", "pooler.dense"),
    heads={
        "masked-lm": MASKED_LM,
        "pre-training": (*MASKED_LM, *affine("sop_classifier.classifier", "head.next_sentence")),
        "sequence-classification": affine("classifier", "head.out"),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected={
        **NOT_A_DECODER,
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
        "down_scale_factor": (1,),
        "gap_size": (0,),
        "net_structure_type": (0,),
        "num_memory_blocks": (0,),
    },
    sequence_head=SequenceHead(hidden="pooler"),
    head_dropout={
        "pre-training": ("classifier_dropout_prob",),
        "sequence-classification": ("classifier_dropout_prob",),
        "token-classification": ("classifier_dropout_prob", "hidden_dropout_prob"),
    },
)
