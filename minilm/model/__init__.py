"""The one Transformer, from a padded batch to the answer of a head."""

from .auto import HUB_OPTIONS, AutoConfig, alias_names, as_device, as_dtype, read_config
from .cache import KVCache
from .heads import (
    MODELS,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CausalLMHead,
)
from .layers import MLP, Attention, Block, Embedding, Embeddings, Linear, Norm, Pass
from .outputs import ModelOutput
from .packing import Packed, pack
from .pretrained import BodyResult, PreTrainedModel, Transformer
from .quantized_layers import QuantizedEmbedding, QuantizedLinear

__all__ = [
    "HUB_OPTIONS",
    "MLP",
    "MODELS",
    "Attention",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "Block",
    "BodyResult",
    "CausalLMHead",
    "Embedding",
    "Embeddings",
    "KVCache",
    "Linear",
    "ModelOutput",
    "Norm",
    "Packed",
    "Pass",
    "PreTrainedModel",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Transformer",
    "alias_names",
    "as_device",
    "as_dtype",
    "pack",
    "read_config",
]
