"""The index on disk against `semantic_search` and brute force; its files, whatever happens to them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import killed_everywhere
from tiny_models import TEXTS, save_model
from torch import nn

from minilm import SentenceEncoder
from minilm.files import FileError
from minilm.search import Hit, SearchIndex
from minilm.search.index import _PROBES
from minilm.search.nearest import Block, nearest
from minilm.sentence.util import cos_sim, dot_score, euclidean_sim, manhattan_sim, semantic_search

SCORES = {"cosine": cos_sim, "dot": dot_score, "euclidean": euclidean_sim, "manhattan": manhattan_sim}


class Table(SentenceEncoder):
    """Encodes texts by a table: "text 3" is its row 3. Other texts get vectors by their letters."""

    def __init__(self, vectors: Any, name: str = "table", **prompts: str) -> None:
        nn.Module.__init__(self)
        self.table = {f"text {row}": vector for row, vector in enumerate(torch.as_tensor(vectors))}
        self.size = len(vectors[0])
        self.prompts = {"query": "", "document": "", **prompts}
        self.transformer: Any = SimpleNamespace(model=SimpleNamespace(name_or_path=name))
        self.similarity_fn_name = "cosine"
        self.asked: list[str] = []

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode(self, sentences: Any, batch_size: int = 32, **options: Any) -> Any:
        texts = [options["prompt"] + text for text in sentences]
        self.asked += [text for text in texts if not text.endswith(_PROBES)]
        found = [self.table.get(text, self._other(text)) for text in texts]
        return torch.stack(found).float() if found else torch.zeros(0, self.size)

    def _other(self, text: str) -> torch.Tensor:
        return torch.tensor(np.random.default_rng(list(text.encode())).normal(size=self.size))


def names(count: int) -> list[str]:
    return [f"text {row}" for row in range(count)]


def made(folder: Path, vectors: Any, **options: Any) -> SearchIndex:
    return SearchIndex.build(Table(vectors), names(len(vectors)), folder, **options)


def listed(hits: list[Hit]) -> list[tuple[int, float]]:
    return [(hit.id, hit.score) for hit in hits]


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 60),
    dimension=st.integers(1, 9),
    top_k=st.integers(1, 70),
    similarity=st.sampled_from(sorted(SCORES)),
    parts=st.integers(1, 3),
)
def test_it_finds_what_semantic_search_finds(
    seed: int, count: int, dimension: int, top_k: int, similarity: str, parts: int, tmp_path_factory: Any
) -> None:
    """With ties: small integers, of which dot, euclidean and manhattan have exact scores."""
    rng = np.random.default_rng(seed)
    ties = seed % 2 == 0 and similarity != "cosine"
    draw = (lambda *shape: rng.integers(-1, 2, shape)) if ties else (lambda *shape: rng.normal(size=shape))
    corpus, queries = (draw(n, dimension).astype(np.float32) for n in (count, 3))
    folder = tmp_path_factory.mktemp("index") / "i"
    cuts = sorted(rng.integers(0, count + 1, parts - 1).tolist())
    index = made(folder, corpus, similarity=similarity) if parts == 1 else None
    if index is None:
        index = SearchIndex.build(Table(corpus), names(cuts[0]), folder, similarity=similarity)
        for start, end in zip(cuts, [*cuts[1:], count], strict=True):
            assert index.add(names(count)[start:end]) == range(start, end)
    wide = (queries.astype(np.float64), corpus.astype(np.float64))
    expected = semantic_search(*wide, top_k=top_k, score_function=SCORES[similarity])
    for found in (index.search(queries, top_k), SearchIndex.open(folder).search(queries, top_k)):
        for hits, wanted in zip(found, expected, strict=True):
            assert [hit.id for hit in hits] == [hit["corpus_id"] for hit in wanted]
            scores = [hit["score"] for hit in wanted]
            assert [hit.score for hit in hits] == pytest.approx(scores, rel=1e-6, abs=1e-6)
            assert [hit.text for hit in hits] == [f"text {hit.id}" for hit in hits]
    assert len(index) == count
    assert len(index._segments) <= count.bit_length()


@pytest.mark.parametrize("similarity", sorted(SCORES))
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_equal_vectors_are_in_order_of_ids(similarity: str, step: int) -> None:
    """In float32, a matrix product gives equal rows different last digits, by their place in it."""
    rng = np.random.default_rng(5)
    kinds = rng.normal(size=(3, 33)).astype(np.float32)
    which = rng.integers(0, 3, 97)
    corpus = torch.tensor(kinds[which])
    if similarity == "cosine":
        corpus = torch.nn.functional.normalize(corpus, dim=-1)
    queries = torch.tensor(rng.normal(size=(70, 33)))
    blocks = [Block(start, corpus[start : start + step]) for start in range(0, 97, step)]
    for query, (rows, scores) in zip(queries, nearest(queries, blocks, 50, similarity), strict=True):
        order = SCORES[similarity](query, corpus.double())[0]
        first = [int(order[which == kind].mean() * 1e9) for kind in range(3)]
        assert rows == sorted(range(97), key=lambda row: (-first[which[row]], row))[:50]
        assert len(set(scores)) == len({which[row] for row in rows})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("similarity", sorted(SCORES))
def test_fewer_bits(tmp_path: Path, dtype: str, similarity: str) -> None:
    rng = np.random.default_rng(1)
    corpus = rng.normal(size=(41, 17)).astype(np.float32) * rng.uniform(0.1, 9, (41, 1)).astype(np.float32)
    corpus[7] = 0
    index = made(tmp_path / "i", corpus, dtype=dtype, similarity=similarity)
    kept = corpus / np.maximum(np.linalg.norm(corpus, axis=1, keepdims=True), 1e-12)
    kept = kept if similarity == "cosine" else corpus
    if dtype == "int8":
        scales = np.abs(kept).max(1, keepdims=True) / 127
        codes = np.rint(kept / np.where(scales == 0, 1, scales))
        rounded = codes * scales
        if similarity == "cosine":  # of length 1 again
            rounded = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
        assert np.abs(rounded - kept).max() > 1e-4
    else:
        rounded = kept.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(index.vectors(), rounded, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(index.vectors(3, 9), rounded[3:9], rtol=1e-6, atol=1e-6)
    queries = rng.normal(size=(5, 17))
    expected = semantic_search(queries, rounded, top_k=9, score_function=SCORES[similarity])
    for hits, wanted in zip(index.search(queries, 9), expected, strict=True):
        assert [hit.id for hit in hits] == [hit["corpus_id"] for hit in wanted]
        assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in wanted], abs=1e-5)
    index.add(["text 40"] * 45)  # merges the first segment, bit by bit
    np.testing.assert_allclose(index.vectors()[:41], rounded, rtol=1e-6, atol=1e-6)
    assert len(index._segments) == 1
    size = {"float16": 2, "int8": 1}[dtype]
    (file,) = (tmp_path / "i").glob("vectors-*.npy")
    assert file.stat().st_size == 128 + 86 * 17 * size
    np.testing.assert_array_equal(np.load(file).shape, (86, 17))


def test_memory_is_bounded_by_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.search import store

    monkeypatch.setattr(store, "_BLOCK", 40)
    index = made(tmp_path / "i", np.eye(9, 4) + 0.1)
    sizes = [len(block.rows) for block in index._blocks()]
    assert sizes == [9]
    index = made(tmp_path / "i", np.random.default_rng(0).normal(size=(64, 4)))
    assert [(b.first, len(b.rows)) for b in index._blocks()] == [(10 * n, 10) for n in range(6)] + [(60, 4)]


# With a real encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(folder, device="cpu", prompts={"query": "who: ", "document": "the "})


def test_texts_metadata_and_prompts(tmp_path: Path, encoder: SentenceEncoder) -> None:
    texts = [*TEXTS, "", TEXTS[0], "two\nlines", '"{} é 北']
    metadata = [{"page": n, "more": {"list": [n, None]}} for n in range(len(texts))]
    done: list[int] = []
    index = SearchIndex.build(
        encoder, iter(texts), tmp_path / "i", metadata=iter(metadata), progress=done.append, batch_size=2
    )
    assert sum(done) == len(texts) == len(index)
    again = SearchIndex.open(tmp_path / "i", encoder)
    assert [again[n] for n in range(len(texts))] == list(zip(texts, metadata, strict=True))
    queries = ["mary in paris", "the end"]
    expected = semantic_search(
        encoder.encode(["who: " + q for q in queries]), encoder.encode(["the " + t for t in texts]), top_k=4
    )
    for hits, wanted in zip(again.search(queries, 4), expected, strict=True):
        assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in wanted], abs=1e-5)
        assert [hit.id for hit in hits] == [hit["corpus_id"] for hit in wanted]
        assert [(hit.text, hit.metadata) for hit in hits] == [(texts[h.id], metadata[h.id]) for h in hits]
    assert again.search(queries[0], 3) == again.search(queries, 3)[0]
    equal = [hit.id for hit in again.search(TEXTS[0], 50) if hit.text == TEXTS[0]]
    assert equal == [0, len(TEXTS) + 1]
    assert again.prompts == {"query": "who: ", "document": "the "}
    assert "9 texts" in repr(again)


def test_other_prompts_and_equal_texts_are_encoded_once(tmp_path: Path) -> None:
    table = Table(np.eye(3), query="q: ", document="d: ")
    index = SearchIndex.build(table, ["a", "b", "a"], tmp_path / "i")
    assert table.asked == ["d: a", "d: b"]
    index.search(["c"], 1)
    assert table.asked[2:] == ["q: c"]
    index = SearchIndex.build(table, ["a"], tmp_path / "j", query_prompt="", document_prompt="x ")
    index.search("c", 1)
    assert table.asked[3:] == ["x a", "c"]


def test_another_model_is_an_error(tmp_path: Path, folder: Path, encoder: SentenceEncoder) -> None:
    index = SearchIndex.build(encoder, TEXTS, tmp_path / "i")
    (hit,) = SearchIndex.open(tmp_path / "i").search("anna", 1)  # by the name that it keeps
    assert hit.id == index.search("anna", 1)[0].id
    half = SentenceEncoder(folder, device="cpu", dtype="bfloat16")
    assert SearchIndex.open(tmp_path / "i", half).search("anna", 1)[0].id == hit.id
    other = save_model(tmp_path / "other", "bert", seed=8)
    with pytest.raises(
        ValueError, match=r"was built with .*, and .*other gives other vectors \(cosine -?0\."
    ):
        SearchIndex.open(tmp_path / "i", SentenceEncoder(other, device="cpu"))
    late = SearchIndex.open(tmp_path / "i", other)  # loaded when it is needed
    with pytest.raises(ValueError, match="other vectors"):
        late.search("anna")
    with pytest.raises(ValueError, match="other vectors"):
        late.add(["anna"])
    narrow = SentenceEncoder(folder, device="cpu", truncate_dim=8)
    with pytest.raises(ValueError, match=r"whose vectors have 24 dimensions; those of .* have 8"):
        SearchIndex.open(tmp_path / "i", narrow)
    with pytest.raises(OSError, match="nothing-there"):
        SearchIndex.open(tmp_path / "i", "./nothing-there").search("anna")


def test_the_name_of_the_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is found from everywhere; what has no name is asked for."""
    monkeypatch.chdir(folder.parent)
    assert SearchIndex.build(folder.name, ["anna"], tmp_path / "i").model == str(folder)
    monkeypatch.chdir(tmp_path)
    assert SearchIndex.open("i").search("anna")[0].text == "anna"
    assert SearchIndex.build(Table(np.eye(3)), [], tmp_path / "i", name="mine").model == "mine"
    SearchIndex.build(Table(np.eye(3), name=""), ["a"], tmp_path / "i")
    with pytest.raises(ValueError, match="a model without a name: give the encoder"):
        SearchIndex.open("i").search("a")


