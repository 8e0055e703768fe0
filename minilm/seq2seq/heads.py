"""The models: the bare encoder-decoder, the encoder alone, and those with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError
from ..families import Head, PretrainedConfig
from ..files import MOST_CONFIG, has_file, read_json
from ..generation import GenerationConfig
from ..model import Linear, ModelOutput, Packed, classification_loss, integers, token_loss
from .cache import EncoderDecoderCache
from .outputs import Seq2SeqLMOutput, Seq2SeqModelOutput, Seq2SeqSequenceClassifierOutput
from .pretrained import GENERAL, Seq2SeqModel


class Seq2SeqBase(Seq2SeqModel):
    """Encoder and decoder without a head: the decoder's last hidden states."""

    head_kind: ClassVar[Head] = "base"
    output_class: ClassVar[type[ModelOutput]] = Seq2SeqModelOutput

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.initialise()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Run padded batches; arguments and results have transformers' names.

        input_ids int64 [B, S], attention_mask [B, S]; decoder_input_ids int64 [B, T], decoder_attention_mask
        [B, T] or, with a cache, [B, past + T]. Without decoder input, labels are shifted to the right, and
        BART without labels shifts input_ids. `encoder_outputs`: of an earlier call; its attention_mask is
        needed again. `past_key_values`: the cache of an earlier call, which is changed; after an error it is
        as before. Raises ValueError for wrong shapes and ids out of range.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._decoder_input(input_ids, labels)
        cached = self.config.use_cache if use_cache is None else use_cache
        cached &= labels is None and not self.is_gradient_checkpointing
        hidden, packed, fields = self.run(
            input_ids,
            attention_mask,
            inputs_embeds,
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            encoder_outputs,
            past_key_values,
            past_key_values is not None
            or bool(cached and labels is None and not self.is_gradient_checkpointing),
            output_attentions,
            output_hidden_states,
        )
        fields.update(self.results(hidden, packed, labels, input_ids))
        if num_items_in_batch is not None and fields.get("loss") is not None and self.can_generate():
            assert labels is not None
            fields["loss"] = fields["loss"] * (
                (packed.targets(labels, False) != -100).sum() / num_items_in_batch
            )
        output = self.output_class(**fields)
        return output if self._as_dict(return_dict) else output.to_tuple()

    def _decoder_input(self, input_ids: Tensor | None, labels: Tensor | None) -> Tensor:
        """The decoder's input where none is given."""
        if labels is not None and self.can_generate():
            return self._shifted("labels", integers("labels", labels))
        if self.both.reads_source and input_ids is not None:
            return self._shifted("input_ids", integers("input_ids", input_ids))
        raise ValueError(
            "the decoder has no input: give decoder_input_ids, decoder_inputs_embeds or labels"
            if self.can_generate()
            else "the decoder has no input: give decoder_input_ids or decoder_inputs_embeds"
        )

    def results(
        self, hidden: Tensor, packed: Packed, labels: Tensor | None, input_ids: Tensor | None
    ) -> dict[str, Any]:
        """The head: hidden states [T, C] -> the fields of `output_class`."""
        if labels is not None:
            raise TypeError("a model without a head takes no labels")
        return {"last_hidden_state": packed.pad(hidden)}


class EncoderModel(Seq2SeqModel):
    """The encoder alone."""

    head_kind: ClassVar[Head] = "encoder"
    with_decoder: ClassVar[bool] = False

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.initialise()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """See `encode`."""
        return self.encode(*arguments, **options)


class LMHead(nn.Module):
    """A logit for each token, by the token table or a matrix of its own, and BART's bias."""

    def __init__(self, model: Seq2SeqModel) -> None:
        super().__init__()
        spec, both = model.spec, model.both
        self.scale = both.logits_scale
        own = not spec.tie_word_embeddings
        self.decoder = Linear(spec.hidden_size, spec.vocab_size, bias=False) if own else None
        self.bias = None
        if both.final_bias:
            zeros = model.body.embeddings.tokens.weight.new_zeros(1, spec.vocab_size)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    def forward(self, hidden: Tensor, tokens: Any) -> Tensor:
        """hidden [T, C], the token table -> logits [T, V]."""
        hidden = hidden * self.scale if self.scale != 1 else hidden
        scores: Tensor = tokens.scores(hidden) if self.decoder is None else self.decoder(hidden)
        return scores if self.bias is None else scores + self.bias


