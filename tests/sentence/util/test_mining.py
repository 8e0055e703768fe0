"""Mining compared with brute force (for equal scores) and with sentence-transformers (without equal
scores)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import sentence_transformers.util as theirs
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilm.sentence import util
from minilm.sentence.util import (
    community_detection,
    dot_score,
    paraphrase_mining,
    paraphrase_mining_embeddings,
    semantic_search,
)

KINDS: dict[str, Any] = {
    "torch": torch.from_numpy,
    "numpy": lambda x: x,
    "lists": lambda x: x.tolist(),
    "list of tensors": lambda x: [torch.from_numpy(row.copy()) for row in x],
}


def drawn(seed: int, rows: int, width: int = 13) -> Any:
    """Embeddings of which no two pairs are equally alike."""
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def small(seed: int, rows: int) -> Any:
    """Whole numbers, so that many pairs are equally alike, and all scores exact."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, 3)).astype(np.float32)


def exact(seed: int, rows: int) -> Any:
    """Rows whose lengths are 0, 1 or 2, so that many cosines are equal, and all are exact: 0, ½ and 1."""
    rng = np.random.default_rng(seed)
    one = np.eye(4)[rng.integers(0, 4, rows)]
    kinds = np.stack((np.zeros((rows, 4)), one, np.ones((rows, 4))))
    found = kinds[rng.integers(0, 3, rows), np.arange(rows)] * rng.choice([-1, 1], (rows, 4))
    return found.astype(np.float32)


# Paraphrases


def pairs_by_hand(rows: Any, top_k: int, max_pairs: int) -> list[list[float]]:
    scores = rows.astype(np.float64) @ rows.astype(np.float64).T
    near = [
        sorted((j for j in range(len(rows)) if j != i), key=lambda j: (-scores[i, j], j))[:top_k]
        for i in range(len(rows))
    ]
    found = [(i, j) for i, j in combinations(range(len(rows)), 2) if j in near[i] or i in near[j]]
    found.sort(key=lambda pair: (-scores[pair], pair))
    return [[scores[pair], *pair] for pair in found[:max_pairs]]


@given(
    rows=st.integers(0, 14),
    top_k=st.integers(1, 16),
    max_pairs=st.integers(1, 40),
    query_chunk=st.integers(1, 16),
    corpus_chunk=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_pairs_of_equal_scores_have_an_order(
    rows: int, top_k: int, max_pairs: int, query_chunk: int, corpus_chunk: int, seed: int
) -> None:
    """And neither the sizes of the chunks nor max_pairs change which pairs are found."""
    some = small(seed, rows)
    found = paraphrase_mining_embeddings(some, query_chunk, corpus_chunk, max_pairs, top_k, dot_score)
    assert found == pairs_by_hand(some, top_k, max_pairs)


@given(
    rows=st.integers(1, 30),
    top_k=st.integers(1, 40),
    max_pairs=st.integers(1, 80),
    query_chunk=st.integers(1, 40),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
)
def test_pairs_are_those_of_sentence_transformers(
    rows: int, top_k: int, max_pairs: int, query_chunk: int, kind: str, seed: int
) -> None:
    some = drawn(seed, rows)
    expected = theirs.paraphrase_mining_embeddings(
        torch.from_numpy(some), query_chunk, max_pairs=max_pairs, top_k=top_k
    )
    found = paraphrase_mining_embeddings(KINDS[kind](some), query_chunk, 7, max_pairs, top_k)
    assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], abs=1e-6)


def test_no_more_scores_at_a_time_than_asked_for() -> None:
    seen = []

    def score(a: Any, b: Any) -> Any:
        seen.append((len(a), len(b)))
        return dot_score(a, b)

    paraphrase_mining_embeddings(drawn(1, 50), 8, 20, score_function=score)
    assert max(a for a, _ in seen) == 8
    assert max(b for _, b in seen) == 20
    assert sum(a * b for a, b in seen) == 2500


def test_texts_are_embedded_as_asked() -> None:
    asked: dict[str, Any] = {}

    class Model:
        def encode(self, texts: list[str], batch_size: int, **options: Any) -> torch.Tensor:
            asked.update(options, batch_size=batch_size)
            return torch.tensor([[len(text), 1.0] for text in texts])

    model: Any = Model()
    texts = ["a", "four", "five5", "a much longer text", "b"]
    found = paraphrase_mining(
        model, texts, batch_size=2, top_k=2, prompt="q: ", truncate_dim=2, score_function=dot_score
    )
    assert found[0] == [91.0, 2, 3]
    assert {k: asked[k] for k in ("batch_size", "prompt", "truncate_dim", "convert_to_tensor")} == {
        "batch_size": 2,
        "prompt": "q: ",
        "truncate_dim": 2,
        "convert_to_tensor": True,
    }
    with pytest.raises(TypeError, match="sentences must be a list of texts, and is a single text"):
        paraphrase_mining(model, "a text")


