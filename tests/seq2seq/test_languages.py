"""Tokenizers of Marian, mBART and mBART-50: the ids of transformers and of the sentencepiece library."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_pieces
import transformers
from tiny_pieces import CODES, marian, mbart

import minilm


@pytest.mark.filterwarnings("ignore:.*sacremoses")
@pytest.mark.parametrize("lacks", [(), ("▁the", "e", "z")])
def test_marian_as_in_transformers(lacks: tuple[str, ...], tmp_path: Path) -> None:
    """Sources and targets, codes at the beginning and elsewhere, characters that one side lacks."""
    folder = marian(tmp_path / "a", lacks)
    theirs = transformers.MarianTokenizer.from_pretrained(folder)
    ours = minilm.AutoTokenizer.from_pretrained(folder)
    assert type(ours).__name__ == "MarianTokenizer"
    ours.save_pretrained(tmp_path / "b")
    again = minilm.MarianTokenizer.from_pretrained(tmp_path / "b")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    texts = [
        *tiny_pieces.TEXTS,
        *(">>fr<< the cat", ">>pt_br<<the cat", "the >>fr<< cat", " >>fr<< cat", "<s> the", ">> the"),
        *("le chat est été", "the cat</s>sat", "éé 日本 zz"),
    ]
    for text in texts:
        expected = theirs(text, text_target=text)
        assert ours(text, text_target=text) == again(text, text_target=text) == expected, text
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert back(text).input_ids == expected["input_ids"]
        for ids in (expected["input_ids"], expected["labels"]):
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        with ours.as_target_tokenizer():
            assert ours(text).input_ids == expected["labels"]
        assert ours(text_target=text).input_ids == expected["labels"]
    batch = {"padding": True, "truncation": True, "max_length": 6, "return_tensors": "pt"}
    for key, value in theirs(texts, text_target=texts, **batch).items():
        assert (ours(texts, text_target=texts, **batch)[key] == value).all()
    assert ours("the cat", "a mat").input_ids == theirs("the cat", "a mat").input_ids
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert ours.model_max_length == theirs.model_max_length == 512
    assert ours.supported_language_codes == CODES
    copied = pickle.loads(pickle.dumps(ours))
    assert copied("the cat", text_target="le chat") == ours("the cat", text_target="le chat")


def test_decoded_special_tokens(tmp_path: Path) -> None:
    theirs = transformers.MarianTokenizer.from_pretrained(marian(tmp_path))
    ours = minilm.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat ẞ sat</s> on<pad><pad>", "ẞẞ the", ""):
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES, r"begins with >>de<<, and the model has only the languages >>fr<<, >>pt_br<<"),
        ([], r"begins with >>de<<, and the model has only the languages \(none\)"),
    ],
)
def test_a_language_that_marian_does_not_write(codes: list[str], message: str, tmp_path: Path) -> None:
    tokenizer = minilm.AutoTokenizer.from_pretrained(marian(tmp_path, codes=codes))
    with pytest.raises(ValueError, match=message):
        tokenizer(["the cat", ">>de<< the cat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "target.spm").unlink(), "has no target.spm"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), "has no '<unk>', the unk_token"),
        (lambda folder: marian(folder, separate_vocabs=True), "separate_vocabs=True is not supported"),
        (lambda folder: marian(folder, sp_model_kwargs={"alpha": 1}), "sp_model_kwargs={'alpha': 1}"),
        (
            lambda folder: (folder / "source.spm").write_bytes(b"\x08"),
            "source.spm: not a sentencepiece model",
        ),
    ],
)
def test_damaged_folders_of_marian(change: Any, message: str, tmp_path: Path) -> None:
    change(marian(tmp_path))
    with pytest.raises(ValueError, match=message):
        minilm.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["MBartTokenizer", "MBart50Tokenizer"])
def test_mbart_as_in_transformers(name: str, tmp_path: Path) -> None:
    """Ids of the sentencepiece library, one higher; codes, frames and the order of tokens of transformers,
    whose normalisation of spaces and ligatures differs from the library's."""
    folder = mbart(tmp_path, name, src_lang="ro_RO", tgt_lang="fr_XX")
    theirs = getattr(transformers, name).from_pretrained(folder)
    ours = minilm.AutoTokenizer.from_pretrained(folder)
    library = sentencepiece.SentencePieceProcessor(model_proto=tiny_pieces.model("both"))
    assert len(ours) == len(theirs)
    assert ours.lang_code_to_id == theirs.lang_code_to_id
    ours.save_pretrained(tmp_path / "again")
    again = minilm.AutoTokenizer.from_pretrained(tmp_path / "again")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(back).__name__ == name
    assert (again.src_lang, again.tgt_lang) == (ours.src_lang, ours.tgt_lang) == ("ro_RO", "fr_XX")
    for text in ("the cat sat", "le chat est", "the <mask> sat", ""):
        expected = theirs(text, text_target=text)
        assert ours(text, text_target=text) == again(text, text_target=text) == expected
        assert back(text).input_ids == expected["input_ids"]
        assert ours(text, "a mat").input_ids == theirs(text, "a mat").input_ids
        assert ours.decode(expected["labels"]) == theirs.decode(expected["labels"])
    for text in tiny_pieces.TEXTS:
        if "</s>" in text:
            continue
        own = [3 if index == 0 else index + 1 for index in library.encode(text)]
        end, before = 2, name == "MBart50Tokenizer"
        for code, ids in (
            ("ro_RO", ours(text).input_ids),
            ("fr_XX", ours(text_target=text).input_ids),
        ):
            number = ours.lang_code_to_id[code]
            assert ids == ([number, *own, end] if before else [*own, end, number]), text
    ours.src_lang = theirs.src_lang = "en_XX"
    assert ours("the cat").input_ids == theirs("the cat").input_ids
    with ours.as_target_tokenizer():
        assert ours("a cat").input_ids == theirs(text_target="a cat").input_ids
    assert ours("a cat").input_ids == theirs("a cat").input_ids
    assert pickle.loads(pickle.dumps(ours))("a cat") == ours("a cat")