class AutoModelForSeq2SeqLM(Seq2SeqBase):
    """An encoder-decoder with a language-model head: writes a text for a text (T5, BART)."""

    head_kind: ClassVar[Head] = "seq2seq-lm"
    output_class: ClassVar[type[ModelOutput]] = Seq2SeqLMOutput

    def __init__(self, config: PretrainedConfig) -> None:
        Seq2SeqModel.__init__(self, config)
        self.head = LMHead(self)
        self.generation_config = _generation_config({}, config)
        self.initialise()

    def results(
        self, hidden: Tensor, packed: Packed, labels: Tensor | None, input_ids: Tensor | None
    ) -> dict[str, Any]:
        """logits [B, T, V]; labels int64 [B, T], those of -100 do not count."""
        if labels is not None and labels.shape != (packed.batch, packed.columns):
            raise ValueError(
                f"labels must be [batch, tokens] = [{packed.batch}, {packed.columns}] as the decoder's "
                f"input, and is {list(labels.shape)}"
            )
        logits = self.logits(hidden)
        return {"loss": token_loss(logits, labels, packed), "logits": packed.pad(logits)}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, C] -> [T, V]."""
        scores: Tensor = self.head(hidden, self.body.embeddings.tokens)
        return scores

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """As for other models; the bias of new tokens is 0."""
        bias, self.head.bias = self.head.bias, None
        try:
            table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        finally:
            self.head.bias = bias
        rows = self.spec.vocab_size
        if bias is not None and bias.shape[1] != rows:
            new = bias.new_zeros(1, rows)
            kept = min(rows, bias.shape[1])
            new[:, :kept] = bias.detach()[:, :kept]
            self.head.bias = nn.Parameter(new, requires_grad=False)
        if "decoder_vocab_size" in self.config:
            self.config.decoder_vocab_size = rows
        return table

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """labels int64 [B, T] -> the decoder's input [B, T] (for collators)."""
        return self._shifted("labels", integers("labels", labels))

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Write texts; see `minilm.seq2seq.generate`."""
        from .generate import generate

        return generate(self, *arguments, **options)

    def read_beside_weights(self, folder: Path) -> None:
        """Load generation_config.json, or else the generation options in config.json."""
        file = folder / "generation_config.json"
        there = has_file(file, error=ConfigError)
        stored = read_json(file, limit=MOST_CONFIG, error=ConfigError) if there else {}
        self.generation_config = _generation_config(stored, self.config)


def _generation_config(stored: dict[str, Any], config: PretrainedConfig) -> GenerationConfig:
    """The generation options of a checkpoint, with those that only encoder-decoders have."""
    found = GenerationConfig.from_checkpoint(stored, config)
    for name in ("decoder_start_token_id", "length_penalty", "early_stopping"):
        value = stored.get(name) if stored else config.get(name)
        if value is not None:
            setattr(found, name, value)
    return found


class Classifier(nn.Module):
    """One logit per class, after a dense layer with tanh (BART)."""

    def __init__(self, model: Seq2SeqModel) -> None:
        super().__init__()
        self.p = float(model.config.classifier_dropout)
        self.dense = Linear(model.spec.hidden_size, model.spec.hidden_size)
        self.out = Linear(model.spec.hidden_size, model.config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C] -> [B, num_labels]."""
        h = self.dense(F.dropout(x, self.p, self.training), "tanh")
        y: Tensor = self.out(F.dropout(h, self.p, self.training))
        return y


class Seq2SeqForSequenceClassification(Seq2SeqBase):
    """One label per text, from the decoder's state at the last end token (BART)."""

    head_kind: ClassVar[Head] = "sequence-classification"
    output_class: ClassVar[type[ModelOutput]] = Seq2SeqSequenceClassifierOutput

    def __init__(self, config: PretrainedConfig) -> None:
        Seq2SeqModel.__init__(self, config)
        self.head = Classifier(self)
        self.initialise()

    def results(
        self, hidden: Tensor, packed: Packed, labels: Tensor | None, input_ids: Tensor | None
    ) -> dict[str, Any]:
        """logits [B, num_labels]; labels [B], or [B, num_labels] for several."""
        if input_ids is None:
            raise ValueError("the classifier reads the state at the last end token: give input_ids")
        if input_ids.shape != (packed.batch, packed.columns):
            raise ValueError(
                f"the decoder's input must be [batch, tokens] = {list(input_ids.shape)} as input_ids, whose "
                f"last end token is read, and is [{packed.batch}, {packed.columns}]"
            )
        ends = self.config.get("eos_token_id")
        there = input_ids == ends
        if bool((~there.any(1)).any()):
            row = int((~there.any(1)).nonzero()[0])
            raise ValueError(
                f"row {row} of input_ids has no end token {ends}, whose state the classifier reads"
            )
        last = there.shape[1] - 1 - there.flip(1).int().argmax(1)  # [B]
        states = packed.pad(hidden)
        logits = self.head(states[torch.arange(len(states), device=states.device), last])
        return {"loss": classification_loss(self.config, logits, labels), "logits": logits}

    def answer(self, hidden: Tensor, batch: Any, labels: Tensor | None) -> dict[str, Any]:
        """The same for the body's states of a `Reading`, [T, C]."""
        ids = batch.packed.pad(batch.tokens + 1) - 1  # -1 at padding
        return self.results(hidden, batch.packed, labels, ids)


GENERAL.update(
    {
        cls.head_kind: cls
        for cls in (Seq2SeqBase, EncoderModel, AutoModelForSeq2SeqLM, Seq2SeqForSequenceClassification)
    }
)
