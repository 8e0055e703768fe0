"""T5 (Raffel et al. 2020, arXiv:1910.10683), and T5 1.1 and Flan-T5.

An encoder and a decoder. There are no position embeddings: a learned bias per head is added to the scores
of self-attention, by the distance of query and key in buckets, whose widths grow with the distance. All
layers of a side share the table of the first. Scores are not divided by the square root of the head size.
Norms are RMS norms before the sub-layers, and no layer has a bias. T5 has a ReLU MLP, and its output matrix
is the token table, for which the hidden states are scaled by d_model ** -0.5; T5 1.1 and Flan-T5 have a gated
MLP (gated-gelu: the tanh form) and an output matrix of their own, without scale.

transformers writes `tie_word_embeddings` true in either case since version 5, and keeps the choice of the
scale in `scale_decoder_outputs`; without it, tied means scaled.
"""

from __future__ import annotations

from typing import Any

from ..config import LARGEST, ConfigError, ModelConfig
from ..weights import Rule, copy, fuse, ignore, tied
from .encoder_decoder import EncoderDecoderConfig, EncoderDecoderFamily, as_decoder, size
from .family import MOST_LAYERS, Head, Options

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": None,
    "classifier_dropout": 0.0,
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    # What feed_forward_proj says, as transformers writes it too.
    "dense_act_fn": None,
    "is_gated_act": None,
    "n_positions": None,
}


def activation(hf: Options) -> tuple[str, bool]:
    """The activation of `feed_forward_proj`, and whether the MLP is gated."""
    given = hf.feed_forward_proj
    parts = given.split("-") if isinstance(given, str) else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated"):
        raise ConfigError(
            f"{hf.model_type}: feed_forward_proj must be an activation, or gated-activation, and is {given!r}"
        )
    return ("gelu_new" if given == "gated-gelu" else parts[-1]), len(parts) == 2


def scaled(hf: Options) -> bool:
    """Whether the hidden states are scaled before the output matrix."""
    return bool(hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)))


def sides(hf: Options, *, scales: bool | None = None, bias_per_layer: bool = False) -> EncoderDecoderConfig:
    """T5's options -> the configuration of both sides."""
    encoder = translate(hf)
    layers = hf.get("num_decoder_layers", encoder.num_layers)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"{hf.model_type}: num_decoder_layers must be from 0 to {MOST_LAYERS}, and is {layers!r}"
        )
    return EncoderDecoderConfig(
        encoder,
        as_decoder(encoder, num_layers=layers),
        buckets=size(hf, "relative_attention_num_buckets", 1 << 20),
        max_distance=size(hf, "relative_attention_max_distance"),
        bias_per_layer=bias_per_layer,
        logits_scale=encoder.hidden_size**-0.5 if (scaled(hf) if scales is None else scales) else 1.0,
        inner_dropout=hf.dropout_rate,
        last_dropout=hf.dropout_rate,
    )


def translate(hf: Options) -> ModelConfig:
    """T5's options -> the encoder's ModelConfig."""
    act, gated = activation(hf)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        num_layers=hf.num_layers,
        num_heads=hf.num_heads,
        num_kv_heads=hf.num_heads,
        head_dim=hf.d_kv,
        intermediate_size=hf.d_ff,
        max_positions=LARGEST,
        causal=False,
        pre_norm=True,
        norm="rms_norm",
        norm_eps=hf.layer_norm_epsilon,
        activation=act,
        gated_mlp=gated,
        final_norm=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        attention_scale=1.0,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)),
        embedding_dropout=hf.dropout_rate,
        attention_dropout=hf.dropout_rate,
        hidden_dropout=hf.dropout_rate,
    )


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    names = [f"{theirs}.SelfAttention.{x}.weight" for x in "qkv"]
    return (
        fuse(names, f"{ours}.attention.qkv.weight"),
        copy(f"{theirs}.SelfAttention.o.weight", f"{ours}.attention.out.weight"),
        copy(f"{theirs}.layer_norm.weight", f"{ours}.attention_norm.weight"),
    )


def _cross(theirs: str, ours: str) -> tuple[Rule, ...]:
    names = [f"{theirs}.EncDecAttention.{x}.weight" for x in "kv"]
    return (
        copy(f"{theirs}.EncDecAttention.q.weight", f"{ours}.cross.q.weight"),
        fuse(names, f"{ours}.cross.kv.weight"),
        copy(f"{theirs}.EncDecAttention.o.weight", f"{ours}.cross.out.weight"),
        copy(f"{theirs}.layer_norm.weight", f"{ours}.cross_norm.weight"),
    )


def _mlp(theirs: str, ours: str) -> tuple[Rule, ...]:
    dense = f"{theirs}.DenseReluDense"
    return (
        copy(f"{dense}.wi.weight", f"{ours}.mlp.up.weight"),
        fuse([f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"], f"{ours}.mlp.gate_up.weight"),
        copy(f"{dense}.wo.weight", f"{ours}.mlp.down.weight"),
        copy(f"{theirs}.layer_norm.weight", f"{ours}.mlp_norm.weight"),
    )


def body(bias_per_layer: bool) -> tuple[Rule, ...]:
    """The rules of both sides. The `relative_attention_bias` of the decoder's cross-attention, which the
    first T5 checkpoints have, was never used."""
    rules: list[Rule] = [
        copy(
            "shared.weight",
            "body.embeddings.tokens.weight",
            also=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ),
        ignore(
            "decoder.block.{i}.layer.1.EncDecAttention.relative_attention_bias.weight",
            "no model of this family uses it",
        ),
    ]
    for side, mlp in (("encoder", 1), ("decoder", 2)):
        block, layer = f"{side}.block.{{i}}.layer", f"body.{side}.layers.{{i}}"
        table = "SelfAttention.relative_attention_bias.weight"
        rules += [
            *_attention(f"{block}.0", layer),
            *(_cross(f"{block}.1", layer) if side == "decoder" else ()),
            *_mlp(f"{block}.{mlp}", layer),
            copy(f"{side}.final_layer_norm.weight", f"body.{side}.norm.weight"),
            copy(f"{block}.0.{table}", f"{layer}.attention.relative.weight")
            if bias_per_layer
            else copy(f"{side}.block.0.layer.0.{table}", f"body.{side}.relative.weight"),
        ]
    return tuple(rules)


HEADS: dict[Head, tuple[Rule, ...]] = {
    "seq2seq-lm": (tied("lm_head.weight", "head.decoder.weight", "tied to the token embeddings"),),
    "encoder": (),
}


FAMILY = EncoderDecoderFamily(
    model_type="t5",
    class_prefix="T5",
    defaults=DEFAULTS,
    translate=translate,
    sides=sides,
    prefixes=("",),
    attribute_map={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    body=body(bias_per_layer=False),
    heads=HEADS,
    rejected={"is_decoder": (False,), "is_encoder_decoder": (True, False)},
)
