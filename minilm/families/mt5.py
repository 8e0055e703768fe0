"""mT5 (Xue et al. 2021, arXiv:2010.11934): T5 1.1 with a vocabulary of 101 languages. The hidden states are
not scaled before the output matrix, tied or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import t5

DEFAULTS = {
    **t5.DEFAULTS,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}

FAMILY = replace(
    t5.FAMILY,
    model_type="mt5",
    class_prefix="MT5",
    defaults=DEFAULTS,
    sides=partial(t5.sides, scales=False),
)
