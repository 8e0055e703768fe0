"""A batch: padded as callers pass it, packed as the model processes it.

    padded  [B, S]   mask           packed [T]        cu_seqlens
    a b c .          1 1 1 0        a b c d e         0 3 5
    . . d e          0 0 1 1

`pack` removes the padding at the start, and `Packed.pad` restores it (as zeros) in the results: the model
computes nothing for padding, and padding cannot affect results. A token's position is its column minus the
first real column of its row, so padding on the left and on the right give the same result.

`Packed` is that layout; `Batch` is everything that the layers share about one batch. `PreTrainedModel.pack`
creates and checks it; the code after it does not check again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..cache import CacheStep, KVCache, Layout


@dataclass
class Packed:
    """Which tokens of a [B, S] batch are real, and where each sequence starts."""

    batch: int
    columns: int
    indices: Tensor | None
    """Flat indices of the real tokens in [B * S], int64 [T]; None when all are real."""
    lengths: list[int]
    cu_seqlens: Tensor
    """int32 [B + 1]."""
    positions: Tensor
    """int64 [T], from 0 in each row."""
    padded_left: bool = False
    """Whether there is padding before the first token of a row."""
    kept: list[tuple[Tensor, Tensor]] | None = None
    """In a graph, where asked for: filled with the keys and values of each layer."""

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        flat = x.reshape(self.batch * self.columns, *x.shape[2:])
        return flat if self.indices is None else flat[self.indices]

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """[T, ...] -> [B, S, ...], `value` at padding."""
        if self.indices is not None:
            full = x.new_full((self.batch * self.columns, *x.shape[1:]), value)
            x = full.index_copy(0, self.indices, x)
        return x.view(self.batch, self.columns, *x.shape[1:])

    def flat_indices(self) -> Tensor:
        """Index of each token in the flattened batch, int64 [T]: row * S + column."""
        if self.indices is not None:
            return self.indices
        return torch.arange(self.batch * self.columns, device=self.cu_seqlens.device)

    def first(self) -> Tensor:
        """Packed index of the first token of each sequence, int64 [B]. Raises ValueError for an empty
        sequence."""
        self._no_empty("first")
        return self.cu_seqlens[:-1].long()

    def last(self) -> Tensor:
        """Packed index of the last token of each sequence, int64 [B]. Raises ValueError for an empty
        sequence."""
        self._no_empty("last")
        return self.cu_seqlens[1:].long() - 1

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each sequence, [T, C] -> [B, C]."""
        return ops.pool(x, self.cu_seqlens)

    def last_where(self, there: Tensor) -> Tensor:
        """Packed index [B] of each row's last token that is `there`, bool [B, S]; the first, if none is."""
        found = [flags.nonzero().flatten() for flags in torch.split(self.pack(there), self.lengths)]
        ends = [start + (at[-1] if len(at) else 0) for start, at in zip(self.first(), found, strict=True)]
        return torch.stack(ends) if ends else self.last()

    def last_columns(self, count: int) -> tuple[Packed, Tensor | None]:
        """The last `count` columns of the batch, and the packed indices of their tokens (None: all)."""
        if count >= self.columns:
            return self, None
        flat = self.flat_indices()
        kept = (flat % self.columns >= self.columns - count).nonzero().squeeze(1)
        mask = torch.zeros(self.batch * self.columns, dtype=torch.bool, device=flat.device).index_fill(
            0, flat, True
        )
        return pack(self.batch, count, mask.view(self.batch, self.columns)[:, -count:], flat.device), kept

    def counted(self, there: Tensor) -> Tensor:
        """Index of each token among those of its row that are `there`, bool [B, S]; others -1. int64 [T]."""
        there = there.long()
        seen, counts = self.pack(there), self.pack(there.cumsum(1))
        if self.tokens:  # ids at the padding before a row do not count
            before = (counts - seen)[self.cu_seqlens[:-1].long().clamp(max=self.tokens - 1)]
            counts = counts - before.repeat_interleave(self.cu_seqlens.diff())
        return counts * seen - 1

    def context(self, positions: Tensor) -> Tensor:
        """The length of each token's sequence, int64 [T], by its `positions` [T]."""
        rows = torch.split(positions, self.lengths)
        return torch.cat([row.max().expand(len(row)) + 1 for row in rows if len(row)] or [positions])

    def targets(self, labels: Tensor, shift: bool) -> Tensor:
        """Padded labels int64 [B, S] -> labels of the packed tokens [T]; with `shift`, each token's label is
        that of the next token, -100 at the end of a sequence."""
        targets = self.pack(labels)
        if shift:  # after packing, so that no label at padding is used
            ends = self.cu_seqlens[1:].long()
            targets = F.pad(targets[1:], (0, 1), value=-100)[: len(targets)]
            targets = targets.index_fill(0, ends[ends > 0] - 1, -100)
        return targets

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **kind: Any) -> Tensor:
        """Attention within each sequence, as `minilm.ops.attention`."""
        ends, longest = self.cu_seqlens, self.max_seqlen
        return ops.attention(q, k, v, ends, ends, longest, longest, **kind)

    def _no_empty(self, which: str) -> None:
        if 0 in self.lengths:
            raise ValueError(
                f"row {self.lengths.index(0)} has no real token, so there is no {which} token to pool"
            )


