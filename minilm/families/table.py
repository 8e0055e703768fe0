"""The table of the families, by the `model_type` of config.json."""

from __future__ import annotations

from importlib import import_module

from ..config import ConfigError
from .family import Family

FAMILIES: dict[str, str] = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "xlm_roberta",
    "camembert": "camembert",
    "distilbert": "distilbert",
    "mpnet": "mpnet",
    "electra": "electra",
    "albert": "albert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "phi": "phi",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gpt_neox": "gpt_neox",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "modernbert": "modernbert",
    "deberta-v2": "deberta_v2",
    "nomic_bert": "nomic_bert",
}
"""config.json's model_type -> the file in this folder."""

ENCODER_DECODERS = {name: name for name in ("t5", "mt5", "umt5", "bart", "mbart", "marian")}
"""The same for encoder-decoders (`minilm.seq2seq`)."""


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. For any other, raises ConfigError, which lists the supported ones."""
    known = {**FAMILIES, **ENCODER_DECODERS}
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are {', '.join(known)}")
    family: Family = import_module(f".{known[model_type]}", __package__).FAMILY
    return family


def families() -> list[Family]:
    """All families but the encoder-decoders, in the order of the table."""
    return [family_of(model_type) for model_type in FAMILIES]
