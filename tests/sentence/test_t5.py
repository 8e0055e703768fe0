"""sentence-t5: T5's encoder, mean pooling, a matrix and normalisation, as in sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import tiny_pieces
import torch
from sentence_transformers import models
from tiny_seq2seq import with_tokenizer

import minilm

TEXTS = [*tiny_pieces.TEXTS[:2], "dogs", "the cat sat on a mat " * 5]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_vectors_as_in_sentence_transformers(kind: str, tmp_path: Path) -> None:
    """Texts are cut, batches padded; saved by minilm, both read it."""
    source = with_tokenizer(kind, tiny_pieces.t5(tmp_path / "source"))
    transformer = models.Transformer(str(source), max_seq_length=9)
    dense = models.Dense(24, 17, bias=False, activation_function=torch.nn.Identity())
    modules = [transformer, models.Pooling(24, "mean"), dense, models.Normalize()]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "a"))
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "a"), device="cpu")
    ours = minilm.SentenceEncoder(str(tmp_path / "a"), device="cpu")
    assert type(ours.transformer.model).__name__ == type(theirs[0].auto_model).__name__
    expected = theirs.encode(TEXTS)
    assert ours.encode(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert ours.encode(TEXTS, batch_size=1) == pytest.approx(expected, abs=1e-5)
    features = ours(ours.tokenize(TEXTS[:2]))
    assert features["sentence_embedding"].detach().numpy() == pytest.approx(expected[:2], abs=1e-5)
    ours.save_pretrained(str(tmp_path / "b"))
    back = sentence_transformers.SentenceTransformer(str(tmp_path / "b"), device="cpu")
    assert back.encode(TEXTS) == pytest.approx(expected, abs=1e-5)
    again = minilm.SentenceEncoder(str(tmp_path / "b"), device="cpu").encode(TEXTS)
    assert np.array_equal(again, ours.encode(TEXTS))


def test_a_folder_of_a_whole_t5(tmp_path: Path) -> None:
    """Without modules.json: the encoder with mean pooling, as there."""
    source = str(with_tokenizer("t5", tiny_pieces.t5(tmp_path)))
    ours = minilm.SentenceEncoder(source, device="cpu")
    assert type(ours.transformer.model).__name__ == "T5EncoderModel"
    theirs = sentence_transformers.SentenceTransformer(source, device="cpu")
    assert ours.encode(TEXTS) == pytest.approx(theirs.encode(TEXTS), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "feature-extraction",
            "a T5Model writes texts, and has no states of a text alone",
        ),
        (
            "text-generation",
            "t5 models have no causal-lm head; they have: .*; AutoModelForSeq2SeqLM, and",
        ),
        ("fill-mask", "t5 models have no masked-lm head"),
    ],
)
def test_tasks_that_t5_has_not(task: str, message: str, tmp_path: Path) -> None:
    source = with_tokenizer("t5", tiny_pieces.t5(tmp_path))
    with pytest.raises(ValueError, match=message):
        minilm.pipeline(task, model=source, device="cpu")("the cat")
    with pytest.raises(ValueError, match="t5 models have no causal-lm head"):
        minilm.LLM(str(source))
