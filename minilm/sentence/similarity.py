"""Similarity functions, semantic search and quantised embeddings; names and values as in
sentence-transformers.

A similarity function takes vectors or matrices (torch, numpy, lists), compares all rows of one with all rows
of the other, and returns a tensor [N, M]; distances are negated, so that higher always means more similar.
The `pairwise` functions compare row i with row i: [N]. float16 and bfloat16 are computed in float32, integers
(int8 and uint8 of quantised embeddings, bool) in float64, which is exact for them. binary and ubinary
embeddings pack eight dimensions into one number: unpack them (np.unpackbits) before comparing.
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
    a, b = _matrices(a, b)
    return normalize(a, dim=-1) @ normalize(b, dim=-1).T


def dot_score(a: Any, b: Any) -> Tensor:
    """Dot products, [N, M]."""
    a, b = _matrices(a, b)
    product: Tensor = a @ b.T
    return product


def euclidean_sim(a: Any, b: Any) -> Tensor:
    """Negative Euclidean distances, [N, M]."""
    a, b = _matrices(a, b)
    # In float64 (for integers) not by matrix products, which lose precision for distances near 0.
    exact = a.dtype == torch.float64
    mode = f"{'donot_use' if exact else 'use'}_mm_for_euclid_dist{'' if exact else '_if_necessary'}"
    return -torch.cdist(a, b, p=2.0, compute_mode=mode)


def manhattan_sim(a: Any, b: Any) -> Tensor:
    """Negative Manhattan distances, [N, M]."""
    a, b = _matrices(a, b)
    return -torch.cdist(a, b, p=1.0)


def pairwise_cos_sim(a: Any, b: Any) -> Tensor:
    """Cosine of the angle between row i and row i, [N]."""
    one, other = _wide(a, b)
    return (normalize(one, dim=-1) * normalize(other, dim=-1)).sum(-1)


def pairwise_dot_score(a: Any, b: Any) -> Tensor:
    """Dot products of row i and row i, [N]."""
    one, other = _wide(a, b)
    return (one * other).sum(-1)


def pairwise_euclidean_sim(a: Any, b: Any) -> Tensor:
    """Negative Euclidean distances of row i and row i, [N]."""
    a, b = _wide(a, b)
    distances: Tensor = torch.linalg.vector_norm(a - b, dim=-1)
    return -distances


def pairwise_manhattan_sim(a: Any, b: Any) -> Tensor:
    """Negative Manhattan distances of row i and row i, [N]."""
    one, other = _wide(a, b)
    return -(one - other).abs().sum(-1)


SIMILARITIES: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[Any, Any], Tensor]]] = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (euclidean_sim, pairwise_euclidean_sim),
    "manhattan": (manhattan_sim, pairwise_manhattan_sim),
}
"""Name -> (function for all pairs of rows, pairwise function)."""


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 100_000,
    top_k: int = 10,
    score_function: Callable[[Any, Any], Tensor] = cos_sim,
) -> list[list[dict[str, Any]]]:
    """For each query the `top_k` most similar rows of the corpus, best first (earlier rows first among equal
    scores): {"corpus_id": row, "score": ...}.

    Scores of `query_chunk_size` x `corpus_chunk_size` pairs are in memory at a time; the sizes do not change
    the result. `score_function` takes tensors [N, D] and [M, D] and returns [N, M]. Raises ValueError for
    sizes below 1, for embeddings of different dimensions, and for a score that is NaN.
    """
    queries = matrix(query_embeddings)
    values, places = nearest(
        queries, corpus_embeddings, query_chunk_size, corpus_chunk_size, top_k, score_function
    )
    return [
        [{"corpus_id": row, "score": value} for row, value in zip(ids, scores, strict=True)]
        for ids, scores in zip(places.tolist(), values.tolist(), strict=True)
    ]


def nearest(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int,
    corpus_chunk_size: int,
    top_k: int,
    score_function: Callable[[Any, Any], Tensor],
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """`semantic_search` in tensors on the CPU: scores, and int64 rows of the corpus; [N, min(top_k, M)].

    `first`: the number of the first query, for errors.
    """
    check_sizes(query_chunk_size=query_chunk_size, corpus_chunk_size=corpus_chunk_size, top_k=top_k)
    queries = matrix(query_embeddings)
    corpus = _rows(corpus_embeddings)
    best: list[tuple[Tensor, Tensor] | None] = [None] * -(-len(queries) // query_chunk_size)
    for start in range(0, len(corpus), corpus_chunk_size):
        chunk = matrix(corpus[start : start + corpus_chunk_size])
        score = score_function
        if score is cos_sim:  # normalise each chunk of the corpus once
            chunk, score = normalize(chunk if chunk.is_floating_point() else chunk.double(), dim=-1), _scaled
        for number in range(len(best)):
            some = queries[number * query_chunk_size : (number + 1) * query_chunk_size].to(chunk.device)
            values, places = best_of(score(some, chunk), top_k)
            _check_scores(values, places, first + number * query_chunk_size, start)
            found, places = values.cpu(), places.cpu() + start
            before = best[number]
            if before is not None:
                found, places = torch.cat((before[0], found), 1), torch.cat((before[1], places), 1)
                found, order = found.sort(dim=1, descending=True, stable=True)
                found, places = found[:, :top_k], places.gather(1, order[:, :top_k])
            best[number] = found, places
    parts = [part for part in best if part is not None]
    if not parts:  # no queries, or nothing to find
        return torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64)
    return torch.cat([values for values, _ in parts]), torch.cat([places for _, places in parts])


def check_sizes(**sizes: Any) -> None:
    """Raises ValueError, naming it, for one that is no positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, and is {size!r}")


