"""Options of pipelines by the names that transformers had for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from same import assert_same
from tiny_models import CORPUS, save_decoder, save_model

from minilm import differences
from minilm.pipelines import pipeline

NAMES = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Each test hears its warnings."""
    before = set(differences.said)
    differences.said.clear()
    yield
    differences.said.clear()
    differences.said.update(before)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tagger"), "bert", "ForTokenClassification", seed=3, **NAMES)


@pytest.mark.parametrize(
    ("older", "strategy"),
    [
        ({"grouped_entities": True}, "simple"),
        ({"grouped_entities": True, "ignore_subwords": False}, "simple"),
        ({"grouped_entities": True, "ignore_subwords": True}, "first"),
        ({"grouped_entities": False}, "none"),
        ({"grouped_entities": False, "ignore_subwords": True}, "none"),
    ],
)
def test_grouped_entities(tagger: Path, older: dict[str, bool], strategy: str) -> None:
    pipe, text = pipeline("ner", model=tagger, device="cpu"), " ".join(CORPUS[:2])
    expected = pipe(text, aggregation_strategy=strategy)
    assert len(expected) > 3
    with pytest.warns(FutureWarning, match=f"is replaced by aggregation_strategy='{strategy}'"):
        assert pipe(text, **older) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe(text, **older) == expected
        assert pipeline("ner", model=tagger, device="cpu", **older)(text) == expected
    with pytest.raises(TypeError, match="is an older form of aggregation_strategy"):
        pipe(text, aggregation_strategy="max", **older)


@pytest.mark.parametrize("labels", [1, 3])
def test_return_all_scores(tmp_path: Path, labels: int) -> None:
    """All classes in the order of the model; of a text alone in a list of one, as in transformers 4."""
    folder = save_model(tmp_path, "bert", "ForSequenceClassification", num_labels=labels)
    pipe = pipeline("text-classification", model=folder, device="cpu")
    ranked = pipe([CORPUS[0]], top_k=None)[0]
    in_order = sorted(ranked, key=lambda found: str(found["label"]))
    with pytest.warns(FutureWarning, match="return_all_scores is replaced by top_k=None"):
        assert_same(pipe(CORPUS[0], return_all_scores=True), [in_order])
    assert_same(pipe([CORPUS[0]] * 2, return_all_scores=True), [in_order] * 2)
    assert_same(pipe(CORPUS[0], return_all_scores=False), pipe(CORPUS[0]))
    assert_same(pipe(CORPUS[0], return_all_scores=True, top_k=None), ranked)
    made = pipeline("text-classification", model=folder, device="cpu", return_all_scores=True)
    assert_same(made([CORPUS[0]]), [in_order])


def test_topk(tmp_path: Path) -> None:
    fill = pipeline("fill-mask", model=save_model(tmp_path / "a", "bert", "ForMaskedLM"), device="cpu")
    with pytest.warns(FutureWarning, match="fill-mask: topk is now called top_k"):
        assert fill("anna [MASK]", topk=2) == fill("anna [MASK]", top_k=2)
    with pytest.raises(TypeError, match="topk is the older name of top_k, and both are given"):
        fill("anna [MASK]", topk=2, top_k=3)
    folder = save_model(tmp_path / "b", "bert", "ForQuestionAnswering")
    answer = pipeline("question-answering", model=folder, device="cpu")
    example = {"question": "who lives?", "context": CORPUS[0]}
    with pytest.warns(FutureWarning, match="question-answering: topk is now called top_k"):
        assert answer(example, topk=3) == answer(example, top_k=3)
    assert answer(example, topk=1) == answer(example)


@pytest.mark.parametrize("name", ["data", "X"])
def test_examples_by_name(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path, "bert", "ForQuestionAnswering")
    answer = pipeline("question-answering", model=folder, device="cpu")
    examples = [{"question": "who lives?", "context": text} for text in CORPUS[:2]]
    with pytest.warns(FutureWarning, match=f"{name}= is now the first positional argument"):
        assert answer(**{name: examples}) == answer(examples)
    assert answer(**{name: examples[0]}) == answer(examples[0])


def test_text_inputs_and_the_token(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, "gpt2")
    with pytest.warns(FutureWarning, match="pipeline: use_auth_token is now called token"):
        write = pipeline("text-generation", model=folder, device="cpu", use_auth_token="t")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    assert write(text_inputs="Anna", **options) == write("Anna", **options)
    assert write(text_inputs=["Anna"], **options) == write(["Anna"], **options)
    with pytest.raises(TypeError, match="they are the same argument"):
        write("Anna", text_inputs="Anna", **options)
    with pytest.raises(TypeError, match="takes a text or several, and got"):
        write(**options)
    for bad in ({"text": "Anna"}, {"Anna"}, {"role": "user", "content": "Anna"}):
        with pytest.raises(TypeError, match="text-generation takes a text or several, and got"):
            list(write(bad, **options))
