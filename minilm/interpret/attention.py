"""Attention probabilities of selected heads and tokens, computed with the fast path.

`output_attentions=True` computes all maps of every layer, B H S^2 numbers each. Here the model runs as usual
(fused blocks, Triton, any backend) up to the selected layer; then q and k of that layer and only the selected
rows are computed, so memory grows with their number, not with S^2. If the attention kernel returns its
log-sum-exp (Triton), the rows are exp(score - lse), the probabilities that the kernel itself used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..model import Attention, Block, Packed

if TYPE_CHECKING:
    from ..model import PreTrainedModel

Places: TypeAlias = int | Sequence[int] | slice


@torch.no_grad()
def attention_probs(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    layer: int,
    head: Places = slice(None),
    rows: Places = slice(None),
) -> list[Tensor]:
    """The attention probabilities of a layer, one tensor [heads, rows, S] per sequence of the batch, in the
    model's dtype; S is the number of the sequence's own tokens, without padding.

    Takes the same batch as the model (without a cache). `head` and `rows` (the query tokens, by position in
    their sequence) are numbers, lists of numbers or slices; a single number drops its axis, and negative
    numbers count from the end. Raises IndexError for an index out of range. Not differentiable.

    >>> batch = tokenizer(["The cat sat on the mat"], return_tensors="pt")        # doctest: +SKIP
    >>> (seen,) = minilm.attention_probs(model, **batch, layer=2, head=5, rows=-1)  # by the last token, [S]
    >>> (maps,) = minilm.attention_probs(model, **batch, layer=-1)                # a whole layer, [H, S, S]
    """
    layers = model.body.layers
    stop = _place("layer", layer, len(layers), "the model", "layers")
    block = layers[stop]
    assert isinstance(block, Block)
    heads = _places("head", head, model.spec.num_heads, "each layer", "heads")
    batch = model.pack(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, stop=stop)
    hidden, packed = model.body(batch), batch.packed
    queries = [
        _places("rows", rows, length, f"sequence {row}", "tokens")
        for row, length in enumerate(packed.lengths)
    ]
    x = block.attention_norm.norm(hidden) if block.pre_norm and block.attention_norm is not None else hidden
    q, k, v = block.attention.heads(x)
    q, k = block.attention.turned(q, k, batch)
    biased = None if batch.biased is None else batch.biased.of_layer(block.attention)
    maps = _maps(block.attention, q, k, v, packed, heads, queries, biased)
    found = [p[:, 0] if isinstance(rows, int) else p for p in maps]
    return [p[0] if isinstance(head, int) else p for p in found]


def _maps(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, packed: Packed, heads: list[int],
    queries: list[list[int]], biased: Any,
) -> list[Tensor]:  # fmt: skip
    """The chosen rows of each sequence's maps, [heads, rows, S]."""
    kind = attention.kind()
    seen: dict[str, Any] = {"causal": attention.config.causal, "window": attention.window}
    lengths = (packed.cu_seqlens, packed.cu_seqlens, packed.max_seqlen, packed.max_seqlen)
    lse = None
    if biased is None and ops.writes_lse(q, k, v, **seen):
        lse = ops.attention_with_lse(q, k, v, *lengths, **kind)[1]
    maps, start = [], 0
    for number, (length, rows) in enumerate(zip(packed.lengths, queries, strict=True)):
        part = slice(start, start + length)
        ends = torch.tensor([0, length], dtype=torch.int32, device=q.device)
        own = None if lse is None else lse[:, part]
        chosen: dict[str, Any] = {"heads": heads, "queries": rows, "lse": own}
        if biased is not None:
            chosen["bias"] = biased.bias_of(number, q, k, attention.scale)
        maps += ops.attention_probs(q[part], k[part], ends, ends, **kind, **chosen)
        start += length
    return maps


def _place(what: str, place: int, count: int, whose: str, things: str) -> int:
    if not -count <= place < count:
        raise IndexError(
            f"attention_probs: {what} {place} is out of range: {whose} has {count} {things}, counted from 0 "
            "or, from the end, from -1"
        )
    return place % count


def _places(what: str, places: Places, count: int, whose: str, things: str) -> list[int]:
    if isinstance(places, slice):
        return list(range(count))[places]
    numbers = [places] if isinstance(places, int) else places
    return [_place(what, int(place), count, whose, things) for place in numbers]
