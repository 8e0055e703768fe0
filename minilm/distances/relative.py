"""Attention with a learned bias by the distance of query and key: MPNet, T5 and its successors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..graphs import Padded, in_graph


def bucket_of(distance: Tensor, buckets: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """key position - query position, int64 -> the bucket, int64 (arXiv:1910.10683, section 2.1).

    With `both_ways` (encoders), half of the buckets are for later keys. Of the buckets of a direction, half
    hold one distance each, the others grow up to `max_distance`, and the last holds everything beyond.
    """
    count, first = buckets, torch.zeros_like(distance)
    if both_ways:
        count //= 2
        first, distance = (distance > 0).long() * count, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    grown = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (count - exact)
    far = (exact + grown.clamp(min=-exact).long()).clamp(max=count - 1)
    return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Embedding):
    """A number per head for each bucket of distances: `weight` [buckets, H]."""

    def __init__(self, buckets: int, heads: int, *, both_ways: bool, max_distance: int = 128) -> None:
        super().__init__(buckets, heads)
        self.both_ways, self.max_distance = both_ways, max_distance

    def reset_parameters(self) -> None:
        """Does nothing: a checkpoint, or the model's random initialisation, fills the table."""

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions int64 [q], [k] -> [H, q, k]."""
        distance, table = keys[None, :] - queries[:, None], self.weight
        buckets = bucket_of(distance, len(table), self.max_distance, both_ways=self.both_ways)
        return F.embedding(buckets, table).permute(2, 0, 1).contiguous()

    def biased(self, queries: Any, keys: Any = None) -> Biased:
        """Attention of the tokens of `queries` to those of `keys`; None: to each other."""
        keys = queries if keys is None else keys
        return Biased(self(queries, keys), queries, keys)

    def forward(self, queries: Any, keys: Any) -> Tensor | list[Tensor]:  # type: ignore[override]
        """One bias [H, q, k] for all sequences of a batch, or one for each if their positions differ.

        `queries` and `keys` are the layouts (`Packed` of `minilm.model`) of the two; the queries of a
        sequence stand at its last keys. In a graph (`Padded`) distances are those of the columns.
        """
        if isinstance(keys, Padded):
            places = torch.arange(keys.columns, device=self.weight.device)
            return self.between(places, places)
        starts = {k - q for q, k in zip(queries.lengths, keys.lengths, strict=True)}
        if len(starts) == 1 and not in_graph() and not _holes(keys):
            places = torch.arange(keys.max_seqlen, device=self.weight.device)
            return self.between(places[starts.pop() :], places)
        rows = zip(
            torch.split(queries.positions, queries.lengths),
            torch.split(keys.positions, keys.lengths),
            strict=True,
        )
        return [self.between(q, k) for q, k in rows]


def _holes(packed: Any) -> bool:
    """Whether a row has padding between its tokens, or none at all."""
    if packed.indices is None:
        return False
    if 0 in packed.lengths:
        return True
    return bool((packed.positions[packed.last()] + 1 != packed.cu_seqlens.diff()).any())


class Biased:
    """Attention of the tokens of `queries` to those of `keys`, with a bias: [H, q, k] for all sequences, a
    list of one for each, or None.

    Where a model has one as `Batch.biased`, it takes the place of `Packed.attend` in every layer. The
    attention of DeBERTa has the same methods (`disentangled`).
    """

    def __init__(self, bias: Tensor | list[Tensor] | None, queries: Any, keys: Any) -> None:
        self.bias, self.queries, self.keys = bias, queries, keys

    def of_layer(self, attention: Any) -> Biased:
        """The attention of one layer: all have the same bias."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **kind: Any) -> Tensor:
        """q [Tq, H, D], k, v [Tk, H, D] -> [Tq, H, D]; `kind`: options of `minilm.ops.attention`."""
        bias, queries, keys = self.bias, self.queries, self.keys
        if isinstance(queries, Padded):
            return queries.attend(q, k, v, bias=bias, **kind)  # type: ignore[arg-type]
        if not isinstance(bias, list):
            longest = queries.max_seqlen, keys.max_seqlen
            return ops.attention(q, k, v, queries.cu_seqlens, keys.cu_seqlens, *longest, bias=bias, **kind)
        parts = (torch.split(x, p.lengths) for x, p in ((q, queries), (k, keys), (v, keys)))
        found = [q[:0]]
        for one, (a, b, c) in zip(bias, zip(*parts, strict=True), strict=True):
            if len(a):
                found.append(ops.attention(a, b, c, _ends(a), _ends(b), len(a), len(b), bias=one, **kind))
        return torch.cat(found)

    def maps(self, q: Tensor, k: Tensor, **kind: Any) -> Tensor:
        """The attention probabilities, [B, H, queries, keys], zero at padding."""
        bias, queries, keys = self.bias, self.queries, self.keys
        if isinstance(queries, Padded):
            return queries.maps(q, k, bias=bias, **kind)  # type: ignore[arg-type]
        full = q.new_zeros(queries.batch, q.shape[1], queries.columns, keys.columns)
        at = torch.split(queries.flat_indices() % max(queries.columns, 1), queries.lengths)
        seen = torch.split(keys.flat_indices() % max(keys.columns, 1), keys.lengths)
        parts = zip(torch.split(q, queries.lengths), torch.split(k, keys.lengths), strict=True)
        for row, (a, b) in enumerate(parts):
            if len(a):
                one = None if bias is None else self.bias_of(row, q, k)
                (p,) = ops.attention_probs(a, b, _ends(a), _ends(b), bias=one, **kind)
                full[row, :, at[row][:, None], seen[row]] = p
        return full

    def bias_of(self, row: int, q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
        """The bias of one sequence of the batch, [H, q, k]; it does not depend on q, k and the scale."""
        assert self.bias is not None
        bias = self.bias[row] if isinstance(self.bias, list) else self.bias
        return bias[:, : self.queries.lengths[row], : self.keys.lengths[row]]


def _ends(x: Tensor) -> Tensor:
    """cu_seqlens of one sequence."""
    return torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
