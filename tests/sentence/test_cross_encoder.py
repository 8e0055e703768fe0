"""CrossEncoder against sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from tiny_models import TEXTS, save_model

from minilm.files import FileError
from minilm.sentence.cross_encoder import CrossEncoder

PAIRS = [
    ("Who lives in Paris?", "John Smith lives in Paris."),
    ("Who lives in Paris?", "Éric drinks tea in 北京 😀"),
    ("anna", TEXTS[2]),
    ("", "an empty question"),
    ("the old city", "the river " * 60),
]


def save(folder: Path, family: str = "bert", **options: Any) -> Path:
    return save_model(folder, family, "ForSequenceClassification", positions=80, **options)


def both(folder: Path, **options: Any) -> tuple[CrossEncoder, Any]:
    return (
        CrossEncoder(folder, device="cpu", **options),
        sentence_transformers.CrossEncoder(str(folder), device="cpu", **options),
    )


@pytest.mark.filterwarnings("ignore:1 of . pairs have more than:UserWarning")
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_scores(tmp_path: Path, family: str, num_labels: int) -> None:
    ours, theirs = both(save(tmp_path, family, num_labels=num_labels))
    expected = theirs.predict(PAIRS)
    found = ours.predict(PAIRS, batch_size=2)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-4)
    raw = torch.nn.Identity()
    assert theirs.predict(PAIRS, activation_fn=raw).std() > 0.1
    np.testing.assert_allclose(
        ours.predict(PAIRS, activation_fn=raw), theirs.predict(PAIRS, activation_fn=raw), atol=1e-4
    )
    np.testing.assert_allclose(
        ours.predict(PAIRS, apply_softmax=True), theirs.predict(PAIRS, apply_softmax=True), atol=1e-5
    )
    one = ours.predict(PAIRS[0])
    np.testing.assert_allclose(one, expected[0], atol=1e-4)
    assert np.shape(one) == np.shape(theirs.predict(PAIRS[0]))
    tensor = ours.predict(PAIRS, convert_to_tensor=True)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-4)
    assert [float(s.sum()) for s in ours.predict(PAIRS, convert_to_numpy=False)] == pytest.approx(
        tensor.reshape(5, -1).sum(1).tolist()
    )
    assert len(ours.predict([])) == 0


def test_ranking(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, num_labels=1), max_length=30)
    documents = ["John Smith lives in Paris.", "tea", "the old river", "anna was in berlin"]
    for options in ({}, {"top_k": 2}, {"return_documents": True}):
        found, expected = (
            ours.rank("Who lives?", documents, **options),
            theirs.rank("Who lives?", documents, **options),
        )
        assert [list(answer) for answer in found] == [list(answer) for answer in expected]
        assert [answer["corpus_id"] for answer in found] == [answer["corpus_id"] for answer in expected]
        assert [answer["score"] for answer in found] == pytest.approx(
            [answer["score"] for answer in expected], abs=1e-5
        )


def test_length(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, num_labels=1), max_length=20)
    assert ours.max_length == ours.max_seq_length == 20
    with pytest.warns(UserWarning, match="1 of 1 pairs have more than 20 tokens, and were cut"):
        found = ours.predict([PAIRS[4]])
    np.testing.assert_allclose(found, theirs.predict([PAIRS[4]]), atol=1e-5)


@pytest.mark.parametrize("where", ["config", "older config", "sentence-transformers"])
def test_the_activation_of_the_model(tmp_path: Path, where: str) -> None:
    folder = save(tmp_path, num_labels=1)
    name = "torch.nn.modules.activation.Tanh"
    config = json.loads((folder / "config.json").read_text())
    if where == "config":
        config["sentence_transformers"] = {"activation_fn": name}
    elif where == "older config":
        config["sbert_ce_default_activation_function"] = name
    else:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": name}))
    (folder / "config.json").write_text(json.dumps(config))
    ours = CrossEncoder(folder, device="cpu")
    logits = ours.predict(PAIRS[:3], activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(ours.predict(PAIRS[:3]), np.tanh(logits), atol=1e-6)
    if where != "sentence-transformers":  # which it reads only beside modules.json
        theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu")
        np.testing.assert_allclose(ours.predict(PAIRS[:3]), theirs.predict(PAIRS[:3]), atol=1e-5)


def test_saving(tmp_path: Path) -> None:
    theirs = sentence_transformers.CrossEncoder(
        str(save(tmp_path / "a", num_labels=1)), device="cpu", activation_fn=torch.nn.Tanh()
    )
    theirs.save_pretrained(str(tmp_path / "b"))
    expected = theirs.predict(PAIRS[:3])
    ours = CrossEncoder(tmp_path / "b", device="cpu")
    np.testing.assert_allclose(ours.predict(PAIRS[:3]), expected, atol=1e-5)
    ours.save_pretrained(tmp_path / "c")
    again = sentence_transformers.CrossEncoder(str(tmp_path / "c"), device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS[:3]), expected, atol=1e-5)
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "c", device="cpu").predict(PAIRS[:3]), expected, atol=1e-5
    )


def test_a_base_model_gets_one_fresh_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = CrossEncoder(save_model(tmp_path, "bert"), device="cpu")
    assert model.num_labels == 1
    assert "has no classifier." in caplog.text
    assert "these weights are random, train them before use" in caplog.text
    assert CrossEncoder(tmp_path, num_labels=4, device="cpu").predict([("a", "b")]).shape == (1, 4)


def test_prompts(tmp_path: Path) -> None:
    """Before the first text of a pair; that of the files by default, kept when saving."""
    folder = save(tmp_path / "a", num_labels=1)
    theirs = sentence_transformers.CrossEncoder(
        str(folder), device="cpu", prompts={"q": "who: ", "d": "the "}, default_prompt_name="q"
    )
    theirs.save_pretrained(str(tmp_path / "b"))
    ours = CrossEncoder(tmp_path / "b", device="cpu")
    ours.save_pretrained(tmp_path / "c")
    for options in ({}, {"prompt_name": "d"}, {"prompt": "where "}, {"prompt": ""}):
        expected = theirs.predict(PAIRS[:4], **options)
        np.testing.assert_allclose(ours.predict(PAIRS[:4], **options), expected, atol=1e-5)
        again = CrossEncoder(tmp_path / "c", device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS[:4], **options), expected, atol=1e-5)
    with pytest.raises(ValueError, match="there is no prompt 'x'; the model has d, q"):
        ours.predict(PAIRS[:1], prompt_name="x")


def test_bad_input(tmp_path: Path) -> None:
    model = CrossEncoder(save(tmp_path, num_labels=2), device="cpu")
    for bad in ("text", 3, b"text"):
        with pytest.raises(TypeError, match="expected a pair of texts or a list of pairs, got"):
            model.predict(bad)  # type: ignore[arg-type]
    for pairs, index in (([("a", "b"), "c"], 1), ([("a", "b", "c")], 0), ([("a", 3)], 0)):
        with pytest.raises(TypeError, match=f"expected pairs of texts, but number {index} is"):
            model.predict(pairs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one score per pair, and this one has 2"):
        model.rank("a", ["b"])
    with pytest.raises(TypeError, match="there is no option maxlength"):
        CrossEncoder(tmp_path, maxlength=3)
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_Dense", "type": "sentence_transformers.models.Dense"},
            ]
        )
    )
    with pytest.raises(FileError, match="a Transformer and LogitScore, and it lists Transformer, Dense"):
        CrossEncoder(tmp_path)
