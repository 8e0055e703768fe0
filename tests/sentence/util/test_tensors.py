"""The small functions of sentence_transformers.util, and that all names there exist here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import sentence_transformers.util as theirs
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilm
from minilm import SentenceEncoder
from minilm.sentence import util

MATRICES = ("cos_sim", "pytorch_cos_sim", "dot_score", "euclidean_sim", "manhattan_sim")
PAIRWISE = ("pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim", "pairwise_manhattan_sim")
KINDS: dict[str, Any] = {
    "tensor": torch.from_numpy,
    "half": lambda x: torch.from_numpy(x).half(),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "array": lambda x: x,
    "lists": lambda x: x.tolist(),
    "arrays": list,
}


@given(
    rows=st.integers(1, 6),
    others=st.integers(1, 6),
    width=st.integers(1, 9),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
)
def test_similarities(rows: int, others: int, width: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (rng.normal(size=(n, width)).astype(np.float32) for n in (rows, others))
    for name in MATRICES:
        expected = getattr(theirs, name)(KINDS[kind](one), KINDS[kind](other))
        found = getattr(util, name)(KINDS[kind](one), KINDS[kind](other))
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    again = (one * 2 + 1).astype(np.float32)
    for name in PAIRWISE:
        expected = getattr(theirs, name)(KINDS[kind](one), KINDS[kind](again))
        assert torch.allclose(
            getattr(util, name)(KINDS[kind](one), KINDS[kind](again)), expected, rtol=1e-5, atol=1e-5
        )


def test_normalize() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]])
    expected = np.array([[0.6, 0.8], [0.0, 0.0], [-5 / 13, 12 / 13]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = util.normalize_embeddings(torch.tensor(rows, dtype=dtype))
        assert found.dtype == dtype
        assert torch.equal(found, torch.tensor(expected, dtype=dtype))
        array = np.float64 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
        same = util.normalize_embeddings(rows.astype(array))
        assert same.dtype == array
        np.testing.assert_array_equal(same, expected.astype(array))
    found = util.normalize_embeddings(rows.tolist())
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float32))
    assert torch.allclose(util.normalize_embeddings(torch.tensor(rows[2])), torch.tensor(expected[2]))
    assert util.normalize_embeddings(torch.tensor([[3, 4]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)]
    ]
    sparse = util.normalize_embeddings(torch.tensor(rows).to_sparse())
    assert sparse.is_sparse
    assert torch.allclose(sparse.to_dense(), torch.tensor(expected))
    long = torch.full((1, 400), 6000.0, dtype=torch.float16)  # 120,000 long, which is no half
    assert torch.allclose(util.normalize_embeddings(long), torch.full((1, 400), 0.05, dtype=torch.float16))
    assert util.normalize_embeddings(torch.zeros(0, 7)).shape == (0, 7)


def test_truncate() -> None:
    rows = np.arange(12.0).reshape(3, 4)
    for kind in (rows, torch.tensor(rows)):
        for dim in (1, 3, 4, 9, None):
            assert np.array_equal(util.truncate_embeddings(kind, dim), theirs.truncate_embeddings(kind, dim))
    assert util.truncate_embeddings(rows, 2).base is not None  # a view
    assert util.truncate_embeddings(rows.tolist(), 2).tolist() == [[0, 1], [4, 5], [8, 9]]
    for dim in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"truncate_dim must be a positive integer, and is {dim}"):
            util.truncate_embeddings(rows, dim)  # type: ignore[arg-type]


def test_batch_to_device() -> None:
    batch = {"input_ids": torch.zeros(2, 3), "text": "a", "none": None}
    moved = util.batch_to_device(batch, torch.device("meta"))
    assert moved is batch
    assert batch["input_ids"].device.type == "meta"  # type: ignore[union-attr]
    assert (batch["text"], batch["none"]) == ("a", None)


def test_similarity_function() -> None:
    rows, others = torch.randn(3, 5), torch.randn(4, 5)
    both = sentence_transformers.SimilarityFunction
    for name in util.SimilarityFunction.possible_values():
        ours, same = util.SimilarityFunction(name), both(name)
        assert (ours.name, ours.value) == (same.name, same.value)
        for value in (name, ours):
            found = util.SimilarityFunction.to_similarity_fn(value)(rows, others)
            assert torch.allclose(found, both.to_similarity_fn(name)(rows, others), atol=1e-6)
            pairwise = util.SimilarityFunction.to_similarity_pairwise_fn(value)(rows, others[:3])
            assert torch.allclose(pairwise, both.to_similarity_pairwise_fn(name)(rows, others[:3]), atol=1e-6)
    assert util.SimilarityFunction.DOT is util.SimilarityFunction.DOT_PRODUCT
    with pytest.raises(ValueError, match="must be one of cosine, dot, euclidean, manhattan, and is 'maxsim'"):
        util.SimilarityFunction("maxsim")


def test_arguments_have_their_names_and_order() -> None:
    for name in util.__all__:
        ours, other = getattr(util, name), getattr(theirs, name)
        if inspect.isclass(ours):
            continue
        names = [p.name for p in inspect.signature(ours).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert names == list(inspect.signature(other).parameters)[: len(names)], name


def test_programs_find_it_where_they_look() -> None:
    """As `from sentence_transformers import util` and `from sentence_transformers.util import ...` do."""
    from minilm import SimilarityFunction
    from minilm import util as short
    from minilm.util import cos_sim

    assert cos_sim is util.cos_sim
    assert short.__all__ is util.__all__
    assert SimilarityFunction is util.SimilarityFunction
    assert all(getattr(short, name) is getattr(util, name) for name in util.__all__)
    assert minilm.__getattr__("util") is short, "import minilm; minilm.util.cos_sim"


def test_the_encoder_takes_the_names_of_similarities() -> None:
    model: Any = SimpleNamespace()
    SentenceEncoder.similarity_fn_name.__set__(model, util.SimilarityFunction.DOT_PRODUCT)
    assert SentenceEncoder.similarity_fn_name.__get__(model) == "dot"
