"""`Padded`: a batch whose padding goes through the layers too, for graphs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


class Padded:
    """The interface of `minilm.model.batch.Packed` for the layers, with all B * S positions as tokens."""

    indices = None
    padded_left = False

    def __init__(
        self, batch: int, columns: int, real: Tensor | None, device: torch.device, *, keeps: bool = False
    ) -> None:
        self.batch, self.columns = batch, columns
        self.real = real
        """bool [B, S]; None if there is no padding."""
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if keeps else None
        """If requested: keys and values of each layer, [T, Hkv, D]."""
        self._masks: dict[tuple[bool, int | None], Tensor | None] = {}
        column = torch.arange(columns, device=device).expand(batch, columns)
        if real is None:
            self.starts = column[:, :1]
            self.positions = column.flatten()
        else:
            self.starts = real.int().argmax(1, keepdim=True)  # int64 [B, 1]
            self.positions = torch.where(real, column - self.starts, 0).flatten()

    @property
    def max_seqlen(self) -> int:
        """The number of columns, an upper bound of the length of each sequence."""
        return self.columns

    def look_ahead(self, causal: bool, windows: Iterable[int | None]) -> None:
        """Make the masks for these windows once, for all layers. This happens before the layers, since
        torch.compile does not let checkpointed layers store anything."""
        for window in windows:
            if (causal, window) not in self._masks:
                self._masks[causal, window] = self._mask(causal, window)

    # Layout
    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...], with zeros at padding."""
        return self._fill(x, 0).flatten(0, 1)

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """[T, ...] -> [B, S, ...], with `value` at padding."""
        return self._fill(self.rows(x), value)

    def rows(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...]."""
        return x.view(self.batch, self.columns, *map(int, x.shape[1:]))

    def _fill(self, x: Tensor, value: float) -> Tensor:
        if self.real is None:
            return x
        return x.masked_fill(~self.real.view(*self.real.shape, *[1] * (x.dim() - 2)), value)

    def tokens_at(self) -> Tensor:
        """True at tokens, False at padding; bool [B, S]."""
        return (
            torch.ones_like(self.rows(self.positions), dtype=torch.bool) if self.real is None else self.real
        )

    def first(self) -> Tensor:
        """Index in T of the first token of each sequence, int64 [B]."""
        return self._places(self.starts[:, 0])

    def last(self) -> Tensor:
        """Index in T of the last token of each sequence, int64 [B]."""
        return self.last_where(None)

    def last_where(self, there: Tensor | None) -> Tensor:
        """Index in T of the last token of each sequence that `there`, bool [B, S], selects; its first token,
        if none is selected."""
        column = torch.arange(self.columns, device=self.starts.device)
        for which in (there, self.real):
            if which is not None:
                column = torch.where(which, column, -1)
        last = column.expand(self.batch, self.columns).amax(1)
        return self._places(torch.where(last < 0, self.starts[:, 0], last))

    def _places(self, columns: Tensor) -> Tensor:
        return torch.arange(self.batch, device=columns.device) * self.columns + columns

    def last_columns(self, count: int) -> tuple[Padded, Tensor]:
        """The last `count` columns as a batch, and the indices of their positions in this one's T."""
        places = torch.arange(self.batch * self.columns, device=self.starts.device)
        places = places.view(self.batch, self.columns)[:, -count:]
        real = None if self.real is None else self.real[:, -count:]
        return Padded(self.batch, places.shape[1], real, places.device), places.flatten()

    # Positions and labels
    def counted(self, there: Tensor) -> Tensor:
        """For each token that `there`, bool [B, S], selects: the number of selected tokens before it in its
        sequence; -1 for the other tokens. int64 [T]."""
        counts = there.long().cumsum(1)
        if self.real is not None:  # do not count padding on the left
            counts = counts - (counts - there.long()).gather(1, self.starts)
        return self._fill(counts * there - 1, 0).flatten()

    def context(self, positions: Tensor) -> Tensor:
        """The length of each token's sequence, int64 [T], from its `positions` [T]."""
        longest = self._fill(self.rows(positions), 0).amax(1, keepdim=True)
        return (longest + 1).expand(self.batch, self.columns).flatten()

    def targets(self, labels: Tensor, shift: bool) -> Tensor:
        """Padded labels int64 [B, S] -> [T], -100 at padding. With `shift`, each token gets the label of the
        next one."""
        labels = self._fill(labels, -100)
        if not shift:
            return labels.flatten()
        labels = F.pad(labels, (0, 1), value=-100)
        column = torch.arange(self.columns, device=labels.device)
        following = (column + 1).expand(self.batch, self.columns)
        if self.real is not None:  # the next token may come after padding
            here = torch.where(self.real, column, self.columns).flip(1).cummin(1).values.flip(1)
            following = F.pad(here[:, 1:], (0, 1), value=0)
            following = torch.where(column == self.columns - 1, self.columns, following)
        return self._fill(labels.gather(1, following), -100).flatten()

    # Attention
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        dropout_p: float,
        soft_cap: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`minilm.ops.attention` within each row: q [T, H, D], k, v [T, Hkv, D] -> [T, H, D]; bias [H, S, S]
        for the columns."""
        if self.kept is not None:
            self.kept.append((k, v))
        queries, keys, values = self._heads(q, k, v)
        if soft_cap is not None or bias is not None:
            p = self._probabilities(queries, keys, scale, causal, window, soft_cap, bias).to(q.dtype)
            return (F.dropout(p, dropout_p, dropout_p > 0) @ values).transpose(1, 2).flatten(0, 1)
        seen = self._seen(causal, window)
        out = F.scaled_dot_product_attention(
            queries, keys, values, seen, dropout_p, is_causal=causal and seen is None, scale=scale
        )
        return out.transpose(1, 2).flatten(0, 1)

    def maps(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        soft_cap: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The attention probabilities, [B, H, S, S], zero in the rows of padding."""
        queries, keys = self._heads(q, k)
        probabilities = self._probabilities(queries, keys, scale, causal, window, soft_cap, bias).to(q.dtype)
        real = self.real
        return probabilities if real is None else probabilities.masked_fill(~real[:, None, :, None], 0)

    def _probabilities(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        soft_cap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        scores = queries @ keys.transpose(2, 3)
        scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if bias is not None:
            scores = scores + bias
        seen = self._seen(causal, window)
        if causal and seen is None:
            seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        return scores.softmax(-1)

    def _heads(self, *xs: Tensor) -> list[Tensor]:
        """[T, heads, D] -> [B, H, S, D] for each argument; key/value heads are repeated for the query heads
        that share them."""
        heads, found = int(xs[0].shape[1]), []
        for x in xs:
            rows, group = self.rows(x).transpose(1, 2), heads // int(x.shape[1])
            if group > 1:
                rows = rows[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
            found.append(rows)
        return found

    def _seen(self, causal: bool, window: int | None) -> Tensor | None:
        """Which keys each query attends to, bool [B or 1, 1, S or 1, S]. None: all, or with `causal` all up
        to itself.

        Every query attends to some key, also at padding, since the softmax over no keys is NaN.
        """
        if (causal, window) in self._masks:
            return self._masks[causal, window]
        return self._mask(causal, window)

    def _mask(self, causal: bool, window: int | None) -> Tensor | None:
        real, column = self.real, torch.arange(self.columns, device=self.starts.device)
        if window is None and (real is None or not causal):
            return None if real is None else (real | ~real.any(1, keepdim=True))[:, None, None]
        seen = column[:, None] - column >= 0 if causal else None
        if window is not None:  # distances count tokens, not padding
            place = column[None] if real is None else real.long().cumsum(1)
            near = (place[:, :, None] - place[:, None]).abs() < window
            seen = near if seen is None else seen & near
        assert seen is not None
        if real is not None:
            seen = (seen & real[:, None]) | ~real[:, :, None]
        return seen.view(-1, 1, self.columns, self.columns)
