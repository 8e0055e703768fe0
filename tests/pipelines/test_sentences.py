"""sentence-similarity and text-ranking against sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from sentence_transformers import util as theirs
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import TEXTS, save_model
from tiny_sentence import build

from minilm import AutoModel, CrossEncoder, SentenceEncoder, pipeline


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("encoder")
    return folder / "model", build(folder, lambda: Pooling(24), prompts={"question": "who: "})


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("ranker"), "bert", "ForSequenceClassification", num_labels=1)


@pytest.mark.filterwarnings("ignore:.* texts have more than:UserWarning")
def test_similarity(encoder: tuple[Path, Any]) -> None:
    folder, reference = encoder
    compare = pipeline("sentence-similarity", model=folder, device="cpu")
    inputs = [
        {"source_sentence": TEXTS[0], "sentences": [TEXTS[1], TEXTS[4], TEXTS[0], TEXTS[1]]},
        {"source_sentence": TEXTS[4], "sentences": [TEXTS[2]]},
        {"source_sentence": TEXTS[4], "sentences": []},
    ]
    expected = [
        theirs.cos_sim(reference.encode(i["source_sentence"]), reference.encode(i["sentences"]))[0].tolist()
        if i["sentences"]
        else []
        for i in inputs
    ]
    for found in (compare(inputs), list(compare(iter(inputs))), [compare(one) for one in inputs]):
        for ours, wanted in zip(found, expected, strict=True):
            assert ours == pytest.approx(wanted, abs=1e-5)
            assert all(isinstance(value, float) for value in ours)
    asked = compare(inputs[0], prompt_name="question")
    vectors = reference.encode([f"who: {text}" for text in (TEXTS[0], *inputs[0]["sentences"])])
    assert asked == pytest.approx(theirs.cos_sim(vectors[:1], vectors[1:])[0].tolist(), abs=1e-5)
    assert asked != pytest.approx(expected[0], abs=1e-3)
    dot = SentenceEncoder(folder, device="cpu", similarity_fn_name="dot")
    vectors = reference.encode([TEXTS[4], TEXTS[2]])
    assert pipeline(model=dot)(inputs[1]) == pytest.approx([float(vectors[0] @ vectors[1])], rel=1e-4)


def test_ranking(ranker: Path) -> None:
    reference = TheirCrossEncoder(str(ranker), device="cpu", max_length=64)
    rank = pipeline("text-ranking", model=ranker, device="cpu")
    documents = [TEXTS[1], TEXTS[4], TEXTS[0], TEXTS[1]]
    query = "where does anna live"
    expected = reference.rank(query, documents, return_documents=True)
    for options in ({}, {"top_k": 2}, {"top_k": 9}):
        found = rank({"query": query, "documents": documents}, return_documents=True, **options)
        wanted = expected[: options.get("top_k")]
        assert [one["corpus_id"] for one in found] == [one["corpus_id"] for one in wanted]
        assert [one["text"] for one in found] == [one["text"] for one in wanted]
        assert [one["score"] for one in found] == pytest.approx([float(w["score"]) for w in wanted], abs=1e-5)
    plain = rank([{"source_sentence": query, "sentences": documents}, {"query": "x", "texts": []}])
    assert plain[0] == [
        {"corpus_id": f["corpus_id"], "score": f["score"]} for f in rank_all(rank, query, documents)
    ]
    assert plain[1] == []
    pairs = [{"text": query, "text_pair": document} for document in documents]
    scores = reference.predict([(query, document) for document in documents]).tolist()
    assert rank(pairs) == pytest.approx(scores, abs=1e-5)
    assert rank(pairs[1], batch_size=1) == pytest.approx(scores[1], abs=1e-5)
    again = pipeline(model=CrossEncoder(ranker, device="cpu"))
    assert again(pairs) == pytest.approx(scores, abs=1e-5)
    assert "text-ranking pipeline of a CrossEncoder on cpu" in repr(again)


def rank_all(rank: Any, query: str, documents: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rank({"query": query, "documents": documents}, return_documents=True)
    return found


def test_errors(encoder: tuple[Path, Any], ranker: Path, tmp_path: Path) -> None:
    compare = pipeline("sentence-similarity", model=encoder[0], device="cpu")
    rank = pipeline("text-ranking", model=ranker, device="cpu")
    for call, wrong, words in (
        (compare, "a text", 'takes {"source_sentence": text, "sentences": .*, and got str'),
        (
            compare,
            {"source_sentence": "a", "sentences": "b"},
            "sentences must be a list of texts, and is 'b'",
        ),
        (compare, {"source_sentence": "a", "sentences": ["b", 3]}, "takes texts, and got int: 3"),
        (rank, {"query": None, "documents": []}, "takes texts, and got NoneType"),
    ):
        with pytest.raises(TypeError, match=words):
            call(wrong)
    for call, wrong in (
        (compare, {"query": "a", "sentences": ["b"]}),
        (compare, {"source_sentence": "a", "sentences": ["b"], "more": 1}),
        (rank, {"query": "a", "documents": ["b"], "texts": ["c"]}),
        (rank, {"text": "a"}),
    ):
        with pytest.raises(ValueError, match=f"{call.task} takes the keys"):
            call(wrong)
    with pytest.raises(ValueError, match="top_k must be a positive integer or None, and is 0"):
        rank({"query": "a", "documents": ["b"]}, top_k=0)
    with pytest.raises(TypeError, match="sentence-similarity has no option top_k"):
        compare({"source_sentence": "a", "sentences": ["b"]}, top_k=1)
    three = save_model(tmp_path, "bert", "ForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match="one score per pair, and this one has 3"):
        pipeline("text-ranking", model=three, device="cpu")
    base = AutoModel.from_pretrained(ranker, device="cpu", add_pooling_layer=False)
    with pytest.raises(
        ValueError, match=r"sentence-similarity needs a SentenceEncoder or its name, and .* Bert"
    ):
        pipeline("sentence-similarity", model=base)
    with pytest.raises(ValueError, match="text-ranking needs a model="):
        pipeline("text-ranking")
    with pytest.raises(ValueError, match="tokenizer= has no effect"):
        pipeline("text-ranking", model=ranker, tokenizer=str(ranker))
    with pytest.raises(ValueError, match="dtype: only for a model that is loaded by name"):
        pipeline("text-ranking", model=CrossEncoder(ranker, device="cpu"), dtype=torch.bfloat16)
