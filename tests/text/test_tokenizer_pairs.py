"""Pairs of long texts are cut without the windows of both; the result is that of transformers. Words for
tokenizers that need spaces. Flags of added tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tokenizer_folders as folders
import transformers
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from minilm import AutoTokenizer
from minilm.text import encode
from minilm.text.truncate import lengths
from minilm.text.vocabulary.errors import TokenizerError

_folders: list[TemporaryDirectory[str]] = []
KINDS = ("wordpiece", "roberta", "gpt2", "llama", "xlm_roberta")


@cache
def pair_of(kind: str) -> tuple[Any, Any]:
    """The same tokenizer.json in both libraries."""
    _folders.append(TemporaryDirectory())
    folder = _folders[-1].name
    ours = AutoTokenizer.from_pretrained(getattr(folders, kind)())
    ours.pad_token = ours.pad_token or ours.convert_ids_to_tokens(5)
    ours.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@examples(60)
@given(
    texts=st.lists(st.tuples(folders.texts(), folders.texts()), min_size=1, max_size=3),
    strategy=st.sampled_from(["longest_first", "only_first", "only_second"]),
    room=st.integers(4, 20),
    side=st.sampled_from(["right", "left"]),
    padding=st.sampled_from([False, True, "max_length"]),
    special=st.booleans(),
)
def test_pairs(
    kind: str,
    texts: list[tuple[str, str]],
    strategy: str,
    room: int,
    side: str,
    padding: Any,
    special: bool,
) -> None:
    """With every pair cut here, and not by the library."""
    theirs, ours = pair_of(kind)
    theirs.truncation_side = ours.truncation_side = side
    firsts, seconds = [a for a, _ in texts], [b for _, b in texts]
    options: dict[str, Any] = {
        "truncation": strategy,
        "max_length": room,
        "padding": padding,
        "add_special_tokens": special,
        "return_offsets_mapping": True,
        "return_token_type_ids": True,
        "return_special_tokens_mask": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "many_windows", lambda *_: True)
        try:
            expected = theirs(firsts, seconds, **options)
        except Exception:
            with pytest.raises(TokenizerError):
                ours(firsts, seconds, **options)
            return
        if strategy == "only_first" and not special and any(len(ours.encode(b)) > room for b in seconds):
            return  # the library reads no more than max_length of the second text, and loses the rest
        found = ours(firsts, seconds, **options)
    assert {**found} == {**expected}
    for row in range(len(texts)):
        if side == "right":  # read from the end, words are counted from where the library stopped
            assert found.word_ids(row) == expected.word_ids(row)
        assert found.sequence_ids(row) == expected.sequence_ids(row)
        assert found.tokens(row) == expected.tokens(row)


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_the_rule_of_the_library(strategy: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for first, second, room in itertools.product(range(8), range(8), range(10)):
        backend.enable_truncation(room, strategy=strategy)
        try:
            found = backend.encode("a " * first, "a " * second).sequence_ids
        except Exception:
            with pytest.raises(TokenizerError, match="the other text has"):
                lengths(first, second, room, strategy)
            continue
        if strategy == "only_first" and second > room:
            continue  # cut as well, since the library reads no further
        counts = (first, second)
        if strategy == "longest_first":  # it has read no further
            counts = (min(first, room), min(second, room))
        assert lengths(*counts, room, strategy) == (found.count(0), found.count(1))


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("split", [False, True])
def test_windows_that_nobody_asks_for_are_not_made(strategy: str, split: bool) -> None:
    """They are counted, since the library's memory is not Python's."""
    tok = AutoTokenizer.from_pretrained(folders.wordpiece())
    long, short = "Anna lives in Berlin " * 1000, "Anna " * 15
    texts = {"longest_first": (long, long), "only_first": (long, short), "only_second": (short, long)}[
        strategy
    ]
    inputs = [text.split() for text in texts] if split else list(texts)
    out = tok(*inputs, truncation=strategy, max_length=100, stride=3, is_split_into_words=split)
    assert len(out["input_ids"]) == 100
    assert out.encodings[0].overflowing == []
    others = (["x"], ["y"]) if split else ("x", "y")
    told = tok(
        [inputs[0], others[0]],
        [inputs[1], others[1]],
        truncation=strategy,
        max_length=100,
        is_split_into_words=split,
        return_truncated=True,
    )
    assert told["truncated"] == [True, False]
    assert told["input_ids"][0] == out["input_ids"]
    alone = tok(["a", long], truncation=True, max_length=100, return_truncated=True, return_tensors="np",
                padding=True)  # fmt: skip
    assert alone["truncated"].tolist() == [False, True]


# -- words


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "roberta"])
def test_words_that_would_be_glued_are_refused(kind: str) -> None:
    tok = AutoTokenizer.from_pretrained(getattr(folders, kind)())
    words = ["Das", "ist", "ein", "Tag"]
    for inputs in (words, [["a"], words]):
        with pytest.raises(
            TokenizerError, match=r"'ist' without the space before it: .*add_prefix_space=True"
        ):
            tok(inputs, is_split_into_words=True)
    with pytest.raises(TokenizerError, match="'ist'"):
        tok([["a"]], [words], is_split_into_words=True)
    spaced = ["Das", *(f" {word}" for word in words[1:])]
    assert tok.encode(spaced, is_split_into_words=True) == tok.encode("Das ist ein Tag")
    assert tok.encode(["Das"], is_split_into_words=True) == tok.encode("Das")
    with_prefix = AutoTokenizer.from_pretrained(getattr(folders, kind)(), add_prefix_space=True)
    assert with_prefix.encode(words, is_split_into_words=True) == with_prefix.encode("Das ist ein Tag")


@pytest.mark.parametrize("kind", ["wordpiece", "llama", "xlm_roberta"])
def test_words_with_their_spaces(kind: str) -> None:
    tok = AutoTokenizer.from_pretrained(getattr(folders, kind)())
    words = ["Das", "ist", "ein", "Tag"]
    assert tok.encode(words, is_split_into_words=True) == tok.encode("Das ist ein Tag")


def test_sentencepiece_without_a_prefix() -> None:
    tok = AutoTokenizer.from_pretrained(folders.llama(add_prefix_space=False))
    with pytest.raises(TokenizerError, match="'ist' without the space"):
        tok(["Das", "ist"], is_split_into_words=True)


# -- flags

flags = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
)


@pytest.mark.parametrize("source", ["added_tokens_decoder", "special_tokens_map.json", "added_tokens.json"])
@examples(40)
@given(in_file=flags, in_config=flags, known=st.booleans(), named=st.booleans(), text=folders.texts())
def test_flags(
    source: str, in_file: dict[str, bool], in_config: dict[str, bool], known: bool, named: bool, text: str
) -> None:
    """Of a token in tokenizer.json and beside it, or beside it alone, as transformers has them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        ours = AutoTokenizer.from_pretrained(folders.gpt2())
        size = len(ours)
        ours.save_pretrained(folder)
        data = json.loads((folder / "tokenizer.json").read_text())
        token = "<Mask>"
        if known:
            data["added_tokens"].append({"id": size, "content": token, **in_file})
        (folder / "tokenizer.json").write_text(json.dumps(data))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("added_tokens_decoder", None)
        end = {"content": "<|endoftext|>", "special": True, "normalized": False}
        if named:
            config["mask_token"] = token
        if source == "added_tokens_decoder":
            config[source] = {"0": end, str(size): {"content": token, **in_config}}
        elif source == "added_tokens.json":
            (folder / source).write_text(json.dumps({token: size}))
        else:
            config.pop("mask_token", None)
            (folder / source).write_text(json.dumps({"mask_token": {"content": token, **in_config}}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        found = AutoTokenizer.from_pretrained(folder)
        for line in (text, f"a {token} b", f"x{token}y", f"{text} <mask> {token}  {token} {text}"):
            assert found(line)["input_ids"] == theirs(line)["input_ids"], line
        ids = theirs(f"a {token} b")["input_ids"]
        assert found.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


class Column(Sequence[str]):
    """A sequence that is no list, as a column of datasets."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __getitem__(self, index: Any) -> Any:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)


@pytest.mark.parametrize("kind", [Column, np.array], ids=["sequence", "array"])
def test_columns_of_texts(kind: Any) -> None:
    theirs, ours = pair_of("wordpiece")
    texts, others = ["a b", "c", "a long text"], ["x", "y z", "b"]
    assert dict(ours(kind(texts), padding=True)) == dict(theirs(texts, padding=True))
    assert dict(ours(kind(texts), kind(others))) == dict(theirs(texts, others))
    assert ours(texts, text_pair=kind(others))["input_ids"] == theirs(texts, others)["input_ids"]
    with pytest.raises(TokenizerError, match=r"text_pair: expected a list of 3 as text is, got 2"):
        ours(kind(texts), kind(others[:2]))
    with pytest.raises(TokenizerError, match=r"text\[0\]: expected a string, got 3"):
        ours(range(3, 5))
    with pytest.raises(TokenizerError, match=r"text: expected a string, got b'a'"):
        ours(b"a")


def test_a_tokenizer_is_of_its_own_class() -> None:
    """Whoever asks, but for transformers' Trainer (tests/integrations/test_trainer.py)."""
    ours = pair_of("wordpiece")[1]
    assert ours.__class__ is type(ours)
    assert isinstance(ours, AutoTokenizer)
    assert not isinstance(ours, transformers.PreTrainedTokenizerBase)
    asked = {"__name__": "transformers.trainer", "ours": ours, "kind": transformers.PreTrainedTokenizerBase}
    assert eval("isinstance(ours, kind)", asked)


def test_flags_that_the_caller_gives() -> None:
    from tokenizers import AddedToken

    with TemporaryDirectory() as name:
        folder = Path(name)
        AutoTokenizer.from_pretrained(folders.roberta()).save_pretrained(folder)
        for lstrip in (False, True):
            mask = AddedToken("<mask>", lstrip=lstrip, single_word=True, special=True)
            tok = AutoTokenizer.from_pretrained(folder, mask_token=mask)
            found = tok.added_tokens_decoder[tok.mask_token_id]
            assert (found.lstrip, found.single_word, found.special) == (lstrip, True, True)
