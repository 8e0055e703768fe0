"""Packed q, k and v as they are drawn for tests of attention, and the formula, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

from minilm import ops


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, as `dtype` can hold them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(x: Tensor) -> np.ndarray:
    """float64 values."""
    return x.detach().double().numpy()


def np_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool, window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sequence, one query and head at a time: result [Sq, H, D], log-sum-exp [H, Sq], probabilities [H,
    Sq, Sk]."""
    queries, heads, size = q.shape
    keys, group = k.shape[0], heads // k.shape[1]
    out, lse, maps = (
        np.zeros((queries, heads, size)),
        np.zeros((heads, queries)),
        np.zeros((heads, queries, keys)),
    )
    for h in range(heads):
        for i in range(queries):
            place = keys - queries + i
            scores = {}
            for j in range(keys):
                if causal and j > place:
                    continue
                if window is not None and abs(place - j) >= window:
                    continue
                scores[j] = scale * sum(q[i, h, d] * k[j, h // group, d] for d in range(size))
            if not scores:
                continue
            top = max(scores.values())
            total = sum(math.exp(s - top) for s in scores.values())
            lse[h, i] = top + math.log(total)
            for j, s in scores.items():
                maps[h, i, j] = math.exp(s - top) / total
                out[i, h] += maps[h, i, j] * v[j, h // group]
    return out, lse, maps


@dataclass(frozen=True)
class Sequences:
    """Packed q, k, v: lengths of queries and keys, and what the attention is."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    kv_heads: int
    group: int
    size: int
    causal: bool
    window: int | None
    seed: int

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.kv_heads * self.group
        return (
            random(self.seed, sum(self.queries), heads, self.size, dtype=dtype),
            random(self.seed + 1, sum(self.keys), self.kv_heads, self.size, dtype=dtype),
            random(self.seed + 2, sum(self.keys), self.kv_heads, self.size, dtype=dtype),
        )

    def call(self, q: Tensor, k: Tensor, v: Tensor, op: Callable[..., Any] = ops.attention) -> Any:
        return op(
            q,
            k,
            v,
            ends(self.queries),
            ends(self.keys),
            max(self.queries, default=0),
            max(self.keys, default=0),
            scale=0.7,
            causal=self.causal,
            window=self.window,
        )

    def formula(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        out, lse, maps = [np.zeros((0, q.shape[1], self.size))], [np.zeros((q.shape[1], 0))], []
        i = j = 0
        for n, m in zip(self.queries, self.keys, strict=True):
            one = np_attention(
                exact(q[i : i + n]), exact(k[j : j + m]), exact(v[j : j + m]), 0.7, self.causal, self.window
            )
            out.append(one[0])
            lse.append(one[1])
            maps.append(one[2])
            i, j = i + n, j + m
        return np.concatenate(out), np.concatenate(lse, axis=1), maps


def ends(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    """Sequences in which the queries are the last of the keys, or all of them; some are empty."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=4))
    causal = draw(st.booleans())
    queries = tuple(n for n, _ in pairs)
    # A query of a full attention needs a key; of a window, one that it sees
    keys = tuple(n + more for n, more in pairs)
    return Sequences(
        queries,
        keys,
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        causal,
        draw(st.none() | st.integers(1, 6)),
        draw(seeds()),
    )
