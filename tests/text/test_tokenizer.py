"""Tokenizers against transformers', called in every way, on text drawn from all of Unicode."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizer_folders as folders
import torch
import transformers
from hypothesis import given
from strategies import examples

from minilm.text.output import BatchEncoding
from minilm.text.tokenizer import AutoTokenizer, Tokenizer, TokenizerError, tokenizer_class

pytestmark = pytest.mark.filterwarnings("ignore:.*max_length.*:UserWarning")

KINDS: dict[str, Callable[[], Path]] = {
    "minilm": folders.minilm_folder,
    "wordpiece": folders.wordpiece,
    "gpt2": folders.gpt2,
    "roberta": folders.roberta,
    "qwen2": folders.qwen2,
    "llama": cache(folders.llama),
    "llama legacy": cache(lambda: folders.llama(legacy=True)),
    "xlm-roberta": folders.xlm_roberta,
}
any_kind = pytest.mark.parametrize("kind", KINDS)
GLUES = ("gpt2", "roberta", "qwen2")  # which put no space before a word


@cache
def pair_of(kind: str) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of a kind, and ours."""
    folder = str(KINDS[kind]())
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if kind == "gpt2":
        theirs.pad_token = ours.pad_token = theirs.eos_token
    return theirs, ours


def clean(kind: str, text: str) -> str:
    """transformers 5 gives "a <mask>" a token for the space where there are only vocabulary files, see
    tokenizer_families.py; all else must be equal."""
    return re.sub(r"\s+<mask>", "<mask>", text) if "roberta" in kind else text


