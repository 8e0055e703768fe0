"""Windows of long texts (`return_overflowing_tokens`): nothing of a text may be missing.

tokenizers 0.23 stops reading a text at the truncation and loses the rest (huggingface/tokenizers#2091), and
transformers with it. So the reference here is the text encoded whole, and cut by the rule.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CORPUS, save_tokenizer

from minilm import AutoTokenizer
from minilm.text.tokenizer import TokenizerError

_folders: list[TemporaryDirectory[str]] = []


@cache
def tokenizer(family: str) -> Any:
    _folders.append(TemporaryDirectory())
    save_tokenizer(Path(_folders[-1].name), family, 64)
    return AutoTokenizer.from_pretrained(_folders[-1].name)


def cut(items: list[Any], room: int, stride: int) -> list[list[Any]]:
    """Windows of `room` items, each beginning with the last `stride` of the one before."""
    windows, start = [items[:room]], 0
    while start + room < len(items):
        start += room - stride
        windows.append(items[start : start + room])
    return windows


words = st.lists(st.sampled_from([*" ".join(CORPUS).split(), "x" * 30, "北京", " "]), max_size=40)
texts = st.builds(" ".join, words)


@given(family=st.sampled_from(["bert", "roberta"]), text=texts, room=st.integers(4, 25), data=st.data())
def test_every_token_of_a_text_is_in_a_window(family: str, text: str, room: int, data: st.DataObject) -> None:
    tok = tokenizer(family)
    stride = data.draw(st.integers(0, room - 1))
    whole = tok(text, return_offsets_mapping=True, verbose=False)
    first, last = whole["input_ids"][0], whole["input_ids"][-1]
    rows = tok(
        [text, "a"], truncation=True, max_length=room + 2, stride=stride, return_overflowing_tokens=True,
        return_offsets_mapping=True, return_special_tokens_mask=True,
    )  # fmt: skip
    expected = cut(whole["input_ids"][1:-1], room, stride)
    assert rows["overflow_to_sample_mapping"] == [0] * len(expected) + [1]
    assert rows["input_ids"][:-1] == [[first, *window, last] for window in expected]
    offsets = cut(whole["offset_mapping"][1:-1], room, stride)
    assert rows["offset_mapping"][:-1] == [[(0, 0), *window, (0, 0)] for window in offsets]
    assert rows["special_tokens_mask"][:-1] == [[1, *[0] * len(window), 1] for window in expected]
    assert [rows.word_ids(i)[1:-1] for i in range(len(expected))] == cut(whole.word_ids()[1:-1], room, stride)
    assert tok.backend_tokenizer.truncation is None
    assert tok(text, verbose=False)["input_ids"] == whole["input_ids"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("strategy", ["only_first", "only_second"])
def test_windows_of_pairs(family: str, strategy: str) -> None:
    tok = tokenizer(family)
    question, context = "Who is Anna?", " ".join(CORPUS)
    pair = (question, context) if strategy == "only_second" else (context, question)
    rows = tok(
        [pair[0], "a"],
        [pair[1], "b"],
        truncation=strategy,
        max_length=50,
        stride=7,
        return_overflowing_tokens=True,
    )
    around = tok.num_special_tokens_to_add(pair=True)
    ids, other = (
        tok(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (context, question)
    )
    expected = cut(ids, 50 - around - len(other), 7)
    sequence = 1 if strategy == "only_second" else 0
    found = [
        [token for token, s in zip(row.ids, row.sequence_ids, strict=True) if s == sequence]
        for row in rows.encodings[:-1]
    ]
    assert found == expected
    for row in rows.encodings[:-1]:
        assert [
            token for token, s in zip(row.ids, row.sequence_ids, strict=True) if s == 1 - sequence
        ] == other
    whole = tok(*pair, return_token_type_ids=True, verbose=False)
    around_first = len(whole["input_ids"]) - len(ids) - len(other)
    assert around_first == around
    second = whole["token_type_ids"][-1]
    assert second == (family == "bert")
    rows = tok(
        [pair[0]], [pair[1]], truncation=strategy, max_length=50, stride=7, return_overflowing_tokens=True,
        return_token_type_ids=True,
    )  # fmt: skip
    for row, types in zip(rows.encodings, rows["token_type_ids"], strict=True):
        switch = len(row) - 1 - sum(s == 1 for s in row.sequence_ids)
        assert types == [0] * switch + [second] * (len(row) - switch)


def test_windows_of_words_are_padded_and_the_post_processor_stays() -> None:
    tok = tokenizer("bert")
    words = ["John", "Smithers", "lives", "in", "Paris"] * 5
    before = tok("anna", "john")["input_ids"]
    rows = tok(
        words, is_split_into_words=True, padding=True, max_length=12, truncation=True, stride=2,
        return_overflowing_tokens=True, return_tensors="pt",
    )  # fmt: skip
    whole = tok(words, is_split_into_words=True, verbose=False)
    assert rows["input_ids"].shape == (len(cut(whole["input_ids"][1:-1], 10, 2)), 12)
    assert rows.word_ids(1)[1:-1] == whole.word_ids()[9:19]
    with pytest.raises(TokenizerError, match="text: expected a string"):
        tok(3, truncation=True, max_length=5, return_overflowing_tokens=True)
    assert tok("anna", "john")["input_ids"] == before
    mixed = tok(["anna", ("anna", "john")], truncation=True, max_length=9, return_overflowing_tokens=True)
    assert mixed["input_ids"][-1] == before