def test_languages_of_threads_do_not_mix(tmp_path: Path) -> None:
    tokenizer = minilm.AutoTokenizer.from_pretrained(mbart(tmp_path, tgt_lang="fr_XX"))
    source, target = tokenizer("the cat").input_ids, tokenizer(text_target="the cat").input_ids
    assert source != target

    def encode(number: int) -> bool:
        if number % 2:
            return bool(tokenizer(text_target="the cat").input_ids == target)
        return bool(tokenizer("the cat").input_ids == source)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(400)))


def test_a_language_that_mbart_does_not_have(tmp_path: Path) -> None:
    folder = mbart(tmp_path)
    tokenizer = minilm.AutoTokenizer.from_pretrained(folder)
    message = "_lang is 'sl_SI', and the tokenizer has only the languages ar_AR, cs_CZ, .*, zh_CN"
    with pytest.raises(ValueError, match=f"src{message}"):
        tokenizer.src_lang = "sl_SI"
    with pytest.raises(ValueError, match=f"tgt{message}"):
        tokenizer.tgt_lang = "sl_SI"
    with pytest.raises(ValueError, match=f"src{message}"):
        minilm.MBartTokenizer.from_pretrained(folder, src_lang="sl_SI")
    assert minilm.MBart50Tokenizer.from_pretrained(folder, src_lang="sl_SI").src_lang == "sl_SI"
    with pytest.raises(ValueError, match="src_lang='en_XX' has no effect"):
        minilm.AutoTokenizer.from_pretrained(marian(tmp_path / "m"), src_lang="en_XX")


def test_text_target_of_other_tokenizers(tmp_path: Path) -> None:
    """The labels are encoded as the text is."""
    (tmp_path / "spiece.model").write_bytes(tiny_pieces.model(**tiny_pieces.T5))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    ours = minilm.T5Tokenizer.from_pretrained(tmp_path)
    options = {"padding": True, "truncation": True, "max_length": 5, "return_tensors": "pt"}
    given = ["the cat sat on a mat", "a"], None, ["dogs", "far away and over"]
    expected, found = theirs(*given, **options), ours(*given, **options)
    assert set(found) == set(expected) == {"input_ids", "attention_mask", "labels"}
    assert all((found[key] == expected[key]).all() for key in expected)