def integers(name: str, x: Tensor) -> Tensor:
    """`x` as int64; ValueError if it is not a tensor of integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        texts = "; tokenize the text first: model(**tokenizer(text, return_tensors='pt'))"
        raise ValueError(f"{name} must be a tensor of integers, and is {what}{texts * isinstance(x, str)}")
    return x.long()


def check_columns(name: str, x: Tensor, batch: int, columns: int) -> None:
    """Raise ValueError unless `x` is a tensor [B, S]."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, and is {type(x).__name__}")
    if x.shape != (batch, columns):
        raise ValueError(f"{name} must be [batch, tokens] = [{batch}, {columns}], and is {list(x.shape)}")


def real_places(
    batch: int, columns: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """A padding mask as bool [B, S], or ValueError."""
    if attention_mask is None:
        return None
    check_columns("attention_mask", attention_mask, batch, columns)
    return attention_mask.to(device) != 0


def pack(batch: int, columns: int, attention_mask: Tensor | None, device: torch.device) -> Packed:
    """The layout for a padding mask, [B, S] of 0/1 or bool (1 = real), or None if every token is real."""
    real = real_places(batch, columns, attention_mask, device)
    if real is None or bool(real.all()):
        if columns == 0:
            cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        else:
            cu_seqlens = torch.arange(0, (batch + 1) * columns, columns, dtype=torch.int32, device=device)
        column = torch.arange(columns, device=device)
        positions = column if batch == 1 else column.repeat(batch)
        return Packed(batch, columns, None, [columns] * batch, cu_seqlens, positions)
    column = torch.arange(columns, device=device).expand(batch, columns)
    counts = real.sum(1, dtype=torch.int32)
    indices = real.flatten().nonzero().squeeze(1)
    starts = real.int().argmax(1, keepdim=True)
    positions = (column - starts).flatten()[indices]
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    *lengths, first = torch.cat((counts, starts.sum()[None])).tolist()  # one device sync for both
    return Packed(batch, columns, indices, lengths, cu_seqlens, positions, first > 0)


@dataclass
class Batch:
    """Packed tokens, and everything that the layers share about them."""

    tokens: Tensor
    """Ids int64 [T], or embedded [T, C]."""
    positions: Tensor
    """int64 [T]: rows of the position table, or positions for rope."""
    packed: Packed
    types: Tensor | None = None
    """int64 [T]."""
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin, [T, rotated channels / 2]."""
    local_rope: tuple[Tensor, Tensor] | None = None
    """The same for layers with a window, if they have their own."""
    biased: Any = None
    """Attention whose scores depend on the distance too (`minilm.distances`), if the family has it."""
    cache: KVCache | None = None
    rows: list[int] = field(default_factory=list)
    """The cache's row of each sequence."""
    layouts: list[Layout] | None = None
    """The columns of each row's tokens, cached ones included; None: without gaps, from column 0."""
    step: CacheStep | None = None
    """Where to write the new tokens in the cache."""
    input_ids: Tensor | None = None
    """[B, S], as passed by the caller."""
    stop: int | None = None
    """Run only the first `stop` blocks and no final norm; None: run all."""
    hidden_states: list[Tensor] | None = None
    """If a list: filled with the residual stream before each layer, and the result, [T, C] each."""
    attentions: list[Tensor] | None = None
    """If a list: filled with one [B, H, S, context] per layer."""
