"""tokenizer.json files that mean harm are refused in one sentence, before they take time or memory; those of
known kinds load as before."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Backend

from minilm import AutoTokenizer
from minilm.text.vocabulary import files, limits
from minilm.text.vocabulary.errors import TokenizerError

VOCAB = {"[UNK]": 0, "a": 1, "b": 2, "<s>": 3}


def file_of(tmp_path: Path, **parts: Any) -> Path:
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": VOCAB, "unk_token": "[UNK]"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**data, **parts}))
    return path


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(kind: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: steps}


def nested(kind: str, depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        step = sequence(kind, [step])
    return step


def template(ids: list[int], times: int = 1, type_id: int = 0) -> dict[str, Any]:
    a = {"Sequence": {"id": "A", "type_id": 0}}
    around = [{"SpecialToken": {"id": "<s>", "type_id": type_id}}] * times
    return {
        "type": "TemplateProcessing",
        "single": [*around, a],
        "pair": [*around, a, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}},
    }


def added(text: str, index: int) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def charsmap(text: bytes) -> str:
    return base64.b64encode(struct.pack("<II", 4, 0) + text + b"\0").decode()


HARMFUL = {
    "nested quantifiers": ({"pre_tokenizer": split(r"(a+)+$")}, "takes far too long"),
    "the same twice": ({"pre_tokenizer": split(r"(?:[ab]|b)*c")}, "takes far too long"),
    "polynomial": ({"pre_tokenizer": split(r"a*a*a*a*a*b")}, "takes far too long"),
    "spaces": ({"pre_tokenizer": split(r"\s*\s*\s*\s*z")}, "takes far too long"),
    "behind a look": ({"pre_tokenizer": split(r"(?=(a+)+b)a")}, "takes far too long"),
    "in a replacement": ({"normalizer": replace(r"(\w+\s*)+$", "x", "Regex")}, "takes far too long"),
    "in a decoder": ({"decoder": replace(r"(x+x+)+y", "x", "Regex")}, "takes far too long"),
    "within sequences": (
        {"pre_tokenizer": sequence("pretokenizers", [sequence("pretokenizers", [split(r"(k+)+;")])])},
        "takes far too long",
    ),
    "written out": ({"pre_tokenizer": split(r"((a{1000}){1000}){1000}")}, "multiply to more than"),
    "long pattern": ({"pre_tokenizer": split("a" * 30_000)}, "a pattern of 30000 characters"),
    "backreference": ({"pre_tokenizer": split(r"(a)\1")}, "refers to its own groups"),
    "recursion": ({"pre_tokenizer": split(r"(?<n>a\g<n>?b)")}, "refers to its own groups"),
    "chain": ({"normalizer": sequence("normalizers", [replace("a", "aa")] * 40)}, "one character into"),
    "chain of patterns": (
        {"normalizer": sequence("normalizers", [replace("[ab]", "aab", "Regex")] * 20)},
        "one character into",
    ),
    "into nothing": ({"normalizer": replace("", "x" * 1000, "Regex")}, "one character into"),
    "bytes of bytes": (
        {"normalizer": sequence("normalizers", [{"type": "ByteLevel"}] * 30)},
        "one character into",
    ),
    "composed again": (
        {"normalizer": sequence("normalizers", [replace("a", "\ufdfa"), {"type": "NFKC"}] * 8)},
        "one character into",
    ),
    "chain in a decoder": (
        {"decoder": sequence("decoders", [replace("a", "aa")] * 40)},
        "one character into",
    ),
    "long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 10_000}}, "before a text"),
    "long replacement": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 5000)}},
        "a text of 5000 bytes for one",
    ),
    "many steps": ({"normalizer": sequence("normalizers", [{"type": "Lowercase"}] * 500)}, "500 steps"),
    "deep": ({"normalizer": nested("normalizers", 90)}, "sequences within sequences"),
    "many tokens around": ({"post_processor": template([3], 100_000)}, "adds 100001 tokens"),
    "many ids": ({"post_processor": template([3] * 5000)}, "adds 5001 tokens"),
    "an id of no token": ({"post_processor": template([4_000_000_000])}, "id 4000000000 .* no token has"),
    "a large token type": ({"post_processor": template([3], 1, 4_000_000_000)}, "token type 4000000000"),
    "roberta's": (
        {
            "post_processor": {
                "type": "RobertaProcessing",
                "sep": ["<s>", 3],
                "cls": ["<s>", 77],
                "trim_offsets": True,
                "add_prefix_space": False,
            }
        },
        "id 77 .* no token has",
    ),
    "a large id": ({"added_tokens": [added("<x>", 4_000_000_000)]}, "has id 4000000000, .* it 4"),
    "an id of another": ({"added_tokens": [added("<s>", 1)]}, "'<s>' has id 1, .* it 3"),
    "a large id of the model": (
        {"model": {"type": "WordLevel", "vocab": {**VOCAB, "z": 1 << 31}, "unk_token": "[UNK]"}},
        "the id of 'z' is 2147483648",
    ),
    "long words": (
        {
            "model": {
                "type": "WordPiece",
                "vocab": VOCAB,
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9,
            }
        },
        "max_input_chars_per_word is 1000000000",
    ),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_files_are_refused(name: str, tmp_path: Path) -> None:
    parts, message = HARMFUL[name]
    path = file_of(tmp_path, **parts)
    with pytest.raises(TokenizerError, match=message) as caught:
        AutoTokenizer.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


USUAL = [
    r"\s+$",
    r" {2,}",
    r"\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?:\r?\n)+(?!\r?\n)",
    r"(?:\p{L}\p{M}*)+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken(pattern: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, pre_tokenizer=split(pattern))
    assert AutoTokenizer.from_pretrained(path).encode("a") == [1]


@examples(30)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["a", "ab", " ", ""]), st.sampled_from(["", "b", "aa", "abab", "aaa"])),
        min_size=1,
        max_size=6,
    ),
    text=st.text("ab ", max_size=12),
)
def test_growth_is_a_bound(steps: list[tuple[str, str]], text: str) -> None:
    """No text grows by more than what is counted for the steps."""
    grown, bound, longest = text, 1.0, len(text) + 1
    for pattern, content in steps:
        bound *= limits._growth(replace(pattern, content, "Regex"), "", ())
        grown = normalizers.Replace(Regex(pattern), content).normalize_str(grown)
        assert len(grown) <= bound * longest + len(steps) * 16


@pytest.mark.parametrize("kind", ["wordpiece", "gpt2", "roberta", "qwen2", "llama", "xlm_roberta"])
def test_what_is_saved_loads(kind: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(getattr(folders, kind)())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(folders.PEOPLE)
    assert again.encode(text) == tokenizer.encode(text)


def test_a_table_in_a_sentencepiece_model(tmp_path: Path) -> None:
    def field(number: int, data: bytes) -> bytes:
        size = bytearray()
        count = len(data)
        while count > 127:
            size.append(count & 127 | 128)
            count >>= 7
        return bytes([number << 3 | 2, *size, count]) + data

    table = struct.pack("<II", 4, 0) + b"x" * 5000 + b"\0"
    path = tmp_path / "spiece.model"
    path.write_bytes(field(1, field(1, b"<unk>")) + field(3, field(2, table)))
    with pytest.raises(TokenizerError, match=r"spiece\.model.* a text of 5000 bytes for one"):
        AutoTokenizer.from_pretrained(path)


def test_runs_of_spaces_are_collapsed_in_one_pass() -> None:
    """Stripping and collapsing, whatever order it is done in, is what sentencepiece does."""
    import sentencepiece

    path = folders.sentencepiece("spiece", model_type="unigram") / "spiece.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    patterns = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]["normalizers"]
    regexes = [step["pattern"]["Regex"] for step in patterns if "Regex" in step.get("pattern", {})]
    assert not any("+" in pattern and "z" in pattern for pattern in regexes)  # looks on from every space
    for unit in (*" \t\n\r=a1", "\u3000", "日", "🚨", " \n", "\u3000\t"):
        for count in (0, 1, 2, 3, 50):
            for text in (unit * count, f"a{unit * count}b", f"{unit * count}a {unit * count}"):
                assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text


class Counted:
    """A `tokenizers.Tokenizer` that counts calls of add_tokens: the library prepares its search anew with
    each."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.calls = backend, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += name == "add_tokens"
        return getattr(self.backend, name)


def test_added_tokens_come_in_one_call(tmp_path: Path) -> None:
    names = [f"<extra {index}>" for index in range(300)]
    numbered = {str(4 + i): {"content": name, "special": i % 2 == 0} for i, name in enumerate(names)}
    path = file_of(tmp_path)
    counted: Any = Counted(Backend.from_file(str(path)))
    added = {"added_tokens_decoder": numbered, "added_tokens": None}
    files._add_tokens(counted, {"extra_special_tokens": ["<more>"]}, {}, added, set(), "x")
    assert counted.calls == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": numbered}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(4, 304))
    assert tokenizer.encode("".join(names)) == list(range(4, 304))
