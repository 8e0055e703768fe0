"""Clusters of similar embeddings, whose number need not be given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..batching import check_batch_size, progress_bar
from ..similarity import check_sizes, matrix


def community_detection(
    embeddings: Any,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Groups of rows around a centre: the rows whose cosine similarity to it is at least `threshold`. The
    largest group comes first.

    In each group the centre comes first, then the members by their similarity to it (of equal ones, the
    earlier row first). Every row is a possible centre. Centres are tried in the order of how many rows are
    within the threshold, most first (of equal ones, the earlier row first). A centre that is already in a
    group is skipped. The others form a group of the rows that are in no group yet, if there are at least
    `min_community_size` of them.

    Args:
        embeddings: [N, D], array, tensor or lists. float16 and bfloat16 are compared in float32.
        batch_size: rows that are compared with all others at once; memory is used for batch_size x N
            similarities, however many rows are similar.

    Raises ValueError for sizes below 1, and for a threshold or an embedding that is not a finite number.
    """
    check_batch_size(batch_size)
    check_sizes(min_community_size=min_community_size)
    if isinstance(threshold, bool) or not math.isfinite(threshold):
        raise ValueError(f"threshold must be a number, and is {threshold!r}")
    rows = matrix(embeddings)
    if len(rows) < min_community_size:
        return []
    rows = normalize(rows if rows.is_floating_point() else rows.double(), dim=-1)
    wrong = rows.isnan().any(1).nonzero()
    if len(wrong):
        raise ValueError(f"embedding {int(wrong[0])} holds values that are not finite numbers")
    bar = progress_bar(-(-len(rows) // batch_size), show_progress_bar)
    counts = []
    with bar:
        for start in range(0, len(rows), batch_size):
            counts.append(_counts(rows[start : start + batch_size] @ rows.T >= threshold))
            bar.update()
    around = torch.cat(counts)
    centres = around.argsort(descending=True, stable=True)
    centres = centres[around[centres] >= min_community_size]
    groups = _without_overlap(rows, centres, threshold, min_community_size, batch_size)
    return sorted(groups, key=len, reverse=True)


def _counts(mask: Tensor) -> Tensor:
    """The number of True values in each row, on the CPU. bool [N, M] -> int64 [N]."""
    if mask.is_cuda:
        return mask.sum(1).cpu()
    return torch.stack([row.count_nonzero() for row in mask])  # sum would convert the mask to int64 first


def _without_overlap(
    rows: Tensor, centres: Tensor, threshold: float, least: int, batch_size: int
) -> list[list[int]]:
    """The groups of the centres in their order, each without the rows of earlier groups.

    Similarities are computed a second time: storing all groups could take memory for all pairs, if all rows
    are similar.
    """
    used = torch.zeros(len(rows), dtype=torch.bool)
    groups: list[list[int]] = []
    while len(centres):
        some, centres = centres[:batch_size], centres[batch_size:]
        cosines = rows[some.to(rows.device)] @ rows.T
        for centre, cosine in zip(some.tolist(), cosines, strict=True):
            if used[centre]:
                continue
            members = (cosine >= threshold).nonzero().flatten()
            members = members[cosine[members].argsort(descending=True, stable=True)].cpu()
            free = members[~used[members]]
            if len(free) >= least:
                groups.append([centre, *free[free != centre].tolist()])
                used[groups[-1]] = True
        centres = centres[~used[centres]]
    return groups
