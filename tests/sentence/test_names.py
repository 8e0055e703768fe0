"""Arguments by the names and in the orders of sentence-transformers, now and before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import save_model
from tiny_sentence import build

from minilm import differences
from minilm.sentence import CrossEncoder, SentenceEncoder
from minilm.sentence.names import answering_to

PAIRS = [("anna", "berlin"), ("who lives?", "the old man")]


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Each test hears its warnings."""
    before = set(differences.said)
    differences.said.clear()
    yield
    differences.said.clear()
    differences.said.update(before)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("ranker"), "bert", "ForSequenceClassification", num_labels=1)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceEncoder, Any]:
    folder = tmp_path_factory.mktemp("encoder")
    theirs = build(folder, Pooling(24), Normalize(), prompts={"query": "tea "})
    return SentenceEncoder(folder / "model", device="cpu"), theirs


IDENTITY = torch.nn.Identity()
CONSTRUCTED: dict[str, Callable[[Any, str], Any]] = {
    "model_name": lambda kind, name: kind(model_name=name, device="cpu"),
    "automodel_args": lambda kind, name: kind(name, device="cpu", automodel_args={"dtype": torch.float32}),
    "tokenizer_args": lambda kind, name: kind(name, device="cpu", tokenizer_args={"model_max_length": 5}),
    "tokenizer_kwargs": lambda kind, name: kind(name, device="cpu", tokenizer_kwargs={"model_max_length": 5}),
    "config_args": lambda kind, name: kind(name, device="cpu", config_args={"num_labels": 1}),
    "default_activation_function": lambda kind, name: kind(
        name, device="cpu", default_activation_function=IDENTITY
    ),
    "classifier_dropout": lambda kind, name: kind(name, device="cpu", classifier_dropout=0.3),
    "by position": lambda kind, name: kind(name, 1, 6, IDENTITY, "cpu"),
    "config_kwargs": lambda kind, name: kind(name, device="cpu", config_kwargs={"num_labels": 1}),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", CONSTRUCTED)
def test_cross_encoders_are_made_by_older_names(ranker: Path, how: str) -> None:
    ours, theirs = (
        CONSTRUCTED[how](kind, str(ranker)) for kind in (CrossEncoder, sentence_transformers.CrossEncoder)
    )
    expected = theirs.predict(PAIRS)
    np.testing.assert_allclose(ours.predict(PAIRS), expected, atol=1e-4)
    if how in ("tokenizer_args", "default_activation_function", "by position"):
        assert np.abs(CrossEncoder(ranker, device="cpu").predict(PAIRS) - expected).max() > 1e-3


CALLS: dict[str, Callable[[Any], Any]] = {
    "activation_fct": lambda m: m.predict(PAIRS, activation_fct=IDENTITY),
    "inputs": lambda m: m.predict(inputs=PAIRS),
    "sentences": lambda m: m.predict(sentences=PAIRS),
    "num_workers": lambda m: m.predict(PAIRS, num_workers=0),
    "prompts by position": lambda m: m.predict(PAIRS, None, None, 1, False, IDENTITY),
    "prompt=None": lambda m: m.predict(PAIRS, prompt=None, prompt_name=None, device=None),
    "rank": lambda m: [r["score"] for r in m.rank("anna", ["tea", "berlin"], activation_fct=IDENTITY)],
    "rank with workers": lambda m: [r["score"] for r in m.rank("anna", ["tea", "berlin"], num_workers=0)],
    "rank softmax": lambda m: [r["score"] for r in m.rank("anna", ["tea", "berlin"], apply_softmax=True)],
    "rank by position": lambda m: [
        r["score"] for r in m.rank("anna", ["tea", "berlin"], 1, True, None, None, 4)
    ],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", CALLS)
def test_cross_encoders_are_called_by_older_names(ranker: Path, how: str) -> None:
    ours = CrossEncoder(ranker, device="cpu")
    theirs = sentence_transformers.CrossEncoder(str(ranker), device="cpu")
    np.testing.assert_allclose(CALLS[how](ours), CALLS[how](theirs), atol=1e-4)


def test_orders_of_earlier_versions(ranker: Path, encoders: Any) -> None:
    """batch_size came first before there were prompts; version 3 of the cross-encoder had workers."""
    model, encoder = CrossEncoder(ranker, device="cpu"), encoders[0]
    raw = model.predict(PAIRS, activation_fn=IDENTITY)
    assert np.abs(raw - model.predict(PAIRS)).max() > 1e-3
    for order in ((1, False, IDENTITY), (1, False, 0, IDENTITY), (None, None, 1, False, IDENTITY)):
        np.testing.assert_allclose(model.predict(PAIRS, *order), raw, atol=1e-6)
    assert isinstance(model.predict(PAIRS, 32, False, None, False, True, True), torch.Tensor)
    found = [r["score"] for r in model.rank("anna", ["tea", "berlin"], 2, False, 32, False, IDENTITY)]
    assert found == [r["score"] for r in model.rank("anna", ["tea", "berlin"], activation_fn=IDENTITY)]
    tensor = encoder.encode(["anna"], 8, False, "sentence_embedding", False, True)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor, encoder.encode(["anna"]))


@pytest.mark.parametrize("name", ["encode", "encode_query", "encode_document"])
def test_encoders_are_called_as_sentence_transformers_are(encoders: Any, name: str) -> None:
    texts = ["anna lives", "in berlin"]
    calls: list[Callable[[Any], Any]] = [
        lambda m: getattr(m, name)(inputs=texts),
        lambda m: getattr(m, name)(sentences=texts),
        lambda m: getattr(m, name)(texts, "query"),
        lambda m: getattr(m, name)(texts, None, "the "),
        lambda m: getattr(m, name)(
            texts, None, "the ", 1, False, "sentence_embedding", "float32", True, False
        ),
        lambda m: getattr(m, name)(texts, prompt=None, pool=None, chunk_size=None),
    ]
    for call in calls:
        np.testing.assert_allclose(call(encoders[0]), call(encoders[1]), atol=1e-5)


def test_each_older_name_warns_once_and_newer_ones_never(ranker: Path, encoders: Any) -> None:
    model = CrossEncoder(ranker, device="cpu")
    with pytest.warns(FutureWarning, match=r"CrossEncoder\.predict: activation_fct is now called"):
        model.predict(PAIRS, activation_fct=IDENTITY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(PAIRS, activation_fct=IDENTITY)
        model.predict(inputs=PAIRS)
        encoders[0].encode(inputs=["anna"])
    with pytest.warns(FutureWarning, match="tokenizer_kwargs is now called processor_kwargs"):
        SentenceEncoder(encoders[0].transformer.model.name_or_path, device="cpu", tokenizer_kwargs={})


def test_nothing_is_given_twice(ranker: Path, encoders: Any) -> None:
    model = CrossEncoder(ranker, device="cpu")
    with pytest.raises(TypeError, match="activation_fct is the older name of activation_fn, and both"):
        model.predict(PAIRS, activation_fct=IDENTITY, activation_fn=IDENTITY)
    with pytest.raises(TypeError, match="inputs is another name of sentences, and both are given"):
        encoders[0].encode(["a"], inputs=["a"])
    with pytest.raises(TypeError, match="got two values for batch_size"):
        encoders[0].encode(["a"], 3, batch_size=3)
    with pytest.raises(TypeError, match="takes at most 12 arguments by position"):
        encoders[0].encode(["a"], *[None] * 12)
    with pytest.raises(TypeError, match="model_name_or_path"):
        CrossEncoder()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'activationfn'"):
        model.predict(PAIRS, activationfn=IDENTITY)  # type: ignore[call-arg]


def test_the_methods_stay_what_they_are() -> None:
    """Their names, documentation and signatures are seen through."""
    import inspect

    assert list(inspect.signature(SentenceEncoder.encode).parameters)[:3] == [
        "self",
        "sentences",
        "batch_size",
    ]
    assert "batch_size" in (SentenceEncoder.encode.__doc__ or "")

    class Thing:
        @answering_to(older={"b": "a"}, order=lambda values: ("c", "d"))
        def run(self, x: int, *, a: int = 0, c: int = 0, d: int = 0) -> tuple[int, ...]:
            return x, a, c, d

    with pytest.warns(FutureWarning, match=r"Thing\.run: b is now called a"):
        assert Thing().run(1, 3, 4, b=2) == (1, 2, 3, 4)  # type: ignore[call-arg, misc]


# What can be encoded


class Series:
    """As pandas has them: items by labels, and in order by iteration."""

    ndim = 1

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, label: Any) -> Any:
        raise KeyError(label)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Rows:
    """A dataset as torch has them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> str:
        return ["anna", "", "in berlin"][index % 3]


class Table(Series):
    """As pandas' DataFrame: iteration gives the names of columns."""

    ndim = 2


def test_kinds_of_sequences(encoders: Any) -> None:
    texts = ["anna", "", "in berlin"]
    model, theirs = encoders
    expected = theirs.encode(texts)
    arrays = (np.array(texts), np.array(texts, dtype=object))
    lazily = (iter(texts), (text for text in texts), dict.fromkeys(texts).keys())
    for several in (texts, tuple(texts), *arrays, Series(texts), Rows(), *lazily):
        np.testing.assert_allclose(model.encode(several), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(np.array(texts)[0]), expected[0], atol=1e-5)
    assert model.encode([""]).shape == (1, 24)
    assert model.encode(np.array([], dtype=str)).shape == (0, 24)
    assert model.encode(()).shape == (0, 24)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "got NoneType"),
        (["a", None], "number 1 is NoneType"),
        (Series(["a", float("nan")]), "number 1 is float: nan"),
        (np.array(["a", None], dtype=object), "number 1 is NoneType"),
        (np.array("a"), "got ndarray of 0 dimensions"),
        (np.array([["a", "b"]]), "got ndarray of 2 dimensions"),
        (Table(["name"]), "got Table of 2 dimensions"),
        (torch.ones(2), "got Tensor"),
        ({"a", "b"}, "got set"),
        (frozenset("ab"), "got frozenset"),
        ({"text": "a"}, "got dict"),
        (bytearray(b"a"), "got bytearray"),
        (["a", ["b"]], "number 1 is list"),
        (["a", np.array(["b"])], "number 1 is ndarray"),
        (3.5, "got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_text_is_refused(encoders: Any, bad: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encoders[0].encode(bad)
