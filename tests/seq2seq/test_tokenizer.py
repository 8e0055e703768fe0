"""The tokenizer.json of a T5 checkpoint: the end token, and the sentinels <extra_id_0>, ..."""

from __future__ import annotations

from pathlib import Path

import pytest
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
