"""DeBERTa v2 and v3 (He et al. 2020, arXiv:2006.03654; 2021, arXiv:2111.09543): BERT whose attention sees
contents and distances separately.

Scores have up to three products: of contents, of a content with the vector of the distance (c2p), and the
reverse (p2c); see `minilm.distances`. The vectors belong to buckets of distances, with a norm, and are
projected by the layers' own matrices of queries and keys (share_att_key). In published models the embeddings
have no positions (position_biased_input). Version 2 xlarge has a convolution beside the first layer.

Heads: classification is dropout, dense and activation on the first token, then the class logits. The
masked-LM head is BERT's, under its names (`legacy`, the default) or as `lm_predictions`. Microsoft's v3 files
hold the latter, and their config.json says nothing; transformers then starts with a random head. Here the
head is read under either name: it is the same function.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ACTIVATIONS, LARGEST, ConfigError, DistanceConfig, ModelConfig
from ..weights import Rule, affine, copy, ignore, tied
from . import bert
from .family import NOT_A_DECODER, Family, Options, SequenceHead, equal_heads

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-7,
    "relative_attention": False,
    "max_relative_positions": -1,
    "position_buckets": None,
    "norm_rel_ebd": None,
    "share_att_key": None,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "position_biased_input": True,
    "pos_att_type": None,
    "pooler_dropout": 0.0,
    "pooler_hidden_act": "gelu",
    "pooler_hidden_size": None,
    "cls_dropout": None,
    "conv_kernel_size": None,
    "conv_groups": None,
    "conv_act": None,
    "attention_head_size": None,
    "embedding_size": None,
    "legacy": True,
    "tie_word_embeddings": True,
}


def kinds(hf: Options) -> tuple[str, ...]:
    """c2p and p2c, from `pos_att_type`: a list, or names with | between them."""
    given = hf.get("pos_att_type", [])
    found = [part.strip() for part in given.lower().split("|")] if isinstance(given, str) else given
    if not isinstance(found, list) or not set(found) <= {"c2p", "p2c", ""}:
        raise ConfigError(f"{hf.model_type}: pos_att_type must be made of c2p and p2c, and is {given!r:.60}")
    return tuple(found)


def _size(hf: Options, name: str, default: int) -> int:
    """A number of config.json; less than 1 is the default."""
    value = hf.get(name, default)
    if type(value) is not int or value > LARGEST // 2:
        raise ConfigError(f"{hf.model_type}: {name} must be a whole number, and is {value!r:.60}")
    return value if value > 0 else default


def distances(hf: Options) -> DistanceConfig | None:
    """The options of relative attention and of the convolution."""
    kernel, groups = _size(hf, "conv_kernel_size", 0), _size(hf, "conv_groups", 1)
    act = hf.get("conv_act", "tanh")
    if kernel and (kernel % 2 == 0 or hf.hidden_size % groups or act not in ACTIVATIONS):
        raise ConfigError(
            f"{hf.model_type}: a convolution needs an odd conv_kernel_size, conv_groups that divide "
            f"hidden_size {hf.hidden_size} and a known conv_act, and has {kernel}, {groups} and {act!r}"
        )
    norms = [part.strip() for part in str(hf.get("norm_rel_ebd", "none")).lower().split("|")]
    conv = {"conv_kernel": kernel, "conv_groups": groups, "conv_activation": act}
    if not hf.relative_attention:
        if "layer_norm" in norms:
            raise ConfigError(f"{hf.model_type}: norm_rel_ebd is for relative_attention, which is off")
        return DistanceConfig(0, **conv) if kernel else None
    longest = _size(hf, "max_relative_positions", _size(hf, "max_position_embeddings", 512))
    buckets = _size(hf, "position_buckets", 0)
    if buckets and (buckets < 4 or longest - 1 <= buckets // 2):
        raise ConfigError(
            f"{hf.model_type}: position_buckets must be 0 or at least 4, and max_relative_positions more "
            f"than half of them + 1; they are {buckets} and {longest}"
        )
    return DistanceConfig(
        span=buckets or longest,
        max_distance=longest if buckets else None,
        c2p="c2p" in kinds(hf),
        p2c="p2c" in kinds(hf),
        shared=bool(hf.get("share_att_key", False)),
        norm="layer_norm" in norms,
        **conv,
    )


def translate(hf: Options) -> ModelConfig:
    """DeBERTa's options -> ModelConfig. Without the new head's own names, its output matrix may be untied."""
    for name in ("pooler_hidden_size", "embedding_size"):
        if hf.get(name, hf.hidden_size) != hf.hidden_size:
            raise ConfigError(
                f"{hf.model_type}: {name} {hf.get(name)} is not supported; minilm supports only hidden_size, "
                f"which is {hf.hidden_size}"
            )
    if hf.pooler_hidden_act not in ACTIVATIONS:
        raise ConfigError(f"{hf.model_type}: pooler_hidden_act {hf.pooler_hidden_act!r} is not supported")
    head_dim = hf.get("attention_head_size") or equal_heads(hf)
    count = 1 + len({"c2p", "p2c"} & set(kinds(hf)))
    return replace(
        bert.translate(hf),
        head_dim=head_dim,
        positions="learned" if hf.position_biased_input else "none",
        attention_scale=(head_dim * count) ** -0.5 if count > 1 else None,
        distances=distances(hf),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)) or not hf.get("legacy", True),
    )


THEIRS = "encoder.layer.{i}.attention"


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{THEIRS}.self.{name}_proj.{kind}" for name in ("query", "key", "value"))


def _body() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for rule in bert.BODY:
        if rule.transform == "fuse":
            rules.append(replace(rule, sources=_qkv(rule.target.rpartition(".")[2])))
        elif rule.sources[0] == "embeddings.position_embeddings.weight":
            reason = "position_biased_input is false"
            rules.append(tied(rule.sources[0], rule.target, reason))
        else:
            rules.append(rule)
    return (
        *rules,
        copy("encoder.rel_embeddings.weight", "body.distances.table.weight"),
        *affine("encoder.LayerNorm", "body.distances.norm"),
        *affine(f"{THEIRS}.self.pos_key_proj", "body.distances.layers.{i}.key"),
        *affine(f"{THEIRS}.self.pos_query_proj", "body.distances.layers.{i}.query"),
        *affine("encoder.conv.conv", "body.conv.conv"),
        *affine("encoder.conv.LayerNorm", "body.conv.norm"),
    )


def _also(source: str, other: str, target: str) -> tuple[Rule, ...]:
    return tuple(
        copy(f"{source}.{kind}", f"{target}.{kind}", also=(f"{other}.{kind}",)) for kind in ("weight", "bias")
    )


OLD, NEW = "cls.predictions", "lm_predictions.lm_head"
LEGACY = (
    *_also(f"{OLD}.transform.dense", f"{NEW}.dense", "head.dense"),
    *_also(f"{OLD}.transform.LayerNorm", f"{NEW}.LayerNorm", "head.norm"),
    tied(f"{OLD}.decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
    copy(f"{OLD}.decoder.bias", "head.bias", also=(f"{OLD}.bias", f"{NEW}.bias")),
    ignore("mask_predictions.*", "of the generator's training, which no model here has"),
)
LM_PREDICTIONS = (
    *_also(f"{NEW}.dense", f"{OLD}.transform.dense", "head.dense"),
    *_also(f"{NEW}.LayerNorm", f"{OLD}.transform.LayerNorm", "head.norm"),
    tied(f"{NEW}.decoder.weight", "head.decoder.weight", "the token embeddings are the output matrix"),
    copy(f"{NEW}.bias", "head.bias", also=(f"{OLD}.bias", f"{OLD}.decoder.bias")),
    ignore(f"{OLD}.decoder.weight", "the token embeddings are the output matrix"),
    LEGACY[-1],
)


def variant(family: Family, hf: Options) -> Family:
    """The family with the names of the masked-LM head that `legacy` says."""
    return family if hf.get("legacy", True) else replace(family, heads={**HEADS, "masked-lm": LM_PREDICTIONS})


HEADS: Any = {
    "masked-lm": LEGACY,
    "sequence-classification": (
        *affine("pooler.dense", "head.dense"),
        *affine("classifier", "head.out"),
    ),
    "token-classification": affine("classifier", "head.out"),
    "question-answering": affine("qa_outputs", "head.out"),
}

FAMILY = Family(
    model_type="deberta-v2",
    class_prefix="DebertaV2",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("deberta.",),
    body=_body(),
    heads=HEADS,
    rejected=NOT_A_DECODER,
    sequence_head=SequenceHead(hidden="pooler_hidden_act", drop_input="pooler_dropout"),
    head_dropout={
        "sequence-classification": ("cls_dropout", "hidden_dropout_prob"),
        "token-classification": ("hidden_dropout_prob",),
    },
    variant=variant,
)
