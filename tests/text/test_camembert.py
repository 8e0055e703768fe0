"""CamemBERT's tokenizer: from tokenizer.json as transformers has it; other files are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizer_folders as folders
import transformers

from minilm.text.tokenizer import AutoTokenizer, TokenizerError

TEXTS = ["un été à la mer", "  deux  espaces\n", "a <mask> b", "", "日本 é e\u0301 ﬁn", "<s> x </s>"]


def theirs() -> transformers.CamembertTokenizer:
    """A small unigram vocabulary, in which some letters are unknown."""
    special = [*("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")]
    pieces = ["▁", "▁un", "▁la", "été", "mer", *"abcdeéiànopsuxt"]
    vocab = [(piece, 0.0) for piece in special] + [(p, -1.0 - i / 7) for i, p in enumerate(pieces)]
    return transformers.CamembertTokenizer(vocab=[*vocab, ("<mask>", 0.0)])


@pytest.mark.parametrize("named", [True, False])
def test_ids_are_transformers(tmp_path: Path, named: bool) -> None:
    """By the class of tokenizer_config.json, or by the model_type of config.json alone."""
    reference = theirs()
    reference.save_pretrained(tmp_path)
    if not named:
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "config.json").write_text('{"model_type": "camembert"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == reference.pad_token_id == 1
    assert tokenizer.mask_token_id == reference.mask_token_id
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"], text
        pair = reference(text, "la mer")
        assert tokenizer(text, "la mer")["input_ids"] == pair["input_ids"], text


def test_a_sentencepiece_file_alone_is_refused(tmp_path: Path) -> None:
    """Read as XLM-RoBERTa's file of the same name, its ids would be wrong."""
    shutil.copy(folders.xlm_roberta() / "sentencepiece.bpe.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "camembert"}')
    with pytest.raises(TokenizerError, match=r"CamemBERT tokenizer is read from tokenizer\.json only"):
        AutoTokenizer.from_pretrained(tmp_path)
