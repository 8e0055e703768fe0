"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder made of what decoders have since found.

Norms stand before the sub-layers, without biases; the first layer has none before its attention, since the
embeddings have one. Positions are rotary, the MLP is gated (GeGLU), and no linear layer has a bias. In two of
three layers a token sees only those at most local_attention // 2 away on either side, and rope has a smaller
theta there. There are no token types and no pooler. All heads begin with a dense layer, an activation and a
norm; classification takes the first token or the mean.
"""

from __future__ import annotations

from typing import Any

from ..config import ConfigError, ModelConfig
from ..weights import affine, copy, tied
from .family import NOT_A_DECODER, Family, Options, SequenceHead, equal_heads
from .gemma3 import ropes
from .positions import layer_windows, rope_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "pad_token_id": 50283,
    "eos_token_id": 50282,
    "bos_token_id": 50281,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "layer_types": None,
    "global_attn_every_n_layers": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "global_rope_theta": None,
    "local_rope_theta": None,
    "local_attention": 128,
    "embedding_dropout": 0.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "decoder_bias": True,
    "classifier_pooling": "cls",
    "classifier_dropout": 0.0,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    # In published files, without effect on results, as in transformers.
    "deterministic_flash_attn": False,
    "initializer_cutoff_factor": 2.0,
    "layer_norm_eps": None,
    "reference_compile": None,
    "repad_logits_with_grad": None,
    "sparse_pred_ignore_index": -100,
}
POOLINGS = ("cls", "mean")


def translate(hf: Options) -> ModelConfig:
    """ModernBERT's options -> ModelConfig."""
    every, local = hf.get("global_attn_every_n_layers", 3), hf.local_attention
    for name, value, least in (("global_attn_every_n_layers", every, 1), ("local_attention", local, 0)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{hf.model_type}: {name} must be at least {least}, and is {value!r}")
    if hf.classifier_pooling not in POOLINGS:
        raise ConfigError(
            f"{hf.model_type}: classifier_pooling must be {' or '.join(POOLINGS)}, and is "
            f"{hf.classifier_pooling!r}"
        )
    layers = range(hf.num_hidden_layers)
    usual = ["sliding_attention" if layer % every else "full_attention" for layer in layers]
    full, near = ropes(hf, (hf.get("global_rope_theta", 160_000.0), hf.get("local_rope_theta", 10_000.0)))
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
        pre_norm=True,
        norm="layer_norm",
        norm_eps=hf.norm_eps,
        norm_without_bias=not hf.norm_bias,
        bare_first_layer=True,
        activation=hf.hidden_activation,
        gated_mlp=True,
        positions="rope",
        rope=rope_config(hf, given=full),
        local_rope=rope_config(hf, given={**near, **(hf.get("rope_scaling") or {})}),
        windows=layer_windows(hf, local // 2 + 1, usual),
        embedding_norm=True,
        final_norm=True,
        qkv_bias=bool(hf.attention_bias),
        out_bias=bool(hf.attention_bias),
        mlp_bias=bool(hf.mlp_bias),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)),
        pad_token_id=hf.pad_token_id,
        embedding_dropout=hf.embedding_dropout,
        attention_dropout=hf.attention_dropout,
        attention_out_dropout=hf.attention_dropout,
        inner_dropout=hf.mlp_dropout,
    )


HEAD = (*affine("head.dense", "head.dense"), *affine("head.norm", "head.norm"))
SCORES = (*HEAD, *affine("classifier", "head.out"))

FAMILY = Family(
    model_type="modernbert",
    class_prefix="ModernBert",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("model.",),
    body=(
        copy("embeddings.tok_embeddings.weight", "body.embeddings.tokens.weight"),
        *affine("embeddings.norm", "body.embeddings.norm"),
        *affine("layers.{i}.attn_norm", "body.layers.{i}.attention_norm"),
        *affine("layers.{i}.attn.Wqkv", "body.layers.{i}.attention.qkv"),
        *affine("layers.{i}.attn.Wo", "body.layers.{i}.attention.out"),
        *affine("layers.{i}.mlp_norm", "body.layers.{i}.mlp_norm"),
        *affine("layers.{i}.mlp.Wi", "body.layers.{i}.mlp.up"),
        *affine("layers.{i}.mlp.Wo", "body.layers.{i}.mlp.down"),
        *affine("final_norm", "body.norm"),
    ),
    heads={
        "masked-lm": (
            *HEAD,
            tied("decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
            copy("decoder.bias", "head.bias"),
        ),
        "sequence-classification": SCORES,
        "token-classification": SCORES,
        "question-answering": SCORES,
    },
    rejected={**NOT_A_DECODER, "sparse_prediction": (False,)},
    sequence_head=SequenceHead(pool="classifier_pooling", hidden="classifier_activation", norm=True),
    mlm_activation="classifier_activation",
    head_dropout=dict.fromkeys(
        ("sequence-classification", "token-classification", "question-answering"), ("classifier_dropout",)
    ),
)
