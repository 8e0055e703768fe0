"""DeBERTa's disentangled attention (arXiv:2006.03654): scores from contents and distances.

Each distance of two tokens, or bucket of distances, has a vector, which all layers share; a layer projects
the vectors to keys K and queries Q of positions. The score of query i and key j, at the distance d = i - j,
is the sum of three products, all with the same scale:

    q_i . k_j    content to content, as in any attention
    q_i . K_d    content to position (c2p)
    k_j . Q_d    position to content (p2c)

The last two are the bias of `ops.attention`. They differ from sequence to sequence, so they are made for some
sequences of one length at a time, and for some heads and queries of a long one: about `BUDGET` numbers, not
[B, H, S, S].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DistanceConfig, ModelConfig
from ..graphs import Padded

BUDGET = 1 << 24
"""Numbers of a bias that exist at a time without gradients: 64 MiB in float32."""

Heads = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""A layer's projection: vectors [R, C] -> q, k, v [R, H, D]."""


def rows_of(distance: Tensor, config: DistanceConfig) -> Tensor:
    """Distances, int64 -> the rows of their vectors, int64, from 0 to 2 span - 1.

    With `max_distance`, distances beyond span / 2 share vectors, in steps that grow with the logarithm up to
    `max_distance`. (In float32, as in transformers: where a bucket ends depends on it.)
    """
    span = config.span
    if config.max_distance is not None:
        half = span // 2
        far = distance.abs().clamp(min=half)
        steps = torch.log(far / half) / torch.log(torch.tensor((config.max_distance - 1) / half))
        found = torch.ceil(steps * (half - 1)) + half
        distance = torch.where(distance.abs() <= half, distance, found.long() * distance.sign())
    return (distance + span).clamp(0, 2 * span - 1)


class Run(NamedTuple):
    """Sequences of a batch, one after another, with the same positions."""

    start: int
    """Packed index of the first token."""
    sequences: int
    positions: Tensor
    """int64 [S]."""


