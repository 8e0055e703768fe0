"""The KV cache: keys and values of the tokens that a decoder has read, stored in pages.

    sequence 0: "the cat sat"    block_table   0: [2, 0]     k_pages[layer]   page 0: sat .    page 1: a dog
    sequence 1: "a dog"                        1: [1]        [page, slot,     page 2: the cat
                                                              Hkv, D]

Each sequence owns whole pages of `page_size` tokens, listed in its row of the block table. So sequences of
any length share the memory, grow without being copied, and free their pages when they end (PagedAttention:
Kwon et al. 2023, arXiv:2309.06180). A fork shares the pages of the sequence that it continues, and copies the
last one when it writes to it (copy-on-write). Padding is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .ops.backends import packed


@dataclass
class CacheStep:
    """Where to store the new tokens of one forward pass, and which cached tokens they attend to."""

    slots: Tensor
    """int64 [T]: page * page_size + offset of each new token."""
    block_table: Tensor
    """int32 [B, pages of the longest sequence]."""
    context_lens: Tensor
    """int32 [B], new tokens included."""
    max_context: int
    fresh: bool
    """True if no sequence had cached tokens before: attention needs the new tokens only."""

    @property
    def ends(self) -> Tensor:
        """Where each sequence begins among the keys of all, and the number of all: int32 [B + 1]."""
        return torch.nn.functional.pad(self.context_lens.cumsum(0, dtype=torch.int32), (1, 0))


@dataclass
class Layout:
    """The columns of the tokens of a padded row; tokens of other rows are in columns 0, 1, 2, ..."""

    columns: Tensor
    """Column of each cached token, int64 [S] on the CPU."""
    width: int
    """Number of columns passed so far, padding included."""
    origin: int
    """The column of position 0."""


def _layers(store: Tensor) -> list[Tensor]:
    """One tensor per layer, detached so that autograd allows in-place writes in training."""
    return [layer.detach() for layer in store]


class KVCache:
    """Keys and values of all layers for a set of sequences (rows), each of its own length.

    `page_size` in tokens. `dtype` is that of the stored keys and values; int8 adds a float32 scale per token
    and head (together a little more than half the memory of 16 bits). `add_rows` adds rows; the forward pass
    calls `extend` once and then `minilm.ops.append_kv` for each layer.
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
        self.steps_a_look = 1
        """Check for changed weights only once in this many decoding steps."""
        self.lengths: dict[int, int] = {}
        self._pages_of: dict[int, list[int]] = {}
        self._layouts: dict[int, Layout] = {}
        self._free: list[int] = []
        self._shared: dict[int, int] = {}  # page -> how many rows hold it beside the first
        self._pages = 0
        shape = (config.num_layers, 0, page_size, config.num_kv_heads, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=self.device)
        self._values = torch.empty(shape, dtype=dtype, device=self.device)
        self.k_pages = _layers(self._keys)
        """Keys of each layer, [pages, page size, Hkv, D]."""
        self.v_pages = _layers(self._values)
        layers = config.num_layers if dtype == torch.int8 else 0
        self._key_scales = torch.empty(layers, *shape[1:4], device=self.device)
        self._value_scales = torch.empty(layers, *shape[1:4], device=self.device)
        self.k_scales = _layers(self._key_scales)
        """Scales of each layer, [pages, page size, Hkv]; empty unless the dtype is int8."""
        self.v_scales = _layers(self._value_scales)
        self._next_row = 0
        self.add_rows(rows)

    def add_rows(self, count: int) -> list[int]:
        """Add `count` empty sequences; returns their row numbers."""
        rows = list(range(self._next_row, self._next_row + count))
        self._next_row += count
        for row in rows:
            self.lengths[row] = 0
            self._pages_of[row] = []
        return rows

    def free_row(self, row: int) -> None:
        """Remove a sequence and free its pages, except for those that others share."""
        self._release(self._pages_of.pop(row))
        self._layouts.pop(row, None)
        del self.lengths[row]

    def _release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            others = self._shared.pop(page, 0)
            if others == 0:
                self._free.append(page)
            elif others > 1:
                self._shared[page] = others - 1

    @property
    def used_pages(self) -> int:
        """Number of pages that hold tokens; one that several sequences share counts once."""
        return self._pages - len(self._free)

    @property
    def rows(self) -> list[int]:
        """The current rows, in order of creation (unless `reorder` changed it)."""
        return list(self.lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Change the order of the rows."""
        if sorted(rows) != sorted(self.lengths):
            raise ValueError(f"the rows are {self.rows}, and the new order is {list(rows)}")
        self.lengths = {row: self.lengths[row] for row in rows}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns passed: tokens of the longest sequence, and padding (transformers' name)."""
        widths = {**self.lengths, **{row: layout.width for row, layout in self._layouts.items()}}
        return max(widths.values(), default=0)

    def layout(self, row: int) -> Layout:
        """The columns of the tokens of a sequence."""
        length = self.lengths[row]
        return self._layouts.get(row) or Layout(torch.arange(length), length, 0)

    def set_layout(self, row: int, layout: Layout) -> None:
        """Set the columns of the tokens of a sequence."""
        length = self.lengths[row]
        if layout.width == length and (layout.origin == 0 or length == 0):
            self._layouts.pop(row, None)
        else:
            self._layouts[row] = layout

    def new_columns(self, mask: Tensor | None, columns: int) -> tuple[Tensor | None, int | None]:
        """The part of a mask, [B, S] or [B, past + S], for the S new columns; and the number of past columns,
        if the mask includes them.

        Raises ValueError if the mask disagrees with the cache about the past: padding is not cached, and all
        cached tokens are attended to.
        """
        past = self.get_seq_length()
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == columns or past == 0:
            return mask, None
        if mask.shape != (len(self.lengths), past + columns):
            b, both = len(self.lengths), past + columns
            raise ValueError(
                f"attention_mask must be [batch, tokens] = [{b}, {columns}], or [{b}, {both}] with {past} "
                f"columns before, and is {list(mask.shape)}"
            )
        told, held = mask[:, :past].cpu() != 0, torch.zeros(mask.shape[0], past, dtype=torch.bool)
        for place, row in enumerate(self.lengths):
            held[place, self.layout(row).columns] = True
        if len(wrong := (told != held).nonzero()):
            place, column = wrong[0].tolist()
            does = "hides a token that is cached" if held[place, column] else "shows what was hidden before"
            raise ValueError(
                f"attention_mask {does}, row {place}, column {column}: with past_key_values the past must be "
                "masked as it was when it was read"
            )
        return mask[:, past:], past

    def lay_out(self, columns: Tensor, lengths: list[int], width: int, past: int | None) -> list[Layout]:
        """The layout of each sequence with its new tokens, in `columns` [T] of `width` new columns. `past`:
        the number of columns before, if the mask included them; else each sequence continues right after its
        last token, even if padding followed it."""
        found = []
        for row, new in zip(self.lengths, torch.split(columns.cpu(), lengths), strict=True):
            old = self.layout(row)
            start, origin = old.width if past is None else past, old.origin
            if not len(old.columns):
                origin = start + int(new[0]) if len(new) else 0
            elif past is None:
                origin += old.width - int(old.columns[-1]) - 1
            found.append(Layout(torch.cat((old.columns, new + start)), start + width, origin))
        return found

    def is_padded(self, padded: bool, past: int | None) -> bool:
        """Whether layouts are needed: the new columns are `padded`, or the past is."""
        ragged = past is not None and any(length != past for length in self.lengths.values())
        return padded or ragged or bool(self._layouts)

    def state(self, rows: Sequence[int] | None = None) -> dict[int, tuple[int, Layout | None]]:
        """The state of these rows (None: of all) for `restore`; valid as long as nothing is removed."""
        chosen = self.lengths if rows is None else rows
        return {row: (self.lengths[row], self._layouts.get(row)) for row in chosen}

    def restore(self, state: dict[int, tuple[int, Layout | None]]) -> None:
        """Remove everything added since `state`."""
        for row in self.rows:
            if row not in state:
                self.free_row(row)
                continue
            self._put_back(row, *state[row])

    def _put_back(self, row: int, length: int, layout: Layout | None) -> None:
        self.crop_row(row, length)
        self.set_layout(row, layout or Layout(torch.arange(length), length, 0))

    def nbytes(self) -> int:
        """Bytes held by the pages of all layers."""
        return sum(pages.nbytes for pages in self._all())

    def _all(self) -> Iterator[Tensor]:
        yield from (*self.k_pages, *self.v_pages, *self.k_scales, *self.v_scales)

    def reserve(self, tokens: int) -> None:
        """Allocate pages for `tokens` more tokens, so that growing does not copy later."""
        missing = -(-tokens // self.page_size) - len(self._free)
        if missing > 0:
            self._grow(self._more(missing))

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
        # One store after the other: never is there more than one of them twice.
        self._grow_store("_keys", "k_pages", pages)
        self._grow_store("_values", "v_pages", pages)
        self._grow_store("_key_scales", "k_scales", pages)
        self._grow_store("_value_scales", "v_scales", pages)
        self._free = [*range(self._pages + pages - 1, self._pages - 1, -1), *self._free]
        self._pages += pages

    def _grow_store(self, name: str, views: str, pages: int) -> None:
        """Move a store to one with so many pages more, layer by layer. The memory of the layers that have
        moved is given back at once, unless somebody else looks at it."""
        store: Tensor = getattr(self, name)
        new = store.new_empty(len(store), self._pages + pages, *store.shape[2:])
        packed.prefer_large_pages(new)
        old, done = store.detach(), 0
        try:
            setattr(self, name, new)
            setattr(self, views, [])
            del store
            given = packed.has_one_owner(old)
            while done < len(old):
                self._move(old, new, done)
                done += 1
                if given:
                    packed.give_back(old, done)
        finally:  # an interrupt loses nothing
            for layer in range(done, len(old)):
                self._move(old, new, layer)
            setattr(self, name, new)
            setattr(self, views, _layers(new))

    def _move(self, old: Tensor, new: Tensor, layer: int) -> None:
        new[layer, : self._pages].copy_(old[layer, : self._pages])

    def _more(self, missing: int) -> int:
        """How many pages to add if so many are missing: a quarter of them all, so that each token is copied
        a few times only."""
        return max(missing, self._pages // 4)

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Reserve slots for `counts[i]` new tokens of `rows[i]`; returns where to store them."""
        fresh = all(self.lengths[row] == 0 for row in rows)
        needed = [
            -(-(self.lengths[row] + n) // self.page_size) - len(self._pages_of[row])
            for row, n in zip(rows, counts, strict=True)
        ]
        writers = self._writers_of_shared_pages(rows, counts) if self._shared else {}
        copies = sum(min(len(each), self._shared[page]) for page, each in writers.items())
        if self._keys.shape[1] != self._pages:  # an error came between two stores
            self._grow(0)
        if (missing := sum(needed) + copies - len(self._free)) > 0:
            self._grow(self._more(missing))
        if writers:
            self._copy_pages(writers)
        slots: list[int] = []
        for row, n, pages in zip(rows, counts, needed, strict=True):
            owned = self._pages_of[row]
            owned.extend(self._free.pop() for _ in range(pages))
            start = self.lengths[row]
            self.lengths[row] = start + n
            if (old := self._layouts.get(row)) is not None:
                new = torch.cat((old.columns, torch.arange(old.width, old.width + n)))
                self._layouts[row] = Layout(new, old.width + n, old.width - start)
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

    def _writers_of_shared_pages(self, rows: Sequence[int], counts: Sequence[int]) -> dict[int, list[int]]:
        """Shared page -> the rows whose next token goes into it."""
        found: dict[int, list[int]] = {}
        for row, n in zip(rows, counts, strict=True):
            if n and self.lengths[row] % self.page_size and (page := self._pages_of[row][-1]) in self._shared:
                found.setdefault(page, []).append(row)
        return found

    def _copy_pages(self, writers: dict[int, list[int]]) -> None:
        """Give each row a copy of the page that it writes to; the last one that holds it keeps it."""
        sources, targets = [], []
        for page, rows in writers.items():
            for row in rows[: self._shared[page]]:
                self._release([page])
                sources.append(page)
                targets.append(self._free.pop())
                self._pages_of[row][-1] = targets[-1]
        source = torch.tensor(sources, device=self.device)
        target = torch.tensor(targets, device=self.device)
        for pages in self._all():
            pages[target] = pages[source]

    @contextmanager
    def restored(self, rows: Sequence[int] | None = None) -> Iterator[None]:
        """A ``with`` block that adds to these rows (None: to any); an error in it restores their lengths."""
        before = self.state(rows)
        try:
            yield
        except BaseException:
            for row in before.keys() & self.lengths.keys():
                self._put_back(row, *before[row])
            raise

    def keys(self, layer: int, row: int, *, values: bool = False) -> Tensor:
        """The keys, or the values, of one sequence in one layer, [S, Hkv, D] (for attention maps, inspection
        and attention that no op for pages computes)."""
        pages = torch.tensor(self._pages_of[row], dtype=torch.int64, device=self.device)
        keys: Tensor = (self.v_pages if values else self.k_pages)[layer][pages]
        scales = self.scales(layer)[values]
        if scales is not None:
            keys = keys * scales[pages][..., None]
        return keys.flatten(0, 1)[: self.lengths[row]]

    def packed(self, layer: int, rows: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and the values of some sequences in one layer, one after the other, [all, Hkv, D] each."""
        k, v = (torch.cat([self.keys(layer, row, values=part) for row in rows]) for part in (False, True))
        return k.to(dtype), v.to(dtype)

    def crop(self, max_length: int) -> None:
        """Remove all but the first `max_length` columns of every sequence; a negative -k removes the last k
        columns; 0 removes nothing (as in transformers)."""
        if not isinstance(max_length, int) or isinstance(max_length, bool):
            raise TypeError(f"crop takes a whole number of columns, and got {max_length!r}")
        for row in self.lengths if max_length else ():
            old = self.layout(row)
            width = min(old.width, max_length) if max_length > 0 else max(0, old.width + max_length)
            kept = old.columns[old.columns < width]
            self.crop_row(row, len(kept))
            self.set_layout(row, Layout(kept, width, old.origin))

    def crop_row(self, row: int, max_length: int) -> None:
        """Remove all but the first `max_length` tokens of one sequence."""
        if max_length < 0:
            raise ValueError(f"a sequence cannot be cropped to {max_length} tokens")
        if self.lengths[row] > max_length:
            self.lengths[row] = max_length
            keep = -(-max_length // self.page_size)
            self._release(self._pages_of[row][keep:])
            del self._pages_of[row][keep:]
            if (old := self._layouts.pop(row, None)) is not None and max_length:
                kept = old.columns[:max_length]
                self.set_layout(row, Layout(kept, int(kept[-1]) + 1, old.origin))

    def fork(self, row: int) -> int:
        """A new row with `row`'s cached tokens, so that several continuations share one prefill. They share
        its pages; the last one is copied when one of them writes to it."""
        (child,) = self.add_rows(1)
        pages = self._pages_of[row]
        self._pages_of[child] = list(pages)
        self.lengths[child] = self.lengths[row]
        for page in pages:
            self._shared[page] = self._shared.get(page, 0) + 1
        self.set_layout(child, self.layout(row))
        return child
