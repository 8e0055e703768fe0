"""What every model made of the one Transformer can do: run on padded batches, grow its vocabulary, save and
load itself.

`PreTrainedModel` is a body with the public API around it: `forward` packs the [B, S] batch that it is called
with, runs the body, and pads the result. The heads are in `minilm.model.heads` and `causal`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from ..families import Family, Head, PretrainedConfig, family_of
from ..ops.backends import watch
from . import rope
from .batch import Batch, Packed, check_columns, pack
from .cache import KVCache
from .layers import Embedding, Linear
from .loading import Checkpointed, initialise
from .outputs import BaseModelOutput, ModelOutput
from .quantized import Quantized, QuantizedEmbedding
from .transformer import Transformer


class PreTrainedModel(ops.Whole, Checkpointed):
    """A body and the public API around it. Subclasses add a head and say how they are called.

    `config` is the checkpoint's configuration under its own names, `spec` what minilm made of it.
    """

    head_kind: ClassVar[Head] = "base"
    output_class: ClassVar[type[ModelOutput]] = ModelOutput

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.family: Family = family_of(config.model_type)
        if self.head_kind != "base" and self.head_kind not in self.family.heads:
            kinds = ", ".join(self.family.heads)
            raise ValueError(f"{config.model_type} models have no {self.head_kind} head; they have: {kinds}")
        self.spec: ModelConfig = self.family.config(config)
        self.body = Transformer(self.spec)
        self.name_or_path = ""
        self.load_report = None

    # Running
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
        **head_options: Any,
    ) -> Any:
        """Run a padded batch; arguments and results have transformers' names (see `pack`, and `answer` of the
        head). After an error, `past_key_values` is as it was."""
        options = {
            "use_cache": self.config.use_cache if use_cache is None else use_cache,
            "output_attentions": (
                self.config.output_attentions if output_attentions is None else output_attentions
            ),
            "output_hidden_states": (
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }
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

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """What the head makes of the hidden states [T, C]: the fields of `output_class`."""
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
        """Check a padded batch and pack it, ready for the body; with a cache, take room there.

        input_ids int64 [B, S] or inputs_embeds [B, S, C]; attention_mask [B, S], or [B, past + S] with a
        cache; the other ids [B, S] (position_ids also [1, S]). `stop`: the body is to give the residual
        stream before this layer. Raises ValueError for shapes or ids that do not fit.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if not torch.compiler.is_compiling():
            _refuse_vmap()
        self._check_inputs(input_ids, inputs_embeds)
        rows, columns = given.shape[:2]
        cache = self._cache(rows, past_key_values, use_cache)
        if past_key_values is not None and attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, max(attention_mask.shape[1] - columns, 0) :]
        packed = pack(rows, columns, attention_mask, given.device)
        batch = Batch(
            tokens=packed.pack(given),
            positions=self._positions(packed, input_ids, position_ids, cache),
            packed=packed,
            types=None if token_type_ids is None else self._types(packed, token_type_ids),
            cache=cache,
            input_ids=input_ids,
            stop=stop,
            hidden_states=[] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
        )
        return self._placed(batch, [] if cache is None else cache.rows)

    def _placed(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """The batch with its places in the cache and the angles of its positions."""
        if batch.cache is not None:
            batch.rows = list(rows)
            batch.step = batch.cache.extend(batch.rows, batch.packed.lengths)
        batch.rope = self._rope(batch)
        return batch

    def run_packed(
        self,
        tokens: Tensor,
        packed: Packed,
        *,
        cache: KVCache | None = None,
        rows: Sequence[int] = (),
    ) -> Tensor:
        """The body on tokens that are packed already: int64 [T] -> hidden states [T, C].

        `packed.positions` are the tokens' true positions. With a cache, sequence b continues its row
        ``rows[b]``. This is the entry of the decoding loop: no padding is made, and ids are not checked.
        """
        offset = self.spec.position_offset
        batch = Batch(tokens, packed.positions + offset, packed, cache=cache)
        with nullcontext() if cache is None else cache.restored(rows):
            hidden: Tensor = self.body(self._placed(batch, rows))
        return hidden

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if input_ids is None:
            assert inputs_embeds is not None
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.spec.hidden_size:
                raise ValueError(
                    f"inputs_embeds must be [batch, tokens, {self.spec.hidden_size}], and is "
                    f"{list(inputs_embeds.shape)}"
                )
            return
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(
                f"input_ids must be integers [batch, tokens], and is {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        self._check_ids("input_ids", input_ids, self.spec.vocab_size, "the vocabulary has")

    @staticmethod
    def _check_ids(name: str, ids: Tensor, size: int, what: str) -> None:
        if ids.numel() and not torch.compiler.is_compiling():
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
        return KVCache(self.spec, rows=rows, dtype=dtype or self.dtype, device=self.device)

    def _positions(
        self, packed: Packed, input_ids: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """The position of each packed token, int64 [T]: a row of the position table, or an angle of rope."""
        spec = self.spec
        high = low = None  # of the positions, where they are known without a look at them
        if position_ids is not None:
            if position_ids.dim() == 1 or position_ids.shape[:1] == (1,):  # one row for all
                position_ids = position_ids.view(1, -1).expand(packed.batch, -1)
            check_columns("position_ids", position_ids, packed.batch, packed.columns)
            positions = packed.pack(position_ids)
        elif spec.positions_skip_padding_id is not None and input_ids is not None:
            real = (input_ids != spec.positions_skip_padding_id).long()
            seen, counts = packed.pack(real), packed.pack(real.cumsum(1))
            if packed.tokens:  # what stands under the padding before a row is not counted
                before = (counts - seen)[packed.cu_seqlens[:-1].long().clamp(max=packed.tokens - 1)]
                counts = counts - before.repeat_interleave(packed.cu_seqlens.diff())
            positions = counts * seen - 1 + spec.position_offset
        else:
            positions = packed.positions
            if packed.indices is None:
                high, low = packed.max_seqlen - 1 + spec.position_offset, 0
            if spec.position_offset:
                positions = positions + spec.position_offset
            if cache is not None and cache.get_seq_length():
                high = low = None
                past = torch.tensor([cache.lengths[row] for row in cache.rows], device=positions.device)
                positions = positions + past.repeat_interleave(
                    torch.tensor(packed.lengths, device=positions.device)
                )
        if spec.positions == "learned" and positions.numel() and not torch.compiler.is_compiling():
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
        check_columns("token_type_ids", token_type_ids, packed.batch, packed.columns)
        if size == 0:  # a tokenizer may make them for a model that has none
            return None
        self._check_ids("token_type_ids", token_type_ids, size, "the model has")
        return packed.pack(token_type_ids)

    def _rope(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        spec, positions = self.spec, batch.positions
        if spec.rope is None:
            return None
        context = None
        if spec.rope.type == "dynamic":
            rows = torch.split(positions, batch.packed.lengths)
            context = torch.cat([row.max().expand(len(row)) + 1 for row in rows if len(row)] or [positions])
        return rope.angles(spec.rope, spec.head_dim, positions, context)

    # Being a model
    def weights_changed(self) -> None:
        """Says that weights were written to in a way that cannot be seen: through an address (``data_ptr()``,
        DLPack) that was taken before the model last ran. All other writes are seen, see
        `minilm.ops.backends.watch`."""
        watch.forget([*self.parameters(), *self.buffers()])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.body.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; of a quantised model, that of activations and of what stays floating."""
        return next(self.body.parameters()).dtype

    @property
    def base_model(self) -> PreTrainedModel:
        """The same model without its head, sharing its parameters; the model itself if it has none."""
        return self if isinstance(self, AutoModel) else AutoModel.sharing(self)

    def __getattr__(self, name: str) -> Any:
        family: Family | None = self.__dict__.get("family")
        if family is not None and f"{name}." == family.prefix(
            self.head_kind
        ):  # model.bert, model.transformer
            return self.base_model
        return super().__getattr__(name)

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head."""
        return self.config.num_labels

    def get_input_embeddings(self) -> Embedding | QuantizedEmbedding:
        """The token table."""
        return self.body.embeddings.tokens

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, the elements of quantised matrices among them."""
        counts = {
            name: p.numel() for name, p in self.named_parameters() if p.requires_grad or not only_trainable
        }
        if not only_trainable:
            modules = ((n, m) for n, m in self.named_modules() if isinstance(m, Quantized))
            counts |= {name: math.prod(module.quantized.shape) for name, module in modules}
        return sum(
            count
            for name, count in counts.items()
            if not (exclude_embeddings and name.startswith("body.embeddings."))
        )

    def get_memory_footprint(self) -> int:
        """Bytes that the parameters and the quantised matrices occupy."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def fused_sizes(self) -> dict[str, tuple[int, ...]]:
        """Rows of the parts of fused matrices, for the weight rules that split them."""
        s = self.spec
        return {
            "qkv": (s.q_size, s.kv_size, s.kv_size),
            "gate_up": (s.intermediate_size, s.intermediate_size),
        }

    def resize_token_embeddings(self, new_num_tokens: int) -> Embedding:
        """Grow or shrink the vocabulary; new rows are random. Output matrices and biases follow."""
        if new_num_tokens < 1:
            raise ValueError(
                f"the vocabulary must have at least 1 token, and {new_num_tokens} were asked for"
            )
        table = self.body.embeddings.tokens
        if isinstance(table, Quantized):
            raise ValueError(f"a token table in {table.format} cannot be resized: load it without weights=")
        std = float(self.config.get("initializer_range", 0.02))
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name in ("body.embeddings.tokens.weight", "head.decoder.weight", "head.bias"):
                if name not in parameters:
                    continue
                old = parameters[name]
                new = old.new_empty(new_num_tokens, *old.shape[1:])
                initialise(name, new, std)
                kept = min(len(old), new_num_tokens)
                new[:kept] = old[:kept]
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, nn.Parameter(new, old.requires_grad))
        table.num_embeddings = new_num_tokens
        self.config.vocab_size = new_num_tokens
        self.spec = replace(self.spec, vocab_size=new_num_tokens)
        return table


def _refuse_vmap() -> None:
    """RuntimeError within `torch.vmap`: a batch's lengths are read to pack it, and vmap does not let them."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(
            "torch.vmap cannot run a model of minilm, which reads the ids that it is given: pass the whole "
            "batch, [batch, tokens], to the model itself, or several models one after the other"
        )


class Pooler(nn.Module):
    """tanh(W x + b) of a sequence's first token (BERT)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = Linear(size, size)

    def forward(self, hidden: Tensor, packed: Packed) -> Tensor:
        """hidden [T, C] -> [B, C]."""
        pooled: Tensor = self.dense(hidden[packed.first()], "tanh")
        return pooled


class AutoModel(PreTrainedModel):
    """The body alone: last hidden states, and the pooler's output where the family has a pooler."""

    output_class: ClassVar[type[ModelOutput]] = BaseModelOutput

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.pooler = Pooler(self.spec.hidden_size) if self.family.pooler and add_pooling_layer else None
        self.initialise()

    @classmethod
    def sharing(cls, other: PreTrainedModel) -> AutoModel:
        """The body and pooler of another model, without its head."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.__dict__.update({k: v for k, v in other.__dict__.items() if not k.startswith("_")})
        model.body = other.body
        model.pooler = getattr(other, "pooler", None)
        return model

    def answer(self, hidden: Tensor, batch: Batch, labels: Tensor | None) -> dict[str, Any]:
        """last_hidden_state [B, S, C] and pooler_output [B, C]."""
        if labels is not None:
            raise TypeError("a model without a head takes no labels")
        pooled = None if self.pooler is None else self.pooler(hidden, batch.packed)
        return {"last_hidden_state": batch.packed.pad(hidden), "pooler_output": pooled}
