"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT, trained to find the tokens that a small generator
replaced.

The body is BERT's without a pooler. In the small models the tables have fewer channels than the layers
(`embedding_size`), and a projection follows their norm. `ElectraForPreTraining` is the discriminator, with
one logit per token: dense + activation, then a vector product. `ElectraForMaskedLM` is for the generator:
dense + GELU + norm, as wide as the token table, which is the output matrix. Sequence classification has dense
+ GELU on the first token.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from ..weights import affine, copy, tied
from . import bert
from .family import Family, Options, SequenceHead

DEFAULTS = {
    **bert.DEFAULTS,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "summary_type": "first",
    "summary_use_proj": True,
    "summary_activation": "gelu",
    "summary_last_dropout": 0.1,
}
"""Those of the summary are for multiple choice, a head that minilm does not have."""


def translate(hf: Options) -> ModelConfig:
    """ELECTRA's options -> ModelConfig: as for BERT, with another size of the tables."""
    size = None if hf.embedding_size == hf.hidden_size else hf.embedding_size
    return replace(bert.translate(hf), embedding_size=size)


FAMILY = Family(
    model_type="electra",
    class_prefix="Electra",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("electra.",),
    body=(*bert.BODY, *affine("embeddings_project", "body.project")),
    heads={
        "masked-lm": (
            *affine("generator_predictions.dense", "head.dense"),
            *affine("generator_predictions.LayerNorm", "head.norm"),
            tied("generator_lm_head.weight", "head.decoder.weight", "tied to the token embeddings"),
            copy("generator_lm_head.bias", "head.bias"),
        ),
        "pre-training": (
            *affine("discriminator_predictions.dense", "head.dense"),
            *affine("discriminator_predictions.dense_prediction", "head.out"),
        ),
        "sequence-classification": (
            *affine("classifier.dense", "head.dense"),
            *affine("classifier.out_proj", "head.out"),
        ),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected=bert.FAMILY.rejected,
    sequence_head=SequenceHead(hidden="gelu", drop_input=True),
    mlm_activation="gelu",
    head_dropout=bert.FAMILY.head_dropout,
)
