"""Exact search: the most similar rows of a matrix that is read in blocks.

Each block is scored in float32 first. All rows that could be among the best, given the rounding error of
that, are scored again in float64, row by row. So the result does not depend on the block size, and equal rows
have equal scores, which a float32 matrix product does not guarantee.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

QUERIES = 64
"""Number of queries that are scored at once."""
_SLACK = 2e-5
"""Bound on the rounding error of a float32 score, relative to the lengths of both vectors."""


def nearest(
    queries: Tensor, blocks: Iterable[tuple[int, Tensor]], top_k: int, similarity: str
) -> list[tuple[list[int], list[float]]]:
    """For each query the numbers and scores of the `top_k` most similar rows, best first, lower numbers first
    among equal scores.

    Args:
        queries: [N, D], finite.
        blocks: the number of the first row, and float32 rows [M, D]; for cosine of length 1 (or 0).
        similarity: cosine, dot, euclidean or manhattan.
    """
    wide = queries.double()
    best = [_Best(top_k) for _ in range(len(queries))]
    for first, block in blocks:
        lengths = float(block.norm(dim=-1).max())
        for start in range(0, len(queries), QUERIES):
            some = wide[start : start + QUERIES]
            rough = _rough(some, block, similarity)
            if bool(rough.isnan().any()):
                raise ValueError(f"a score of rows {first} to {first + len(block) - 1} is NaN")
            slack = _SLACK * (rough.abs().amax(1) if similarity in _DISTANCES else lengths)
            if similarity == "dot":
                slack = slack * some.norm(dim=-1)
            limit = torch.full((len(some),), -torch.inf, dtype=torch.float64)
            if len(block) > top_k:
                limit = rough.topk(top_k, dim=1).values[:, -1].double()
            kept = torch.tensor([one.least for one in best[start : start + QUERIES]], dtype=torch.float64)
            limit = torch.maximum(limit, kept) - 2 * slack
            rows = rough.double() >= limit[:, None]
            for at, query in enumerate(some):
                found = rows[at].nonzero().flatten()
                if len(found):
                    best[start + at].add(found + first, _exact(query, block[found], similarity))
    return [(one.rows.tolist(), one.scores.tolist()) for one in best]


_DISTANCES = ("euclidean", "manhattan")


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


def _rough(queries: Tensor, block: Tensor, similarity: str) -> Tensor:
    """float32 [N, M]."""
    if similarity == "cosine":
        return normalize(queries, dim=-1).float() @ block.T
    queries = queries.float()
    if similarity == "dot":
        return queries @ block.T
    if similarity == "euclidean":
        return -torch.cdist(queries, block, compute_mode="donot_use_mm_for_euclid_dist")
    return -torch.cdist(queries, block, p=1.0)


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
