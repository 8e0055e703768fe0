"""The cache of an encoder-decoder: the decoder's own keys and values, which grow, and those of the source,
which are made once per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import Packed, pack


class EncoderDecoderCache:
    """Keys and values of B sequences: per layer the decoder's own, [B, columns, H, D], zero at padding, and
    the packed ones of the source, [Ts, H, D].

    Contiguous, not in pages: T5's bias is added to the scores, which no paged kernel can do.
    """

    def __init__(self, layers: int, source: Packed, source_mask: Tensor | None) -> None:
        self.source = source
        self.source_mask = source_mask
        """bool [B, source columns]; None: without padding."""
        self.mask: Tensor | None = None
        """bool [B, columns]: which of the decoder's columns are tokens."""
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.origins = list(range(source.batch))
        """The prompt of each row, as numbered by the first call."""

    @property
    def rows(self) -> int:
        """B."""
        return self.source.batch

    def get_seq_length(self) -> int:
        """Number of columns in the cache, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def append(self, layer: int, k: Tensor, v: Tensor, new: Packed, keys: Packed) -> tuple[Tensor, Tensor]:
        """Add packed keys and values [T, H, D] of the columns `new`; returns those of all columns, packed by
        `keys`. (Concatenated, not written in place, so that gradients pass.)"""
        past, found = self.own[layer], (new.pad(k), new.pad(v))
        if past is not None:
            found = (torch.cat((past[0], found[0]), 1), torch.cat((past[1], found[1]), 1))
        self.own[layer] = found
        return keys.pack(found[0]), keys.pack(found[1])

    def state(self) -> tuple[object, ...]:
        """What `restore` needs to undo later calls."""
        return self.mask, list(self.own), list(self.cross)

    def restore(self, state: tuple[object, ...]) -> None:
        """Back to an earlier `state`."""
        self.mask, self.own, self.cross = state  # type: ignore[assignment]

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of row ``rows[b]``; rows may be left out and repeated (beam search)."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.source.cu_seqlens.device)
        self.own = [None if kv is None else (kv[0][index], kv[1][index]) for kv in self.own]
        self.mask = None if self.mask is None else self.mask[index]
        origins = [self.origins[row] for row in rows]
        if origins == self.origins:  # beams of the same prompts: the sources stay
            return
        mask = None if self.source_mask is None else self.source_mask[index]
        new = pack(len(origins), self.source.columns, mask, index.device)
        self.cross = [
            None
            if kv is None
            else (new.pack(self.source.pad(kv[0])[index]), new.pack(self.source.pad(kv[1])[index]))
            for kv in self.cross
        ]
        self.source, self.source_mask, self.origins = new, mask, origins

    def fork(self, count: int) -> None:
        """Repeat each row `count` times, next to each other."""
        self.reorder([row for row in range(self.rows) for _ in range(count)])

    reorder_cache = reorder
