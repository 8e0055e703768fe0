"""`PreTrainedModel`, the base class of all models: the Transformer body and the public API around it.

`forward` takes a padded [B, S] batch, packs it, runs the body and the head, and pads the result. The task
heads are in `minilm.model.heads` and `causal`; loading and saving is in `loading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..cache import KVCache, Layout
from ..companions import refuse_transforms
from ..config import ConfigError, ModelConfig, RopeConfig
from ..differences import tell
from ..families import ENCODER_DECODERS, Family, Head, PretrainedConfig, family_of
from ..graphs import LateCache, Padded, graphed, in_graph
from ..ops.backends import watch
from . import rope
from .batch import Batch, Packed, check_columns, integers, pack, real_places
from .layers import Linear
from .loading import Checkpointed
from .outputs import BaseModelOutput, ModelOutput
from .transformer import Transformer


class PreTrainedModel(ops.Whole, Checkpointed):
    """A body and the public API around it: takes padded batches, returns padded results. Subclasses add a
    task head.

    `config` is the checkpoint's configuration under its own names, `spec` its translation (`ModelConfig`).
    """

    head_kind: ClassVar[Head] = "base"
    output_class: ClassVar[type[ModelOutput]] = ModelOutput
    body: Transformer
    model_type: ClassVar[str | None] = None
    """Set in the classes of one family (`of_family`)."""
    variants: ClassVar[dict[str, str]] = {}
    """Model type -> the subclass in `minilm.pretraining`, where a family's head of this kind is another."""

    def __new__(cls, config: Any = None, *arguments: Any, **options: Any) -> PreTrainedModel:
        """``AutoModelForMaskedLM(config)`` with a BERT configuration creates a `BertForMaskedLM`."""
        general = cls.model_type is None and cls.__module__.startswith(f"{__package__}.")
        general &= isinstance(config, PretrainedConfig)
        found = of_family(cls, config.model_type) if general else cls
        return super().__new__(found) if issubclass(found, cls) else found(config, *arguments, **options)

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, PretrainedConfig):
            how = f"to load by name, use {type(self).__name__}.from_pretrained"  # type: ignore[unreachable]
            raise TypeError(
                f"config must be a PretrainedConfig, and is {type(config).__name__}: {config!r:.60}; {how}"
            )
        self.config = config
        if self.model_type not in (None, config.model_type):
            raise ConfigError(
                f"{type(self).__name__} is a {self.model_type} model, and the configuration is of a "
                f"{config.model_type}: use the Auto class with this head, which takes both"
            )
        self.family: Family = family_of(config.model_type).of(config)
        if self.head_kind != "base" and self.head_kind not in self.family.heads:
            kinds = ", ".join(self.family.heads)
            raise ValueError(f"{config.model_type} models have no {self.head_kind} head; they have: {kinds}")
        self.spec: ModelConfig = self.family.config(config)
        self.body = Transformer(self.spec)
        self.name_or_path = ""
        self.load_report = None

    # Running
    @graphed
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **head_options: Any,
    ) -> Any:
        """Run a padded batch; arguments and results have transformers' names (see `pack`, and `answer` of the
        head). After an error, `past_key_values` is unchanged.

        `num_items_in_batch`: the loss is the sum over labels divided by this number instead of their mean,
        for gradient accumulation.
        """
        defaults = {
            "use_cache": self.config.use_cache and not self.is_gradient_checkpointing,
            "output_attentions": self.config.output_attentions,
            "output_hidden_states": self.config.output_hidden_states,
        }
        given = (use_cache, output_attentions, output_hidden_states)
        options = {k: d if g is None else g for (k, d), g in zip(defaults.items(), given, strict=True)}
        past = past_key_values
        with past.restored() if isinstance(past, KVCache) else nullcontext():
            batch = self.pack(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                past_key_values=past,
                **options,
            )
            fields = self.answer(self.body(batch), batch, labels, **head_options)
            if num_items_in_batch is not None and labels is not None:
                fields["loss"] = fields["loss"] * self._share(labels, batch.packed, num_items_in_batch)
        if batch.packed.kept is not None:
            batch.cache = LateCache(self.spec, self.dtype, batch.packed)
        if batch.cache is not None and "past_key_values" in self.output_class.__dataclass_fields__:  # type: ignore[attr-defined]
            fields["past_key_values"] = batch.cache
        if batch.hidden_states is not None:
            fields["hidden_states"] = tuple(map(batch.packed.pad, batch.hidden_states))
        if batch.attentions is not None:
            fields["attentions"] = tuple(batch.attentions)
        output = self.output_class(**fields)
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )

    def _share(self, labels: Tensor, packed: Packed, items: int | Tensor) -> Tensor | int:
        """This batch's share of all `items`; 1 for regression, whose mean is kept, as in transformers."""
        if labels.dim() == 1 and not labels.is_floating_point():
            return (labels != -100).sum() / items
        if labels.shape != (packed.batch, packed.columns) or self.head_kind == "sequence-classification":
            return 1
        return (packed.targets(labels, self.head_kind == "causal-lm") != -100).sum() / items

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """The head: hidden states [T, C] -> the fields of `output_class`."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def pack(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        stop: int | None = None,
    ) -> Batch:
        """Check a padded batch and pack it for the body; with a cache, reserve space in it.

        input_ids int64 [B, S] or inputs_embeds [B, S, C]; attention_mask [B, S], or [B, past + S] with a
        cache; the other ids [B, S] (position_ids also [1, S]). `stop`: the body returns the residual stream
        before this layer. Raises ValueError for wrong shapes or ids out of range.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        refuse_transforms()
        if input_ids is not None:
            given = input_ids = self._checked_ids(input_ids)
        else:
            self._check_vectors(given)
        rows, columns = given.shape[:2]
        graph = in_graph()
        cache = None if graph else self._cache(rows, past_key_values, use_cache)
        past, layouts = None, None
        if cache is not None:
            attention_mask, past = cache.new_columns(attention_mask, columns)
        packed: Any = None
        if graph:
            real = real_places(rows, columns, attention_mask, given.device)
            packed = Padded(rows, columns, real, given.device, keeps=use_cache and self.spec.causal)
            packed.look_ahead(self.spec.causal, map(self.spec.window, range(self.spec.num_layers)))
        else:
            packed = pack(rows, columns, attention_mask, given.device)
        if packed.padded_left and position_ids is None and self._counts_columns(input_ids):
            tell("left-padding")
        if cache is not None and cache.is_padded(packed.indices is not None, past):
            layouts = cache.lay_out(packed.flat_indices() % max(columns, 1), packed.lengths, columns, past)
        batch = Batch(
            tokens=packed.pack(given),
            positions=self._positions(packed, input_ids, position_ids, cache, layouts),
            packed=packed,
            types=None if token_type_ids is None else self._types(packed, token_type_ids),
            cache=cache,
            layouts=layouts,
            input_ids=input_ids,
            stop=stop,
            hidden_states=[] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
        )
        return self._placed(batch, [] if cache is None else cache.rows)

    def _placed(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """Add to the batch its slots in the cache and the rope angles of its positions."""
        if batch.cache is not None:
            batch.rows = list(rows)
            batch.step = batch.cache.extend(batch.rows, batch.packed.lengths)
            for row, layout in zip(batch.rows, batch.layouts or (), strict=False):
                batch.cache.set_layout(row, layout)
        batch.rope = self._angles(batch, self.spec.rope)
        batch.local_rope = self._angles(batch, self.spec.local_rope)
        return batch

    def run_packed(
        self,
        tokens: Tensor,
        packed: Packed,
        *,
        cache: KVCache | None = None,
        rows: Sequence[int] = (),
    ) -> Tensor:
        """Run the body on tokens that are already packed: int64 [T] -> hidden states [T, C].

        `packed.positions` are the tokens' positions. With a cache, sequence b continues the cache's row
        ``rows[b]``. The decoding loop calls this: it needs no padding, and ids are not checked.
        """
        offset = self.spec.position_offset
        batch = Batch(tokens, packed.positions + offset, packed, cache=cache)
        with nullcontext() if cache is None else cache.restored(rows):
            hidden: Tensor = self.body(self._placed(batch, rows))
        return hidden

    def _check_vectors(self, x: Tensor) -> None:
        size = self.spec.table_size
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != size or not x.is_floating_point():
            what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"inputs_embeds must be floats, [batch, tokens, {size}], and is {what}")

    def _checked_ids(self, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
            ids = integers("input_ids", ids)
            if ids.dim() != 2:
                raise ValueError(f"input_ids must be integers [batch, tokens], and is {list(ids.shape)}")
        self._check_ids("input_ids", ids, self.spec.vocab_size, "the vocabulary has")
        return ids

    @staticmethod
    def _check_ids(name: str, ids: Tensor, size: int, what: str) -> None:
        if not in_graph() and ids.numel():
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} holds {low if low < 0 else high}, and {what} {size} entries (0 to {size - 1})"
                )

    def _cache(self, batch: int, past: KVCache | None, use_cache: bool) -> KVCache | None:
        if past is None:
            return self.new_cache(batch) if use_cache and self.spec.causal else None
        if not self.spec.causal:
            raise ValueError(f"{self.config.model_type} is an encoder and takes no past_key_values")
        if not isinstance(past, KVCache):
            raise ValueError(
                f"past_key_values must be the KVCache of an earlier call, and is {type(past).__name__}"
            )
        if len(past.rows) != batch:
            raise ValueError(f"past_key_values holds {len(past.rows)} sequences, and the batch has {batch}")
        return past

    def new_cache(self, rows: int = 0, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty KV cache with `rows` sequences on the model's device, in its dtype or another (int8)."""
        if not self.spec.causal:
            raise ValueError(
                f"tokens of this {self.config.model_type} model see later ones: it cannot generate"
            )
        return KVCache(self.spec, rows=rows, dtype=dtype or self.dtype, device=self.device)

    def _positions(
        self,
        packed: Packed,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        layouts: list[Layout] | None,
    ) -> Tensor:
        """The position of each packed token, int64 [T]: a row of the position table, or rope's position."""
        spec = self.spec
        high = low = None  # largest and smallest position, if known without reading the tensor
        if position_ids is not None:
            position_ids = integers("position_ids", position_ids)
            if position_ids.dim() == 1 or position_ids.shape[:1] == (1,):  # one row for all
                position_ids = position_ids.view(1, -1).expand(packed.batch, -1)
            check_columns("position_ids", position_ids, packed.batch, packed.columns)
            positions = packed.pack(position_ids)
        elif spec.positions_skip_padding_id is not None and input_ids is not None:
            positions = packed.counted(input_ids != spec.positions_skip_padding_id) + spec.position_offset
        else:
            positions = packed.positions
            if packed.indices is None:
                high, low = packed.max_seqlen - 1 + spec.position_offset, 0
            if spec.position_offset:
                positions = positions + spec.position_offset
            if layouts is not None:
                high = low = None
                ends = [
                    layout.columns[len(layout.columns) - new :] - layout.origin
                    for layout, new in zip(layouts, packed.lengths, strict=True)
                ]
                positions = torch.cat(ends).to(positions.device) + spec.position_offset
            elif cache is not None and cache.get_seq_length():
                high = low = None
                past = torch.tensor([cache.lengths[row] for row in cache.rows], device=positions.device)
                positions = positions + past.repeat_interleave(
                    torch.tensor(packed.lengths, device=positions.device)
                )
        if spec.positions == "learned" and not in_graph() and positions.numel():
            rows = spec.max_positions + spec.position_offset
            if high is None or low is None:
                low, high = (int(value) for value in positions.aminmax())
            if high >= rows or low < 0:
                raise ValueError(
                    f"a sequence reaches position {high - spec.position_offset + 1}, and the model has only "
                    f"{spec.max_positions}: truncate the text"
                )
        return positions

    def _types(self, packed: Packed, token_type_ids: Tensor) -> Tensor | None:
        size = self.spec.vocab_size if self.spec.types_are_tokens else self.spec.type_vocab_size
        token_type_ids = integers("token_type_ids", token_type_ids)
        check_columns("token_type_ids", token_type_ids, packed.batch, packed.columns)
        if size == 0:  # some tokenizers return them for models without token types
            return None
        self._check_ids("token_type_ids", token_type_ids, size, "the model has")
        return packed.pack(token_type_ids)

    def _counts_columns(self, input_ids: Tensor | None) -> bool:
        """Whether transformers would use the columns of the batch as rows of a position table."""
        skips = self.spec.positions_skip_padding_id is not None and input_ids is not None
        return self.spec.positions == "learned" and not skips

    def _angles(self, batch: Batch, kind: RopeConfig | None) -> tuple[Tensor, Tensor] | None:
        if kind is None:
            return None
        context = batch.packed.context(batch.positions) if kind.type == "dynamic" else None
        return rope.angles(kind, self.spec.rotated, batch.positions, context)

    # Being a model
    def weights_changed(self) -> None:
        """Call this after writing to weights through an address (``data_ptr()``, DLPack) that was taken
        before the model last ran: such writes cannot be detected. All others are, see
        `minilm.ops.backends.watch`."""
        watch.forget([*self.parameters(), *self.buffers()])

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; in a quantised model, that of activations and unquantised weights."""
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> PreTrainedModel:
        """The same model without its head, sharing its parameters; the model itself if it has no head."""
        return self if isinstance(self, AutoModel) else AutoModel.sharing(self)

    def __getattr__(self, name: str) -> Any:
        family: Family | None = self.__dict__.get("family")
        asked = family is not None and name not in self._modules  # an unfused model has such a module
        if family is not None and asked and f"{name}." == family.prefix(self.head_kind):
            return self.base_model  # model.bert, model.transformer
        return super().__getattr__(name)

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head."""
        return self.config.num_labels

    def fused_sizes(self) -> dict[str, tuple[int, ...]]:
        """Number of rows of each part of a fused matrix, for the weight rules that split them."""
        s = self.spec
        return {
            "qkv": (s.q_size, s.kv_size, s.kv_size),
            "gate_up": (s.intermediate_size, s.intermediate_size),
        }


_OF_FAMILIES: dict[tuple[Any, str], type[PreTrainedModel]] = {}


def of_family(general: type[PreTrainedModel], model_type: str) -> type[PreTrainedModel]:
    """The class of one family's models with this head, under transformers' name, such as BertForMaskedLM."""
    if model_type in ENCODER_DECODERS:
        from ..seq2seq import class_of

        return class_of(general.head_kind, model_type)
    if (general, model_type) not in _OF_FAMILIES:
        about = {"__module__": "minilm", "__doc__": general.__doc__, "model_type": model_type}
        name, own = family_of(model_type).class_name(general.head_kind), general.variants.get(model_type)
        base = general if own is None else getattr(import_module("minilm.pretraining"), own)
        _OF_FAMILIES[general, model_type] = type(name, (base,), about)
    return _OF_FAMILIES[general, model_type]


class Pooler(nn.Module):
    """tanh(W x + b) of a sequence's first token (BERT)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = Linear(size, size)

    def forward(self, hidden: Tensor, packed: Packed) -> Tensor:
        """hidden [T, C] -> [B, C]."""
        if packed.padded_left:
            tell("first-token")
        pooled: Tensor = self.dense(hidden[packed.first()], "tanh")
        return pooled


class AutoModel(PreTrainedModel):
    """The body alone: last hidden states, and the pooler's output if the family has a pooler."""

    output_class: ClassVar[type[ModelOutput]] = BaseModelOutput

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        pools = self.family.pooler and self.family.base_pooler and add_pooling_layer
        self.pooler = Pooler(self.spec.hidden_size) if pools else None
        self.initialise()

    @classmethod
    def sharing(cls, other: PreTrainedModel) -> AutoModel:
        """The body and pooler of another model, without its head."""
        model = cls.__new__(cls, other.config)
        assert isinstance(model, AutoModel)
        nn.Module.__init__(model)
        model.__dict__.update({k: v for k, v in other.__dict__.items() if not k.startswith("_")})
        model.body = other.body
        model.pooler = getattr(other, "pooler", None)
        return model

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """last_hidden_state [B, S, C] and pooler_output [B, C]."""
        if labels is not None:
            raise TypeError("a model without a head takes no labels")
        pooled = None if self.pooler is None else self.whole_pooler(hidden, batch.packed)
        return {"last_hidden_state": batch.packed.pad(hidden), "pooler_output": pooled}
