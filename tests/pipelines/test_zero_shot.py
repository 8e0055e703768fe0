"""zero-shot-classification against transformers' pipeline, on random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders
import torch
import transformers
from tiny_models import TEXTS, save_decoder, save_model
from tiny_seq2seq import with_tokenizer

import minilm
from minilm import SentenceEncoder, pipeline
from minilm.prompting import EmbeddingClassifier, LabelScorer

NLI = {"id2label": {0: "CONTRADICTION", 1: "neutral", 2: "ENTAILMENT"}}
NLI["label2id"] = {name: number for number, name in NLI["id2label"].items()}  # type: ignore[misc]
LABELS = ["red tea", "the city", "john", "Nürnberg"]


def nli(folder: Path, family: str = "bert", names: dict[int, str] | None = None) -> Path:
    labels = NLI if names is None else {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    return save_model(folder, family, "ForSequenceClassification", **labels)


def same(ours: Any, theirs: Any) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        assert found["sequence"] == expected["sequence"]
        assert found["labels"] == expected["labels"]
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_as_transformers(tmp_path: Path, family: str) -> None:
    folder = nli(tmp_path, family)
    ours = pipeline("zero-shot-classification", model=folder, device="cpu")
    theirs = transformers.pipeline("zero-shot-classification", model=str(folder), device=-1)
    texts = [TEXTS[0], TEXTS[2], TEXTS[4]]
    for options in ({}, {"multi_label": True}, {"hypothesis_template": "the {} is old"}):
        same(ours(texts, LABELS, **options), theirs(texts, LABELS, **options))
    same([ours(texts[0], "red tea, john")], [theirs(texts[0], "red tea, john")])
    same([ours(texts[0], candidate_labels="anna")], [theirs(texts[0], candidate_labels="anna")])
    same(ours(iter(texts), candidate_labels=LABELS, batch_size=3), theirs(texts, LABELS))


def test_bart_as_transformers(tmp_path: Path) -> None:
    """The kind of bart-large-mnli: the decoder's state at the last end token of each pair."""
    shutil.copytree(tokenizer_folders.roberta(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    with_tokenizer("bart", tmp_path, "ForSequenceClassification", **NLI, **ids, max_position_embeddings=200)
    ours = pipeline("zero-shot-classification", model=tmp_path, device="cpu")
    assert type(ours.model).__name__ == "BartForSequenceClassification"
    theirs = transformers.pipeline("zero-shot-classification", model=str(tmp_path), device=-1)
    texts = [TEXTS[0], TEXTS[2], TEXTS[4]]
    for options in ({}, {"multi_label": True, "batch_size": 4}):
        same(ours(texts, LABELS, **options), theirs(texts, LABELS, multi_label="multi_label" in options))
    scores = pipeline("text-classification", model=tmp_path, device="cpu", top_k=None)(TEXTS[0])
    expected = transformers.pipeline("text-classification", model=str(tmp_path), device=-1, top_k=None)
    [found], [wanted] = scores, expected(TEXTS[0])
    assert [score["label"] for score in found] == [score["label"] for score in wanted]


def test_a_text_that_is_too_long_is_cut_and_the_labels_are_not(tmp_path: Path) -> None:
    folder = nli(tmp_path)
    ours = pipeline("zero-shot-classification", model=folder, device="cpu")
    theirs = transformers.pipeline("zero-shot-classification", model=str(folder), device=-1)
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 64 tokens"):
        found = ours(TEXTS[3] * 3, LABELS)
    same([found], [theirs(TEXTS[3] * 3, LABELS)])


@pytest.mark.parametrize(
    ("names", "entailment", "against"),
    [
        ({0: "entailment", 1: "neutral", 2: "contradiction"}, 0, 2),
        ({0: "entailment", 1: "contradiction", 2: "neutral"}, 0, 1),
        ({0: "neutral", 1: "entailment", 2: "contradiction"}, 1, 2),
        ({0: "entailment", 1: "not_entailment"}, 0, 1),
    ],
)
def test_the_classes_are_found_by_their_names(
    tmp_path: Path, names: dict[int, str], entailment: int, against: int
) -> None:
    folder = nli(tmp_path, names=names)
    ours = pipeline("zero-shot-classification", model=folder, device="cpu")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = {}
    for label in LABELS:
        with torch.no_grad():
            logits = model(**tokenizer(TEXTS[0], f"This example is {label}.", return_tensors="pt")).logits[0]
        expected[label] = logits[[against, entailment]].softmax(-1)[1].item()
    found = ours(TEXTS[0], LABELS, multi_label=True)
    assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(expected, rel=1e-4)


def test_errors(tmp_path: Path) -> None:
    ours = pipeline("zero-shot-classification", model=nli(tmp_path / "a"), device="cpu")
    for labels in ([], "", ["a", ""], [1]):
        with pytest.raises(ValueError, match="candidate_labels must be one or more texts"):
            ours("tea", labels)
    with pytest.raises(ValueError, match="candidate_labels must be one or more texts, and are None"):
        ours("tea")
    with pytest.raises(ValueError, match="candidate_labels has 'a' twice"):
        ours("tea", "a, b, a")
    for template in ("no place", "{0} {1}", "{name}", "{"):
        with pytest.raises(ValueError, match="hypothesis_template must have one"):
            ours("tea", LABELS, hypothesis_template=template)
    with pytest.raises(ValueError, match="needs a text"):
        ours(" ", LABELS)
    with pytest.raises(TypeError, match="takes texts and candidate_labels, and got"):
        ours("tea", LABELS, True)
    other = pipeline(
        "zero-shot-classification", model=nli(tmp_path / "b", names={0: "yes", 1: "no"}), device="cpu"
    )
    with pytest.raises(ValueError, match="its classes are yes, no, and none of them begins with 'entail'"):
        other("tea", LABELS)
    with pytest.raises(ValueError, match="and none is 'maybe'"):
        other("tea", LABELS, entailment="maybe")
    assert other("tea", LABELS, entailment="yes")["labels"]


def test_sentence_encoders_and_language_models(tmp_path: Path) -> None:
    """A model without a trained head chooses by similarity, or by what follows."""
    encoder = SentenceEncoder(save_model(tmp_path / "encoder", "bert"), device="cpu")
    by_similarity = EmbeddingClassifier(encoder, LABELS, hypothesis="the {} is old")
    causal = save_decoder(tmp_path / "causal", "llama")
    by_score = LabelScorer(causal, "{text}\nthe", LABELS)
    model = minilm.AutoModelForCausalLM.from_pretrained(causal)
    texts = [TEXTS[0], TEXTS[1], TEXTS[4]]
    for given, classifier, template in (
        (tmp_path / "encoder", by_similarity, "the {} is old"),
        (encoder, by_similarity, "the {} is old"),
        (causal, by_score, "the {}."),
        (model, by_score, "the {}."),
    ):
        pipe = pipeline("zero-shot-classification", model=given, device="cpu", hypothesis_template=template)
        expected = classifier.probabilities(texts)
        for found in (pipe(texts, LABELS), list(pipe(iter(texts), LABELS)), [pipe(t, LABELS) for t in texts]):
            for one, text, row in zip(found, texts, expected.tolist(), strict=True):
                assert one["sequence"] == text
                assert one["scores"] == sorted(one["scores"], reverse=True)
                scores = dict(zip(one["labels"], one["scores"], strict=True))
                assert scores == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)
        with pytest.raises(ValueError, match="multi_label needs a model trained on NLI, and this is a"):
            pipe(texts, LABELS, multi_label=True)
        with pytest.raises(ValueError, match="two or more candidate_labels"):
            pipe(texts, ["tea"])
        with pytest.raises(ValueError, match=r"must have one \{\} for the label"):
            pipe(texts, LABELS, hypothesis_template="the label")
        with pytest.raises(ValueError, match="zero-shot-classification needs a text"):
            pipe(" ", LABELS)
    with pytest.raises(ValueError, match=r"must end with \{\}, and is 'the \{\} is old'"):
        pipeline("zero-shot-classification", model=causal)(texts, LABELS, hypothesis_template="the {} is old")


def test_a_masked_language_model_has_no_way(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert", "ForMaskedLM")
    with pytest.raises(ValueError, match="needs a model trained on NLI: its classes are LABEL_0, LABEL_1"):
        pipeline("zero-shot-classification", model=folder, device="cpu")(TEXTS[0], LABELS)
