"""CamemBERT (Martin et al. 2019, arXiv:1911.03894): RoBERTa with a French sentencepiece vocabulary.

The network is identical to RoBERTa; in checkpoints the body is even called ``roberta``.
"""

from __future__ import annotations

from dataclasses import replace

from . import roberta

FAMILY = replace(
    roberta.FAMILY,
    model_type="camembert",
    class_prefix="Camembert",
    defaults={**roberta.DEFAULTS, "vocab_size": 30522},
)
