"""Similarities of all kinds of numbers against numpy in integers and float64; search against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilm.sentence.similarity import (
    SIMILARITIES,
    cos_sim,
    dot_score,
    quantize_embeddings,
    semantic_search,
)

KINDS: dict[str, Any] = {
    "numpy": lambda x: x,
    "torch": lambda x: torch.from_numpy(x.copy()),
    "lists": lambda x: x.tolist(),
    "list of arrays": list,
    "list of tensors": lambda x: [torch.from_numpy(row.copy()) for row in x],
    "tuple of lists": lambda x: tuple(map(tuple, x.tolist())),
}


def by_hand(name: str, a: Any, b: Any) -> Any:
    """Row with row of [..., D], in Python's integers where they are integers."""
    exact = [x.astype(object) if x.dtype.kind in "iub" else x.astype(np.float64) for x in (a, b)]
    a, b = exact
    if name == "dot":
        return (a * b).sum(-1).astype(np.float64)
    if name == "manhattan":
        return -abs(a - b).sum(-1).astype(np.float64)
    if name == "euclidean":
        return -np.sqrt(((a - b) ** 2).sum(-1).astype(np.float64))
    lengths = [np.sqrt((x * x).sum(-1).astype(np.float64)) for x in (a, b)]
    return (a * b).sum(-1).astype(np.float64) / np.maximum(lengths[0], 1e-12) / np.maximum(lengths[1], 1e-12)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "bool"])
