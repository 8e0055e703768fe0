"""The one Transformer, from a padded batch to the output of a task head.

Reading order: `layers`, `transformer` (the body), `batch` (its input), `pretrained` (the public API around
it: takes padded batches, returns padded results), `heads` and `causal` (task heads), then `loading`.
"""

from ..families import PretrainedConfig
from .auto import MODELS, AutoConfig, alias, alias_names
from .batch import Batch, Packed, check_columns, integers, pack
from .causal import AutoModelForCausalLM, CausalLMHead
from .heads import (
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ScoreHead,
    classification_loss,
    token_loss,
)
from .layers import MLP, Attention, Block, Embedding, Embeddings, Linear, Norm
from .loading import HUB_OPTIONS, as_device, as_dtype, read_config
from .outputs import MaskedLMOutput, ModelOutput
from .pretrained import AutoModel, PreTrainedModel
from .rope import angle_table, angles
from .transformer import Transformer

__all__ = [
    "HUB_OPTIONS", "MLP", "MODELS", "Attention", "AutoConfig", "AutoModel", "AutoModelForCausalLM",
    "AutoModelForMaskedLM", "AutoModelForNextSentencePrediction", "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "Batch", "Block", "CausalLMHead", "Embedding", "Embeddings",
    "Linear", "MaskedLMOutput", "ModelOutput", "Norm", "Packed", "PreTrainedModel", "PretrainedConfig",
    "ScoreHead", "Transformer", "alias", "alias_names", "angle_table", "angles", "as_device",
    "as_dtype", "check_columns", "classification_loss", "integers", "pack", "read_config", "token_loss",
]  # fmt: skip
