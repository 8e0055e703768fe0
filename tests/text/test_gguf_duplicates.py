"""GGUF vocabularies in which texts occur more than once: every id keeps its text, encoding takes the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

import minilm

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def written(path: Path, kind: str, tokens: list[str], types: list[int]) -> minilm.AutoTokenizer:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b", "Ġ ab"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return minilm.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_byte_level(tmp_path: Path, times: int) -> None:
    tokens = [*LETTERS, "ab", "Ġab", *["ab"] * (times - 1), "<x>", "<x>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]
    tokenizer = written(tmp_path / "x.gguf", "gpt2", tokens, kinds)
    ids = [index for index, token in enumerate(tokens) if token == "ab"]
    assert [tokenizer.decode([index]) for index in ids] == ["ab"] * times
    assert tokenizer.encode("ab ab") == [ids[-1], tokens.index("Ġab")]
    assert tokenizer.decode(ids) == "ab" * times
    last = len(tokens) - 1
    assert [tokenizer.decode([index]) for index in (last - 1, last)] == ["<x>", "<x>"]
    assert tokenizer.decode([last - 1, ids[0], last], skip_special_tokens=True) == "ab"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = minilm.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.decode(ids) == "ab" * times


def test_sentencepiece(tmp_path: Path) -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "▁a",
        "a",
        "▁a",
        "<0x41>",
    ]
    tokenizer = written(tmp_path / "x.gguf", "llama", pieces, [2, 3, 3, *[6] * 256, *[1] * 5, 6])
    for index, piece in enumerate(pieces):
        if piece == "a":
            assert tokenizer.decode([index]) == "a"
        if piece == "▁a":
            assert tokenizer.decode([index, index]) == "a a"
        if piece == "<0x41>":
            assert tokenizer.decode([index]) == "A"
    assert tokenizer.decode(tokenizer.encode("a a", add_special_tokens=False)) == "a a"
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
