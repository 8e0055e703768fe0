"""Decoding steps: take the newest token of each sequence, return logits for the next one.

`AutoModelForCausalLM.run_steps` defines a step: embeddings, all blocks with the cache, the head. It takes a
small model a few milliseconds, of which Python calls are a large part. So a whole step is one call of the
native extension (csrc/cpu/transformer.cpp); with greedy decoding and no streaming, several steps are. This is
an implementation of the op `decode_step` in the dispatch table.

Checking whether modules or weights have changed (`ops.backends.watch`) takes a tenth of a small model's step.
The engine checks with the prompt and then at every eighth step (`KVCache.steps_a_look`), which is also the
number of steps in one call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..model import (
    AutoModelForCausalLM,
    CausalLMHead,
    Embedding,
    Embeddings,
    Linear,
    angle_table,
)
from ..ops.backends import native, packed, watch
from ..quantized import QuantizedEmbedding, QuantizedLinear
from . import blocks, released
from .arena import Arena
from .embed import factor
from .state import Structure, hooked, made_of, own_code

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run_steps(
    model: AutoModelForCausalLM,
    tokens: Tensor,
    rows: Sequence[int],
    cache: KVCache,
    steps: int,
    ends: frozenset[int],
    *,
    found: tuple[Arena, _Ends] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `AutoModelForCausalLM.steps`; in one call. `found`: the result of `look`."""
    if found is None:
        looked = look(model)
        if isinstance(looked, str):
            raise RuntimeError(f"a step cannot run natively: {looked}")
        found = looked
    (arena, layout), frame = found
    assert frame.head is not None
    spec, dtype, bias = model.spec, model.dtype, model.head.bias
    with cache.restored(rows):
        room = cache.extend(rows, [steps] * len(rows))
        positions = max(512, 1 << (room.max_context - 1).bit_length())
        angles = [
            (None, None) if rope is None else angle_table(rope, spec.rotated, positions)
            for rope in (spec.rope, spec.local_rope)
        ]
        (cos, sin), (local_cos, local_sin) = angles
        logits, best = torch.ops.minilm.decode_steps.default(
            tokens.contiguous(),
            *frame.table,
            frame.positions,
            spec.position_offset,
            cos,
            sin,
            arena,
            layout,
            frame.head.data,
            frame.head.format,
            frame.head.columns,
            packed.FORMATS[dtype],
            _numbers(ends),
            *cache.stores(),
            room.slots,
            room.block_table,
            room.context_lens,
            *cache.scale_stores(),
            local_cos=local_cos,
            local_sin=local_sin,
            factor=factor(model.body.embeddings),
            head_bias=None if bias is None else bias.detach().float().contiguous(),
            head_soft_cap=model.head.soft_cap or 0.0,
            packed_format=frame.packed_table[0],
            packed_rows=frame.packed_table[1],
        )
    if steps > 1 and len(rows):
        made = int((best[:, 0] >= 0).sum())
        for row in rows if made < steps else ():
            cache.crop_row(row, cache.lengths[row] - (steps - made))
        best = best[:made]
    return logits.to(dtype), best


@lru_cache(maxsize=64)
def _numbers(numbers: frozenset[int]) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor(sorted(numbers), dtype=torch.int64)


@dataclass
class _Ends:
    """The packed embeddings and head for a step, and the state that they were created from."""

    refusal: str | None
    """Why this model cannot run steps natively."""
    structure: Structure
    kinds: list[object]
    sources: list[Tensor] = field(default_factory=list)
    watch: watch.Watch | None = None
    table: tuple[Tensor, Tensor | None, Tensor | None] = (torch.empty(0), None, None)
    """The token table, [V, C]: floats, or codes with their scale and minimum; or as it is packed."""
    packed_table: tuple[int, int] = (-1, 0)
    """The format and the rows of a table that is packed."""
    positions: Tensor | None = None
    """The position table, if positions are learned."""
    head: packed.Packed | None = None
    cache: weakref.ref[KVCache] | None = None
    """The cache of the last step."""
    unlooked: int = 0
    """Number of steps with it since the model was checked."""

    def may_trust(self, cache: KVCache) -> bool:
        """Whether a step with this cache may skip the check for changes since the step before."""
        self.unlooked += 1
        trusted = self.cache is not None and self.cache() is cache and self.unlooked < cache.steps_a_look
        if not trusted:
            self.cache, self.unlooked = weakref.ref(cache), 0
        return trusted

    def stands(self, trusting: bool) -> bool:
        """Whether this is up to date."""
        if trusting and self.watch is not None:
            return not self.watch.told
        if not self.structure.stands():
            return False
        return self.structure.kinds() == self.kinds if self.watch is None else self.watch.holds(self.sources)


def obstacle(
    model: AutoModelForCausalLM, tokens: Tensor, rows: Sequence[int], cache: KVCache, *_: object
) -> str | Callable[..., tuple[Tensor, Tensor]]:
    """Why this step needs the modules; if nothing, the function to call."""
    if native.unavailable is not None:
        return native.unavailable
    if torch.is_grad_enabled():
        return "gradients are enabled (torch.inference_mode() or torch.no_grad() disables them)"
    if cache.dtype not in blocks.CACHES:
        return f"the extension has no kernel for a cache in {cache.dtype}"
    if model.device.type != "cpu":
        return "the weights are not on the CPU"
    found = look(model, cache)
    return found if isinstance(found, str) else partial(run_steps, found=found)


