"""Groups of embeddings that are alike, for which nobody says how many there are."""

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
    """Groups of rows around a centre: those whose cosine with it is at least `threshold`; largest first.

    In each group the centre comes first, then its members by their cosine with it (of equal ones the earlier
    row). Every row may be a centre. They are gone through by how many rows they have around them (of equal
    ones the earlier): a centre that is in a group already is passed over, and so are its rows that are; what
    is left of its group counts if it has `min_community_size` rows.

    Args:
        embeddings: [N, D], array, tensor or lists. Halves are compared in float32.
        batch_size: rows that are compared with all others at a time: batch_size x N cosines exist at a time,
            however many rows are alike.

    Raises ValueError for sizes below 1, and for a threshold or an embedding that is no number.
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
        raise ValueError(f"embedding {int(wrong[0])} holds values that are no finite numbers")
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
    """How many of each row are True, on the CPU. bool [N, M] -> int64 [N]."""
    if mask.is_cuda:
        return mask.sum(1).cpu()
    return torch.stack([row.count_nonzero() for row in mask])  # a sum would copy all to int64


def _without_overlap(
    rows: Tensor, centres: Tensor, threshold: float, least: int, batch_size: int
) -> list[list[int]]:
    """The groups of the centres in their order, each without the rows of those before it.

    Cosines are computed once more: to keep all groups until they are gone through would take as many numbers
    as there are pairs, where all rows are alike.
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
