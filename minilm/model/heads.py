"""Models with a task head, which maps the last hidden states to logits, and the losses to train them.

Heads and losses work on packed tokens; only results are padded. Labels at padding never count. Losses are
computed in float32, by transformers' rules: -100 is ignored, and `config.problem_type` selects the loss of a
classifier.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..differences import said, tell
from ..families import Head, PretrainedConfig, SequenceHead
from ..graphs import in_graph
from .batch import Batch, Packed, check_columns, integers
from .layers import Linear, Norm
from .outputs import (
    MaskedLMOutput,
    ModelOutput,
    NextSentencePredictorOutput,
    PreTrainingOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .pretrained import Pooler, PreTrainedModel


class MaskedLMHead(nn.Module):
    """norm(act(W x + b)), as wide as the token table, then a logit for each token of the vocabulary. With
    `next_sentence` it also holds the next-sentence layer."""

    def __init__(self, model: PreTrainedModel, *, next_sentence: bool = False) -> None:
        super().__init__()
        spec, family, options = model.spec, model.family, model.config
        size, bias = spec.table_size, bool(options.get("classifier_bias", True))
        self.activation = options.get(family.mlm_activation or "", family.mlm_activation) or spec.activation
        self.dense = Linear(spec.hidden_size, size, bias=bias)
        self.norm = Norm(spec, size, eps=family.mlm_norm_eps)
        self.decoder = None if spec.tie_word_embeddings else Linear(size, spec.vocab_size, bias=False)
        biased = options.get("decoder_bias", True)
        self.bias = nn.Parameter(torch.zeros(spec.vocab_size)) if biased else None
        self.next_sentence = Linear(spec.hidden_size, 2) if next_sentence else None

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, C], the token table [V, C] -> logits [T, V]."""
        x = self.norm.norm(self.dense(hidden, self.activation))
        return ops.linear(x, tokens if self.decoder is None else self.decoder.weight, self.bias)


class AutoModelForMaskedLM(PreTrainedModel):
    """An encoder with a masked-LM head: predicts the tokens at [MASK]."""

    head_kind: ClassVar[Head] = "masked-lm"
    output_class: ClassVar[type[ModelOutput]] = MaskedLMOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.head = MaskedLMHead(self)
        self.initialise()

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """logits [B, S, V]; labels int64 [B, S]."""
        logits = self.head(hidden, self.body.embeddings.tokens.weight)
        return {"loss": token_loss(logits, labels, batch.packed), "logits": batch.packed.pad(logits)}


class AutoModelForNextSentencePrediction(PreTrainedModel):
    """Predicts whether the second text follows the first (0) or is a random one (1)."""

    head_kind: ClassVar[Head] = "next-sentence"
    output_class: ClassVar[type[ModelOutput]] = NextSentencePredictorOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(self.spec.hidden_size)
        self.head = nn.ModuleDict({"next_sentence": Linear(self.spec.hidden_size, 2)})
        self.initialise()

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """logits [B, 2]; labels int64 [B]."""
        logits = self.head["next_sentence"](self.pooler(hidden, batch.packed))
        loss = None if labels is None else ops.cross_entropy(logits, labels.view(-1))
        return {"loss": loss, "logits": logits}


