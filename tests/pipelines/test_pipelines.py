"""Pipelines for whole texts, against transformers.pipeline on random models; and what all pipelines share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from same import assert_same
from tiny_models import TEXTS, save_model

import minilm
from minilm import AutoModelForMaskedLM, AutoModelForTokenClassification, AutoTokenizer
from minilm.pipelines import TASKS, FillMaskPipeline, TextClassificationPipeline, pipeline

FAMILIES = ("bert", "roberta", "distilbert", "mpnet", "electra")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """folders(family, head, **options of the configuration) -> the folder of a tiny model, made once."""
    made: dict[Any, Path] = {}

    def folder(family: str, head: str, **options: Any) -> Path:
        key = (family, head, repr(options))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family), family, head, **options)
        return made[key]

    return folder


def both(task: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Our pipeline and transformers'."""
    ours = pipeline(task, model=folder, device="cpu", **options)
    return ours, transformers.pipeline(task, model=str(folder), device=-1, **options)


def quiet(call: Any, *args: Any, **options: Any) -> Any:
    """A call whose warnings about cut texts are not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **options)


# feature-extraction


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_extraction(folders: Any, family: str) -> None:
    ours, theirs = both("feature-extraction", folders(family, "Model"))
    expected = theirs(TEXTS, truncation=True)
    assert_same(quiet(ours, TEXTS), expected)
    assert_same(ours(TEXTS[2]), theirs(TEXTS[2]))
    assert_same(
        ours(TEXTS, truncation=True, max_length=7),
        theirs(TEXTS, tokenize_kwargs={"truncation": True, "max_length": 7}),
    )
    tensor = ours(TEXTS[0], return_tensors=True)
    torch.testing.assert_close(tensor, theirs(TEXTS[0], return_tensors=True), atol=1e-5, rtol=0)


def test_feature_extraction_has_a_default_model() -> None:
    extract = pipeline("feature-extraction", device="cpu")
    assert np.array(extract("hello world")).shape == (1, 4, 384)


# fill-mask


@pytest.mark.parametrize("family", FAMILIES)
def test_fill_mask(folders: Any, family: str) -> None:
    ours, theirs = both("fill-mask", folders(family, "ForMaskedLM"))
    mask = ours.tokenizer.mask_token
    one = f"john lives in {mask}, the old city."
    assert_same(ours(one), theirs(one))
    assert_same(ours([one]), theirs([one]))
    assert_same(ours([one, f"{mask} was in 北京"], top_k=3), theirs([one, f"{mask} was in 北京"], top_k=3))
    several = f"{mask} works in the {mask} {mask}."
    assert_same(ours(several, top_k=2), theirs(several, top_k=2))
    assert len(ours(several)) == 3
    assert_same(ours([several, one]), theirs([several, one]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["paris", ["paris", "london", "green"], ["parisland", "tea"], ["x" * 5]])
def test_fill_mask_targets(folders: Any, family: str, targets: Any) -> None:
    ours, theirs = both("fill-mask", folders(family, "ForMaskedLM"))
    text = f"john lives in {ours.tokenizer.mask_token}."
    found = ours(text, targets=targets, top_k=2)
    assert_same(found, theirs(text, targets=targets, top_k=2))
    assert len(found) <= len([targets] if isinstance(targets, str) else targets)


def test_fill_mask_of_long_texts(folders: Any) -> None:
    ours, theirs = both("fill-mask", folders("bert", "ForMaskedLM"))
    long = "the old [MASK]" + " of the city" * 60
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 64 tokens"):
        found = ours([long, "the [MASK]"])
    assert_same(found[0], theirs(long, tokenizer_kwargs={"truncation": True}))
    assert_same(ours(long, tokenizer_kwargs={"truncation": True}), found[0])
    with pytest.raises(ValueError, match=r"no \[MASK\] in the first 64 tokens of the text"):
        ours("of the city " * 60 + "[MASK]")


def test_fill_mask_bad_input(folders: Any) -> None:
    fill = pipeline("fill-mask", model=folders("bert", "ForMaskedLM"), device="cpu")
    with pytest.raises(ValueError, match=r"no \[MASK\] in the text 'the city'"):
        fill("the city")
    with pytest.raises(ValueError, match="targets must name at least one token"):
        fill("the [MASK]", targets=[])
    with pytest.raises(ValueError, match="top_k must be a positive integer, and is 0"):
        fill("the [MASK]", top_k=0)
    with pytest.raises(TypeError, match="takes texts, and got int: 3"):
        fill(["the [MASK]", 3])
    assert len(fill("the [MASK]", top_k=10**6)) == fill.model.spec.vocab_size


# text-classification

LABELS = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_classification(folders: Any, family: str) -> None:
    ours, theirs = both("text-classification", folders(family, "ForSequenceClassification", **LABELS))
    expected = theirs(TEXTS, truncation=True)
    assert len({answer["label"] for answer in expected}) > 1
    assert_same(quiet(ours, TEXTS), expected)
    for options in ({}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "none"}):
        assert_same(ours(TEXTS[0], **options), theirs(TEXTS[0], **options))
        assert_same(ours(TEXTS[:3], **options), theirs(TEXTS[:3], **options))
    assert_same(ours(TEXTS[0], function_to_apply="sigmoid"), theirs(TEXTS[0], function_to_apply="sigmoid"))
    assert_same(ours(TEXTS[0], function_to_apply="default"), theirs(TEXTS[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_texts(folders: Any, family: str) -> None:
    ours, theirs = both(
        "text-classification", folders(family, "ForSequenceClassification", **LABELS), top_k=None
    )
    texts = ["John Smith lives in Paris.", "Éric was in 北京?"]
    pairs = [
        {"text": texts[0], "text_pair": texts[1]},
        {"text": texts[1], "text_pair": "anna"},
        {"text": "anna"},
    ]
    assert_same(ours(pairs), theirs(pairs))
    assert_same(ours(pairs[0]), theirs(pairs[0]))
    swapped = {"text": texts[1], "text_pair": texts[0]}
    assert ours(swapped) != ours(pairs[0])
    assert_same(ours("anna"), theirs("anna"))  # top_k of the constructor: a list in a list


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "single_label_classification"},
    ],
)
def test_functions_of_problem_types(folders: Any, options: Any) -> None:
    ours, theirs = both("sentiment-analysis", folders("bert", "ForSequenceClassification", **options))
    assert_same(ours(TEXTS[:3], top_k=None), theirs(TEXTS[:3], top_k=None))


def test_lengths_of_classified_texts(folders: Any) -> None:
    classify, theirs = both("text-classification", folders("bert", "ForSequenceClassification", **LABELS))
    long = "the old city " * 50
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 64 tokens, and were cut"):
        found = classify(long)
    assert_same(found, theirs(long, truncation=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(classify(long, truncation=True), found)
        assert_same(
            classify(long, truncation=True, max_length=9), theirs(long, truncation=True, max_length=9)
        )
        assert_same(classify(long, max_length=9), theirs(long, truncation=True, max_length=9))
    with pytest.raises(ValueError, match="only 64"):
        classify(long, truncation=False)


def test_text_classification_bad_input(folders: Any) -> None:
    classify = pipeline(
        "text-classification", model=folders("bert", "ForSequenceClassification", **LABELS), device="cpu"
    )
    for bad in ([["a", "b"]], [("a", "b")]):
        with pytest.raises(TypeError, match=r'a pair of texts is \{"text": ..., "text_pair": ...\}, not'):
            classify(bad)
    with pytest.raises(ValueError, match="a pair of texts is"):
        classify({"text": "a", "pair": "b"})
    with pytest.raises(ValueError, match="function_to_apply must be"):
        classify("a", function_to_apply="tanh")
    with pytest.raises(TypeError, match="text-classification has no option topp; it has top_k, function"):
        classify("a", topp=3)


# What all pipelines share


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_and_iterators_change_nothing(folders: Any, batch_size: int) -> None:
    folder = folders("roberta", "ForSequenceClassification", **LABELS)
    classify = pipeline("text-classification", model=folder, device="cpu", top_k=None)
    expected = [quiet(classify, text)[0] for text in TEXTS]
    assert_same(quiet(classify, TEXTS, batch_size=batch_size), expected, atol=1e-6)
    assert_same(quiet(classify, tuple(TEXTS)), expected, atol=1e-6)
    found = classify((text for text in TEXTS), batch_size=batch_size)
    assert isinstance(found, Iterator)
    assert_same(quiet(list, found), expected, atol=1e-6)
    assert classify([]) == []


def test_an_iterator_is_read_only_as_far_as_results_are_asked_for(folders: Any) -> None:
    classify = pipeline(
        "text-classification", model=folders("bert", "ForSequenceClassification", **LABELS), device="cpu"
    )
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in ("one", "two", "three", "four", "five"):
            read.append(text)
            yield text

    answers = classify(texts())
    assert read == []
    next(answers)
    assert read == ["one"]
    answers = classify(texts(), batch_size=2)
    next(answers)
    assert read == ["one", "one", "two"]


def test_loaded_models(folders: Any) -> None:
    folder = folders("bert", "ForMaskedLM")
    model = AutoModelForMaskedLM.from_pretrained(folder).train()
    fill = pipeline("fill-mask", model=model)
    assert not fill.model.training
    assert isinstance(fill, FillMaskPipeline)
    assert fill.device == torch.device("cpu")
    text = "anna lives in [MASK]"
    assert_same(fill(text), pipeline("fill-mask", model=folder, tokenizer=folder, device=-1)(text))
    assert_same(pipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))(text), fill(text))
    fresh = AutoModelForMaskedLM.from_config(model.config)
    with pytest.raises(ValueError, match="not loaded from files needs a tokenizer"):
        pipeline("fill-mask", model=fresh)


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForMaskedLM", "fill-mask"),
        ("ForSequenceClassification", "text-classification"),
        ("ForTokenClassification", "token-classification"),
        ("ForQuestionAnswering", "question-answering"),
        ("Model", "feature-extraction"),
    ],
)
def test_the_task_is_seen_from_the_model(folders: Any, head: str, task: str) -> None:
    assert pipeline(model=folders("distilbert", head), device="cpu").task == task


def test_dtype_and_device(folders: Any) -> None:
    folder = folders("bert", "ForSequenceClassification", **LABELS)
    exact = pipeline("text-classification", model=folder, device="cpu", top_k=None)
    half = pipeline("text-classification", model=folder, device="cpu", dtype="bfloat16", top_k=None)
    assert half.model.dtype == torch.bfloat16
    scores = [{answer["label"]: answer["score"] for answer in p(TEXTS[0])[0]} for p in (exact, half)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert "bert" in repr(exact)


def test_an_untrained_head_is_announced(folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    classify = pipeline("text-classification", model=folders("bert", "Model"), device="cpu")
    assert isinstance(classify, TextClassificationPipeline)
    assert "has no classifier." in caplog.text
    assert "these weights are random, train them before use" in caplog.text
    assert "classifier.weight" in caplog.text


def test_bad_calls(folders: Any) -> None:
    folder = folders("bert", "ForMaskedLM")
    with pytest.raises(
        ValueError, match=r"unknown task 'conversational'; the tasks are feature-extraction, fill-mask, ner"
    ):
        pipeline("conversational", model=folder)
    with pytest.raises(ValueError, match="bert models are not encoder-decoders, which are t5, mt5"):
        pipeline("translation", model=folder)
    with pytest.raises(ValueError, match="fill-mask needs a model="):
        pipeline("fill-mask")
    with pytest.raises(ValueError, match="pipeline needs a model="):
        pipeline()
    model = AutoModelForTokenClassification.from_config(AutoModelForMaskedLM.from_pretrained(folder).config)
    with pytest.raises(
        ValueError, match="needs an AutoModelForMaskedLM, and the model is a BertForTokenClassification"
    ):
        pipeline("fill-mask", model=model)
    with pytest.raises(TypeError, match="fill-mask has no option topp"):
        pipeline("fill-mask", model=folder, topp=3)
    with pytest.raises(minilm.HubError, match="no such file or folder"):
        pipeline("fill-mask", model=folder / "missing")
    extract = pipeline("feature-extraction", model=folder, device="cpu")
    for bad in (3, None, b"text", torch.ones(2)):
        with pytest.raises(TypeError, match="takes a text or several, and got"):
            extract(bad)
    with pytest.raises(ValueError, match="batch_size must be a positive integer, and is 0"):
        extract(["a"], batch_size=0)
    assert set(TASKS) == {
        *("feature-extraction", "fill-mask", "text-classification", "token-classification"),
        *("question-answering", "text-generation", "zero-shot-classification"),
        *("sentence-similarity", "text-ranking"),
    }
