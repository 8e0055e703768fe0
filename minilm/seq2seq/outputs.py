"""Return values of encoder-decoders, with transformers' fields.

`decoder_hidden_states` and `encoder_hidden_states`: [B, S, C] before each layer and after the last;
`decoder_attentions`, `cross_attentions`, `encoder_attentions`: [B, H, queries, keys] per layer. All are zero
at padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..model import ModelOutput

if TYPE_CHECKING:
    from .cache import EncoderDecoderCache

Tensors = tuple[Tensor, ...]


@dataclass
class EncoderOutput(ModelOutput):
    """last_hidden_state [B, S, C]."""

    last_hidden_state: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class Seq2SeqModelOutput(ModelOutput):
    """last_hidden_state [B, S, C] of the decoder."""

    last_hidden_state: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """logits [B, S, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass
class Seq2SeqSequenceClassifierOutput(Seq2SeqLMOutput):
    """logits [B, num_labels]."""
