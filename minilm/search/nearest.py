"""Exact search: the most similar rows of a matrix that is read in blocks.

Each block is scored in float32 first. All rows that could be among the best, given the rounding error of
that, are scored again in float64, row by row. So the result does not depend on the block size, and equal rows
have equal scores, which a float32 matrix product does not guarantee.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

QUERIES = 64
"""Number of queries that are scored at once."""
_SLACK = 2e-5
"""Bound on the rounding error of a float32 score, relative to the lengths of both vectors."""
ROUNDED = 5e-4
"""How much the length of a row may differ from 1: by the rounding to float16."""


class Block(NamedTuple):
    """Some rows: row `first + i` is `rows[i]`, times its scale if there are scales."""

    first: int
    rows: Tensor
    """float32 [M, D]"""
    scales: Tensor | None = None
    """float32 [M]"""

    def scaled(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The rows, or some of them, with their scales."""
        rows = self.rows[chosen]
        return rows if self.scales is None else rows * self.scales[chosen, None]


def nearest(
    queries: Tensor, blocks: Iterable[Block], top_k: int, similarity: str
) -> list[tuple[list[int], list[float]]]:
    """For each query the numbers and scores of the `top_k` most similar rows, best first, lower numbers first
    among equal scores.

    Args:
        queries: [N, D], finite.
        blocks: in order. For cosine the rows have about the length 1 (or 0): `ROUNDED`.
        similarity: cosine, dot, euclidean or manhattan.
    """
    wide = queries.double()
    best = [_Best(top_k) for _ in range(len(queries))]
    for block in blocks:
        for start in range(0, len(queries), QUERIES):
            some = wide[start : start + QUERIES]
            rough, slack = _rough(some, block, similarity)
            peaks = rough.amax(1)  # NaN if there is one
            if bool(peaks.isnan().any()):
                last = block.first + len(block.rows) - 1
                raise ValueError(f"a score of rows {block.first} to {last} is NaN")
            limit = torch.tensor([one.least for one in best[start : start + QUERIES]], dtype=torch.float64)
            if len(block.rows) > top_k and bool(limit.isinf().any()):
                limit = torch.maximum(limit, rough.topk(top_k, dim=1).values[:, -1].double())
            limit = (limit - 2 * slack).float()
            for at in (peaks >= limit).nonzero().flatten().tolist():
                found = (rough[at] >= limit[at]).nonzero().flatten()
                best[start + at].add(found + block.first, _exact(some[at], block.scaled(found), similarity))
    return [(one.rows.tolist(), one.scores.tolist()) for one in best]


class _Best:
    """The best rows so far of one query."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.scores = torch.zeros(0, dtype=torch.float64)

    @property
    def least(self) -> float:
        """The score that a row must reach."""
        return float(self.scores[-1]) if len(self.scores) == self.top_k else -float("inf")

    def add(self, rows: Tensor, scores: Tensor) -> None:
        """`rows` are in order, and above those so far."""
        every, order = torch.cat((self.scores, scores)).sort(descending=True, stable=True)
        self.scores = every[: self.top_k]
        self.rows = torch.cat((self.rows, rows))[order[: self.top_k]]


def _rough(queries: Tensor, block: Block, similarity: str) -> tuple[Tensor, Tensor]:
    """Scores in float32, [N, M], and a bound on the error of each query's."""
    if similarity in ("cosine", "dot"):
        unit = similarity == "cosine"
        some = normalize(queries, dim=-1) if unit else queries
        rough = some.float() @ block.rows.T
        rough = rough if block.scales is None else rough * block.scales
        longest = 1.0 if unit else float(block.scaled().norm(dim=-1).max())
        return rough, (ROUNDED if unit else 0.0) + _SLACK * longest * some.norm(dim=-1)
    manhattan = similarity == "manhattan"
    mode = "donot_use_mm_for_euclid_dist"
    rough = -torch.cdist(queries.float(), block.scaled(), p=1.0 if manhattan else 2.0, compute_mode=mode)
    return rough, _SLACK * rough.abs().amax(1).double()


def _exact(query: Tensor, rows: Tensor, similarity: str) -> Tensor:
    """float64 [M]; each row alone, so that equal rows have equal scores."""
    rows = rows.double()
    if similarity == "cosine":
        return (normalize(rows, dim=-1) * normalize(query, dim=-1)).sum(-1)
    if similarity == "dot":
        return (rows * query).sum(-1)
    if similarity == "euclidean":
        return -((rows - query) ** 2).sum(-1).sqrt()
    return -(rows - query).abs().sum(-1)
