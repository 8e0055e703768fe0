"""Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344), the translation models of OPUS-MT.

BART's layers, with norms after the sub-layers, but none after the embeddings. Positions are sines and
cosines, which checkpoints may hold and which are computed here: the channels of the first half are sines,
those of the second cosines. A text to be written begins with the padding token, which must not occur in it
(bad_words_ids).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from . import bart

DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in bart.DEFAULTS.items() if name != "classifier_dropout"},
    "vocab_size": 58101,
    "decoder_vocab_size": None,
    "share_encoder_decoder_embeddings": True,
    "id2label": None,
    "label2id": None,
    "pad_token_id": 58100,
    "bos_token_id": None,
    "eos_token_id": 0,
    "decoder_start_token_id": 58100,
    "forced_eos_token_id": 0,
}
FORM: dict[str, Any] = {"embedding_norm": False, "position_offset": 0}

FAMILY = replace(
    bart.FAMILY,
    model_type="marian",
    class_prefix="Marian",
    class_names={"seq2seq-lm": "MarianMTModel"},
    defaults=DEFAULTS,
    translate=partial(bart.translate, **FORM),
    sides=partial(bart.sides, form=FORM, sinusoids=True, reads_source=False),
    body=bart.body(learned=False, embedding_norm=False),
    heads={"seq2seq-lm": bart.FAMILY.heads["seq2seq-lm"]},
    rejected={
        "is_decoder": (False,),
        "normalize_before": (False,),
        "normalize_embedding": (False,),
        "add_final_layer_norm": (False,),
        "static_position_embeddings": (True,),
        "share_encoder_decoder_embeddings": (True,),
    },
)
