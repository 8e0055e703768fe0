"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's body, trained longer, with three differences.

Positions start at the padding index + 1 (usually 2), a convention of fairseq that makes the table two rows
longer than the longest text, and count only tokens that are not padding. There is one token type. The heads
differ: the masked-LM head always uses exact GELU, and the classification head has its own dense + tanh
instead of the pooler's.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ConfigError, ModelConfig
from ..weights import affine, copy, tied
from . import bert
from .family import Family, Options, SequenceHead

DEFAULTS = {**bert.DEFAULTS, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def translate(hf: Options) -> ModelConfig:
    """RoBERTa's options -> ModelConfig: as for BERT, with shifted positions."""
    if hf.pad_token_id is None:
        raise ConfigError(f"{hf.model_type}: positions start after pad_token_id, which is not set")
    offset = hf.pad_token_id + 1
    if hf.max_position_embeddings <= offset:
        raise ConfigError(
            f"{hf.model_type}: positions start at pad_token_id + 1 = {offset}, and "
            f"max_position_embeddings is {hf.max_position_embeddings}"
        )
    return replace(
        bert.translate(hf),
        max_positions=hf.max_position_embeddings - offset,
        position_offset=offset,
        positions_skip_padding_id=hf.pad_token_id,
    )


FAMILY = Family(
    model_type="roberta",
    class_prefix="Roberta",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("roberta.",),
    body=bert.BODY,
    pooler=bert.POOLER,
    heads={
        "masked-lm": (
            *affine("lm_head.dense", "head.dense"),
            *affine("lm_head.layer_norm", "head.norm"),
            tied("lm_head.decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
            copy("lm_head.decoder.bias", "head.bias", also=("lm_head.bias",), write_also=True),  # as for BERT
        ),
        "sequence-classification": (
            *affine("classifier.dense", "head.dense"),
            *affine("classifier.out_proj", "head.out"),
        ),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected=bert.FAMILY.rejected,
    sequence_head=SequenceHead(hidden="tanh", drop_input=True),
    mlm_activation="gelu",
    head_dropout=bert.FAMILY.head_dropout,
)
