"""BART (Lewis et al. 2020, arXiv:1910.13461).

An encoder and a decoder with learned positions, whose first two rows are not used (position p is row p + 2),
a norm after the embeddings, and norms after the sub-layers, as in BERT. Both sides share the token table,
which is the output matrix too; a bias that is not trained is added to the logits. The classifier reads the
decoder's last hidden state at the last end token, and the decoder reads the input itself, shifted to the
right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ConfigError, ModelConfig
from ..weights import Rule, affine, copy, fuse, ignore, tied
from .encoder_decoder import EncoderDecoderConfig, EncoderDecoderFamily, as_decoder, size
from .family import MOST_LAYERS, Options

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "classifier_dropout": 0.0,
    "scale_embedding": False,
    "id2label": {i: f"LABEL_{i}" for i in range(3)},
    "label2id": {f"LABEL_{i}": i for i in range(3)},
    "is_encoder_decoder": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": None,
    "forced_eos_token_id": 2,
    "tie_word_embeddings": True,
    # In published files, without effect here as in transformers 5.
    "add_bias_logits": None,
    "add_final_layer_norm": None,
    "classif_dropout": None,
    "extra_pos_embeddings": None,
    "force_bos_token_to_be_generated": None,
    "normalize_before": None,
    "normalize_embedding": None,
    "static_position_embeddings": None,
    "num_hidden_layers": None,
}

OFFSET = 2
"""Row of the position tables for the first token."""


def translate(hf: Options, **changes: Any) -> ModelConfig:
    """BART's options -> the encoder's ModelConfig, with the `changes` of another family."""
    config = ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        num_layers=hf.encoder_layers,
        num_heads=hf.encoder_attention_heads,
        num_kv_heads=hf.encoder_attention_heads,
        head_dim=_head_size(hf, "encoder_attention_heads"),
        intermediate_size=hf.encoder_ffn_dim,
        max_positions=hf.max_position_embeddings,
        position_offset=OFFSET,
        causal=False,
        pre_norm=False,
        norm="layer_norm",
        norm_eps=1e-5,
        activation=hf.activation_function,
        embedding_norm=True,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)),
        pad_token_id=hf.pad_token_id,
        embedding_dropout=hf.dropout,
        attention_dropout=hf.attention_dropout,
        hidden_dropout=hf.dropout,
    )
    return replace(config, **changes)


def _head_size(hf: Options, name: str) -> int:
    heads = size(hf, name)
    if hf.d_model % heads:
        raise ConfigError(
            f"{hf.model_type}: d_model {hf.d_model} is not a multiple of {name}, which is {heads}"
        )
    return int(hf.d_model // heads)


def sides(
    hf: Options, form: Mapping[str, Any] | None = None, *, reads_source: bool = True, **changes: Any
) -> EncoderDecoderConfig:
    """BART's options -> the configuration of both sides. `form` and `changes`: how another family differs, in
    `ModelConfig` and `EncoderDecoderConfig`."""
    encoder = translate(hf, **(form or {}))
    layers, heads = hf.decoder_layers, size(hf, "decoder_attention_heads")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"{hf.model_type}: decoder_layers must be from 0 to {MOST_LAYERS}, and is {layers!r}"
        )
    decoder = as_decoder(
        encoder,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_size(hf, "decoder_attention_heads"),
        intermediate_size=size(hf, "decoder_ffn_dim"),
    )
    return EncoderDecoderConfig(
        encoder,
        decoder,
        embedding_scale=encoder.hidden_size**0.5 if hf.scale_embedding else 1.0,
        final_bias=True,
        inner_dropout=hf.activation_dropout,
        reads_source=reads_source,
        **changes,
    )


def body(*, learned: bool = True, embedding_norm: bool = True, final_norm: bool = False) -> tuple[Rule, ...]:
    """The rules of both sides: with `learned` positions, a norm after the embeddings, a norm at the end."""
    rules: list[Rule] = [
        copy(
            "shared.weight",
            "body.embeddings.tokens.weight",
            also=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ),
        ignore("encoder.version", "fairseq's mark"),
        ignore("decoder.version", "fairseq's mark"),
    ]
    for side in ("encoder", "decoder"):
        theirs, ours = f"{side}.layers.{{i}}", f"body.{side}.layers.{{i}}"
        rules += [
            copy(f"{side}.embed_positions.weight", f"body.{side}.positions.weight")
            if learned
            else ignore(f"{side}.embed_positions.weight", "sines and cosines, which are computed"),
            *(affine(f"{side}.layernorm_embedding", f"body.{side}.embedding_norm") if embedding_norm else ()),
            *(affine(f"{side}.layer_norm", f"body.{side}.norm") if final_norm else ()),
            *affine(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out"),
            *affine(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm"),
            *affine(f"{theirs}.fc1", f"{ours}.mlp.up"),
            *affine(f"{theirs}.fc2", f"{ours}.mlp.down"),
            *affine(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm"),
        ]
        for leaf in ("weight", "bias"):
            names = [f"{theirs}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
            rules.append(fuse(names, f"{ours}.attention.qkv.{leaf}"))
            if side == "decoder":
                names = [f"{theirs}.encoder_attn.{x}_proj.{leaf}" for x in "kv"]
                rules.append(fuse(names, f"{ours}.cross.kv.{leaf}"))
    cross, ours = "decoder.layers.{i}.encoder_attn", "body.decoder.layers.{i}.cross"
    return (
        *rules,
        *affine(f"{cross}.q_proj", f"{ours}.q"),
        *affine(f"{cross}.out_proj", f"{ours}.out"),
        *affine(f"{cross}_layer_norm", f"{ours}_norm"),
    )


FAMILY = EncoderDecoderFamily(
    model_type="bart",
    class_prefix="Bart",
    defaults=DEFAULTS,
    translate=translate,
    sides=sides,
    prefixes=("model.",),
    attribute_map={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "initializer_range": "init_std",
    },
    body=body(),
    heads={
        "seq2seq-lm": (
            tied("lm_head.weight", "head.decoder.weight", "tied to the token embeddings"),
            copy("final_logits_bias", "head.bias"),
        ),
        "sequence-classification": (
            *affine("classification_head.dense", "head.dense"),
            *affine("classification_head.out_proj", "head.out"),
        ),
    },
    rejected={"is_decoder": (False,), "normalize_before": (False,), "static_position_embeddings": (False,)},
)