def test_kinds_of_queries(tmp_path: Path) -> None:
    """One, or several: lists, arrays, tensors, generators of vectors or of texts."""
    index = made(tmp_path / "i", np.eye(3))
    one = index.search("text 1", 2)
    assert [hit.id for hit in one] == [1, 0]
    row = np.eye(3)[1]
    for single in (row, row.tolist(), torch.tensor(row), torch.tensor(row).bfloat16(), row.astype(np.int8)):
        assert index.search(single, 2) == one
    rows = np.eye(3)[[1, 0]]
    several: list[Any] = [rows, rows.tolist(), list(rows), torch.tensor(rows), list(torch.tensor(rows))]
    several += [iter(rows), ["text 1", "text 0"], iter(["text 1", "text 0"]), np.array(["text 1", "text 0"])]
    for queries in several:
        found = index.search(queries, 2)
        assert [[hit.id for hit in hits] for hits in found] == [[1, 0], [0, 1]]
    assert index.search(np.zeros((0, 3))) == []


def test_an_empty_corpus(tmp_path: Path) -> None:
    index = SearchIndex.build(Table(np.eye(3)), [], tmp_path / "i")
    assert len(index) == 0
    assert index.search("a") == []
    assert index.search(["a", "b"]) == [[], []]
    assert index.search([]) == []
    assert index.vectors().shape == (0, 3)
    assert index.add([]) == range(0)
    assert sorted(file.name for file in (tmp_path / "i").iterdir()) == ["index.json"]
    assert index.add(["a", "b"]) == range(2)
    assert len(index.search("a", 5)) == 2


