"""The tokenizers of T5 checkpoints, from tokenizer.json or spiece.model: the end token and the sentinels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pieces
import transformers

import minilm

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("b", -3.5), ("ab", -4.0)]


@pytest.mark.parametrize("text", ["ab b", "a <extra_id_0> b", "  b  ab ", "", "<extra_id_1> b </s>"])
def test_ids_as_in_transformers(text: str, tmp_path: Path) -> None:
    theirs = transformers.T5Tokenizer(vocab=PIECES, extra_ids=5)
    theirs.save_pretrained(tmp_path)
    for ours in (
        minilm.AutoTokenizer.from_pretrained(tmp_path),
        minilm.T5Tokenizer.from_pretrained(tmp_path),
    ):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours(text).input_ids[-1] == ours.eos_token_id == 1
        assert ours.pad_token_id == 0


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"model_type": "t5"}, {}),
        ({"model_type": "mt5"}, {"extra_ids": 0, "tokenizer_class": "T5Tokenizer"}),
        ({"model_type": "umt5"}, {"extra_ids": 7}),
        ({}, {"tokenizer_class": "T5TokenizerFast", "extra_ids": 3}),
        ({}, {}),
    ],
)
def test_a_folder_with_only_spiece_model(
    config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Pieces, the end token and the sentinels, in every way to load it, and after saving."""
    (tmp_path / "spiece.model").write_bytes(tiny_pieces.model(**tiny_pieces.T5))
    for name, content in (("config", config), ("tokenizer_config", settings)):
        if content:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    found = [minilm.AutoTokenizer.from_pretrained(tmp_path), minilm.T5Tokenizer.from_pretrained(tmp_path)]
    found[0].save_pretrained(tmp_path / "again")
    for ours in (*found, minilm.AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert len(ours) == len(theirs)
        for text in (*tiny_pieces.TEXTS, "a <extra_id_0> cat<extra_id_1>b <extra_id_2>"):
            ids = theirs(text).input_ids
            assert ours(text).input_ids == ids, text
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
        assert ours("the cat", "a mat").input_ids == theirs("the cat", "a mat").input_ids
        assert set(ours.all_special_tokens) == set(theirs.all_special_tokens)


def test_a_number_of_sentinels_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(tiny_pieces.model(**tiny_pieces.T5))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": -1}')
    with pytest.raises(ValueError, match="extra_ids is -1, expected a number from 0 to 10000"):
        minilm.AutoTokenizer.from_pretrained(tmp_path)
