"""`pipeline(task, model)`: creates a pipeline from a model and its tokenizer, like transformers.pipeline.

    ner = pipeline("ner", model="dslim/bert-base-NER", aggregation_strategy="simple")
    ner("Wolfgang lives in Berlin.")   # [{"entity_group": "PER", "score": ..., "word": "Wolfgang", ...}, ...]

Results have transformers' structure and values. There is one file per task (sentences.py has two); their base
class is in base.py.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from ..differences import renamed
from ..files import DEFAULT_DECODER, DEFAULT_ENCODER, resolve
from ..model import HUB_OPTIONS, AutoModelForCausalLM, PreTrainedModel, read_config
from ..sentence import CrossEncoder, SentenceEncoder
from ..text import AutoTokenizer, Tokenizer
from .base import Pipeline
from .feature_extraction import FeatureExtractionPipeline
from .fill_mask import FillMaskPipeline
from .question_answering import QuestionAnsweringPipeline
from .sentences import SentencePipeline, SentenceSimilarityPipeline, TextRankingPipeline
from .text_classification import TextClassificationPipeline
from .text_generation import TextGenerationPipeline
from .token_classification import TokenClassificationPipeline
from .zero_shot import PromptedZeroShotPipeline, ZeroShotClassificationPipeline

TASKS: dict[str, type[Pipeline[Any]]] = {
    cls.task: cls
    for cls in (
        FeatureExtractionPipeline,
        FillMaskPipeline,
        QuestionAnsweringPipeline,
        SentenceSimilarityPipeline,
        TextClassificationPipeline,
        TextGenerationPipeline,
        TextRankingPipeline,
        TokenClassificationPipeline,
        ZeroShotClassificationPipeline,
    )
}
LATE = {
    "summarization": "SummarizationPipeline",
    "text2text-generation": "Text2TextGenerationPipeline",
    "translation": "TranslationPipeline",
}
"""Tasks of encoder-decoders, whose file is imported when one is asked for -> their classes."""
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
DEFAULT_MODELS = {
    "feature-extraction": DEFAULT_ENCODER,
    "sentence-similarity": DEFAULT_ENCODER,
    "text-generation": DEFAULT_DECODER,
}

_HEADS = {
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "translation",
    "Model": "feature-extraction",
}
"""Suffix of a class name in config.json -> the task of such a model."""

_WITHOUT_EFFECT = ("trust_remote_code", "use_fast", "framework", "num_workers", "feature_extractor", "config")


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | PreTrainedModel | SentenceEncoder | CrossEncoder | None = None,
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Create a pipeline for a task; call it with texts.

    Args:
        task: one of `TASKS` or `LATE`, or an alias of one; "translation_en_to_fr" is "translation" with its
            languages; None: the task that the model was trained for.
        model: a folder, a name on the hub, or a loaded model (with or without PEFT's adapters).
            feature-extraction, sentence-similarity and text-generation have a default. For
            sentence-similarity also a SentenceEncoder, for text-ranking a CrossEncoder.
            zero-shot-classification takes models trained on NLI, sentence encoders, and causal language
            models.
        tokenizer: None: the model's own.
        device: -1 is the CPU, another number a GPU; None: the GPU if there is one (a loaded model stays where
            it is).
        dtype: of the weights; None: the checkpoint's.
        weights: quantises them, see `AutoModel.from_pretrained`; not for a loaded model.
        batch_size: maximum number of texts per forward pass.
        model_kwargs: for `from_pretrained` of the model.
        options: options of the task, see its class; `revision`, `cache_dir`, `token`, `local_files_only` are
            for the hub.

    Raises ValueError for an unknown task or a model without the head for it.
    """
    for name in _WITHOUT_EFFECT:
        options.pop(name, None)
    options = renamed("pipeline", options, {"use_auth_token": "token"})
    dtype = options.pop("torch_dtype", None) if dtype is None else dtype
    device = options.pop("device_map", None) if device is None else device
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    if model is None:
        model = DEFAULT_MODELS.get(_name(task)) if task is not None else None
        if model is None:
            raise ValueError(
                f"{'pipeline' if task is None else task} needs a model=: a folder, or a name on the hub"
            )
    model = _adapted(model)
    task = _task_of(model, hub) if task is None else task
    name = _name(task)
    cls = _class(name)
    if name in LATE:
        options["task"] = task
    model_class = cls.model_class
    if issubclass(cls, SentencePipeline):
        if tokenizer is not None:
            raise ValueError(f"{name} uses the tokenizer of its model: tokenizer= has no effect")
        made = {"dtype": dtype, "weights": weights, "model_kwargs": model_kwargs, **hub}
        found = _of_sentences(model_class, name, model, device, made)
        return cls(found, batch_size=batch_size, **options)
    if cls is ZeroShotClassificationPipeline:
        kind = _prompted(model, hub)
        if kind is SentenceEncoder:
            made = {"dtype": dtype, "weights": weights, "model_kwargs": model_kwargs, **hub}
            found = _of_sentences(SentenceEncoder, name, model, device, made)
            return PromptedZeroShotPipeline(found, batch_size=batch_size, **options)
        cls = cls if kind is None else PromptedZeroShotPipeline
        model_class = kind or model_class
    if isinstance(model, PreTrainedModel):
        base = cls is FeatureExtractionPipeline
        if not isinstance(model, PreTrainedModel if base else model_class):
            raise ValueError(
                f"{name} needs an {model_class.__name__}, and the model is a {type(model).__name__}"
            )
        if weights is not None:
            raise ValueError("weights= applies to loading: give the model's name, not a loaded model")
        loaded = model if device is None else model.to(_device(device))
        if dtype is not None:
            loaded = loaded.to(dtype=getattr(torch, str(dtype).removeprefix("torch.")))
    else:
        more = {"add_pooling_layer": False} if cls is FeatureExtractionPipeline else {}
        made = {
            "dtype": dtype,
            "weights": weights,
            "device": _device(device),
            **more,
            **hub,
            **(model_kwargs or {}),
        }
        loaded = model_class.from_pretrained(model, **made)
    if not isinstance(tokenizer, Tokenizer):
        source: Any = tokenizer or (loaded.name_or_path if isinstance(model, PreTrainedModel) else model)
        if not source:
            raise ValueError("a model that was not loaded from files needs a tokenizer=")
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    return cls(loaded, tokenizer, batch_size=batch_size, **options)


