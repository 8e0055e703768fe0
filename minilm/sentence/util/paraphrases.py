"""Paraphrase mining: the most similar pairs among the texts of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..similarity import check_sizes, cos_sim, matrix, nearest

if TYPE_CHECKING:
    from ..encoder import SentenceEncoder


def paraphrase_mining(
    model: SentenceEncoder,
    sentences: Sequence[str],
    show_progress_bar: bool = False,
    batch_size: int = 32,
    query_chunk_size: int = 500,
    corpus_chunk_size: int = 100_000,
    max_pairs: int = 500_000,
    top_k: int = 100,
    score_function: Callable[[Tensor, Tensor], Tensor] = cos_sim,
    truncate_dim: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> list[list[Any]]:
    """`paraphrase_mining_embeddings` of the texts' embeddings.

    Args:
        show_progress_bar, batch_size, truncate_dim, prompt_name, prompt: see `SentenceEncoder.encode`.
    """
    if isinstance(sentences, str):
        raise TypeError("sentences must be a list of texts, and is a single text")
    embeddings = model.encode(
        sentences,
        batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        truncate_dim=truncate_dim,
        prompt_name=prompt_name,
        prompt=prompt,
    )
    return paraphrase_mining_embeddings(
        embeddings, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )


def paraphrase_mining_embeddings(
    embeddings: Any,
    query_chunk_size: int = 500,
    corpus_chunk_size: int = 100_000,
    max_pairs: int = 500_000,
    top_k: int = 100,
    score_function: Callable[[Tensor, Tensor], Tensor] = cos_sim,
) -> list[list[Any]]:
    """The most similar pairs of rows, best first: [score, i, j] with i < j, each pair once.

    A pair is a candidate if one of the two is among the `top_k` rows most similar to the other; the best
    `max_pairs` candidates are returned. Of pairs with equal scores, the one with the lower i, then the lower
    j, comes first.

    Args:
        embeddings: [N, D], array, tensor or lists.
        query_chunk_size, corpus_chunk_size: memory is used for query_chunk_size x corpus_chunk_size scores;
            the result does not depend on them. (The defaults of sentence-transformers, 5000 and 100,000 rows,
            take 2 GB.)
        score_function: takes tensors [N, D] and [M, D], returns [N, M]; must be symmetric.

    Raises ValueError for sizes below 1 and for a score that is NaN.
    """
    check_sizes(query_chunk_size=query_chunk_size, max_pairs=max_pairs, top_k=top_k)
    rows = matrix(embeddings)
    count = len(rows)
    scores = torch.zeros(0)
    pairs = torch.zeros(0, dtype=torch.int64)  # i * count + j
    for start in range(0, count, query_chunk_size):
        some = rows[start : start + query_chunk_size]
        values, places = nearest(some, rows, len(some), corpus_chunk_size, top_k + 1, score_function, start)
        own = torch.arange(start, start + len(some))[:, None]
        other = places != own
        other &= other.cumsum(1) <= top_k  # a row is not always the one most similar to itself
        low, high = torch.minimum(places, own), torch.maximum(places, own)
        scores = torch.cat((scores.to(values.dtype), values[other]))
        pairs = torch.cat((pairs, (low * count + high)[other]))
        scores, pairs = _best_pairs(scores, pairs, max_pairs)
    found = zip(
        scores.tolist(), (pairs // max(count, 1)).tolist(), (pairs % max(count, 1)).tolist(), strict=True
    )
    return [list(pair) for pair in found]


def _best_pairs(scores: Tensor, pairs: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each pair once, with the first of its scores; only the best pairs, of equal ones the lower."""
    order = pairs.argsort(stable=True)
    scores, pairs = scores[order], pairs[order]
    first = torch.ones_like(pairs, dtype=torch.bool)
    first[1:] = pairs[1:] != pairs[:-1]
    scores, pairs = scores[first], pairs[first]
    order = scores.argsort(descending=True, stable=True)[:most]
    return scores[order], pairs[order]
