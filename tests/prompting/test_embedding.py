"""Labels by similarity, against the formula with vectors of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import TEXTS
from tiny_sentence import build

from minilm import SentenceEncoder
from minilm.prompting import EmbeddingClassifier, PromptedEntities

ITEMS = [TEXTS[0], TEXTS[1], TEXTS[4], "the green river"]
LABELS = {"person": "john smith", "place": ["paris", "the old city"], "drink": "tea"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceEncoder, Any]:
    folder = tmp_path_factory.mktemp("encoder")
    theirs = build(folder, lambda: Pooling(24))
    return SentenceEncoder(folder / "model", device="cpu"), theirs


def by_hand(theirs: Any, items: list[str], known: dict[str, list[str]], temperature: float) -> Any:
    """softmax(cosine / temperature), float64 [items, labels]."""

    def unit(x: Any) -> Any:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    labels = np.stack([unit(unit(theirs.encode(texts)).mean(0)) for texts in known.values()])
    powers = np.exp(unit(theirs.encode(items)) @ labels.T / temperature)
    return powers / powers.sum(-1, keepdims=True)


def test_descriptions(both: tuple[SentenceEncoder, Any]) -> None:
    ours, theirs = both
    classify = EmbeddingClassifier(ours, LABELS, hypothesis="it is {}.", temperature=0.2, batch_size=2)
    known = {"person": ["it is john smith."], "place": ["it is paris.", "it is the old city."]}
    expected = by_hand(theirs, ITEMS, {**known, "drink": ["it is tea."]}, 0.2)
    np.testing.assert_allclose(classify.probabilities(ITEMS), expected, atol=1e-5)
    np.testing.assert_allclose(classify.scores(ITEMS), np.log(expected), atol=1e-4)
    assert classify.predict(ITEMS) == [list(LABELS)[i] for i in expected.argmax(-1)]
    assert classify.scores([]).shape == (0, 3)
    assert (expected.std(0) > 0.01).all()


def test_examples_calibration_and_fields(both: tuple[SentenceEncoder, Any]) -> None:
    ours, theirs = both
    examples = [("mary", "b"), ("anna", "b"), ("red", "a")]
    classify = EmbeddingClassifier(ours, ["a", "b"], template="the {x} x", examples=examples, calibrate=True)
    known = {"a": ["a", "the red x"], "b": ["b", "the mary x", "the anna x"]}
    items = by_hand(theirs, [f"the {item} x" for item in ("old man", "tea")], known, 0.05)
    nothing = by_hand(theirs, ["the N/A x", "the  x", "the ... x"], known, 0.05).mean(0)
    expected = items / nothing
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(classify.probabilities([{"x": "old man"}, "tea"]), expected, atol=1e-4)
    assert not np.allclose(expected, items, atol=1e-2)
    find = PromptedEntities(
        EmbeddingClassifier(ours, {"yes": "john", "none": "of"}, template="{text} {span}"), max_words=1
    )
    assert {found["entity_group"] for found in find("john of paris")} <= {"yes"}


def test_bad_input(both: tuple[SentenceEncoder, Any]) -> None:
    for labels, options, words in (
        (["a"], {}, "labels must be two or more texts"),
        ("ab", {}, "labels must be two or more texts"),
        (["a", "a"], {}, "labels must be different texts"),
        (["a", " "], {}, "the label ' ' needs a text that describes it"),
        ({"a": "x", "b": []}, {}, "the label 'b' needs a text that describes it"),
        (["a", "b"], {"hypothesis": "about"}, "hypothesis must have one {} for the label, and is 'about'"),
        (["a", "b"], {"hypothesis": "{} {}"}, "hypothesis must have one {}"),
        (["a", "b"], {"template": "{text} {mask}"}, "must not have {mask}"),
        (["a", "b"], {"examples": [("x", "c")]}, "an example has the label 'c', and the labels are a, b"),
        (["a", "b"], {"temperature": 0.0}, "temperature must be a positive number"),
        (["a", "b"], {"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=words):
            EmbeddingClassifier(both[0], labels, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected several items"):
        EmbeddingClassifier(both[0], ["a", "b"]).predict("a text")


@pytest.mark.slow
def test_with_the_real_model() -> None:
    classify = EmbeddingClassifier("all-MiniLM-L6-v2", ["sport", "politics", "weather"])
    texts = ["The striker scored twice.", "Parliament passed the budget.", "Rain is expected in the north."]
    assert classify.predict(texts) == ["sport", "politics", "weather"]


def test_other_paths_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such file or folder") as caught:
        EmbeddingClassifier(tmp_path / "none", ["a", "b"])
    assert len(str(caught.value).splitlines()) == 1