def _prompted(model: Any, hub: dict[str, Any]) -> Any:
    """The class of a model that chooses among labels without a head: a sentence encoder, or a causal language
    model. None for one that was trained on NLI, or cannot."""
    if isinstance(model, (SentenceEncoder, AutoModelForCausalLM)):
        return SentenceEncoder if isinstance(model, SentenceEncoder) else AutoModelForCausalLM
    if isinstance(model, PreTrainedModel):
        return None
    config = read_config(resolve(model, files="config", **hub))
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    return SentenceEncoder if architecture.endswith("Model") else None


def _of_sentences(kind: type[Any], task: str, model: Any, device: Any, options: dict[str, Any]) -> Any:
    """The SentenceEncoder or CrossEncoder of a name, or a loaded one."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, (str, os.PathLike)):
        return kind(model, device=_device(device), **given)
    if not isinstance(model, kind):
        raise ValueError(
            f"{task} needs a {kind.__name__} or its name, and the model is a {type(model).__name__}"
        )
    if given:
        raise ValueError(f"{', '.join(given)}: only for a model that is loaded by name")
    return model if device is None else model.to(_device(device))


def _adapted(model: Any) -> Any:
    """The model inside a PEFT model, with its adapters; any other model unchanged."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "PEFT adds trained prompts and prefixes outside of the model, so a pipeline would not use "
            "them: call the PEFT model itself"
        )
    return model.get_base_model()


def _name(task: str) -> str:
    name = ALIASES.get(task, task)
    if re.fullmatch("translation_.+_to_.+", str(name)):
        name = "translation"
    if name not in TASKS and name not in LATE:
        known = ", ".join(sorted([*TASKS, *LATE, *ALIASES]))
        raise ValueError(f"unknown task {task!r}; the tasks are {known} and translation_xx_to_yy")
    return name


def _class(name: str) -> type[Pipeline[Any]]:
    if name in TASKS:
        return TASKS[name]
    from . import text2text

    found: type[Pipeline[Any]] = getattr(text2text, LATE[name])
    return found


def _device(device: str | int | torch.device | None) -> str | int | torch.device:
    if device is None or device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == -1 else device


def _task_of(model: Any, hub: dict[str, Any]) -> str:
    """The task of a model, by its class or the class in its config.json."""
    if isinstance(model, (PreTrainedModel, SentenceEncoder, CrossEncoder)):
        for name, cls in TASKS.items():
            if isinstance(model, cls.model_class):
                return name
        if model.head_kind == "seq2seq-lm":
            return "translation" if type(model).__name__ == "MarianMTModel" else "text2text-generation"
        raise ValueError(f"no task is known for {type(model).__name__}: give task=")
    config = read_config(resolve(model, files="config", **hub))
    architecture = str((config.get("architectures") or [""])[0])
    for end, name in _HEADS.items():
        if architecture.endswith(end):
            return name
    raise ValueError(f"the configuration of {model} does not name a task: give task=")
