"""The KV cache: what a decoder remembers of the tokens it has read, in pages.

    sequence 0: "the cat sat"    block_table   0: [2, 0]     k_pages[layer]   page 0: sat .    page 1: a dog
    sequence 1: "a dog"                        1: [1]        [page, slot,     page 2: the cat
                                                              Hkv, D]

Each sequence owns whole pages of `page_size` tokens, found through its row of the block table, so that
sequences of any length live side by side, grow without moving, and give their pages back when they end (Kwon
et al. 2023, arXiv:2309.06180). Padding is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..ops.backends import packed


@dataclass
class CacheStep:
    """Where the new tokens of one forward pass go, and what they may look back on."""

    slots: Tensor
    """int64 [T]: page * page_size + offset of each new token."""
    block_table: Tensor
    """int32 [B, pages of the longest sequence]."""
    context_lens: Tensor
    """int32 [B], new tokens included."""
    max_context: int
    fresh: bool
    """No sequence had a past: attention needs the new tokens only."""


def _layers(store: Tensor) -> list[Tensor]:
    """The part of each layer, as a tensor of its own to autograd, which may be written to in training."""
    return [layer.detach() for layer in store]


class KVCache:
    """Keys and values of all layers for a set of sequences (rows), each of its own length.

    `page_size` in tokens. `dtype` is that of the stored keys and values; in int8 each head of a token has a
    float32 scale beside it (a little more than half of what 16 bits take). Rows are added by `add_rows`; the
    forward pass calls `extend` once and then `minilm.ops.append_kv` for each layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rows: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
        page_size: int = 32,
    ) -> None:
        self.config = config
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.lengths: dict[int, int] = {}
        self._pages_of: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._pages = 0
        shape = (config.num_layers, 0, page_size, config.num_kv_heads, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=self.device)
        self._values = torch.empty(shape, dtype=dtype, device=self.device)
        self.k_pages = _layers(self._keys)
        """Of each layer, [pages, page size, Hkv, D]."""
        self.v_pages = _layers(self._values)
        layers = config.num_layers if dtype == torch.int8 else 0
        self._key_scales = torch.empty(layers, *shape[1:4], device=self.device)
        self._value_scales = torch.empty(layers, *shape[1:4], device=self.device)
        self.k_scales = _layers(self._key_scales)
        """Of each layer, [pages, page size, Hkv]; without int8 there are none."""
        self.v_scales = _layers(self._value_scales)
        self._next_row = 0
        self.add_rows(rows)

    def add_rows(self, count: int) -> list[int]:
        """Begin `count` empty sequences; returns their row numbers."""
        rows = list(range(self._next_row, self._next_row + count))
        self._next_row += count
        for row in rows:
            self.lengths[row] = 0
            self._pages_of[row] = []
        return rows

    def free_row(self, row: int) -> None:
        """Forget a sequence and take its pages back."""
        self._free.extend(reversed(self._pages_of.pop(row)))
        del self.lengths[row]

    @property
    def rows(self) -> list[int]:
        """The living rows, in order of their birth (unless `reorder` changed it)."""
        return list(self.lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Put the living rows into another order."""
        if sorted(rows) != sorted(self.lengths):
            raise ValueError(f"the rows are {self.rows}, and the new order is {list(rows)}")
        self.lengths = {row: self.lengths[row] for row in rows}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence (the name that transformers uses)."""
        return max(self.lengths.values(), default=0)

    def nbytes(self) -> int:
        """Bytes held by the pages of all layers."""
        return sum(pages.nbytes for pages in self._all())

    def _all(self) -> Iterator[Tensor]:
        yield from (*self.k_pages, *self.v_pages, *self.k_scales, *self.v_scales)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens in new pages, so that growing does not copy later."""
        missing = -(-tokens // self.page_size) - len(self._free)
        if missing > 0:
            self._grow(max(missing, self._pages // 2))

    def stores(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, [layers, pages, page size, Hkv, D] each."""
        return self._keys, self._values

    def scale_stores(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Scales of int8 keys and values of all layers, [layers, pages, page size, Hkv] each."""
        return (self._key_scales, self._value_scales) if self.k_scales else ()

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The scales of int8 keys and values in one layer."""
        return (self.k_scales[layer], self.v_scales[layer]) if self.k_scales else (None, None)

    def _grow(self, pages: int) -> None:
        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(len(old), self._pages + pages, *old.shape[2:])
            packed.prefer_large_pages(new)
            new.narrow(1, 0, self._pages).copy_(old)
            return new

        self._keys, self._values = grown(self._keys), grown(self._values)
        self._key_scales, self._value_scales = grown(self._key_scales), grown(self._value_scales)
        self.k_scales, self.v_scales = _layers(self._key_scales), _layers(self._value_scales)
        self.k_pages, self.v_pages = _layers(self._keys), _layers(self._values)
        self._free = [*range(self._pages + pages - 1, self._pages - 1, -1), *self._free]
        self._pages += pages

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Take room for `counts[i]` new tokens of `rows[i]` and say where they go."""
        fresh = all(self.lengths[row] == 0 for row in rows)
        needed = [
            -(-(self.lengths[row] + n) // self.page_size) - len(self._pages_of[row])
            for row, n in zip(rows, counts, strict=True)
        ]
        if sum(needed) > len(self._free):
            self._grow(max(sum(needed) - len(self._free), self._pages // 2))
        slots: list[int] = []
        for row, n, pages in zip(rows, counts, needed, strict=True):
            owned = self._pages_of[row]
            owned.extend(self._free.pop() for _ in range(pages))
            start = self.lengths[row]
            self.lengths[row] = start + n
            slots.extend(
                owned[t // self.page_size] * self.page_size + t % self.page_size
                for t in range(start, start + n)
            )
        context = [self.lengths[row] for row in rows]
        width = max((len(self._pages_of[row]) for row in rows), default=0)
        table = [self._pages_of[row] + [0] * (width - len(self._pages_of[row])) for row in rows]
        return CacheStep(
            slots=torch.tensor(slots, dtype=torch.int64, device=self.device),
            block_table=torch.tensor(table, dtype=torch.int32, device=self.device).view(len(rows), width),
            context_lens=torch.tensor(context, dtype=torch.int32, device=self.device),
            max_context=max(context, default=0),
            fresh=fresh,
        )

    @contextmanager
    def restored(self, rows: Sequence[int] | None = None) -> Iterator[None]:
        """A ``with`` block that adds to these rows (None: to any): after an error they have their lengths
        from before."""
        before = {row: self.lengths[row] for row in (self.lengths if rows is None else rows)}
        try:
            yield
        except BaseException:
            for row, length in before.items():
                if row in self.lengths:
                    self.crop_row(row, length)
            raise

    def keys(self, layer: int, row: int) -> Tensor:
        """The keys of one sequence in one layer, [S, Hkv, D] (for attention maps and for readers)."""
        pages = torch.tensor(self._pages_of[row], dtype=torch.int64, device=self.device)
        keys: Tensor = self.k_pages[layer][pages]
        if self.k_scales:
            keys = keys * self.k_scales[layer][pages][..., None]
        return keys.flatten(0, 1)[: self.lengths[row]]

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` tokens of every sequence."""
        for row in self.lengths:
            self.crop_row(row, max_length)

    def crop_row(self, row: int, max_length: int) -> None:
        """Forget all but the first `max_length` tokens of one sequence."""
        if self.lengths[row] > max_length:
            self.lengths[row] = max_length
            keep = -(-max_length // self.page_size)
            self._free.extend(reversed(self._pages_of[row][keep:]))
            del self._pages_of[row][keep:]

    def fork(self, row: int) -> int:
        """A new row with a copy of `row`'s past: several continuations of one prompt read it once."""
        (child,) = self.add_rows(1)
        length = self.lengths[row]
        if length:
            self.extend([child], [length])
            source = torch.tensor(self._pages_of[row], dtype=torch.int64, device=self.device)
            target = torch.tensor(self._pages_of[child], dtype=torch.int64, device=self.device)
            for pages in self._all():
                pages[target] = pages[source[: len(target)]]
        return child