class Vectors(NamedTuple):
    """The vectors of the distances in a batch."""

    vectors: Tensor
    """[R, C]: those of the table's rows `first`, `first` + 1, ..."""
    first: int
    packed: Any
    """`minilm.model.Packed`, or `Padded` in a graph."""
    config: DistanceConfig
    runs: list[Run]
    layers: nn.ModuleList

    def of_layer(self, attention: Any) -> Scores:
        """The attention of one layer."""
        scores: Scores = self.layers[attention.layer](self, attention.heads)
        return scores

    def places(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions [..., Sq] and [..., S] -> indices of `vectors`, int64 [..., Sq, S]."""
        return rows_of(queries[..., :, None] - keys[..., None, :], self.config) - self.first


class Distances(nn.Module):
    """The vectors of all distances, [2 span, C], with a norm if the model has one, and what each layer
    projects them with."""

    def __init__(
        self, config: DistanceConfig, table: nn.Module, norm: nn.Module | None, layers: list[Disentangled]
    ) -> None:
        super().__init__()
        self.config, self.table, self.norm, self.layers = config, table, norm, nn.ModuleList(layers)

    def biased(self, packed: Any) -> Vectors | None:
        """The vectors of the distances between tokens of a batch: short texts need few of them. None if the
        scores do not take them (neither c2p nor p2c)."""
        if not (self.config.c2p or self.config.p2c):
            return None
        first, last, runs = 0, 2 * self.config.span - 1, []
        device = packed.positions.device
        if not isinstance(packed, Padded):
            runs = _runs(packed)
            reach = max((int(run.positions[-1]) for run in runs), default=0)
            first, last = rows_of(torch.tensor([-reach, reach]), self.config).tolist()
        vectors: Tensor = self.table(torch.arange(first, last + 1, device=device))
        vectors = vectors if self.norm is None else self.norm.norm(vectors)  # type: ignore[operator]
        return Vectors(vectors, first, packed, self.config, runs, self.layers)


def _runs(packed: Any) -> list[Run]:
    longest = torch.arange(packed.max_seqlen, device=packed.positions.device)
    if packed.indices is None:
        return [Run(0, packed.batch, longest)] if packed.max_seqlen and packed.batch else []
    ends = packed.cu_seqlens.tolist()[1:]
    last = packed.positions[[end - 1 for end in ends]].tolist() if packed.tokens else []
    rows = []
    for length, end, place in zip(packed.lengths, ends, last, strict=False):
        own = packed.positions[end - length : end]  # with padding between the tokens
        rows.append(Run(end - length, 1, longest[:length] if place == length - 1 else own))
    runs = []
    for length, group in groupby((row for row in rows if len(row.positions)), _key):
        same = list(group)
        whole = length is not None
        runs += [same[0]._replace(sequences=len(same))] if whole else same
    return runs


def _key(row: Run) -> int | None:
    """The length of a sequence without padding between its tokens, else None."""
    length = len(row.positions)
    return length if int(row.positions[-1]) == length - 1 else None


class Disentangled(nn.Module):
    """A layer's projections of the vectors: its own, or with `shared` those of its queries and keys."""

    def __init__(self, model: ModelConfig, linear: Any) -> None:
        super().__init__()
        config, sizes = model.distances, (model.hidden_size, model.q_size)
        assert config is not None
        self.config, self.num_heads, self.p = config, model.num_heads, model.hidden_dropout
        self.key = linear(*sizes) if config.c2p and not config.shared else None
        self.query = linear(*sizes) if config.p2c and not config.shared else None

    def forward(self, vectors: Vectors, heads: Heads) -> Scores:
        """The scores of a layer; `heads`: its projection."""
        x = F.dropout(vectors.vectors, self.p, self.training)
        if self.config.shared:
            queries, keys, _ = heads(x)
            c2p, p2c = self.config.c2p, self.config.p2c
            return Scores(keys if c2p else None, queries if p2c else None, vectors)
        shape = (len(x), self.num_heads, -1)
        own = [None if layer is None else layer(x).view(shape) for layer in (self.key, self.query)]
        return Scores(own[0], own[1], vectors)


class Scores(NamedTuple):
    """Attention of a layer: the methods of `minilm.distances.Biased`. q, k and v are [T, H, D]."""

    keys: Tensor | None
    """[R, H, D], of the positions (c2p)."""
    queries: Tensor | None
    """The same for p2c."""
    vectors: Vectors

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float = 0.0, **kind: Any
    ) -> Tensor:
        """softmax(scores) v within each sequence, [T, H, D]."""
        packed, heads = self.vectors.packed, q.shape[1]
        if isinstance(packed, Padded):
            bias = self._padded(q, k, packed, scale)
            return packed.attend(q, k, v, scale=scale, dropout_p=dropout_p, bias=bias, **kind)
        found = [q[:0]]
        for start, count, positions in self.vectors.runs:
            length = len(positions)
            pairs = max(1, BUDGET // (length * len(self.vectors.vectors)))  # of a sequence and a head
            step, some = max(1, pairs // heads), min(heads, pairs)
            for row in range(0, count, step):
                here = slice(start + row * length, start + min(row + step, count) * length)
                a, b, c = (x[here].view(-1, length, *x.shape[1:]) for x in (q, k, v))
                chosen = [slice(head, head + some) for head in range(0, heads, some)]
                parts = [
                    self._heads(a[:, :, h], b[:, :, h], c[:, :, h], positions, h, scale, dropout_p)
                    for h in chosen
                ]
                found.append(_joined(parts, 2).flatten(0, 1))
        return torch.cat(found)

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, heads: slice, scale: float, p: float
    ) -> Tensor:
        """The same for some heads of n sequences: [n, S, h, D]."""
        count, length, some, _ = q.shape
        far, found = self._far(k, heads), []
        step = max(1, BUDGET // (count * some * length))
        for first in range(0, length, step):
            part = q[:, first : first + step]
            places = self.vectors.places(positions[first : first + step], positions)
            bias = self._bias(part, far, places[None], heads, scale).flatten(0, 1)
            a, b, c = (x.transpose(0, 1).flatten(1, 2) for x in (part, k, v))  # [S, n h, D]
            ends = (_ends(a), _ends(b), len(a), len(b))
            out = ops.attention(a, b, c, *ends, scale=scale, causal=False, dropout_p=p, bias=bias)
            found.append(out.view(len(a), count, some, -1).transpose(0, 1))
        return _joined(found, 1)

    def _far(self, k: Tensor, heads: slice) -> Tensor | None:
        """k . Q of all positions, [n, h, S, R]."""
        if self.queries is None:
            return None
        return k.transpose(1, 2) @ self.queries[:, heads].permute(1, 2, 0)

    def _bias(self, q: Tensor, far: Tensor | None, places: Tensor, heads: slice, scale: float) -> Tensor:
        """q [n, Sq, h, D], `_far` of the keys, places [n or 1, Sq, S] -> [n, h, Sq, S]."""
        index = places[:, None].expand(q.shape[0], q.shape[2], *places.shape[1:])
        found = None
        if self.keys is not None:
            products = q.transpose(1, 2) @ self.keys[:, heads].permute(1, 2, 0)  # [n, h, Sq, R]
            found = products.gather(-1, index)
        if far is not None:
            other = far.gather(-1, index.transpose(2, 3)).transpose(2, 3)
            found = other if found is None else found + other
        assert found is not None
        return found * scale

    def _padded(self, q: Tensor, k: Tensor, packed: Padded, scale: float) -> Tensor:
        """The bias of all rows in a graph, [B, H, S, S]."""
        positions, everything = packed.rows(packed.positions), slice(None)
        far = self._far(packed.rows(k), everything)
        places = self.vectors.places(positions, positions)
        return self._bias(packed.rows(q), far, places, everything, scale)

    def bias_of(self, row: int, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The bias of one sequence of the batch, [H, S, S]."""
        packed, everything = self.vectors.packed, slice(None)
        start = sum(packed.lengths[:row])
        here = slice(start, start + packed.lengths[row])
        positions = packed.positions[here]
        places, far = self.vectors.places(positions, positions), self._far(k[None, here], everything)
        return self._bias(q[None, here], far, places[None], everything, scale)[0]

    def maps(self, q: Tensor, k: Tensor, *, scale: float, **kind: Any) -> Tensor:
        """The attention probabilities, [B, H, S, S], zero at padding."""
        packed: Any = self.vectors.packed
        if isinstance(packed, Padded):
            return packed.maps(q, k, scale=scale, bias=self._padded(q, k, packed, scale), **kind)
        full = q.new_zeros(packed.batch, q.shape[1], packed.columns, packed.columns)
        columns = torch.split(packed.flat_indices() % max(packed.columns, 1), packed.lengths)
        start = 0
        for row, (at, length) in enumerate(zip(columns, packed.lengths, strict=True)):
            here = slice(start, start + length)
            ends, bias = _ends(q[here]), self.bias_of(row, q, k, scale)
            (p,) = ops.attention_probs(q[here], k[here], ends, ends, scale=scale, bias=bias, **kind)
            full[row, :, at[:, None], at] = p
            start += length
        return full


def _ends(x: Tensor) -> Tensor:
    """cu_seqlens of one sequence."""
    return torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Convolution(nn.Module):
    """norm(x + act(conv(embeddings))) after the first layer (DeBERTa v2 xlarge). The convolution is over the
    columns of the batch; padding counts as zeros."""

    def __init__(self, config: DistanceConfig, size: int, p: float, norm: nn.Module) -> None:
        super().__init__()
        kernel = config.conv_kernel
        self.conv = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=config.conv_groups)
        self.norm, self.p, self.activation = norm, p, config.conv_activation

    def forward(self, embedded: Tensor, x: Tensor, packed: Any) -> Tensor:
        """embedded, x [T, C] -> [T, C]."""
        if type(self.conv) is nn.Conv1d:
            y = self._convolved(embedded, packed)
        else:  # an adapter, or what calls one
            y = packed.pack(self.conv(packed.pad(embedded).transpose(1, 2)).transpose(1, 2))
        y = ops.ACTIVATIONS[self.activation](F.dropout(y, self.p, self.training))
        normed: Tensor = self.norm.norm(x + y)  # type: ignore[operator]
        return normed

    def _convolved(self, x: Tensor, packed: Any) -> Tensor:
        """The same as one product for each group, of nothing but tokens: no bit depends on the padding."""
        conv, (total, size) = self.conv, x.shape
        kernel, groups = conv.kernel_size[0], conv.groups
        places = packed.pad(torch.arange(total, device=x.device), total)  # [B, S]; `total` is a row of zeros
        places = F.pad(places, (kernel // 2, kernel // 2), value=total).unfold(1, kernel, 1)
        near = torch.cat((x, x.new_zeros(1, size)))[packed.pack(places)]  # [T, kernel, C]
        near = near.view(total, kernel, groups, size // groups).permute(2, 0, 3, 1).flatten(2)
        weight = conv.weight.view(groups, size // groups, -1).transpose(1, 2)
        y = (near @ weight).transpose(0, 1).reshape(total, size)
        return y if conv.bias is None else y + conv.bias


def disentangled_parts(
    config: ModelConfig, table: Any, linear: Any, norm: Any
) -> tuple[Distances | None, Convolution | None]:
    """The vectors with what each layer projects them with, and the convolution; of these classes of tables,
    linear layers and norms."""
    far, size = config.distances, config.hidden_size
    assert far is not None
    conv = Convolution(far, size, config.hidden_dropout, norm(config)) if far.conv_kernel else None
    if not far.span:
        return None, conv
    layers = [Disentangled(config, linear) for _ in range(config.num_layers if far.c2p or far.p2c else 0)]
    return Distances(far, table(2 * far.span, size), norm(config) if far.norm else None, layers), conv
