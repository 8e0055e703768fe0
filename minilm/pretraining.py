"""Pre-training heads that one family has: ALBERT's sentence order and ELECTRA's replaced tokens.

`minilm.model.AutoModelForPreTraining` finds them by the names in its table `variants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .families import SequenceHead
from .graphs import in_graph
from .model import (
    AutoModelForPreTraining,
    Batch,
    MaskedLMOutput,
    ModelOutput,
    ScoreHead,
    check_columns,
    integers,
)


@dataclass
class AlbertForPreTrainingOutput(ModelOutput):
    """prediction_logits [B, S, V]; sop_logits [B, 2]: in order, swapped."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ElectraForPreTrainingOutput(MaskedLMOutput):
    """logits [B, S]: above 0 for a replaced token."""


class SentenceOrder(AutoModelForPreTraining):
    """ALBERT's two: masked tokens, and whether the second text follows the first (0) or they are swapped
    (1)."""

    output_class: ClassVar[type[ModelOutput]] = AlbertForPreTrainingOutput

    def answer(
        self, hidden: Tensor, batch: Batch, labels: Tensor | None, sentence_order_label: Tensor | None = None
    ) -> dict[str, Any]:
        """As for BERT, with sop_logits [B, 2] for the order."""
        fields = super().answer(hidden, batch, labels, sentence_order_label)
        fields["sop_logits"] = fields.pop("seq_relationship_logits")
        return fields


class ReplacedTokens(AutoModelForPreTraining):
    """ELECTRA's discriminator: whether each token is the text's own (0) or a generator's (1)."""

    output_class: ClassVar[type[ModelOutput]] = ElectraForPreTrainingOutput

    def make_head(self) -> Any:
        return ScoreHead(self, 1, SequenceHead(hidden=self.spec.activation))

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:  # type: ignore[override]
        """logits [B, S], the log odds of a replaced token; labels int64 or bool [B, S], -100 does not count.
        Raises ValueError for labels other than 0, 1 and -100."""
        logits, packed, loss = self.head(hidden).squeeze(-1), batch.packed, None
        if labels is not None:
            labels = integers("labels", labels.long() if labels.dtype == torch.bool else labels)
            check_columns("labels", labels, packed.batch, packed.columns)
            targets = packed.targets(labels.to(logits.device), False)
            counts = targets != -100
            if not in_graph() and bool((counts & (targets != 0) & (targets != 1)).any()):
                low, high = int(targets[counts].min()), int(targets.max())
                raise ValueError(f"labels must be 0, 1 (replaced) or -100, and are from {low} to {high}")
            odds = logits if logits.dtype == torch.float64 else logits.float()
            each = F.binary_cross_entropy_with_logits(odds, targets.to(odds.dtype), reduction="none")
            loss = torch.where(counts, each, 0.0).sum() / counts.sum()
        return {"loss": loss, "logits": packed.pad(logits)}
