"""BERT (Devlin et al. 2018, arXiv:1810.04805); also MiniLM, E5, BGE, GTE and other models with its
architecture.

An encoder. Token, position and type embeddings are summed and normalised. Each layer normalises *after* its
residual sums: x = norm(x + attention(x)), x = norm(x + mlp(x)), with LayerNorm, exact GELU and biases
everywhere. The pooler is a dense layer with tanh on the first token ([CLS]). The masked-LM head is dense +
GELU + LayerNorm, then the token table as the output matrix, with its own bias.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..weights import affine, copy, fuse, ignore, tied
from .family import NOT_A_DECODER, Family, Options, SequenceHead, equal_heads

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "classifier_dropout": None,
    "tie_word_embeddings": True,
}


def translate(hf: Options) -> ModelConfig:
    """BERT's options -> ModelConfig."""
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=equal_heads(hf),
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        causal=False,
        pre_norm=False,
        norm="layer_norm",
        norm_eps=hf.layer_norm_eps,
        activation=hf.hidden_act,
        type_vocab_size=hf.type_vocab_size,
        embedding_norm=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        pad_token_id=hf.pad_token_id,
        embedding_dropout=hf.hidden_dropout_prob,
        attention_dropout=hf.attention_probs_dropout_prob,
        hidden_dropout=hf.hidden_dropout_prob,
    )


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"encoder.layer.{{i}}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))


BODY = (
    copy("embeddings.word_embeddings.weight", "body.embeddings.tokens.weight"),
    copy("embeddings.position_embeddings.weight", "body.embeddings.positions.weight"),
    copy("embeddings.token_type_embeddings.weight", "body.embeddings.types.weight"),
    *affine("embeddings.LayerNorm", "body.embeddings.norm"),
    fuse(_qkv("weight"), "body.layers.{i}.attention.qkv.weight", sizes="qkv"),
    fuse(_qkv("bias"), "body.layers.{i}.attention.qkv.bias", sizes="qkv"),
    *affine("encoder.layer.{i}.attention.output.dense", "body.layers.{i}.attention.out"),
    *affine("encoder.layer.{i}.attention.output.LayerNorm", "body.layers.{i}.attention_norm"),
    *affine("encoder.layer.{i}.intermediate.dense", "body.layers.{i}.mlp.up"),
    *affine("encoder.layer.{i}.output.dense", "body.layers.{i}.mlp.down"),
    *affine("encoder.layer.{i}.output.LayerNorm", "body.layers.{i}.mlp_norm"),
    ignore("embeddings.position_ids", "the numbers 0, 1, 2, ..., which need no storage"),
    ignore("embeddings.token_type_ids", "zeros, which need no storage"),
)
POOLER = affine("pooler.dense", "pooler.dense")

MASKED_LM = (
    *affine("cls.predictions.transform.dense", "head.dense"),
    *affine("cls.predictions.transform.LayerNorm", "head.norm"),
    tied("cls.predictions.decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
    # transformers stores the bias twice, and ties both only if the matrix is tied
    copy("cls.predictions.decoder.bias", "head.bias", also=("cls.predictions.bias",), write_also=True),
)
NEXT_SENTENCE = affine("cls.seq_relationship", "head.next_sentence")

FAMILY = Family(
    model_type="bert",
    class_prefix="Bert",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("bert.",),
    body=BODY,
    pooler=POOLER,
    heads={
        "masked-lm": MASKED_LM,
        "next-sentence": NEXT_SENTENCE,
        "pre-training": (*MASKED_LM, *NEXT_SENTENCE),
        "sequence-classification": affine("classifier", "head.out"),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected=NOT_A_DECODER,
    sequence_head=SequenceHead(hidden="pooler"),
    head_dropout={
        "sequence-classification": ("classifier_dropout", "hidden_dropout_prob"),
        "token-classification": ("classifier_dropout", "hidden_dropout_prob"),
    },
)
