"""Tokenizers from GGUF metadata: the real SmolLM2 against transformers, small ones against their origin."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import tokenizer_folders as folders
import transformers
from hypothesis import given
from strategies import examples

from minilm.text.tokenizer import AutoTokenizer, Tokenizer, TokenizerError
from minilm.text.vocabulary.gguf import tokenizer_from_gguf
from minilm.text.vocabulary.sentencepiece import read_sentencepiece

FILE = Path("some.gguf")


@cache
def smollm() -> tuple[Any, Tokenizer]:
    file = folders.smollm_file()
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return theirs, AutoTokenizer.from_pretrained(file)


@cache
def known_bytes() -> set[str]:
    """SmolLM2 has no token for some bytes, mostly ones that no UTF-8 has. transformers makes <|endoftext|> of
    them; here they are dropped, as by llama.cpp."""
    vocab = smollm()[1].get_vocab()
    return {character for character in map(chr, range(0x250)) if character in vocab}


def has_all_bytes(text: str) -> bool:
    from tokenizers import pre_tokenizers

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return all(set(piece) <= known_bytes() for piece, _ in pieces)


@pytest.mark.slow
@examples(150)
@given(text=folders.texts().filter(lambda text: not any(c.isnumeric() for c in text)), pair=folders.texts())
def test_smollm_without_numbers(text: str, pair: str) -> None:
    """As transformers reads it, which ignores how the file says that text is to be split: single digits."""
    theirs, ours = smollm()
    pair = "".join(character for character in pair if not character.isnumeric())
    if has_all_bytes(text + pair):
        assert dict(ours(text, pair, return_offsets_mapping=True)) == dict(
            theirs(text, pair, return_offsets_mapping=True)
        )
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text


@cache
def with_single_digits() -> Any:
    from tokenizers import pre_tokenizers

    theirs = copy.deepcopy(smollm()[0])
    # The pre-tokenizer of the tokenizer.json that SmolLM2 has on the hub.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return theirs


@pytest.mark.slow
@examples(150)
@given(folders.texts())
def test_smollm(text: str) -> None:
    if has_all_bytes(text):
        assert smollm()[1](text).tokens() == with_single_digits()(text).tokens()


def test_smollm_settings() -> None:
    """transformers 5.17 takes <|im_start|> for the end, and has no padding token."""
    tokenizer = smollm()[1]
    special = {"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>", "pad": "<|im_end|>"}
    assert tokenizer.special_tokens_map == {f"{name}_token": token for name, token in special.items()}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert not tokenizer.add_bos_token
    assert len(tokenizer) == 49152
    assert tokenizer.encode("a  7b<|im_end|>") == [81, 256, 39, 82, 2]
    assert tokenizer.decode([1, 81, 2], skip_special_tokens=True) == "a"
    assert smollm()[0].chat_template == tokenizer.chat_template


def metadata_of_byte_level(folder: Path, **more: Any) -> dict[str, Any]:
    vocab = json.loads((folder / "vocab.json").read_text())
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [
        line for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#version")
    ]
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "eos_token_id": 0,
        **more,
    }
    return {
        "general.architecture": "llama",
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None},
    }


@cache
def metadata_of_sentencepiece(**more: Any) -> dict[str, Any]:
    model = read_sentencepiece(folders.llama_model())
    fields = {
        "model": "llama",
        "tokens": [piece.text for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [int(piece.kind) for piece in model.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "kind"), [("qwen2", "qwen2"), ("deepseek-r1-qwen", "qwen2"), ("gpt-2", "gpt2")]
)
@examples(50)
@given(text=folders.texts())
def test_ways_to_split(pre: str, kind: str, text: str) -> None:
    """By llama.cpp's name the same as from the vocabulary files of that family."""
    ours, expected = splitting(pre, kind)
    assert ours.encode(text).tokens == expected.tokenize(text)


@cache
def splitting(pre: str, kind: str) -> tuple[Any, Tokenizer]:
    folder = {"qwen2": folders.qwen2, "gpt2": folders.gpt2}[kind]()
    expected = AutoTokenizer.from_pretrained(folder)
    kinds = [3 if index in expected.all_special_ids else 1 for index in range(len(expected))]
    backend, _ = tokenizer_from_gguf(metadata_of_byte_level(folder, pre=pre, token_type=kinds), FILE)
    return backend, expected


@pytest.mark.parametrize(
    ("pre", "words"),
    [  # llama.cpp, src/llama-vocab.cpp: one pattern after the other
        ("llama-bpe", ["It", "'S", " ", "123", "45", " $", "a", " Ü", "\n\n", "  ", " x"]),
        ("tekken", ["It", "'S", " ", "1", "2", "3", "4", "5", " $", "a", " Ü", "\n\n", "  ", " x"]),
        ("qwen2", ["It", "'S", " ", "1", "2", "3", "4", "5", " $", "a", " Ü", "\n\n", "  ", " x"]),
        ("smollm", ["It", "'", "S", " ", "1", "2", "3", "4", "5", " $", "a", " Ü", "\n\n  ", " x"]),
        ("gpt-2", ["It", "'", "S", " 12345", " $", "a", " Ü", "\n\n  ", " x"]),
        ("default", ["It", "'", "S", " ", "123", "45", " ", "$", "a", " Ü", "\n\n  ", " x"]),
    ],
)
def test_words(pre: str, words: list[str]) -> None:
    backend, _ = tokenizer_from_gguf(metadata_of_byte_level(folders.gpt2(), pre=pre), FILE)
    text = "It'S 12345 $a Ü\n\n   x"
    found = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == words


