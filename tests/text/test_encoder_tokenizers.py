"""The tokenizers of MPNet, ELECTRA and ALBERT: ids as transformers has them, from each kind of file."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders
import transformers
from hypothesis import given, settings
from tiny_models import LETTERS, WORDS

from minilm.text.tokenizer import AutoTokenizer

TEXTS = [
    *(
        "Paris is a city of France.",
        "  two  spaces\n\tand more ",
        "",
        "a <mask> b [MASK] c",
        "UNKNOWNwörds é",
    ),
    *("e\u0301 ﬁn ½ ①", "日本 北京 и 😀\u200d👩", "<s> x </s> [SEP] [CLS] <pad> y", "l''eau ``quoted''"),
    *("In 1,234, or 9, (a) b-c.", "x" * 150, "a\u00a0b\u3000c\u200b"),
]
PAIR = "and (so) on"


def vocabulary(folder: Path, *special: str) -> None:
    """vocab.txt with these special tokens."""
    pieces = [*special, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,;:?!'()-\""]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)), encoding="utf-8")


SPECIAL = {
    "mpnet": ("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"),
    "electra": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}


@functools.cache
def spiece() -> Path:
    """A small ALBERT vocabulary, without user-defined symbols."""
    controls = ["[CLS]", "[SEP]", "[MASK]"]
    ids = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
    return folders.sentencepiece("spiece", model_type="unigram", control_symbols=controls, **ids)


def same(ours: Any, theirs: Any, text: str) -> None:
    for one in ((text,), (text, PAIR)):
        found, expected = ours(*one), theirs(*one)
        for name in expected:
            assert found[name] == expected[name], (one, name)
    assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


def named(folder: Path, family: str, by: str, reference: Any) -> None:
    """Leave only what names the tokenizer in this way."""
    if by != "tokenizer.json":
        (folder / "tokenizer.json").unlink(missing_ok=True)
    if by == "model_type":
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(f'{{"model_type": "{family}"}}')


@pytest.mark.parametrize("by", ["tokenizer.json", "tokenizer_class", "model_type"])
@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("kind", ["mpnet", "electra"])
def test_wordpiece_is_transformers(tmp_path: Path, kind: str, cased: bool, by: str) -> None:
    vocabulary(tmp_path, *SPECIAL[kind])
    cls = {"mpnet": transformers.MPNetTokenizer, "electra": transformers.ElectraTokenizer}[kind]
    options = {"do_lower_case": False} if cased and by != "model_type" else {}
    reference = cls.from_pretrained(str(tmp_path), **options)
    reference.save_pretrained(tmp_path)
    named(tmp_path, kind, by, reference)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_token == reference.mask_token
    for name in ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        assert getattr(tokenizer, name) == getattr(reference, name), name
    for text in TEXTS:
        same(tokenizer, reference, text)
    assert ("token_type_ids" in tokenizer("a")) == (kind == "electra")


@pytest.mark.parametrize("by", ["tokenizer.json", "tokenizer_class", "model_type"])
@pytest.mark.parametrize("options", [{}, {"do_lower_case": False, "keep_accents": True}])
def test_albert_is_transformers(tmp_path: Path, options: dict[str, bool], by: str) -> None:
    shutil.copy(spiece() / "spiece.model", tmp_path)
    options = {} if by == "model_type" else options
    reference = transformers.AlbertTokenizer.from_pretrained(str(tmp_path), **options)
    reference.save_pretrained(tmp_path)
    shutil.copy(spiece() / "spiece.model", tmp_path)
    named(tmp_path, "albert", by, reference)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        same(tokenizer, reference, text)


def test_albert_has_token_types() -> None:
    """The second text's are 1, as in pre-training and in transformers 4."""
    (spiece() / "config.json").write_text('{"model_type": "albert"}')
    tokenizer = AutoTokenizer.from_pretrained(spiece())
    first, both = tokenizer("the city"), tokenizer("the city", "of Paris")
    assert set(both["token_type_ids"]) == {0, 1}
    assert both["token_type_ids"].index(1) == len(first["input_ids"])


@functools.cache
def with_symbols() -> tuple[Any, Any]:
    """A vocabulary with user-defined symbols and pieces that end in a digit and a comma: sentencepiece's own
    processor, and our tokenizer."""
    import sentencepiece as library

    folder = folders.new_folder(config={"model_type": "albert"})
    numbers = [f"in 19{n % 100:02d}, {n}, they {n % 7}, (paid) 4, of 2, - so-so" for n in range(400)]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(numbers + folders.corpus()[:200]),
        model_prefix=str(folder / "spiece"),
        vocab_size=400,
        minloglevel=2,
        model_type="unigram",
        split_by_unicode_script=False,
        split_by_number=False,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        user_defined_symbols=["(", ")", "-"],
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
    )
    processor = library.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    assert any(len(p) > 1 and p[-1] == "," and p[-2].isdigit() for p in pieces)
    return processor, AutoTokenizer.from_pretrained(folder)


def expected_pieces(processor: Any, text: str) -> list[str]:
    """sentencepiece's pieces of each word, with the comma after a number apart."""
    found: list[str] = []
    for word in text.split():
        number = re.fullmatch(r"(.*\d)(,)", word)
        parts = number.groups() if number else (word,)
        found += [*processor.encode(parts[0], out_type=str), *parts[1:]]
    return found


@pytest.mark.parametrize(
    "text", ["in 1923, they paid", "(paid) so-so", "of 2, 4, 6", "a 19, b", "they (4)-2, x"]
)
def test_albert_is_sentencepiece(text: str) -> None:
    """With user-defined symbols within words, and numbers before commas, where transformers 5 differs."""
    processor, tokenizer = with_symbols()
    assert tokenizer.tokenize(text) == expected_pieces(processor, text)


@settings(max_examples=10)
@given(text=folders.texts())
def test_any_text(text: str) -> None:
    ours, theirs = _albert_pair()
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@functools.cache
def _albert_pair() -> tuple[Any, Any]:
    (spiece() / "config.json").write_text('{"model_type": "albert"}')
    return AutoTokenizer.from_pretrained(spiece()), transformers.AlbertTokenizer.from_pretrained(
        str(spiece())
    )


def test_class_names() -> None:
    import minilm

    for name in ("MPNetTokenizer", "ElectraTokenizerFast", "AlbertTokenizer"):
        assert getattr(minilm, name) is not None
    (spiece() / "config.json").write_text('{"model_type": "albert"}')
    assert minilm.AlbertTokenizer.from_pretrained(spiece()).mask_token == "[MASK]"