class AutoModelForPreTraining(PreTrainedModel):
    """BERT's two pre-training heads: masked tokens and next sentence. ALBERT and ELECTRA have others."""

    head_kind: ClassVar[Head] = "pre-training"
    output_class: ClassVar[type[ModelOutput]] = PreTrainingOutput
    variants: ClassVar[dict[str, str]] = {"albert": "SentenceOrder", "electra": "ReplacedTokens"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.head, self.p = self.make_head(), self.family.dropout(self.head_kind, config)
        self.initialise()

    def make_head(self) -> Any:
        """The head, and a pooler if it needs one."""
        self.pooler = Pooler(self.spec.hidden_size)
        return MaskedLMHead(self, next_sentence=True)

    def answer(
        self, hidden: Tensor, batch: Batch, labels: Tensor | None, next_sentence_label: Tensor | None = None
    ) -> dict[str, Any]:
        """prediction_logits [B, S, V] and seq_relationship_logits [B, 2]; the loss is the sum of both losses,
        if both have labels."""
        logits = self.head(hidden, self.body.embeddings.tokens.weight)
        scores = self.head.next_sentence(F.dropout(self.pooler(hidden, batch.packed), self.p, self.training))
        loss = None
        if labels is not None and next_sentence_label is not None:
            tokens = token_loss(logits, labels, batch.packed)
            assert tokens is not None
            loss = tokens + ops.cross_entropy(scores, next_sentence_label.view(-1))
        return {
            "loss": loss,
            "prediction_logits": batch.packed.pad(logits),
            "seq_relationship_logits": scores,
        }


class ScoreHead(nn.Module):
    """`size` logits from a vector, of a sequence or of a token, after the dense layer of `style` if it has
    one."""

    def __init__(self, model: PreTrainedModel, size: int, style: SequenceHead) -> None:
        super().__init__()
        width, options = model.spec.hidden_size, model.config
        self.p = model.family.dropout(model.head_kind, options)
        self.first_p = options.get(style.drop_input, 0.0) if isinstance(style.drop_input, str) else self.p
        self.first_p *= bool(style.drop_input)
        self.activation = options.get(style.hidden or "", style.hidden)
        hidden = style.hidden not in (None, "pooler")
        bias = bool(options.get("classifier_bias", True))
        self.dense = Linear(width, width, bias=bias) if hidden else None
        self.norm = Norm(model.spec) if style.norm else None
        self.out = Linear(width, size, bias=style.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., size]."""
        if self.dense is not None:
            x = self.dense(F.dropout(x, self.first_p, self.training), self.activation)
        x = x if self.norm is None else self.norm.norm(x)
        scores: Tensor = self.out(F.dropout(x, self.p, self.training))
        return scores


def token_head(model: PreTrainedModel, size: int, *, bias: bool = True) -> ScoreHead:
    """`size` logits for every token."""
    style = model.family.sequence_head
    return ScoreHead(model, size, style if style.norm else SequenceHead(bias=bias))


class AutoModelForSequenceClassification(PreTrainedModel):
    """Predicts a class (or several, or a number) for a text or a pair of texts."""

    head_kind: ClassVar[Head] = "sequence-classification"
    output_class: ClassVar[type[ModelOutput]] = SequenceClassifierOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(self.spec.hidden_size) if self.family.sequence_head.hidden == "pooler" else None
        self.head = ScoreHead(self, config.num_labels, self.family.sequence_head)
        self.initialise()

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """logits [B, num_labels]; labels int64 [B], or float [B] (regression), or float [B, num_labels]
        (multi-label)."""
        pool = self.config.get(self.family.sequence_head.pool, self.family.sequence_head.pool)
        if self.pooler is not None:
            pooled = self.pooler(hidden, batch.packed)
        elif pool == "mean":
            pooled = batch.packed.mean(hidden)
        elif pool in ("first", "cls"):
            if batch.packed.padded_left:
                tell("first-token")
            pooled = hidden[batch.packed.first()]
        else:
            pooled = hidden[self._last_tokens(batch)]
        logits = self.head(pooled)
        return {"loss": classification_loss(self.config, logits, labels), "logits": logits}

    def _last_tokens(self, batch: Batch) -> Tensor:
        """Packed index [B] of the last token of each sequence that is not the padding token (decoders)."""
        last, pad = batch.packed.last(), self.config.get("pad_token_id")
        if pad is None or batch.input_ids is None:
            return last
        return batch.packed.last_where(batch.input_ids != pad)


class AutoModelForTokenClassification(PreTrainedModel):
    """Predicts a class for each token (named entities, parts of speech)."""

    head_kind: ClassVar[Head] = "token-classification"
    output_class: ClassVar[type[ModelOutput]] = TokenClassifierOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        bias = bool(config.get("token_classification_bias", True))
        self.head = token_head(self, config.num_labels, bias=bias)
        self.initialise()

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """logits [B, S, num_labels]; labels int64 [B, S]."""
        logits = self.head(hidden)
        return {"loss": token_loss(logits, labels, batch.packed), "logits": batch.packed.pad(logits)}


class AutoModelForQuestionAnswering(PreTrainedModel):
    """Predicts where the answer starts and ends in the text."""

    head_kind: ClassVar[Head] = "question-answering"
    output_class: ClassVar[type[ModelOutput]] = QuestionAnsweringModelOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.head = token_head(self, 2)
        self.initialise()

    def answer(
        self,
        hidden: Tensor,
        batch: Batch,
        labels: Tensor | None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """start_logits and end_logits [B, S]. Positions, int64 [B], are columns; those at padding are
        ignored. Raises ValueError for a negative position.

        Logits at padding are the lowest number of the dtype, so that padding is never the answer.
        """
        if labels is not None:
            raise TypeError(
                "question answering is trained with start_positions and end_positions, not with labels"
            )
        packed = batch.packed
        scores = self.head(hidden)
        nowhere = torch.finfo(scores.dtype).min
        start, end = (packed.pad(s, nowhere) for s in scores.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            starts = _answer_columns("start_positions", start_positions, packed)
            ends = _answer_columns("end_positions", end_positions, packed)
            nothing = packed.columns
            loss = (ops.cross_entropy(start, starts, nothing) + ops.cross_entropy(end, ends, nothing)) / 2
        return {"loss": loss, "start_logits": start, "end_logits": end}


def _answer_columns(name: str, positions: Tensor, packed: Packed) -> Tensor:
    """positions [B] -> int64 [B], with S in place of columns at padding."""
    at = integers(name, positions).to(packed.cu_seqlens.device).reshape(-1)
    if len(at) != packed.batch:
        raise ValueError(f"{name} must be [{packed.batch}], and is {list(positions.shape)}")
    if len(at) and not in_graph() and int(at.min()) < 0:
        raise ValueError(
            f"{name} must be columns, from 0 to {packed.columns - 1}, and one is {int(at.min())}"
        )
    real = F.pad(packed.pad(torch.ones_like(packed.positions)), (0, 1))
    at = at.clamp(max=packed.columns)
    return torch.where(real.gather(1, at[:, None]).squeeze(1) > 0, at, packed.columns)


def token_loss(
    logits: Tensor, labels: Tensor | None, packed: Packed, *, shift: bool = False
) -> Tensor | None:
    """Cross-entropy of packed logits [T, V] with padded labels [B, S]; `shift`: with the next token's."""
    if labels is None:
        return None
    labels = integers("labels", labels)
    check_columns("labels", labels, packed.batch, packed.columns)
    labels = labels.to(logits.device)
    _tell_of_padding(labels, packed.pack(labels), packed, shift)
    return ops.cross_entropy(logits, packed.targets(labels, shift))


def _tell_of_padding(labels: Tensor, targets: Tensor, packed: Packed, shift: bool) -> None:
    """Warn of labels that are ignored here and count in transformers. On a GPU only the first call checks."""
    if packed.indices is None or "labels" in said:
        return
    if labels.device.type != "cpu" or {"labels-at-padding", "labels-after-padding"} <= said:
        said.add("labels")
    if int((labels != -100).sum()) > int((targets != -100).sum()):
        tell("labels-at-padding")
    if shift and packed.padded_left:
        first = packed.cu_seqlens[:-1][packed.cu_seqlens.diff() > 0].long()
        if bool(((targets[first] != -100) & (packed.indices[first] % packed.columns > 0)).any()):
            tell("labels-after-padding")


def classification_loss(config: PretrainedConfig, logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """The loss for `config.problem_type`: regression, single-label or multi-label classification. If unset,
    the type is inferred from the labels."""
    if labels is None:
        return None
    labels = labels.to(logits.device)
    if config.problem_type is None:
        classes = not labels.is_floating_point() and labels.dim() == 1
        config.problem_type = (
            "regression"
            if config.num_labels == 1
            else "single_label_classification"
            if classes
            else "multi_label_classification"
        )
    if config.problem_type == "regression":
        numbers = labels.view_as(logits) if labels.numel() == logits.numel() else labels
        if numbers.shape != logits.shape:
            raise ValueError(
                f"labels must be {list(logits.shape)} for regression, and are {list(labels.shape)}"
            )
        return F.mse_loss(logits, numbers.to(logits.dtype))
    if config.problem_type == "single_label_classification":
        return ops.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    if config.problem_type == "multi_label_classification":
        outside = labels.shape != logits.shape or (not in_graph() and ((labels < 0) | (labels > 1)).any())
        if outside:
            raise ValueError(
                f"labels must be from 0 to 1, {list(logits.shape)}, for multi-label classification, and are "
                f"{list(labels.shape)}, from {labels.min()} to {labels.max()}"
            )
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    raise ValueError(
        f"problem_type {config.problem_type!r} is unknown; expected regression, single_label_classification "
        "or multi_label_classification"
    )