def test_splitting_that_is_unknown_or_unsaid(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre is 'falcon-9', expected one of"):
        tokenizer_from_gguf(metadata_of_byte_level(folders.gpt2(), pre="falcon-9"), FILE)
    tokenizer_from_gguf(metadata_of_byte_level(folders.gpt2()), FILE)
    assert "taking 'llama-bpe'" in caplog.text


@cache
def by_scores() -> tuple[Any, Any]:
    """The sentencepiece library, and its model with the pieces in another order, the scores as they were."""
    import sentencepiece

    metadata = dict(metadata_of_sentencepiece())
    order = [*range(259), *random.Random(1).sample(range(259, 900), 641)]
    for name in ("tokens", "scores", "token_type"):
        values = metadata[f"tokenizer.ggml.{name}"]
        metadata[f"tokenizer.ggml.{name}"] = [values[index] for index in order]
    library = sentencepiece.SentencePieceProcessor(model_file=str(folders.llama_model()))
    return library, tokenizer_from_gguf(metadata, FILE)[0]


@examples(150)
@given(folders.texts())
def test_sentencepiece_by_scores(text: str) -> None:
    library, backend = by_scores()
    text = re.sub(r"▁|</?s>|<unk>", "", text)
    assert backend.encode(text).tokens == library.encode(text, out_type=str)
    assert backend.decode(backend.encode(text).ids) == text


def write(path: Path, metadata: dict[str, Any]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files(tmp_path: Path) -> None:
    """A file, a folder with one, a file named in a folder; with the flags that a file can have."""
    template = {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}
    flags = {"add_bos_token": True, "add_eos_token": True, "add_space_prefix": False, "padding_token_id": 2}
    file = write(tmp_path / "spm.gguf", {**metadata_of_sentencepiece(), **template, **prefixed(flags)})
    for tokenizer in (
        AutoTokenizer.from_pretrained(file),
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="spm.gguf"),
    ):
        assert tokenizer.tokenize("a", add_special_tokens=True) == ["<s>", "a", "</s>"]
        assert tokenizer.pad_token == "</s>"
        assert tokenizer.chat_template == {"default": "A", "tool_use": "B"}
    assert (
        AutoTokenizer.from_pretrained(file, add_bos_token=False).tokenize("a", add_special_tokens=True)[0]
        == "a"
    )
    plain = write(tmp_path / "plain.gguf", dict(metadata_of_sentencepiece()))
    assert AutoTokenizer.from_pretrained(plain).tokenize("a", add_special_tokens=True) == ["<s>", "▁a"]


def prefixed(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "a GGUF file without a tokenizer"),
        ({"tokens": None}, "a GGUF file without a tokenizer"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": 3}, "tokenizer.ggml.model is 3, expected a str"),
        ({"tokens": [1]}, r"tokenizer.ggml.tokens\[0\] is 1"),
        ({"tokens": "abc"}, "expected a list"),
        ({"token_type": [1]}, "1 tokenizer.ggml.token_type for"),
        ({"scores": None}, "tokenizer.ggml.scores, found none"),
        ({"scores": [0.5]}, "tokenizer.ggml.scores, found 1"),
        ({"scores": ["x"] * 900}, r"tokenizer.ggml.scores\[0\] is 'x'"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000, but there are 900 tokens"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": True}, "expected a int"),
        ({"add_bos_token": 1}, "expected a bool"),
    ],
)
def test_damaged_metadata(changes: dict[str, Any], message: str) -> None:
    metadata = dict(metadata_of_sentencepiece())
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf(metadata, FILE)
    assert FILE.name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": None}, "without tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "'ab' does not name two tokens"),
        ({"merges": ["zzzz yyyy"]}, "zzzz"),
        ({"token_type": [9] * 900}, "token_type: no such type: 9"),
    ],
)
def test_damaged_byte_level_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(metadata_of_byte_level(folders.gpt2(), pre="gpt-2", **changes), FILE)


@cache
def small_file() -> bytes:
    folder = folders.new_folder()
    file = write(folder / "a.gguf", metadata_of_byte_level(folders.gpt2(), pre="gpt-2"))
    data = file.read_bytes()
    shutil.rmtree(folder)
    return data


@examples(80)
@given(seed=st.integers(0, 2**32), cut=st.booleans())
def test_bytes_changed(seed: int, cut: bool) -> None:
    chance = random.Random(seed)
    data = bytearray(small_file())
    if cut:
        del data[chance.randrange(len(data)) :]
    else:
        near_the_start = chance.random() < 0.5
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(300 if near_the_start else len(data))] ^= 1 << chance.randrange(8)
    folder = folders.new_folder()
    (folder / "a.gguf").write_bytes(bytes(data))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer.encode("Das ist ein Test 12"))
    except TokenizerError:
        pass
    finally:
        shutil.rmtree(folder)
