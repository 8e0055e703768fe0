"""Encoder-decoders in the rest of the library: new tokens, training by Seq2SeqTrainer, conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pieces
import torch
import transformers
from tiny_seq2seq import pair, with_tokenizer
from typer.testing import CliRunner

import minilm
from minilm.cli.app import app
from minilm.conversion import quantize, summarise

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("name", "change"), [("t5", 3), ("t5", -4), ("bart", 3), ("bart", -4), ("marian", 3)]
)
def test_new_tokens(name: str, change: int, tmp_path: Path) -> None:
    """The bias of the logits grows with the table; both libraries read what is saved."""
    theirs, ours = pair(name, tmp_path)
    before = ours(IDS, decoder_input_ids=IDS).logits
    rows = before.shape[2] + change
    for model in (theirs, ours):
        model.resize_token_embeddings(rows, mean_resizing=False)
    found = ours(IDS, decoder_input_ids=IDS).logits
    kept = min(rows, before.shape[2])
    assert found.shape == (1, 3, rows)
    torch.testing.assert_close(found[..., :kept], before[..., :kept], atol=1e-5, rtol=0)
    assert theirs(input_ids=IDS, decoder_input_ids=IDS).logits.shape == found.shape
    if name == "bart":
        assert (ours.head.bias[:, kept:] == 0).all()
        assert (ours.head.bias[:, :kept] != 0).all()
    ours.save_pretrained(tmp_path / "again")
    for library in (transformers, minilm):
        again = library.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(
            again(input_ids=IDS, decoder_input_ids=IDS).logits, found, atol=1e-5, rtol=0
        )


@pytest.mark.slow
def test_seq2seq_trainer(tmp_path: Path) -> None:
    """Losses and texts of transformers' model after the same steps."""
    folder = with_tokenizer("marian", tiny_pieces.marian(tmp_path / "m"), dropout=0.0)
    results: list[Any] = []
    for library in (transformers, minilm):
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        model = library.AutoModelForSeq2SeqLM.from_pretrained(folder)
        texts = [("the cat", "le chat"), ("dogs ran far", "les chiens"), ("a mat", "un tapis")]
        rows = [dict(tokenizer(source, text_target=target)) for source, target in texts]
        arguments = transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            predict_with_generate=True,
            generation_max_length=9,
            generation_num_beams=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = transformers.Seq2SeqTrainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
        )
        loss = trainer.train().training_loss
        results.append((loss, trainer.predict(rows).predictions.tolist()))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-4)
    assert results[1][1] == results[0][1]


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_quantised_folders_write_texts(name: str, tmp_path: Path) -> None:
    """A quantised folder keeps the head; only where an encoder is alone, vectors are compared."""
    make = tiny_pieces.t5 if name == "t5" else tiny_pieces.marian
    folder = with_tokenizer(name, make(tmp_path / "a"))
    done = quantize(folder, tmp_path / "b", weights="int8", texts=tiny_pieces.TEXTS[:2])
    assert done.conversion.head == "seq2seq-lm"
    assert (done.error is not None) == (name == "t5")
    pipe = minilm.pipeline("text2text-generation", model=tmp_path / "b", max_new_tokens=5)
    assert set(pipe("the cat")[0]) == {"generated_text"}
    assert type(pipe.model) is type(minilm.AutoModelForSeq2SeqLM.from_pretrained(folder))
    assert summarise(folder).class_name == summarise(tmp_path / "b").class_name == "AutoModelForSeq2SeqLM"


def test_the_command_names_the_way(tmp_path: Path) -> None:
    folder = str(with_tokenizer("t5", tiny_pieces.t5(tmp_path)))
    shown = CliRunner().invoke(app, ["inspect", folder])
    assert "2,147,483,647" not in shown.output  # T5 has no last position
    assert "t5 encoder-decoder, loaded by minilm.AutoModelForSeq2SeqLM" in " ".join(shown.output.split())
    shown = CliRunner().invoke(app, ["generate", "--model", folder, "the cat"])
    assert shown.exit_code != 0
    assert "pipeline('text2text-generation')" in " ".join(shown.output.split())
