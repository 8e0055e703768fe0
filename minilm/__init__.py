"""minilm: a Transformer to read, to use and to measure.

    from minilm import AutoModel, AutoTokenizer, SentenceEncoder, LLM

Names are imported on first use, so ``import minilm`` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cache import KVCache as KVCache
    from .config import ConfigError as ConfigError
    from .config import ModelConfig as ModelConfig
    from .files import HubError as HubError
    from .files import WeightError as WeightError
    from .generation import LLM as LLM
    from .generation import BeamSearchParams as BeamSearchParams
    from .generation import GenerationConfig as GenerationConfig
    from .generation import RequestOutput as RequestOutput
    from .generation import SamplingParams as SamplingParams
    from .generation import TextIteratorStreamer as TextIteratorStreamer
    from .generation import TextStreamer as TextStreamer
    from .interpret import attention_probs as attention_probs
    from .model import AutoConfig as AutoConfig
    from .model import AutoModel as AutoModel
    from .model import AutoModelForCausalLM as AutoModelForCausalLM
    from .model import AutoModelForMaskedLM as AutoModelForMaskedLM
    from .model import AutoModelForNextSentencePrediction as AutoModelForNextSentencePrediction
    from .model import AutoModelForPreTraining as AutoModelForPreTraining
    from .model import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from .model import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .model import AutoModelForTokenClassification as AutoModelForTokenClassification
    from .model import PretrainedConfig as PretrainedConfig
    from .ops import BackendError as BackendError
    from .ops import backend as backend
    from .ops import explain as explain
    from .pipelines import pipeline as pipeline
    from .search import SearchIndex as SearchIndex
    from .sentence import CrossEncoder as CrossEncoder
    from .sentence import SentenceEncoder as SentenceEncoder
    from .sentence import SentenceTransformer as SentenceTransformer
    from .seq2seq import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from .text import AutoTokenizer as AutoTokenizer
    from .text import Tokenizer as Tokenizer
    from .util import SimilarityFunction as SimilarityFunction

_HOME = {
    "cache": ("KVCache",),
    "config": (
        "ConfigError",
        "ModelConfig",
    ),
    "files": ("HubError", "WeightError"),
    "generation": (
        "GenerationConfig",
        "LLM",
        "BeamSearchParams",
        "RequestOutput",
        "SamplingParams",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
    "interpret": ("attention_probs",),
    "model": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "PretrainedConfig",
    ),
    "ops": (
        "BackendError",
        "backend",
        "explain",
    ),
    "pipelines": ("pipeline",),
    "search": ("SearchIndex",),
    "sentence": (
        "CrossEncoder",
        "SentenceEncoder",
        "SentenceTransformer",
    ),
    "seq2seq": ("AutoModelForSeq2SeqLM",),
    "text": (
        "AutoTokenizer",
        "Tokenizer",
    ),
    "util": ("SimilarityFunction",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    elif name in ("util", "prompting"):  # as modules, without an import of their own
        value = import_module(f".{name}", __name__)
    elif name[
        :1
    ].isupper():  # BertModel, GPT2LMHeadModel, LlamaConfig, ...: transformers' class names, by table
        value = import_module(".model", __name__).alias(name)
        if value is None:
            value = import_module(".seq2seq", __name__).alias(name)
    else:
        value = None
    if value is None:
        substitutes = import_module(".substitutes", __name__)
        way = substitutes.instead(substitutes.CLASSES, [name]).replace(f"; {name}: ", "; ")
        raise AttributeError(f"module 'minilm' has no attribute {name!r}{way}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from . import seq2seq
    from .model import alias_names

    return sorted({*globals(), *__all__, *alias_names(), *seq2seq.alias_names()})
