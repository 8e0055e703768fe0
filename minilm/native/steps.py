"""Steps of decoding: the newest token of each sequence in, a score for each possible next one out.

`AutoModelForCausalLM.run_steps` says what a step is: the tokens' embeddings, all blocks with the cache, the
head. A small model does it in a few milliseconds, of which the calls between Python and the kernels are a
good part. So whole steps are one call of the native extension here (csrc/cpu/transformer.cpp); where the
likeliest token is what is written and nobody waits for each, several. It is one more implementation behind
the dispatch table, of the op `decode_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RopeConfig
from ..model import (
    AutoModelForCausalLM,
    CausalLMHead,
    Embedding,
    Embeddings,
    KVCache,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    angles,
)
from ..ops.backends import packed
from . import blocks

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run_steps(
    model: AutoModelForCausalLM,
    tokens: Tensor,
    rows: Sequence[int],
    cache: KVCache,
    steps: int,
    ends: frozenset[int],
) -> tuple[Tensor, Tensor]:
    """As `AutoModelForCausalLM.steps`, in one call."""
    frame: _Ends = model.__dict__["_step_ends"]  # as `obstacle` found it a moment ago
    assert frame.head is not None
    arena, layout = blocks.arena(model.body)
    spec = model.spec
    room = cache.extend(rows, [steps] * len(rows))
    cos = sin = None
    if spec.rope is not None:
        cos, sin = _angles(spec.rope, spec.head_dim, max(512, 1 << (room.max_context - 1).bit_length()))
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
        packed.FORMATS[model.dtype],
        _numbers(ends),
        *cache.stores(),
        room.slots,
        room.block_table,
        room.context_lens,
        *cache.scale_stores(),
    )
    if steps > 1 and len(rows):
        made = int((best[:, 0] >= 0).sum())
        for row in rows if made < steps else ():
            cache.crop_row(row, cache.lengths[row] - (steps - made))
        best = best[:made]
    return logits.to(model.dtype), best


@lru_cache(maxsize=64)
def _numbers(numbers: frozenset[int]) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor(sorted(numbers), dtype=torch.int64)


@lru_cache(maxsize=8)
def _angles(config: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the first positions, float32 [positions, D/2]."""
    with torch.inference_mode(False), torch.device("cpu"):
        return angles(config, head_dim, torch.arange(positions))


@dataclass
class _Ends:
    """What a step needs beside the blocks, and the tensors that it was made from."""

    refusal: str | None
    """Why this model cannot step natively."""
    modules: tuple[nn.Module | None, ...] = ()
    sources: tuple[Tensor | None, ...] = ()
    stamp: tuple[tuple[int, int], ...] = ()
    """What changes when a source is written to, or given other memory."""
    table: tuple[Tensor, Tensor | None, Tensor | None] = (torch.empty(0), None, None)
    """Vectors of the tokens, [V, C]: floats, or codes with their scale and minimum."""
    positions: Tensor | None = None
    """Vectors of the positions, where they are learned."""
    head: packed.Packed | None = None


def obstacle(
    model: AutoModelForCausalLM, tokens: Tensor, rows: Sequence[int], cache: KVCache, *_: object
) -> str | None:
    """What in this step only the modules can do."""
    if torch.is_grad_enabled():
        return "gradients may be wanted (torch.inference_mode() or torch.no_grad() says that they are not)"
    reason = blocks.standing_obstacle(model.body, cache.dtype)
    if reason is not None:
        return reason
    if model.training and model.spec.embedding_dropout:
        return "dropout is on (model.eval() turns it off)"
    ends: _Ends | None = model.__dict__.get("_step_ends")
    if ends is None or ends.refusal is not None or not _is_current(model, ends):
        ends = model.__dict__["_step_ends"] = _look(model)
    if ends.refusal is None and any(
        m._forward_hooks or m._forward_pre_hooks for m in (model, *ends.modules) if m is not None
    ):
        return "a module has forward hooks"
    return ends.refusal


def _is_current(model: AutoModelForCausalLM, ends: _Ends) -> bool:
    modules = _modules(model)
    if any(a is not b for a, b in zip(modules, ends.modules, strict=True)):
        return False
    sources = _sources(modules)
    return (
        len(sources) == len(ends.sources)
        and all(a is b for a, b in zip(sources, ends.sources, strict=True))
        and _stamp(sources) == ends.stamp
    )


def _stamp(sources: tuple[Tensor | None, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((packed.version(t), t.data_ptr()) for t in sources if t is not None)


def _modules(model: AutoModelForCausalLM) -> tuple[nn.Module | None, ...]:
    """Embeddings and head, and the modules in them."""
    embeddings, head = model.body.embeddings, model.head
    inner = embeddings._modules
    return embeddings, head, inner.get("tokens"), inner.get("positions"), head._modules.get("decoder")


def _sources(modules: tuple[nn.Module | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors of these modules."""
    held: list[Tensor | None] = []
    for module in modules:
        if module is not None:
            held += (*module._parameters.values(), *module._buffers.values())
    return tuple(held)


def _look(model: AutoModelForCausalLM) -> _Ends:
    embeddings, head = model.body.embeddings, model.head
    if type(embeddings) is not Embeddings or type(head) is not CausalLMHead:
        return _Ends("the embeddings or the head were replaced")
    tokens, positions, decoder = embeddings.tokens, embeddings.positions, head.decoder
    expected: tuple[tuple[Any, tuple[type, ...]], ...] = (
        (tokens, (Embedding, QuantizedEmbedding)),
        (positions, (Embedding, type(None))),
        (decoder, (Linear, QuantizedLinear, type(None))),
    )
    for module, kinds in expected:
        if type(module) not in kinds:
            return _Ends(f"an embedding or the head was replaced by a {type(module).__name__}")
    if embeddings.types is not None or embeddings.norm is not None:
        return _Ends("the embeddings are more than a token's and a position's vector")
    if model.spec.rope is not None and model.spec.rope.type == "dynamic":
        return _Ends("dynamic rope changes with the length of the sequence")
    weight: Any = tokens if decoder is None else decoder
    matrix = weight.quantized if isinstance(weight, QuantizedEmbedding | QuantizedLinear) else weight.weight
    for held in (matrix, getattr(tokens, "weight", None), getattr(positions, "weight", None)):
        if isinstance(held, Tensor) and held.dtype not in _FLOATS:
            return _Ends(f"the extension has no kernel for weights in {held.dtype}")
    modules = _modules(model)
    sources = _sources(modules)
    table: tuple[Tensor, Tensor | None, Tensor | None]
    if isinstance(tokens, QuantizedEmbedding):
        table = tokens.codes, tokens.scale, tokens.minimum
    else:
        table = tokens.weight.detach(), None, None
    return _Ends(
        None,
        modules,
        sources,
        _stamp(sources),
        tuple(None if t is None else t.contiguous() for t in table),  # type: ignore[arg-type]
        None if positions is None else positions.weight.detach().contiguous(),
        packed.kept(matrix, getattr(decoder, "bias", None)),
    )