def test_bad_input(tmp_path: Path) -> None:
    table = Table(np.eye(3))
    index = SearchIndex.build(table, names(3), tmp_path / "i")
    for wrong, words in (
        (np.ones((2, 4)), r"expected vectors \[N, 3\], got \[2, 4\]"),
        ([[1.0, float("nan"), 0.0]], "a query has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            index.search(wrong)
    for wrong, words in ((["a", np.eye(3)[0]], "all be texts or all be vectors"), (7, "got int")):
        with pytest.raises(TypeError, match=words):
            index.search(wrong)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="top_k must be a positive integer"):
            index.search("a", wrong)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"has 3 texts, and none with the id {wrong}"):
            index[wrong]
    for options, words in (
        ({"dtype": "int4"}, "dtype must be one of float32, float16, int8, and is 'int4'"),
        ({"similarity": "jaccard"}, "similarity must be cosine"),
        ({"batch_size": 0}, "batch_size"),
        ({"metadata": [{}]}, "text 1 has no metadata"),
        ({"metadata": [{}] * 4}, "there are 3 texts, and more metadata"),
        ({"metadata": [{"a": set()}] * 3}, "text 0 or its metadata cannot be written as JSON"),
        ({"metadata": [{"a": float("nan")}] * 3}, "text 0 or its metadata cannot be written as JSON"),
        ({"metadata": ["a"] * 3}, "the metadata of text 0 must be"),
    ):
        with pytest.raises(ValueError, match=words):
            SearchIndex.build(table, names(3), tmp_path / "i", **options)
    with pytest.raises(TypeError, match="got one text"):
        SearchIndex.build(table, "text", tmp_path / "i")
    with pytest.raises(TypeError, match="number 1 is int: 5"):
        SearchIndex.build(table, ["a", 5], tmp_path / "i")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="the vector of the text 'text 1' is not finite"):
        SearchIndex.build(Table(np.diag([1, np.inf])), names(2), tmp_path / "i")
    with pytest.raises(ValueError, match="70000, too large for float16"):
        made(tmp_path / "i", np.diag([1, 70000.0]), dtype="float16", similarity="dot")
    assert len(SearchIndex.open(tmp_path / "i", table).search("text 1")) == 3, "the old index is there"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for open_ in (lambda f: SearchIndex.build(table, [], f), SearchIndex.open):
        with pytest.raises(FileError, match=r"index\.json"):
            open_(tmp_path / "full")
    with pytest.raises(FileError, match="no such folder"):
        SearchIndex.open(tmp_path / "none")


