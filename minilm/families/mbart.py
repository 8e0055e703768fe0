"""mBART (Liu et al. 2020, arXiv:2001.08210) and mBART-50 (Tang et al. 2020, arXiv:2008.00401): BART for many
languages.

Norms stand before the sub-layers, and each side has one more at its end, beside BART's after the embeddings.
A token names the language of a text: mBART has it at the end of the source, mBART-50 at its beginning, and
the text to be written begins with it (forced_bos_token_id, or decoder_start_token_id). Texts that are shifted
to the right begin with their last token, which is the language's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from . import bart

DEFAULTS: dict[str, Any] = {
    **bart.DEFAULTS,
    "id2label": None,
    "label2id": None,
    "decoder_start_token_id": None,
}
FORM: dict[str, Any] = {"pre_norm": True, "final_norm": True}

FAMILY = replace(
    bart.FAMILY,
    model_type="mbart",
    class_prefix="MBart",
    defaults=DEFAULTS,
    translate=partial(bart.translate, **FORM),
    sides=partial(bart.sides, form=FORM, wraps=True),
    body=bart.body(final_norm=True),
    rejected={
        "is_decoder": (False,),
        "normalize_before": (True,),
        "normalize_embedding": (True,),
        "add_final_layer_norm": (True,),
        "static_position_embeddings": (False,),
    },
)