def _scaled(a: Tensor, scaled: Tensor) -> Tensor:
    """`cos_sim` with rows of length 1."""
    a, scaled = _matrices(a, scaled)
    return normalize(a, dim=-1) @ scaled.T


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their indices, lower indices first among equals. [N, M] ->
    [N, count] twice."""
    values, places = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    rows = (values[:, count - 1 : count] == values[:, count:]).any(1)  # the last place is claimed by several
    values, places = values[:, :count], places[:, :count]
    for row in rows.nonzero().flatten().tolist():
        least = values[row, -1]
        above = (scores[row] > least).nonzero().flatten()
        equal = (scores[row] == least).nonzero().flatten()
        places[row] = torch.cat((above, equal))[: values.shape[1]]
    places = places.sort(dim=1).values
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _check_scores(values: Tensor, places: Tensor, query: int, corpus: int) -> None:
    wrong = values.isnan().nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        at = int(places[row, column]) + corpus
        raise ValueError(f"the score of query {query + row} and row {at} of the corpus is NaN")


def _rows(x: Any) -> Any:
    """An object that can be sliced by rows [N, D] without converting it as a whole."""
    if isinstance(x, (Tensor, np.ndarray)):
        return x[None] if x.ndim == 1 else x
    if isinstance(x, (list, tuple)):
        return x if not len(x) or np.ndim(x[0]) else [x]
    return matrix(x)


def tensor(x: Any) -> Tensor:
    """Embeddings as a tensor of real numbers: halves in float32, of what is sparse all. Raises TypeError."""
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], (Tensor, np.ndarray)):
        x = torch.stack([torch.as_tensor(row) for row in x])
    try:
        found = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as problem:
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        raise TypeError(f"embeddings must be numbers [N, D], and are {kind}: {problem}") from problem
    if found.is_complex():
        raise TypeError(f"embeddings must be real numbers, and are {found.dtype}")
    found = found.to_dense() if found.is_sparse else found
    return found.float() if found.is_floating_point() and found.itemsize < 4 else found


def matrix(x: Any) -> Tensor:
    """`tensor` with two dimensions: of one vector, one row."""
    found = tensor(x)
    return found[None] if found.dim() == 1 else found


def _wide(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors of one floating dtype that represents their values (and products of integers)."""
    one, other = tensor(a), tensor(b)
    if one.dim() and other.dim() and one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"embeddings of {one.shape[-1]} and of {other.shape[-1]} dimensions cannot be compared"
        )
    kinds = [x.dtype if x.is_floating_point() else torch.float64 for x in (one, other)]
    kind = torch.promote_types(*kinds)
    return one.to(kind), other.to(kind)


def _matrices(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    one, other = _wide(a, b)
    return (one[None] if one.dim() == 1 else one), (other[None] if other.dim() == 1 else other)


def quantize_embeddings(
    embeddings: Tensor | NDArray[Any],
    precision: Precision,
    ranges: NDArray[Any] | None = None,
    calibration_embeddings: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Quantise embeddings [N, D].

    int8, uint8: each dimension's range in 255 steps. The ranges [2, D] (lowest, highest) are those of
    `calibration_embeddings`, or else of the embeddings themselves. binary, ubinary: one bit per dimension
    (whether it is positive), eight per byte, [N, ceil(D / 8)], as int8 or uint8.
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
                f"{precision} needs the ranges of the values, which one embedding alone does not have"
            )
        if calibration_embeddings is None and len(sample) < 100:
            logger.warning("%s: the ranges are computed from only %d embeddings", precision, len(sample))
        ranges = np.stack((sample.min(axis=0), sample.max(axis=0)))
    low = ranges[0].astype(np.float32)
    step = (ranges[1].astype(np.float32) - low) / 255
    levels = np.clip(np.floor((embeddings - low) / np.where(step == 0, 1, step)), 0, 255)
    found: NDArray[Any] = levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
    return found