def test_a_new_index_replaces_the_old_one(tmp_path: Path) -> None:
    index = made(tmp_path / "i", np.eye(3), dtype="int8")
    made(tmp_path / "i", np.eye(4))
    assert index.search(np.eye(3)[1], 1)[0].text == "text 1", "what is open stays"
    assert len(list((tmp_path / "i").iterdir())) == 4
    with pytest.raises(ValueError, match="vectors have 4 dimensions; those of table have 3"):
        index.add(["a"])


def test_two_that_add(tmp_path: Path) -> None:
    """Neither loses what the other has added; one of them reads while they do."""
    table = Table(np.eye(3))
    made(tmp_path / "i", np.eye(3))
    both = [SearchIndex.open(tmp_path / "i", table) for _ in range(2)]

    def work(index: SearchIndex, name: str) -> None:
        for n in range(12):
            (place,) = index.add([f"{name} {n}"])
            assert index[place][0] == f"{name} {n}"

    threads = [threading.Thread(target=work, args=(i, n)) for i, n in zip(both, "ab", strict=True)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(SearchIndex.open(tmp_path / "i").search(np.ones(3), 50)) >= 3
    found = SearchIndex.open(tmp_path / "i")
    texts = {found[n][0] for n in range(len(found))}
    assert texts == {*names(3), *(f"{name} {n}" for name in "ab" for n in range(12))}
    assert len(found._segments) <= 5


# The files


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["add", "build"])
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, what: str, one_thread: None) -> None:
    table, top = Table(np.eye(3)), tmp_path / "top"
    made(tmp_path / "old", np.eye(3), dtype="int8")

    def fresh() -> None:
        shutil.rmtree(top, ignore_errors=True)
        shutil.copytree(tmp_path / "old", top / "i")

    def write() -> None:
        if what == "add":
            SearchIndex.open(top / "i", table).add(["a", "b", "c"])
        else:
            SearchIndex.build(table, ["a", "b"], top / "i")

    found = []
    for number in killed_everywhere(write, top, fresh):
        index = SearchIndex.open(top / "i", table)
        texts = [index[n][0] for n in range(len(index))]
        new = [*names(3), "a", "b", "c"] if what == "add" else ["a", "b"]
        assert texts in (names(3), new), number
        found.append(texts == new)
        assert len(index.search("text 1", 9)) == len(texts)
        index.add(["more"])
        assert index[len(index) - 1][0] == "more"
    assert found == sorted(found)
    assert set(found) == {False, True}
    files = len(index._segments) * (4 if what == "add" else 3) + 1
    assert len([file for file in (top / "i").iterdir() if not file.name.startswith(".")]) == files


