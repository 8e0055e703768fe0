"""XLM-RoBERTa (Conneau et al. 2019, arXiv:1911.02116): RoBERTa with a sentencepiece vocabulary of a hundred
languages.

The network is identical to RoBERTa; in checkpoints the body is even called ``roberta``.
"""

from __future__ import annotations

from dataclasses import replace

from . import roberta

FAMILY = replace(
    roberta.FAMILY,
    model_type="xlm-roberta",
    class_prefix="XLMRoberta",
    defaults={**roberta.DEFAULTS, "vocab_size": 30522},
)
