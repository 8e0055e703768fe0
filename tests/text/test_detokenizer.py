"""Text that comes token by token is the text of all tokens, and never shows half a character."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tokenizer_folders as folders
from hypothesis import given
from strategies import examples

from minilm.text import AutoTokenizer, IncrementalDecoder, Tokenizer, continuation

KINDS: dict[str, Callable[[], Path]] = {
    "wordpiece": folders.wordpiece,
    "gpt2": folders.gpt2,
    "roberta": folders.roberta,
    "llama": cache(folders.llama),
    "llama legacy": cache(lambda: folders.llama(legacy=True)),
    "xlm-roberta": folders.xlm_roberta,
    "sentencepiece": folders.llama_model,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return AutoTokenizer.from_pretrained(KINDS[kind]())


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip: bool, sizes: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    pieces, at = [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(decoder.push(ids[at] if size == 1 else ids[at : at + size]))
        at += size
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(text=folders.texts(), skip=st.booleans(), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_pieces_of_texts(kind: str, text: str, skip: bool, sizes: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip, sizes)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
@examples(150)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_ids(kind: str, data: st.DataObject, skip: bool) -> None:
    """What an untrained model may say: bytes that are no text."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip, [1])
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    if "llama" in kind or kind == "sentencepiece":
        # A run of bytes is decoded as a whole there: one bad byte takes good ones with it, which were shown.
        assert "".join(pieces).replace("\ufffd", "").endswith(whole.rpartition("\ufffd")[2])
        if "\ufffd" not in whole:
            assert "".join(pieces) == whole
    else:
        assert "".join(pieces) == whole


def test_words_come_at_once() -> None:
    tokenizer = tokenizer_of("gpt2")
    text = "def format_usage(self): straße 日本語"
    ids = tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer)
    shown = ""
    for count, index in enumerate(ids, 1):
        shown += decoder.push(index)
        whole = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert shown == whole
    assert shown == text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "xlm-roberta", "sentencepiece"])
@examples(60)
@given(prompt=folders.texts(), text=folders.texts())
def test_text_that_continues_a_prompt(kind: str, prompt: str, text: str) -> None:
    """Joined to the prompt it is the text of all tokens, with the space between the two."""
    tokenizer = tokenizer_of(kind)
    if "\ufffd" in prompt + text:
        return
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer, prompt_ids=before)
    found = decoder.push(after) + decoder.flush()
    whole = tokenizer.decode(before + after, skip_special_tokens=True)
    assert tokenizer.decode(before, skip_special_tokens=True) + found == whole


@pytest.mark.parametrize("kind", ["gpt2", "llama", "xlm-roberta", "sentencepiece"])
@examples(60)
@given(prompt=folders.texts(), text=folders.texts(), cut=st.integers(0, 5))
def test_continuation(kind: str, prompt: str, text: str, cut: int) -> None:
    """All at once, and with a prompt that ends within a character."""
    tokenizer = tokenizer_of(kind)
    ids = [*tokenizer.encode(prompt), *tokenizer.encode(text, add_special_tokens=False)]
    at = max(0, len(tokenizer.encode(prompt)) - cut)
    found = continuation(tokenizer.decode, ids[:at], ids[at:])
    start, whole = tokenizer.decode(ids[:at]), tokenizer.decode(ids)
    if whole.startswith(start) and "\ufffd" not in start:
        assert start + found == whole
    elif whole.startswith(start.rstrip("\ufffd")) and "\ufffd" not in whole:
        assert start.rstrip("\ufffd") + found == whole


def test_long_runs_take_linear_time() -> None:
    """The window that is decoded again stays short."""
    tokenizer = tokenizer_of("gpt2")
    decoder = IncrementalDecoder(tokenizer)
    longest = 0
    for index in tokenizer.encode("word " * 500):
        decoder.push(index)
        longest = max(longest, len(decoder._window))
    assert longest < 8
    byte = tokenizer.convert_tokens_to_ids("Ģ")  # the byte 0x80, which begins no character
    for _ in range(300):
        decoder.push(byte)
        longest = max(longest, len(decoder._window))
    assert longest < 80


def test_reuse_after_flush() -> None:
    tokenizer = tokenizer_of("llama")
    decoder = IncrementalDecoder(tokenizer)
    for text in ("eins zwei", "drei"):
        ids = tokenizer.encode(text)
        assert decoder.push(ids) + decoder.flush() == text
    assert decoder.push([]) == ""
    assert decoder.flush() == ""
