"""The one Transformer, from a padded batch to the answer of a head."""

from .auto import AutoConfig, HUB_OPTIONS, alias_names, as_device, as_dtype, read_config
from .cache import KVCache
from .heads import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForNextSentencePrediction, AutoModelForPreTraining, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification, CausalLMHead, MODELS
from .layers import Attention, Block, Embedding, Embeddings, Linear, MLP, Norm, Pass
from .outputs import ModelOutput
from .packing import Packed, pack
from .pretrained import BodyResult, PreTrainedModel, Transformer
from .quantized_layers import QuantizedEmbedding, QuantizedLinear

__all__ = ["Attention", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForNextSentencePrediction", "AutoModelForPreTraining", "AutoModelForQuestionAnswering", "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "Block", "BodyResult", "CausalLMHead", "Embedding", "Embeddings", "HUB_OPTIONS", "KVCache", "Linear", "MLP", "MODELS", "ModelOutput", "Norm", "Packed", "Pass", "PreTrainedModel", "QuantizedEmbedding", "QuantizedLinear", "Transformer", "alias_names", "as_device", "as_dtype", "pack", "read_config"]