@pytest.mark.parametrize("name", list(SIMILARITIES))
@pytest.mark.parametrize("kind", KINDS)
def test_integers_do_not_wrap_around(dtype: str, name: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    low, high = (0, 2) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    low, high = max(low, -(2**20)), min(high, 2**20)
    a = rng.integers(low, high, (5, 301), endpoint=True).astype(dtype)
    b = rng.integers(low, high, (7, 301), endpoint=True).astype(dtype)
    b[2] = a[1]
    a[0], b[0] = high if dtype != "bool" else True, high if dtype != "bool" else True  # the largest sum
    every, row_with_row = SIMILARITIES[name]
    found = every(KINDS[kind](a), KINDS[kind](b))
    assert found.is_floating_point()
    np.testing.assert_allclose(found, by_hand(name, a[:, None], b[None]), rtol=1e-12, atol=1e-9)
    pairs = row_with_row(KINDS[kind](a), KINDS[kind](b[:5]))
    np.testing.assert_allclose(pairs, by_hand(name, a, b[:5]), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(every(a[1], b)[0], by_hand(name, a[1:2], b), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_kinds_of_numbers_mix(name: str) -> None:
    """Queries in float32 against a corpus in int8, float64 against float32, halves against integers."""
    rng = np.random.default_rng(4)
    codes, floats = rng.integers(-128, 128, (4, 33)).astype(np.int8), rng.normal(size=(3, 33))
    every = SIMILARITIES[name][0]
    for one in (
        floats.astype(np.float32),
        floats,
        torch.tensor(floats).bfloat16(),
        floats.astype(np.float16),
    ):
        wide = np.asarray(torch.as_tensor(one).double())
        expected = by_hand(name, wide[:, None], codes[None].astype(np.float64))
        np.testing.assert_allclose(every(one, codes), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(every(codes, one), expected.T, rtol=1e-5, atol=1e-5)


def test_quantised_embeddings_rank_as_their_originals() -> None:
    rng = np.random.default_rng(5)
    embeddings = rng.normal(size=(200, 64)).astype(np.float32)
    ranges = np.stack((embeddings.min(0), embeddings.max(0)))
    codes = quantize_embeddings(embeddings, "int8", ranges)
    [hits] = semantic_search(codes[17], codes, top_k=3, score_function=dot_score)
    exact = (codes[17].astype(np.int64) * codes.astype(np.int64)).sum(1)
    assert [hit["corpus_id"] for hit in hits] == np.argsort(-exact, kind="stable")[:3].tolist()
    assert [hit["score"] for hit in hits] == np.sort(exact)[::-1][:3].tolist()
    bits = quantize_embeddings(embeddings, "ubinary")
    unpacked = np.unpackbits(bits, axis=1)
    agree = SIMILARITIES["manhattan"][0](unpacked[:3], unpacked)
    np.testing.assert_array_equal(agree, -(unpacked[:3, None] != unpacked[None]).sum(-1))


def test_what_is_no_matrix_of_numbers_is_refused() -> None:
    for every, _ in SIMILARITIES.values():
        with pytest.raises(ValueError, match="embeddings of 3 and of 4 dimensions cannot be compared"):
            every(np.ones((2, 3)), np.ones((2, 4)))
        with pytest.raises(TypeError, match="embeddings must be"):
            every(np.array([["a"]]), np.ones((1, 1)))
        with pytest.raises(TypeError, match=r"real numbers, and are torch\.complex"):
            every(np.ones((1, 1), dtype=np.complex64), np.ones((1, 1)))


# Search


def brute_force(queries: Any, corpus: Any, top_k: int, name: str) -> list[list[int]]:
    scores = by_hand(name, queries[:, None], corpus[None])
    return [sorted(range(len(corpus)), key=lambda i: (-row[i], i))[:top_k] for row in scores]


@given(
    queries=st.integers(0, 7),
    corpus=st.integers(0, 23),
    query_chunk=st.integers(1, 8),
    corpus_chunk=st.integers(1, 25),
    top_k=st.integers(1, 30),
    name=st.sampled_from(["dot", "manhattan", "euclidean"]),
    seed=st.integers(0, 99),
)
def test_chunks_find_what_all_scores_at_once_say(
    queries: int, corpus: int, query_chunk: int, corpus_chunk: int, top_k: int, name: str, seed: int
) -> None:
    """Few different values, so that ties are the rule: of equal scores the earlier row comes first."""
    rng = np.random.default_rng(seed)
    one = rng.integers(-1, 2, (queries, 3)).astype(np.int8)
    other = rng.integers(-1, 2, (corpus, 3)).astype(np.int8)
    found = semantic_search(
        one, other, query_chunk, corpus_chunk, top_k, score_function=SIMILARITIES[name][0]
    )
    assert len(found) == queries
    if corpus:
        expected = brute_force(one, other, top_k, name)
        assert [[hit["corpus_id"] for hit in hits] for hits in found] == expected
        scores = by_hand(name, one[:, None], other[None])
        for row, hits in enumerate(found):
            assert [hit["score"] for hit in hits] == [scores[row, hit["corpus_id"]] for hit in hits]
    else:
        assert found == [[]] * queries


@given(seed=st.integers(0, 99), corpus_chunk=st.integers(1, 40), top_k=st.integers(1, 9))
def test_cosines(seed: int, corpus_chunk: int, top_k: int) -> None:
    one, other = np.split(np.random.default_rng(seed).normal(size=(35, 11)).astype(np.float32), [4])
    found = semantic_search(one, torch.tensor(other), corpus_chunk_size=corpus_chunk, top_k=top_k)
    scores = by_hand("cosine", one[:, None], other[None])
    for row, hits in enumerate(found):
        assert [hit["corpus_id"] for hit in hits] == np.argsort(-scores[row])[:top_k].tolist()
        expected = np.sort(scores[row])[::-1][:top_k]
        assert [hit["score"] for hit in hits] == pytest.approx(expected.tolist(), abs=1e-6)


def test_memory_is_bounded_by_the_chunks() -> None:
    """No more scores at a time than asked for, and no copy of the corpus: rows are converted as they come."""
    seen: list[tuple[int, int]] = []

    def score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((len(a), len(b)))
        return dot_score(a, b)

    class Corpus(np.ndarray):  # type: ignore[type-arg]
        """Counts what is taken at a time."""

        taken: list[int] = []  # noqa: RUF012 - shared by views

        def __getitem__(self, index: Any) -> Any:
            part = super().__getitem__(index)
            Corpus.taken.append(len(part))
            return np.asarray(part)

    rng = np.random.default_rng(6)
    queries = rng.integers(-9, 9, (23, 5)).astype(np.int8)
    corpus = rng.integers(-9, 9, (1000, 5)).astype(np.int8)
    found = semantic_search(queries, corpus.view(Corpus), 4, 60, 7, score)
    assert max(a for a, _ in seen) == 4
    assert max(b for _, b in seen) == 60
    assert sum(a * b for a, b in seen) == 23 * 1000
    assert max(Corpus.taken) == 60
    assert sum(Corpus.taken) == 1000
    assert [[hit["corpus_id"] for hit in hits] for hits in found] == brute_force(queries, corpus, 7, "dot")
    seen.clear()
    semantic_search(rng.normal(size=(250, 2)), rng.normal(size=(3, 2)), score_function=score)
    assert max(a for a, _ in seen) == 100


def test_search_refuses() -> None:
    some = np.ones((2, 3), dtype=np.float32)
    for name in ("top_k", "query_chunk_size", "corpus_chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, and is 0"):
            semantic_search(some, some, **{name: 0})
    holed = np.ones((5, 3), dtype=np.float32)
    holed[3, 1] = np.nan
    with pytest.raises(ValueError, match="the score of query 0 and row 3 of the corpus is NaN"):
        semantic_search(some, holed, corpus_chunk_size=2)
    with pytest.raises(ValueError, match="dimensions cannot be compared"):
        semantic_search(some, np.ones((2, 4)))


def test_kinds_of_corpora() -> None:
    some = np.random.default_rng(7).normal(size=(6, 4)).astype(np.float32)
    expected = semantic_search(some[:2], some, top_k=3)
    for kind in KINDS.values():
        again = semantic_search(kind(some[:2]), kind(some), corpus_chunk_size=4, top_k=3)
        assert [[h["corpus_id"] for h in hits] for hits in again] == [
            [h["corpus_id"] for h in hits] for hits in expected
        ]
    assert semantic_search(some[1].tolist(), some)[0][0]["corpus_id"] == 1
    assert semantic_search(some, []) == [[]] * 6
    assert cos_sim(some, some).dtype == torch.float32