def damage(folder: Path, kind: str) -> None:
    """Damages a file in one way."""
    name, how = kind.split(" ", 1)
    (file,) = folder.glob(f"{name}*")
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "short":
        file.write_bytes(data[:-3])
    elif how == "long":
        file.write_bytes(data + b"more")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "zeros":
        file.write_bytes(bytes(len(data)))
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        key, _, value = how.partition("=")
        file.write_text(json.dumps({**json.loads(data), key: json.loads(value)}))


@pytest.mark.parametrize(
    "kind",
    [
        *(
            f"{name} {how}"
            for name in ("vectors", "scales", "places", "texts")
            for how in ("missing", "short")
        ),
        *(f"{name} {how}" for name in ("vectors", "scales", "places", "texts") for how in ("long", "folder")),
        *("vectors empty", "vectors zeros", "texts empty", "index.json empty", "index.json zeros"),
        *(
            'index.json format="x"',
            "index.json version=2",
            "index.json dimension=4",
            "index.json dimension=-1",
        ),
        *('index.json dtype="float32"', 'index.json dtype="object"', 'index.json similarity="x"'),
        *("index.json prompts=[]", "index.json probe=[]", "index.json probe=[[1]]", "index.json model=3"),
        *('index.json segments=[{"name": "../x", "rows": 3, "bytes": 9}]', "index.json segments=3"),
        *('index.json segments=[{"name": "a", "rows": -1, "bytes": 9}]', "index.json more=1"),
        'index.json segments=[{"name": "a"}]',
    ],
)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    made(tmp_path / "i", np.eye(3), dtype="int8")
    damage(tmp_path / "i", kind)
    with pytest.raises(FileError) as caught:
        SearchIndex.open(tmp_path / "i")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "i")), message
    assert len(message.splitlines()) == 1


def test_damaged_rows(tmp_path: Path) -> None:
    """Contents are not read when an index is opened, but checked when they are."""
    folder = tmp_path / "i"
    made(folder, np.eye(3))
    (texts,) = folder.glob("texts*")
    (places,) = folder.glob("places*")
    (vectors,) = folder.glob("vectors*")
    good = texts.read_bytes(), places.read_bytes(), vectors.read_bytes()
    texts.write_bytes(b"x" * len(good[0]))
    with pytest.raises(FileError, match="row 1 is not a text with metadata"):
        SearchIndex.open(folder)[1]
    texts.write_bytes(good[0])
    places.write_bytes(good[1][:-16] + np.array([900, 5], dtype="<i8").tobytes())
    with pytest.raises(FileError, match="row 1 is at "):
        SearchIndex.open(folder)[1]
    places.write_bytes(good[1])
    vectors.write_bytes(good[2][:-4] + np.array([np.nan], dtype="<f4").tobytes())
    with pytest.raises(ValueError, match="a score of rows 0 to 2 is NaN"):
        SearchIndex.open(folder).search(np.ones(3))
    vectors.write_bytes(good[2])
    assert SearchIndex.open(folder)[2] == ("text 2", {})


@pytest.mark.slow
def test_with_the_real_model(tmp_path: Path) -> None:
    texts = ["The cat sleeps on the sofa.", "Stocks fell sharply today.", "Rain is expected tomorrow."]
    index = SearchIndex.build("all-MiniLM-L6-v2", texts, tmp_path / "i", dtype="int8")
    (one,) = index.search("What will the weather be like?", 1)
    assert one.text == texts[2]
    assert SearchIndex.open(tmp_path / "i").search(["an animal"], 1)[0][0].text == texts[0]
    smaller = SentenceEncoder("all-MiniLM-L6-v2", weights="int8")
    assert SearchIndex.open(tmp_path / "i", smaller).search("an animal", 1)[0].text == texts[0]