def as_lists(value: Any) -> Any:
    """Tensors, arrays and arrays of arrays as nested lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def assert_same(theirs: Any, ours: Any) -> None:
    assert list(theirs) == list(ours)
    for key, value in theirs.items():
        if isinstance(value, (torch.Tensor, np.ndarray)):
            assert type(value) is type(ours[key])
            assert value.dtype == ours[key].dtype
            assert as_lists(value) == as_lists(ours[key]), key
        else:
            assert value == ours[key], key


@any_kind
@examples(60)
@given(data=st.data())
def test_calls(kind: str, data: st.DataObject) -> None:
    theirs, ours = pair_of(kind)
    draw = data.draw
    text = st.builds(clean, st.just(kind), folders.texts())
    shape = draw(st.sampled_from(["one", "one pair", "batch", "batch of pairs", "words", "batch of words"]))
    words = st.lists(text, max_size=5)
    if "words" in shape:
        inputs = [draw(st.lists(words, min_size=1, max_size=3)) if "batch" in shape else draw(words)]
    elif "batch" in shape:
        first = draw(st.lists(text, min_size=1, max_size=4))
        inputs = [first, [draw(text) for _ in first]] if "pairs" in shape else [first]
    else:
        inputs = [draw(text) for _ in shape.split()]
    paired = len(inputs) > 1
    options: dict[str, Any] = {
        "add_special_tokens": draw(st.booleans()),
        "padding": draw(st.sampled_from([False, True, "longest", "max_length", "do_not_pad"])),
        "truncation": draw(
            st.sampled_from([None, False, True, "longest_first", "only_first", "do_not_truncate"])
        ),
        "max_length": draw(st.sampled_from([None, 6, 8, 16])),
        "padding_side": draw(st.sampled_from([None, "left", "right"])),
        "pad_to_multiple_of": draw(st.sampled_from([None, None, 2])),
        "is_split_into_words": "words" in shape,
    }
    for name in ("overflowing_tokens", "offsets_mapping", "special_tokens_mask", "length"):
        options[f"return_{name}"] = draw(st.booleans())
    for name in ("token_type_ids", "attention_mask"):
        options[f"return_{name}"] = draw(st.sampled_from([None, True, False]))
    if options["max_length"] is not None or options["truncation"] not in (None, False, "do_not_truncate"):
        options["return_overflowing_tokens"] = (
            False  # the reference loses tokens, see test_tokenizer_windows.py
        )
    if not paired:
        options["stride"] = draw(st.integers(0, 2))
    if options["padding"] in (True, "longest", "max_length") and options["truncation"] not in (None, False):
        options["return_tensors"] = draw(st.sampled_from([None, "pt", "np"]))
    try:
        expected = theirs(*inputs, **options)
    except Exception:
        with pytest.raises(TokenizerError):
            ours(*inputs, **options)
        return
    lists = [] if "words" not in shape else inputs[0] if "batch" in shape else [inputs[0]]
    glued = any(word[:1].strip() for words in lists for word in words[1:])
    if kind in GLUES and glued:  # transformers reads them as one word, in silence
        with pytest.raises(TokenizerError, match="without the space before it"):
            ours(*inputs, **options)
        return
    lengths = {len(row) for row in expected.encodings}
    if options.get("return_tensors") == "pt" and len(lengths) > 1:
        # torch.tensor([[], [1, 2]]) has the shape [2, 0]; nothing warns of what got lost.
        assert min(lengths) == 0
        with pytest.raises(TokenizerError, match="padding=True"):
            ours(*inputs, **options)
        return
    found = ours(*inputs, **options)
    assert_same(expected, found)
    assert found.encodings is not None
    assert [row.tokens for row in expected.encodings] == [row.tokens for row in found.encodings]
    for row in range(len(found.encodings)):
        assert expected.word_ids(row) == found.word_ids(row)
        assert expected.sequence_ids(row) == found.sequence_ids(row)


@any_kind
@examples(60)
@given(text=folders.texts(), other=folders.texts(), skip=st.booleans())
def test_tokens_and_text(kind: str, text: str, other: str, skip: bool) -> None:
    theirs, ours = pair_of(kind)
    text, other = clean(kind, text), clean(kind, other)
    ids = theirs.encode(text, other)
    assert ours.encode(text, other) == ids
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(torch.tensor(ids), clean_up_tokenization_spaces=skip) == theirs.decode(
        ids, clean_up_tokenization_spaces=skip
    )
    tokens = theirs.convert_ids_to_tokens(ids, skip_special_tokens=skip)
    assert ours.convert_ids_to_tokens(np.array(ids, dtype=np.int64), skip_special_tokens=skip) == tokens
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.get_special_tokens_mask(
        ids, already_has_special_tokens=True
    ) == theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)


@any_kind
def test_attributes(kind: str) -> None:
    theirs, ours = pair_of(kind)
    special = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    names = [f"{name}_token{end}" for name in special for end in ("", "_id")]
    names += ["special_tokens_map", "vocab_size", "model_max_length", "padding_side", "truncation_side"]
    names += ["model_input_names", "is_fast", "clean_up_tokenization_spaces", "chat_template"]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert set(ours.all_special_tokens) == set(theirs.all_special_tokens)
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.num_special_tokens_to_add(True) == theirs.num_special_tokens_to_add(True)


@pytest.mark.parametrize("kind", ["minilm", "roberta", "llama"])
@examples(40)
@given(text=folders.texts(), other=folders.texts())
def test_positions(kind: str, text: str, other: str) -> None:
    theirs, ours = pair_of(kind)
    text, other = clean(kind, text), clean(kind, other) or "x"
    expected, found = theirs([text, "ab"], [other, "cd"]), ours([text, "ab"], [other, "cd"])
    for index in range(len(found["input_ids"][0])):
        for name in ("token_to_chars", "token_to_sequence", "token_to_word"):
            assert getattr(found, name)(0, index) == getattr(expected, name)(0, index), name
        assert found.token_to_chars(index) == found.token_to_chars(0, index)
    for sequence, part in enumerate((text, other)):
        for at in range(len(part)):
            for name in ("char_to_token", "char_to_word"):
                assert getattr(found, name)(0, at, sequence) == getattr(expected, name)(0, at, sequence), name
        words = {
            word for word, of in zip(found.word_ids(), found.sequence_ids(), strict=True) if of == sequence
        }
        for word in words - {None}:
            for name in ("word_to_tokens", "word_to_chars"):
                assert getattr(found, name)(0, word, sequence) == getattr(expected, name)(
                    0, word, sequence
                ), name


@pytest.mark.parametrize("kind", ["minilm", "gpt2", "llama"])
@examples(40)
@given(data=st.data())
def test_pad(kind: str, data: st.DataObject) -> None:
    theirs, ours = pair_of(kind)
    lines = data.draw(st.lists(st.sampled_from(folders.PEOPLE), min_size=1, max_size=3))
    rows = [dict(ours(line, return_special_tokens_mask=True)) for line in lines]
    form = data.draw(st.sampled_from(["rows", "columns", "single", "tensors"]))
    given_rows: Any = {
        "rows": rows,
        "columns": {key: [row[key] for row in rows] for key in rows[0]},
        "single": rows[0],
        "tensors": [{key: torch.tensor(value) for key, value in row.items()} for row in rows],
    }[form]
    options = {
        "padding": data.draw(st.sampled_from([True, "longest", "max_length", False])),
        "max_length": data.draw(st.sampled_from([None, 90])) if form != "tensors" else 90,
        "pad_to_multiple_of": data.draw(st.sampled_from([None, 4])),
        "padding_side": data.draw(st.sampled_from([None, "left", "right"])),
        "return_tensors": data.draw(st.sampled_from([None, "pt", "np"])),
    }
    try:
        expected = theirs.pad(copy.deepcopy(given_rows), **options)
    except ValueError:
        with pytest.raises(TokenizerError):
            ours.pad(given_rows, **options)
        return
    found = ours.pad(given_rows, **options)
    assert set(expected) == set(found)
    for key in expected:
        assert as_lists(expected[key]) == as_lists(found[key]), key
        assert type(expected[key]) is type(found[key]), key


def test_collators_of_transformers() -> None:
    """Data loaders of existing programs work with these tokenizers."""
    theirs, ours = pair_of("minilm")
    rows = [dict(ours(line)) for line in folders.PEOPLE[:3]]
    for make in (
        transformers.DataCollatorWithPadding,
        lambda tokenizer: transformers.DataCollatorForLanguageModeling(tokenizer, seed=3),
    ):
        expected, found = make(theirs)(copy.deepcopy(rows)), make(ours)(copy.deepcopy(rows))
        assert set(expected) == set(found)
        for key in expected:
            assert torch.equal(expected[key], found[key]), key


def test_special_tokens_are_settable() -> None:
    tokenizer = copy.deepcopy(pair_of("gpt2")[1])
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenizer(["a", "b c"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    assert tokenizer(["a", "b c d"], padding=True)["input_ids"][0][-1] == end
    tokenizer.pad_token_id = 5
    assert tokenizer.pad_token == tokenizer.convert_ids_to_tokens(5)
    with pytest.raises(TokenizerError):
        tokenizer.pad_token = 7  # type: ignore[assignment]
    with pytest.raises(TokenizerError):
        tokenizer.pad_token_id = 10**6


def test_new_tokens() -> None:
    theirs, ours = (copy.deepcopy(tokenizer) for tokenizer in pair_of("gpt2"))
    for tokenizer in (theirs, ours):
        assert tokenizer.add_tokens(["<new>", "übung"]) == 2
        assert tokenizer.add_tokens(["<new>"]) == 0
        assert (
            tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[A]", "[B]"]})
            == 3
        )
    text = "eine übung<new>[A] x [PAD] [B]"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert len(ours) == len(theirs) == ours.vocab_size + 5
    with pytest.raises(TokenizerError, match="not a special token"):
        ours.add_special_tokens({"stop_token": "x"})


def test_bos_and_eos() -> None:
    tokenizer = Tokenizer.from_pretrained(folders.llama())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (True, False)
    tokenizer.add_eos_token = True
    ids = tokenizer.encode("a b", "c")
    assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 2, 2)
    tokenizer.add_bos_token = False
    assert tokenizer.encode("a b").count(bos) == 0
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (False, True)


def test_batch_encoding() -> None:
    tokenizer = pair_of("minilm")[1]
    batch = tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    assert isinstance(batch, dict)
    assert torch.equal(batch.input_ids, batch["input_ids"])
    assert {**batch}.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert batch[1].tokens == ["[CLS]", "c", "[SEP]", "[PAD]"]
    assert batch.to("cpu") is batch
    assert batch.to("meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="input_ids"):
        _ = batch.nothing
    again = pickle.loads(pickle.dumps(tokenizer("a b")))
    assert again.word_ids() == [None, 0, 1, None]
    assert BatchEncoding({"x": [1, 2]})[0:1] == {"x": [1]}
    assert BatchEncoding({"x": [1, 2]}, tensor_type="pt", prepend_batch_axis=True).x.shape == (1, 2)


def test_empty_inputs() -> None:
    tokenizer = pair_of("minilm")[1]
    assert tokenizer("")["input_ids"] == [101, 102]
    assert tokenizer([])["input_ids"] == []
    assert tokenizer([], return_tensors="pt", padding=True)["attention_mask"].shape[0] == 0
    assert tokenizer([""], add_special_tokens=False)["input_ids"] == [[]]
    assert tokenizer("", add_special_tokens=False, return_tensors="pt")["input_ids"].dtype == torch.int64
    assert tokenizer.decode([]) == ""
    assert tokenizer.batch_decode([[], [101]]) == ["", "[CLS]"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "text: expected a string"),
        ((3,), {}, "text: expected a string, got 3"),
        (("a", 3), {}, "text_pair: expected a string"),
        ((["a", None],), {}, r"text\[1\]: expected a string, got None"),
        (([["a"]],), {}, "is_split_into_words=True"),
        ((["a", 3],), {"is_split_into_words": True}, "expected words as strings"),
        (("a",), {"is_split_into_words": True}, "expected a list of words"),
        ((["a", "b"], "c"), {}, "text_pair: expected a list of 2"),
        ((["a", "b"], ["c"]), {}, "text_pair: expected a list of 2 as text is, got 1"),
        (("a\ud800b",), {}, r"text\[0\] is not valid Unicode"),
        (("a",), {"padding": "longer"}, "padding='longer': expected True, False, 'longest'"),
        (("a",), {"truncation": "first"}, "truncation='first'"),
        (("a",), {"truncation": True, "max_length": 1}, "max_length=1 is less than the 2 special tokens"),
        (("a", "b"), {"truncation": True, "max_length": 2}, "less than the 3 special tokens"),
        (("a b c",), {"truncation": True, "max_length": 4, "stride": 2}, "stride=2 does not fit"),
        (("a",), {"truncation": True, "max_length": -1}, "max_length=-1"),
        (("a",), {"max_length": 2.5}, "max_length=2.5"),
        (("a",), {"stride": -1, "max_length": 5}, "stride=-1"),
        (("a b c", "d"), {"truncation": "only_second", "max_length": 4}, "too short"),
        (("a b c",), {"truncation": "only_second", "max_length": 4}, "Second sequence not provided"),
        ((["a", "b c"],), {"return_tensors": "pt"}, "padding=True"),
        (("a",), {"return_tensors": "tf"}, "return_tensors='tf'"),
        (
            ("a",),
            {"padding": "max_length", "max_length": 5, "truncation": True, "pad_to_multiple_of": 3},
            "multiple",
        ),
    ],
)
def test_wrong_calls(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        pair_of("minilm")[1](*arguments, **options)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([101, -100], "ignored labels"),
        ([-1], "token id -1 is out of range"),
        ([1 << 40], "out of range"),
        ([1.5], "expected token ids as integers"),
        (["a"], "expected token ids as integers"),
        ("abc", "expected token ids as integers"),
        (None, "expected token ids as integers"),
    ],
)
def test_wrong_ids(ids: Any, message: str) -> None:
    tokenizer = pair_of("minilm")[1]
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_ids_beyond_the_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    """A model's embedding may have more rows than there are tokens, so that this can happen while
    generating."""
    tokenizer = Tokenizer.from_pretrained(folders.wordpiece())
    word = tokenizer.convert_tokens_to_ids("a")
    for _ in range(2):
        assert tokenizer.decode([word, len(tokenizer) + 5]) == "a"
    assert caplog.text.count("is left out") == 1
    assert tokenizer.convert_ids_to_tokens([len(tokenizer)]) == [None]


def test_long_texts_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_pretrained(folders.minilm_folder())
    tokenizer("a " * 600, truncation=True)
    assert not caplog.text
    for _ in range(2):
        assert len(tokenizer("a " * 600)["input_ids"]) == 602
    assert caplog.text.count("602 tokens is longer than the model's limit of 512") == 1


def test_pickle_copy_and_threads() -> None:
    tokenizer = pair_of("minilm")[1]
    text = "A text, for all."
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other(text) == tokenizer(text)
        assert other.special_tokens_map == tokenizer.special_tokens_map

    def work(length: int) -> bool:
        """Truncation and padding of one thread must not reach another."""
        rows = tokenizer([text] * 3, truncation=True, max_length=length, padding="max_length")["input_ids"]
        return all(len(row) == length for row in rows) and len(tokenizer(text)["input_ids"]) == 8

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, list(range(3, 40)) * 10))


def test_class_names() -> None:
    roberta = tokenizer_class("RobertaTokenizerFast")
    assert roberta is not None
    files = {"vocab_file": folders.roberta() / "vocab.json", "merges_file": folders.roberta() / "merges.txt"}
    tokenizer = roberta(**files, add_prefix_space=True)
    assert isinstance(tokenizer, Tokenizer)
    expected = transformers.RobertaTokenizer.from_pretrained(str(folders.roberta()), add_prefix_space=True)
    assert dict(tokenizer("so", "it")) == dict(expected("so", "it"))
    bert = tokenizer_class("BertTokenizer")
    assert bert is not None
    vocab = folders.wordpiece() / "vocab.txt"
    lower = transformers.BertTokenizer(str(vocab), do_lower_case=True)
    assert dict(bert(vocab)("Über ALL")) == dict(lower("Über ALL"))
    distilbert = tokenizer_class("DistilBertTokenizer")
    assert distilbert is not None
    assert distilbert(vocab).model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer_class("PreTrainedTokenizerFast") is Tokenizer
    assert tokenizer_class("SomethingElse") is None


def test_from_a_pipeline_of_the_tokenizers_library() -> None:
    """PreTrainedTokenizerFast(tokenizer_object=...), as its documentation shows."""
    backend = pair_of("gpt2")[1].backend_tokenizer
    settings = {"eos_token": "<|endoftext|>", "pad_token": "[PAD]", "model_max_length": 7}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    ours = Tokenizer(tokenizer_object=backend, **settings)
    texts = ["a text that is long", "b"]
    assert dict(ours(texts, padding=True, truncation=True)) == dict(
        theirs(texts, padding=True, truncation=True)
    )
    assert len(ours) == len(theirs)
    assert ours.padding_side == "right"
    with pytest.raises(TokenizerError, match="padding_side is 'up'"):
        Tokenizer(tokenizer_object=backend, padding_side="up")
    with pytest.raises(TokenizerError, match="no such setting"):
        Tokenizer(tokenizer_object=backend, lower=True)
    with pytest.raises(TokenizerError, match="from_pretrained"):
        Tokenizer()
