"""How alike embeddings are, and embeddings in fewer bits; names and values as in sentence-transformers.

A similarity takes vectors or matrices (torch, numpy, lists), compares all rows of one with all rows of the
other, and returns a tensor [N, M]; distances are negated, so that more is always more alike. The `pairwise`
ones compare row with row: [N].
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")

logger = logging.getLogger(__name__)


def cos_sim(a: Any, b: Any) -> Tensor:
    """Cosine of the angle between each row of `a` and each of `b`, [N, M]."""
    return normalize(_matrix(a), dim=-1) @ normalize(_matrix(b), dim=-1).T


def dot_score(a: Any, b: Any) -> Tensor:
    """Dot products, [N, M]."""
    return _matrix(a) @ _matrix(b).T


def euclidean_sim(a: Any, b: Any) -> Tensor:
    """Negative Euclidean distances, [N, M]."""
    return -torch.cdist(_matrix(a), _matrix(b), p=2.0)


def manhattan_sim(a: Any, b: Any) -> Tensor:
    """Negative Manhattan distances, [N, M]."""
    return -torch.cdist(_matrix(a), _matrix(b), p=1.0)


def pairwise_cos_sim(a: Any, b: Any) -> Tensor:
    """Cosine of the angle between rows of the same number, [N]."""
    return (normalize(_tensor(a), dim=-1) * normalize(_tensor(b), dim=-1)).sum(-1)


def pairwise_dot_score(a: Any, b: Any) -> Tensor:
    """Dot products of rows of the same number, [N]."""
    return (_tensor(a) * _tensor(b)).sum(-1)


def pairwise_euclidean_sim(a: Any, b: Any) -> Tensor:
    """Negative Euclidean distances of rows of the same number, [N]."""
    distances: Tensor = torch.linalg.vector_norm(_tensor(a) - _tensor(b), dim=-1)
    return -distances


def pairwise_manhattan_sim(a: Any, b: Any) -> Tensor:
    """Negative Manhattan distances of rows of the same number, [N]."""
    return -(_tensor(a) - _tensor(b)).abs().sum(-1)


SIMILARITIES: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[Any, Any], Tensor]]] = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (euclidean_sim, pairwise_euclidean_sim),
    "manhattan": (manhattan_sim, pairwise_manhattan_sim),
}
"""Name -> (all with all, row with row)."""


def semantic_search(
    query: Any, corpus: Any, *, top_k: int = 10, score_function: Callable[[Any, Any], Tensor] = cos_sim
) -> list[list[dict[str, Any]]]:
    """For each row of `query` the `top_k` rows of `corpus` most like it: {"corpus_id": row, "score": ...}."""
    scores = score_function(query, corpus)
    best, rows = scores.topk(min(top_k, scores.shape[1]), dim=1)
    return [
        [{"corpus_id": row, "score": value} for row, value in zip(ids, values, strict=True)]
        for ids, values in zip(rows.tolist(), best.tolist(), strict=True)
    ]


def _tensor(x: Any) -> Tensor:
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], (Tensor, np.ndarray)):
        x = torch.stack([torch.as_tensor(row) for row in x])
    found = torch.as_tensor(x)
    return found.float() if found.is_floating_point() and found.itemsize < 4 else found


def _matrix(x: Any) -> Tensor:
    found = _tensor(x)
    return found[None] if found.dim() == 1 else found


def quantize_embeddings(
    embeddings: Tensor | NDArray[Any],
    precision: Precision,
    ranges: NDArray[Any] | None = None,
    calibration_embeddings: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Embeddings [N, D] in fewer bits.

    int8, uint8: each dimension's range in 255 steps. The ranges [2, D] (lowest, highest) are taken from
    `calibration_embeddings`, or else from the embeddings themselves. binary, ubinary: one bit a dimension
    (is it positive?), eight to a byte, [N, ceil(D / 8)], as int8 or uint8.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, and is {precision!r}")
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.float().cpu().numpy()
    if not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings to quantise must be floating-point numbers, and are {embeddings.dtype}")
    if precision == "float32":
        return embeddings.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits: NDArray[Any] = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if len(embeddings) == 0:
        return embeddings.astype(np.int8 if precision == "int8" else np.uint8)
    if ranges is None:
        sample = embeddings if calibration_embeddings is None else calibration_embeddings
        if sample.ndim == 1 or len(sample) == 1:
            raise ValueError(
                f"{precision} needs the ranges of the values, which a single embedding does not show"
            )
        if calibration_embeddings is None and len(sample) < 100:
            logger.warning("%s: the ranges are taken from only %d embeddings", precision, len(sample))
        ranges = np.stack((sample.min(axis=0), sample.max(axis=0)))
    low = ranges[0].astype(np.float32)
    step = (ranges[1].astype(np.float32) - low) / 255
    levels = np.clip(np.floor((embeddings - low) / np.where(step == 0, 1, step)), 0, 255)
    found: NDArray[Any] = levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
    return found