def look(model: AutoModelForCausalLM, cache: KVCache | None = None) -> str | tuple[Arena, _Ends]:
    """The packed parts for a step in the current state of the model, or the reason why it needs the
    modules."""
    made = made_of(model)
    with made.lock:
        ends: _Ends | None = made.ends
        trusting = ends is not None and cache is not None and ends.may_trust(cache)
        arena = blocks.look(model.body, trusting)
        if isinstance(arena, str):
            return arena
        if ends is None or not ends.stands(trusting):
            ends = made.ends = None  # it may hold planes
            ends = made.ends = _look(model)
    return (arena, ends) if ends.refusal is None else ends.refusal


def _parts(model: AutoModelForCausalLM) -> list[nn.Module]:
    """The model, its body, embeddings and head, and the submodules of the last two."""
    return [model, model.body, *model.body.embeddings.modules(), *model.head.modules()]


_OF_MODEL = {"run_steps", "run_packed", "logits"}
"""Methods that a native step replaces; of the body only `forward`."""


def _look(model: AutoModelForCausalLM) -> _Ends:
    if _refusal(model) is None:
        _release(model)
    structure = Structure(_parts(model))
    refusal = _refusal(model)
    if refusal is not None:
        return _Ends(refusal, structure, structure.kinds())
    embeddings, head = model.body.embeddings, model.head
    tokens, positions, decoder = embeddings.tokens, embeddings.positions, head.decoder
    sources = [tensor for part in (*embeddings.modules(), *head.modules()) for tensor in _tensors(part)]
    seen = watch.Watch(sources)
    form = released.form_of(_owner(model))
    table: tuple[Tensor, Tensor | None, Tensor | None]
    sizes = -1, 0
    if form is not None and decoder is None:
        table, sizes = (form.packed.data, None, None), (form.packed.format, form.rows)
    elif isinstance(tokens, QuantizedEmbedding):
        table = tokens.codes, tokens.scale, tokens.minimum
    else:
        table = tokens.weight.detach(), None, None
    return _Ends(
        None,
        structure,
        structure.kinds(),
        sources,
        seen,
        tuple(None if t is None else t.contiguous() for t in table),  # type: ignore[arg-type]
        sizes,
        None if positions is None else positions.weight.detach().contiguous(),
        packed.kept(_matrix(_owner(model)), getattr(decoder, "bias", None)) if form is None else form.packed,
    )


def _owner(model: AutoModelForCausalLM) -> nn.Module:
    """The layer with the output matrix."""
    decoder = model.head.decoder
    return model.body.embeddings.tokens if decoder is None else decoder


def _release(model: AutoModelForCausalLM) -> None:
    """Hold a quantised output matrix once, as it is packed."""
    owner = _owner(model)
    if released.may_release(owner) and getattr(owner, "bias", None) is None:
        form = packed.kept(_matrix(owner), None)
        if packed.kept(_matrix(owner), None) is form:  # nobody wrote to it meanwhile
            blocks.release_beside(model.body, owner, form)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without the planes of a released layer (which `_buffers` would unpack)."""
    held = module.__dict__
    return [t for t in (*held["_parameters"].values(), *held["_buffers"].values()) if t is not None]


def _matrix(owner: Any) -> Any:
    """The matrix of an embedding or a linear layer."""
    return owner.quantized if isinstance(owner, QuantizedEmbedding | QuantizedLinear) else owner.weight


def _refusal(model: AutoModelForCausalLM) -> str | None:
    embeddings, head = model.body.embeddings, model.head
    if type(embeddings) is not Embeddings or type(head) is not CausalLMHead:
        return "the embeddings or the head were replaced"
    tokens, positions, decoder = embeddings.tokens, embeddings.positions, head.decoder
    expected: tuple[tuple[Any, tuple[type, ...]], ...] = (
        (tokens, (Embedding, QuantizedEmbedding)),
        (positions, (Embedding, type(None))),
        (decoder, (Linear, QuantizedLinear, type(None))),
    )
    for module, kinds in expected:
        if released.type_of(module) not in kinds:
            return f"an embedding or the head was replaced by a {type(module).__name__}"
    reason = own_code((model,), _OF_MODEL) or own_code(_parts(model)[1:])
    if reason is not None:
        return reason
    if hooked(_parts(model)):
        return "a module has forward hooks"
    if embeddings.training and embeddings.config.embedding_dropout:
        return "dropout is on (model.eval() turns it off)"
    if embeddings.types is not None or embeddings.norm is not None:
        return "the embeddings have more than token and position tables"
    ropes = (rope for rope in (model.spec.rope, model.spec.local_rope) if rope is not None)
    if any(rope.type == "dynamic" for rope in ropes):
        return "dynamic rope changes with the length of the sequence"
    for owner in (tokens, positions, decoder):
        if getattr(owner, "max_norm", None) is not None:
            return "a table has a max_norm, to which lookups rescale its rows"
        if isinstance(owner, Embedding | Linear):
            weight = owner._parameters.get("weight")
            if not isinstance(weight, nn.Parameter):
                return "a weight is not a parameter"
            if weight.dtype not in _FLOATS:
                return f"the extension has no kernel for weights in {weight.dtype}"
    return None
