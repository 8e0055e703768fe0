"""`Seq2SeqModel`, the base class of encoder-decoders: padded batches in, padded results out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..families import ENCODER_DECODERS, Family, Head, PretrainedConfig, family_of
from ..families.encoder_decoder import EncoderDecoderFamily
from ..model import Packed, PreTrainedModel, check_columns, integers, pack
from .cache import EncoderDecoderCache
from .layers import EncoderDecoder, Pass, Reading
from .outputs import EncoderOutput


class Seq2SeqModel(PreTrainedModel):
    """An encoder-decoder and the public API around it. Subclasses add a head."""

    body: EncoderDecoder  # type: ignore[assignment]
    with_decoder: ClassVar[bool] = True
    generation_config: Any
    """The defaults of `generate`, in a model that has it."""

    def __new__(cls, config: Any = None, *arguments: Any, **options: Any) -> Seq2SeqModel:
        """``AutoModelForSeq2SeqLM(config)`` with a T5 configuration is a `T5ForConditionalGeneration`."""
        general = cls.model_type is None and isinstance(config, PretrainedConfig)
        return nn.Module.__new__(class_of(cls.head_kind, config.model_type) if general else cls)

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = False) -> None:
        nn.Module.__init__(self)  # without a pooler in any case, as other families without one
        if not isinstance(config, PretrainedConfig):
            raise TypeError(
                f"config must be a PretrainedConfig, and is {type(config).__name__}: {config!r:.60}; to load "
                f"by name, use {type(self).__name__}.from_pretrained"
            )
        if self.model_type != config.model_type:
            raise ConfigError(
                f"{type(self).__name__} is a {self.model_type} model, and the configuration is of a "
                f"{config.model_type}"
            )
        family = family_of(config.model_type)
        assert isinstance(family, EncoderDecoderFamily)
        self.config, self.family = config, family
        self.both = family.both(config)
        if "scale_decoder_outputs" in config and config.get("scale_decoder_outputs") is None:
            # Kept, for the checkpoint may untie the output matrix without changing the scale.
            config.scale_decoder_outputs = self.both.logits_scale != 1
        self.spec = self.both.encoder
        self.body = EncoderDecoder(self.both, decoder=self.with_decoder)
        self.name_or_path = ""
        self.load_report = None

    def initialise(self) -> None:
        """Initialise all parameters at random; T5's as in its paper's code, by the sizes of each matrix."""
        super().initialise()
        if self.device.type == "meta" or not self.both.buckets:
            return
        factor, width, inner = float(self.config.initializer_factor), self.spec.hidden_size, self.spec.q_size
        deep = {
            "tokens.weight": 1.0,
            "attention.out.weight": inner**-0.5,
            "cross.out.weight": inner**-0.5,
            "mlp.down.weight": self.spec.intermediate_size**-0.5,
            "cross.q.weight": (width * self.spec.head_dim) ** -0.5,
            "decoder.weight": 1.0,
        }
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(factor)
                    continue
                std = next((s for end, s in deep.items() if name.endswith(end)), width**-0.5)
                parameter.normal_(0.0, factor * std)
                if name.endswith("attention.qkv.weight"):
                    parameter[:inner].normal_(0.0, factor * (width * self.spec.head_dim) ** -0.5)

    @property
    def base_model(self) -> PreTrainedModel:
        """The same model without its head, sharing its parameters."""
        if self.head_kind in ("base", "encoder"):
            return self
        return class_of("base", self.config.model_type).sharing(self)

    @classmethod
    def sharing(cls, other: Seq2SeqModel) -> Seq2SeqModel:
        """The body of another model, without its head."""
        model = cls.__new__(cls, other.config)
        nn.Module.__init__(model)
        model.__dict__.update({k: v for k, v in other.__dict__.items() if not k.startswith("_")})
        model.body = other.body
        return model

    def get_encoder(self) -> Any:
        """The encoder, to be called as ``encoder(input_ids, attention_mask)``."""
        return self.encode

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return self.head_kind == "seq2seq-lm"

    def _layout(
        self, side: str, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor, Packed, Tensor | None]:
        """Check one side's input: ids or vectors, its layout, and its mask as bool (None: no padding)."""
        name = f"{side}input_ids"
        given = ids if ids is not None else embeds
        if given is None or (ids is not None and embeds is not None):
            raise ValueError(f"give exactly one of {name} and {side}inputs_embeds")
        if ids is not None:
            given = integers(name, ids)
            if given.dim() != 2:
                raise ValueError(f"{name} must be integers [batch, tokens], and is {list(given.shape)}")
            self._check_ids(name, given, self.spec.vocab_size, "the vocabulary has")
        else:
            self._check_vectors(given)
        rows, columns = given.shape[:2]
        if rows == 0 or columns == 0:
            raise ValueError(f"{name} is {list(given.shape)}, and needs at least one row and one token")
        if mask is not None:
            check_columns(f"{side}attention_mask", mask, rows, columns)
            mask = mask.to(given.device) != 0
            mask = None if bool(mask.all()) else mask
        return given, pack(rows, columns, mask, given.device), mask

    def _check_positions(self, name: str, packed: Packed) -> None:
        if not self.both.buckets and packed.tokens:
            most, longest = self.spec.max_positions, int(packed.positions.max()) + 1
            if longest > most:
                raise ValueError(
                    f"{name} reaches position {longest}, and the model has only {most}: truncate the text"
                )

    def _embedded(self, given: Tensor, packed: Packed) -> Tensor:
        tokens = packed.pack(given)
        return tokens.to(self.dtype) if tokens.is_floating_point() else self.body.embed(tokens)

    def pack(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Reading:
        """Texts that are read, as one packed batch for the body: input_ids int64 [B, S], attention_mask
        [B, S]. Raises ValueError for models whose decoder does not read the source (T5, Marian)."""
        if token_type_ids is not None:
            raise ValueError(
                f"{self.config.model_type} models have no token types, and token_type_ids is given"
            )
        if self.with_decoder and not self.both.reads_source:
            raise ValueError(
                f"a {type(self).__name__} writes texts, and has no states of a text alone: "
                f"{'its EncoderModel has' if 'encoder' in self.family.heads else 'its encoder has'}"
            )
        given, packed, _ = self._layout("", input_ids, attention_mask, None)
        self._check_positions("input_ids", packed)
        written = packed.pack(self._shifted("input_ids", given)) if self.with_decoder else None
        return Reading(packed.pack(given), packed.positions, packed, input_ids=given, written=written)

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the encoder: input_ids int64 [B, S] or inputs_embeds [B, S, C], attention_mask [B, S]."""
        output = self._encode(
            input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states
        )[0]
        return output if self._as_dict(return_dict) else output.to_tuple()

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _encode(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        embeds: Tensor | None,
        attentions: bool | None,
        hidden_states: bool | None,
    ) -> tuple[EncoderOutput, Packed, Tensor | None, Tensor]:
        """The output, its layout and mask, and the packed last hidden states."""
        given, packed, mask = self._layout("", ids, mask, embeds)
        if 0 in packed.lengths:
            raise ValueError(f"row {packed.lengths.index(0)} of attention_mask is all padding")
        self._check_positions("input_ids", packed)
        run = Pass(packed, packed)
        run.attentions = [] if self._wants("output_attentions", attentions) else None
        run.hidden_states = [] if self._wants("output_hidden_states", hidden_states) else None
        memory = self.body.encoder(self._embedded(given, packed), run)
        output = EncoderOutput(
            last_hidden_state=packed.pad(memory),
            hidden_states=None if run.hidden_states is None else tuple(map(packed.pad, run.hidden_states)),
            attentions=None if run.attentions is None else tuple(run.attentions),
        )
        return output, packed, mask, memory

    def _wants(self, name: str, given: bool | None) -> bool:
        return bool(self.config.get(name, False) if given is None else given)

    def _given_encoding(
        self, encoder_outputs: Any, mask: Tensor | None
    ) -> tuple[EncoderOutput, Packed, Tensor | None, Tensor]:
        """`encoder_outputs` of the caller (an output, a tuple or a dict), checked."""
        if isinstance(encoder_outputs, Tensor):
            fields: tuple[Any, ...] = (encoder_outputs, None, None)
        elif isinstance(encoder_outputs, Mapping):
            names = ("last_hidden_state", "hidden_states", "attentions")
            fields = tuple(encoder_outputs.get(name) for name in names)
        else:
            fields = (*encoder_outputs, None, None)[:3]
        hidden, width = fields[0], self.spec.hidden_size
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[2] != width:
            what = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"encoder_outputs must be [batch, tokens, {width}], and is {what}")
        if mask is not None:
            check_columns("attention_mask", mask, *hidden.shape[:2])
            mask = mask.to(hidden.device) != 0
            mask = None if bool(mask.all()) else mask
        packed = pack(hidden.shape[0], hidden.shape[1], mask, hidden.device)
        if 0 in packed.lengths:
            raise ValueError(f"row {packed.lengths.index(0)} of attention_mask is all padding")
        return EncoderOutput(*fields), packed, mask, packed.pack(hidden).to(self.dtype)

    def _shifted(self, name: str, ids: Tensor) -> Tensor:
        """The decoder's input for labels: a start token, then all but the last; -100 is padding."""
        wraps = self.both.wraps
        start, pad = self.config.get("decoder_start_token_id"), self.config.get("pad_token_id")
        for option, value in (("decoder_start_token_id", start), ("pad_token_id", pad)):
            if value is None and not (wraps and option != "pad_token_id"):
                raise ValueError(f"{name} cannot be shifted to the right: the configuration has no {option}")
        if ids.dim() != 2:
            raise ValueError(f"{name} must be integers [batch, tokens], and is {list(ids.shape)}")
        ids = ids.masked_fill(ids == -100, int(pad))
        if wraps:  # as transformers does: the tokens before the padding are counted
            first = ids.gather(1, (ids != int(pad)).sum(1, keepdim=True).clamp(min=1) - 1)
        else:
            first = ids.new_full((len(ids), 1), int(start))
        return torch.cat((first, ids[:, :-1]), 1)

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        encoder_outputs: Any,
        past_key_values: EncoderDecoderCache | None,
        use_cache: bool,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> tuple[Tensor, Packed, dict[str, Any]]:
        """Both sides: the decoder's packed hidden states, their layout, and the fields of the result."""
        past = past_key_values
        if past is not None and not isinstance(past, EncoderDecoderCache):
            raise ValueError(
                "past_key_values must be the EncoderDecoderCache of an earlier call, and is "
                f"{type(past).__name__}"
            )
        encoding: EncoderOutput | None = None
        memory: Tensor | None = None
        if encoder_outputs is not None:
            encoding, source, source_mask, memory = self._given_encoding(encoder_outputs, attention_mask)
        elif past is not None and input_ids is None and inputs_embeds is None:
            source, source_mask = past.source, past.source_mask
        else:
            encoding, source, source_mask, memory = self._encode(
                input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states
            )
        if past is not None:  # its keys of the source are the ones that count
            if past.source.lengths != source.lengths:
                raise ValueError(
                    f"past_key_values is for sources of {past.source.lengths} tokens, and these have "
                    f"{source.lengths}"
                )
            source = past.source
        hidden, packed, run, cache = self._decode(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            (source, source_mask, memory),
            past,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        states, maps, cross = run.hidden_states, run.attentions, run.cross_attentions
        fields: dict[str, Any] = {
            "past_key_values": cache,
            "decoder_hidden_states": None if states is None else tuple(map(packed.pad, states)),
            "decoder_attentions": None if maps is None else tuple(maps),
            "cross_attentions": None if cross is None else tuple(cross),
        }
        if encoding is not None:
            fields["encoder_last_hidden_state"] = encoding.last_hidden_state
            fields["encoder_hidden_states"] = encoding.hidden_states
            fields["encoder_attentions"] = encoding.attentions
        return hidden, packed, fields

    def _decode(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        embeds: Tensor | None,
        encoded: tuple[Packed, Tensor | None, Tensor | None],
        past: EncoderDecoderCache | None,
        use_cache: bool,
        attentions: bool | None,
        hidden_states: bool | None,
    ) -> tuple[Tensor, Packed, Pass, EncoderDecoderCache | None]:
        source, source_mask, memory = encoded
        body = self.body.decoder
        assert body is not None
        before = 0 if past is None else past.get_seq_length()
        new = ids if ids is not None else embeds
        if past is not None and before and isinstance(mask, Tensor) and isinstance(new, Tensor):
            mask = self._new_columns(mask, new.shape[1], past)
        given, packed, new_mask = self._layout("decoder_", ids, mask, embeds)
        if packed.batch != source.batch:
            raise ValueError(
                f"the decoder has {packed.batch} sequences, and the encoder {source.batch}: their batches "
                "must be of one size"
            )
        keys, cache = packed, past
        if use_cache and cache is None:
            cache = EncoderDecoderCache(len(body.layers), source, source_mask)
        kept = None if cache is None else cache.state()
        if cache is not None:
            here = torch.ones(packed.batch, packed.columns, dtype=torch.bool, device=given.device)
            here = here if new_mask is None else new_mask
            cache.mask = here if cache.mask is None else torch.cat((cache.mask, here), 1)
            keys = pack(len(cache.mask), cache.mask.shape[1], cache.mask, given.device)
            packed.positions = packed.pack(keys.pad(keys.positions)[:, before:])
        run = Pass(packed, keys, source, memory, cache)
        if self._wants("output_attentions", attentions):
            run.attentions, run.cross_attentions = [], []
        run.hidden_states = [] if self._wants("output_hidden_states", hidden_states) else None
        try:
            self._check_positions("decoder_input_ids", packed)
            hidden = body(self._embedded(given, packed), run)
        except BaseException:
            if cache is not None and kept is not None:
                cache.restore(kept)
            raise
        return hidden, packed, run, cache

    @staticmethod
    def _new_columns(mask: Tensor, new: int, past: EncoderDecoderCache) -> Tensor:
        """The part of a mask of all columns that is for the `new` ones."""
        assert past.mask is not None
        before = past.get_seq_length()
        if mask.shape == (past.rows, new):
            return mask
        if mask.shape != (past.rows, before + new):
            raise ValueError(
                f"decoder_attention_mask must be [{past.rows}, {before + new}] (with the cache's columns) or "
                f"[{past.rows}, {new}], and is {list(mask.shape)}"
            )
        if not torch.equal(mask[:, :before].to(past.mask.device) != 0, past.mask):
            raise ValueError("decoder_attention_mask differs from that of the calls that filled the cache")
        return mask[:, before:]


_CLASSES: dict[tuple[str, str], type[Seq2SeqModel]] = {}
GENERAL: dict[str, type[Seq2SeqModel]] = {}
"""Head kind -> the class of all families; filled by `minilm.seq2seq.heads`."""


def class_of(head: Head, model_type: str) -> type[Seq2SeqModel]:
    """The class of one family's models with this head, under transformers' name, such as
    T5ForConditionalGeneration. Raises ConfigError for a family that is no encoder-decoder, or has no such
    head."""
    if model_type not in ENCODER_DECODERS:
        known = ", ".join(ENCODER_DECODERS)
        raise ConfigError(f"{model_type} models are not encoder-decoders, which are {known}")
    family = family_of(model_type)
    if head != "base" and head not in family.heads:
        kinds = ", ".join(family.heads)
        way = "; AutoModelForSeq2SeqLM, and pipeline('text2text-generation'), write texts for texts"
        way = way if head == "causal-lm" else ""
        raise ConfigError(f"{model_type} models have no {head} head; they have: {kinds}{way}")
    if (head, model_type) not in _CLASSES:
        general = GENERAL[head]
        about = {"__module__": "minilm", "__doc__": general.__doc__, "model_type": model_type}
        _CLASSES[head, model_type] = type(family.class_name(head), (general,), about)
    return _CLASSES[head, model_type]


def alias(name: str) -> type | None:
    """The class for a class name of transformers (T5Model, BartConfig, ...), or None. The names of the
    tokenizers are `minilm.text`'s."""
    for model_type in ENCODER_DECODERS:
        family = family_of(model_type)
        for head in ("base", *family.heads):
            if name == family.class_name(head):
                return class_of(head, model_type)
        if name == f"{family.class_prefix}Config":
            return type(name, (PretrainedConfig,), {"model_type": model_type, "__module__": "minilm"})
        if name.removesuffix("Fast") in _tokenizers(family):
            from ..text import AutoTokenizer, tokenizer_class

            return tokenizer_class(name) or AutoTokenizer
    return None


def alias_names() -> list[str]:
    """All names that `alias` knows."""
    names = []
    for family in map(family_of, ENCODER_DECODERS):
        names += [family.class_name(head) for head in ("base", *family.heads)]
        names.append(f"{family.class_prefix}Config")
        names += [f"{name}{fast}" for name in _tokenizers(family) for fast in ("", "Fast")]
    return names


def _tokenizers(family: Family) -> tuple[str, ...]:
    """The names of the family's tokenizers."""
    own = f"{family.class_prefix}Tokenizer"
    return (own, "MBart50Tokenizer") if family.model_type == "mbart" else (own,)
