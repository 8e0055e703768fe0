"""Return values of models: transformers' field names, accessible by attribute, key or position."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..graphs import register_output

if TYPE_CHECKING:
    from ..cache import KVCache


class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that also works as a dict and a tuple: ``out.logits``, ``out["logits"]``, ``out[0]``,
    ``out.to_tuple()``.

    Fields that are None are absent from the dict and from the tuple.
    """

    def __init_subclass__(cls) -> None:
        """torch.export takes results apart."""
        register_output(cls)

    def __post_init__(self) -> None:
        first = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        if isinstance(first, dict | Iterator):  # as accelerate makes one anew: fields by name
            type(self).__init__(self, **dict(first))
            return
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value is not None:
                super().__setitem__(f.name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are present, in order."""
        return tuple(self.values())


Tensors = tuple[Tensor, ...]


@dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state [B, S, C]; hidden_states: [B, S, C] before each layer and after the last; attentions:
    [B, H, S, S] per layer."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """logits [B, S, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """logits [B, S, V], and the KV cache to continue from."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """prediction_logits [B, S, V]; seq_relationship_logits [B, 2]."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class AlbertForPreTrainingOutput(ModelOutput):
    """prediction_logits [B, S, V]; sop_logits [B, 2]: in order, swapped."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class ElectraForPreTrainingOutput(MaskedLMOutput):
    """logits [B, S]: above 0 for a replaced token."""


@dataclass
class NextSentencePredictorOutput(MaskedLMOutput):
    """logits [B, 2]: is the next sentence, is a random sentence."""


@dataclass
class SequenceClassifierOutput(CausalLMOutput):
    """logits [B, num_labels]."""


@dataclass
class TokenClassifierOutput(MaskedLMOutput):
    """logits [B, S, num_labels]."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """start_logits, end_logits [B, S]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