def test_mining_refuses() -> None:
    for name in ("top_k", "max_pairs", "query_chunk_size", "corpus_chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, and is 0"):
            paraphrase_mining_embeddings(drawn(1, 4), **{name: 0})

    def score(a: Any, b: Any) -> Any:
        return torch.where((a[:, :1] == 5) & (b[:, 0] == 6), torch.nan, dot_score(a, b))

    numbered = np.stack([np.arange(9), np.ones(9)], 1).astype(np.float32)
    with pytest.raises(ValueError, match="the score of query 5 and row 6 of the corpus is NaN"):
        paraphrase_mining_embeddings(numbered, 4, 3, score_function=score)


# Communities


def communities_by_hand(rows: Any, threshold: float, least: int) -> list[list[int]]:
    """In float64, which is exact for such rows."""
    wide = rows.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    cosines = wide @ wide.T
    around = [[j for j in range(len(rows)) if cosines[i, j] >= threshold] for i in range(len(rows))]
    groups: list[list[int]] = []
    for centre in sorted(range(len(rows)), key=lambda i: -len(around[i])):
        taken = {row for group in groups for row in group}
        left = [row for row in around[centre] if row not in taken]
        if centre in taken or len(around[centre]) < least or len(left) < least:
            continue
        left.sort(key=lambda row: (-cosines[centre, row], row))
        groups.append([centre, *(row for row in left if row != centre)])
    return sorted(groups, key=lambda group: -len(group))


@given(
    rows=st.integers(0, 30),
    threshold=st.sampled_from([-0.7, -0.2, 0.2, 0.7, 1.0]),
    least=st.integers(1, 6),
    batch=st.integers(1, 31),
    seed=st.integers(0, 99),
)
def test_communities_of_equal_rows_have_an_order(
    rows: int, threshold: float, least: int, batch: int, seed: int
) -> None:
    some = exact(seed, rows)
    found = community_detection(some, threshold, least, batch)
    assert found == communities_by_hand(some, threshold, least)


@given(
    rows=st.integers(1, 60),
    threshold=st.floats(-0.2, 0.8),
    least=st.integers(1, 8),
    batch=st.integers(1, 70),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
)
def test_communities_are_those_of_sentence_transformers(
    rows: int, threshold: float, least: int, batch: int, kind: str, seed: int
) -> None:
    some = drawn(seed, rows, 5)
    expected = theirs.community_detection(some, threshold, least)
    # Cosines of a row with itself may be a little below 1, and sizes of 1 are then theirs to choose.
    assert community_detection(KINDS[kind](some), threshold, least, batch) == expected


def test_halves_are_compared_in_float32() -> None:
    """In half precision, cosines are wrong by 1e-3, and those of long vectors are no numbers."""
    some = drawn(3, 40, 6)
    some[::2] = 0.95 * some[1::2] + 0.3 * some[::2]
    half = torch.from_numpy(some).half()
    expected = community_detection(half.float(), 0.7, 2)
    assert expected
    assert community_detection(half, 0.7, 2) == expected
    assert community_detection(half.numpy() * 40, 0.7, 2) == community_detection(half.float() * 40, 0.7, 2)
    pairs = paraphrase_mining_embeddings(half, max_pairs=30)
    assert pairs == paraphrase_mining_embeddings(half.float(), max_pairs=30)


def test_integers_are_taken() -> None:
    codes = np.random.default_rng(2).integers(-128, 128, (30, 4)).astype(np.int8)
    assert community_detection(codes, 0.6, 2) == community_detection(codes.astype(np.float64), 0.6, 2)
    assert community_detection(codes, 0.6, 2)


def test_communities_refuse() -> None:
    for name in ("min_community_size", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, and is 0"):
            community_detection(drawn(1, 4), **{name: 0})
    with pytest.raises(ValueError, match="threshold must be a number, and is nan"):
        community_detection(drawn(1, 4), threshold=float("nan"))
    holed = drawn(1, 12)
    holed[5, 0] = np.nan
    with pytest.raises(ValueError, match="embedding 5 holds values that are not finite numbers"):
        community_detection(holed)
    assert community_detection(drawn(1, 4), 0.0) == []  # fewer rows than a community has


# Search


@given(
    queries=st.integers(0, 6),
    corpus=st.integers(1, 25),
    top_k=st.integers(1, 30),
    name=st.sampled_from(["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_search_is_that_of_sentence_transformers(
    queries: int, corpus: int, top_k: int, name: str, half: bool, seed: int
) -> None:
    kind = torch.float16 if half else torch.float32
    one, other = (
        torch.from_numpy(drawn(seed, queries)).to(kind),
        torch.from_numpy(drawn(seed + 1, corpus)).to(kind),
    )
    expected = theirs.semantic_search(one, other, top_k=top_k, score_function=getattr(theirs, name))
    found = semantic_search(one, other, corpus_chunk_size=6, top_k=top_k, score_function=getattr(util, name))
    for hits, wanted in zip(found, expected, strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in wanted]
        assert [h["score"] for h in hits] == pytest.approx([h["score"] for h in wanted], rel=1e-5, abs=1e-5)
