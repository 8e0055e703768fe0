"""Lookup by name: `AutoConfig`, the class of each task head, and transformers' class names."""

from __future__ import annotations

import os
from typing import Any

from ..families import Head, PretrainedConfig, families
from ..files import resolve
from ..substitutes import WITHOUT_EFFECT, with_effect
from .causal import AutoModelForCausalLM
from .heads import (
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from .loading import HUB_OPTIONS, read_config
from .pretrained import AutoModel, PreTrainedModel, of_family

MODELS: dict[Head, type[PreTrainedModel]] = {
    cls.head_kind: cls
    for cls in (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForNextSentencePrediction,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModelForCausalLM,
    )
}
"""Head kind -> class."""


class AutoConfig:
    """Loads configurations: ``AutoConfig.from_pretrained(name, num_labels=3)``."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> PretrainedConfig:
        """The configuration of a checkpoint, with overrides. Errors: see `minilm.files.resolve` and
        `ConfigError`."""
        hub = {k: options.pop(k) for k in HUB_OPTIONS if k in options}
        options = with_effect(options, WITHOUT_EFFECT)
        return read_config(resolve(pretrained_model_name_or_path, files="config", **hub), **options)

    @classmethod
    def for_model(cls, model_type: str, **options: Any) -> PretrainedConfig:
        """A configuration without a checkpoint: ``AutoConfig.for_model("gpt2", n_layer=2)``."""
        return PretrainedConfig(model_type=model_type, **options)


PretrainedConfig.reader = AutoConfig.from_pretrained


def alias(name: str) -> Any:
    """The class for a class name of transformers (BertModel, GPT2LMHeadModel, LlamaConfig,
    RobertaTokenizerFast, ...), or None."""
    for family in families():
        for head in ("base", *family.heads):
            if name == family.class_name(head):
                return of_family(MODELS[head], family.model_type)
        if name == f"{family.class_prefix}Config":
            return type(name, (PretrainedConfig,), {"model_type": family.model_type, "__module__": "minilm"})
        if name in (f"{family.class_prefix}Tokenizer", f"{family.class_prefix}TokenizerFast"):
            from ..text import AutoTokenizer, tokenizer_class

            return tokenizer_class(name) or AutoTokenizer
    return None


def alias_names() -> list[str]:
    """All names that `alias` knows."""
    names = []
    for family in families():
        names += [family.class_name(head) for head in ("base", *family.heads)]
        names += [f"{family.class_prefix}{what}" for what in ("Config", "Tokenizer", "TokenizerFast")]
    return names
