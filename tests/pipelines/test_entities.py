"""Entities from known classes of tokens: words of all scripts, labels of all schemes, places in the text.

The models' heads are replaced by tables of classes, so that what is right can be written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minilm import AutoTokenizer
from minilm.pipelines import pipeline
from minilm.pipelines.entities import Labels, same_word, visible

STRATEGIES = ("simple", "first", "average", "max")

pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer does not mark words:UserWarning")


def with_labels(folder: Path, names: Sequence[str], family: str = "bert", **options: Any) -> Any:
    """A tagger whose classes have these names."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    save_model(folder, family, "ForTokenClassification", **labels, **options)
    return pipeline("ner", model=folder, device="cpu")


def tell(pipe: Any, classes: dict[str, str]) -> None:
    """Let the tagger be sure of these tokens, and take all others for its first class."""
    names = [pipe.model.config.id2label[i] for i in range(pipe.model.config.num_labels)]
    known = {pipe.tokenizer.get_vocab()[token]: names.index(name) for token, name in classes.items()}
    table = torch.eye(len(names)) * 0.9 + 0.1 / len(names)
    pipe.head = lambda result, windows: [table[[known.get(i, 0) for i in w.ids]] for w in windows]


def found(pipe: Any, text: str, **options: Any) -> list[tuple[str, str]]:
    """The kinds and words of the entities; the words are those at their places."""
    entities = pipe(text, **{"aggregation_strategy": "simple", **options})
    assert all(text[e["start"] : e["end"]] == e["word"] for e in entities)
    return [(e["entity_group"], e["word"]) for e in entities]


# Labels


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        ("O START-DATE END-DATE", "START-DATE END-DATE", [("START-DATE", "anna"), ("END-DATE", "berlin")]),
        ("O E-MAIL S-CLASS", "E-MAIL S-CLASS", [("E-MAIL", "anna"), ("S-CLASS", "berlin")]),
        ("O B-A-B I-A-B", "B-A-B I-A-B", [("A-B", "anna berlin")]),
        ("O B-A-B I-A-C", "B-A-B I-A-C", [("A-B", "anna"), ("A-C", "berlin")]),
        ("O B-P I-P", "B-P B-P", [("P", "anna"), ("P", "berlin")]),
        ("O B-P I-P", "I-P I-P", [("P", "anna berlin")]),
        ("O B-P I-P I-L", "B-P I-L", [("P", "anna"), ("L", "berlin")]),
        ("O P L", "P P", [("P", "anna berlin")]),
        ("O P L", "P L", [("P", "anna"), ("L", "berlin")]),
        ("O B-P I-P E-P S-P", "B-P E-P", [("P", "anna berlin")]),
        ("O B-P I-P E-P S-P", "S-P E-P", [("P", "anna"), ("P", "berlin")]),
        ("O B-P I-P E-P S-P", "E-P I-P", [("P", "anna"), ("P", "berlin")]),
        ("O B-P I-P L-P U-P", "B-P L-P", [("P", "anna berlin")]),
        ("O B-P I-P L-P U-P", "U-P U-P", [("P", "anna"), ("P", "berlin")]),
        ("O B-M M-M E-M", "M-M E-M", [("M", "anna berlin")]),
        ("NONE B-O I-O", "B-O I-O", [("O", "anna berlin")]),
        ("O B-O I-O", "B-O O", [("O", "anna")]),
        ("O B- I-", "B- I-", [("", "anna berlin")]),
    ],
)
def test_labels(tmp_path: Path, names: str, classes: str, expected: list[tuple[str, str]]) -> None:
    pipe = with_labels(tmp_path, names.split())
    tell(pipe, dict(zip(("anna", "berlin"), classes.split(), strict=True)))
    others = [name for name in ("NONE",) if name in names]
    for strategy in STRATEGIES:
        options = {"aggregation_strategy": strategy, "ignore_labels": ["O", *others]}
        assert found(pipe, "anna berlin lives", **options) == expected


def test_a_kind_can_be_ignored_by_its_name(tmp_path: Path) -> None:
    pipe = with_labels(tmp_path, ["O", "B-PER", "I-PER", "B-LOC", "MISC"])
    tell(pipe, {"anna": "B-PER", "berlin": "B-LOC", "paris": "MISC"})
    text = "anna in berlin in paris"
    assert found(pipe, text) == [("PER", "anna"), ("LOC", "berlin"), ("MISC", "paris")]
    assert found(pipe, text, ignore_labels=["PER", "MISC", "O"]) == [("LOC", "berlin")]
    assert [e["entity"] for e in pipe(text, ignore_labels=["O", "B-PER"])] == ["B-LOC", "MISC"]


NAMES = st.lists(
    st.sampled_from([*"OPQ", "B-P", "I-P", "E-P", "S-P", "B-Q", "I-Q", "L-Q", "U-Q", "E-R", "X-P"]),
    max_size=9,
)


@given(names=NAMES, known=st.sets(st.sampled_from(["B-P", "I-P", "B-Q", "I-Q", "E-P", "L-Q"])))
def test_groups_are_runs_of_one_kind(names: list[str], known: set[str]) -> None:
    """Nothing is lost or moved; a border is where the kind changes, and where a prefix says so."""
    scheme = Labels({*names, *known})
    groups = list(scheme.groups(range(len(names)), names))
    assert [i for group in groups for i in group] == list(range(len(names)))
    borders = {group[0] for group in groups[1:]}
    all_names = {*names, *known}

    def split(name: str) -> tuple[str, str]:
        prefix, _, kind = name.partition("-")
        pair = {f"B-{kind}", f"I-{kind}"}
        is_prefix = kind and (prefix in ("B", "I") or (prefix in ("E", "S", "L", "U") and pair & all_names))
        return (prefix, kind) if is_prefix else ("", name)

    for i in range(1, len(names)):
        (before, one), (here, other) = split(names[i - 1]), split(names[i])
        outside = "O" in (names[i - 1], names[i]) and names[i - 1] != names[i]
        expected = outside or one != other or here in ("B", "S", "U") or before in ("E", "L", "S", "U")
        assert (i in borders) == expected, (names[i - 1], names[i])


# Words


@pytest.mark.parametrize(
    "text",
    [
        "Réunion lives",
        "Re\u0301union lives",
        "RE\u0301UNION lives",
        "re\u00adunion lives",
        "reu\u200bnion lives",
    ],
)
@pytest.mark.parametrize("strategy", ["first", "average", "max"])
def test_a_word_is_whole_however_it_is_written(tmp_path: Path, text: str, strategy: str) -> None:
    """What the normalizer drops or changes does not begin or end a word."""
    pipe = with_labels(tmp_path, ["O", "B-LOC", "I-LOC"])
    tell(pipe, {"r": "B-LOC", "lives": "B-LOC"})
    pieces = pipe.tokenizer.tokenize(text)
    assert len(pieces) > 5
    assert pieces[1].startswith("##")
    entities = pipe(text, aggregation_strategy=strategy, ignore_labels=[])
    first = entities[0]
    assert text[: first["end"]] == first["word"] == text.split(" ")[0]
    assert first["entity_group"] == ("O" if strategy == "average" else "LOC")


@pytest.mark.parametrize("written", ["##ing", "a ##ing", "a##ing"])
def test_the_prefix_in_the_text_itself_is_none(tmp_path: Path, written: str) -> None:
    pipe = with_labels(tmp_path, ["O", "B-X"])
    tell(pipe, {"a": "B-X"})
    tokens = pipe(written, ignore_labels=[])
    words = pipe(written, ignore_labels=[], aggregation_strategy="first")
    assert "".join(t["word"] for t in tokens).replace("##", "") == written.replace(" ", "").replace("##", "")
    assert [w["entity_group"] for w in words] == (["O"] if written == "##ing" else ["X", "O"])


SEPARATORS = [" ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000", "\u200b", "  ", "\n\n"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_white_space_ends_a_word(tmp_path: Path, family: str, separator: str) -> None:
    if family == "bert" and separator == "\u200b":
        pytest.skip("BERT's normalizer drops it, so that the two are one word")
    pipe = with_labels(tmp_path, ["O", "PER", "LOC"], family)
    text = f"anna{separator}paris"
    border = len("anna" + separator)

    def head(result: Any, windows: Any) -> Any:
        table = torch.eye(3) * 0.9 + 0.03
        offsets = pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return [table[[0 if a == b else 1 if b <= 4 else 2 if a >= border else 0 for a, b in offsets]]]

    pipe.head = head
    for strategy in STRATEGIES:
        assert found(pipe, text, aggregation_strategy=strategy) == [("PER", "anna"), ("LOC", "paris")]


def byte_level(folder: Path, kind: str) -> Path:
    """A tagger with a tokenizer without a prefix: bytes, or pieces with a sign for spaces."""
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *alphabet])}
        made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.北京在é"
        pieces = [("<pad>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters), ("▁anna", -1.0)]
        made = Tokenizer(models.Unigram(pieces, unk_id=1))
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    folder.mkdir(exist_ok=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=66,
        pad_token_id=0,
        id2label={0: "O", 1: "X", 2: "Y"},
        label2id={"O": 0, "X": 1, "Y": 2},
    )
    transformers.RobertaForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prefixless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Taggers whose tokens do not say whether they are within a word."""
    top = tmp_path_factory.mktemp("prefixless")
    made = {
        kind: pipeline("ner", model=byte_level(top / kind, kind), device="cpu")
        for kind in ("bytes", "pieces")
    }
    assert all(pipe._prefix is None for pipe in made.values())
    return made


def by_place(pipe: Any, text: str, classes: Sequence[int]) -> None:
    """Let the class of a token be that of the first visible character it stands for."""

    def head(result: Any, windows: Any) -> Any:
        table = torch.eye(3) * 0.9 + 0.03
        offsets = pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        places = [next((i for i in range(a, b) if not text[i].isspace()), None) for a, b in offsets]
        return [table[[0 if i is None else classes[i] for i in places]]]

    pipe.head = head


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_places_hold_the_word_and_no_space(prefixless: Any, kind: str, strategy: str) -> None:
    pipe, text = prefixless[kind], "in anna  Berlin, 北京在 é\nend"
    classes = [0] * len(text)
    for word, number in (("anna", 1), ("Berlin", 2), ("京", 1), ("end", 2)):
        start = text.index(word)
        classes[start : start + len(word)] = [number] * len(word)
    by_place(pipe, text, classes)
    entities = found(pipe, text, aggregation_strategy=strategy)
    merged: list[tuple[str, str]] = []
    for group, word in entities:  # simple gives one entity a token: each begins one
        glued = (
            merged and strategy == "simple" and merged[-1][0] == group and text.count(merged[-1][1] + word)
        )
        merged = [*merged[:-1], (group, merged[-1][1] + word)] if glued else [*merged, (group, word)]
    if strategy != "simple":  # the comma is of the word before, as in transformers
        assert merged == [("X", "anna"), ("Y", "Berlin,"), ("X", "京"), ("Y", "end")]
    elif kind == "pieces":
        assert merged == [("X", "anna"), ("Y", "Berlin"), ("X", "京"), ("Y", "end")]


def test_bytes_of_a_character_are_one_word(prefixless: Any) -> None:
    """An emoji after a space is four tokens of one place."""
    pipe, text = prefixless["bytes"], "a 😀 b"
    by_place(pipe, text, [0, 0, 1, 0, 0])
    assert len(pipe(text, ignore_labels=[])) > 6
    assert found(pipe, text, aggregation_strategy="first") == [("X", "😀")]


@pytest.mark.parametrize(
    ("text", "borders"),
    [
        ("new york", [4]),
        ("new\u00a0york", [3, 4]),
        ("new\nyork", [3, 4]),
        ("newyork", []),
        ("don't", []),
        ("北京在", [1, 2]),
        ("東京タワー", [1, 2, 3, 4]),
        ("in北京", [2, 3]),
        ("서울에서", []),
        ("สวัสดี", [1, 3, 4]),  # a vowel above its consonant is part of it
        ("cafe\u0301s", []),
        ("👩\u200d👩", []),
        ("क्षि", []),
    ],
)
def test_where_words_end(text: str, borders: list[int]) -> None:
    """Before which characters a word may begin, were each character a token. Beside spaces that belong to the
    token after them, the place of the space counts too."""
    begins = [i for i in range(1, len(text)) if not same_word(text, i, i)]
    white = [i for i, c in enumerate(text) if c == " "]
    marks = [i for i in begins if i not in white]
    assert marks == borders
    assert all(same_word(text, i, i + 1) for i in range(1, len(text)))


@given(text=st.text(max_size=12), start=st.integers(0, 12), length=st.integers(0, 12))
def test_visible(text: str, start: int, length: int) -> None:
    start = min(start, len(text))
    end = min(start + length, len(text))
    a, b = visible(text, start, end)
    assert start <= a <= b <= end
    assert text[a:b] == (text[start:end].strip() or text[start:end])


@given(
    text=st.text(max_size=30),
    strategy=st.sampled_from(STRATEGIES),
    family=st.sampled_from(["bert", "roberta"]),
)
def test_places_hold_the_word_in_any_text(text: str, strategy: str, family: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    pipe = _drawn(family)
    entities = pipe(text, aggregation_strategy=strategy, ignore_labels=[])
    assert all(text[e["start"] : e["end"]] == e["word"] for e in entities)
    assert all(e["word"] == e["word"].strip() or not e["word"].strip() for e in entities)
    starts = [e["start"] for e in entities]
    assert starts == sorted(starts)


def _drawn(family: str, cache: dict[str, Any] = {}) -> Any:  # noqa: B006 - hypothesis takes no module fixtures
    if family not in cache:
        import tempfile

        cache[family + "/"] = tempfile.TemporaryDirectory()
        cache[family] = with_labels(
            Path(cache[family + "/"].name), ["O", "B-PER", "I-PER", "MISC"], family, positions=200
        )
    return cache[family]


def test_given_words_that_would_be_glued_are_refused(prefixless: Any) -> None:
    """A tokenizer that needs a space before each word reads "ab", "cd" as "abcd"."""
    for delimiter in (" ", "", "--", "\n"):
        with pytest.raises(ValueError, match="'cd' without the space before it"):
            prefixless["bytes"](["ab", "cd", "北京"], is_split_into_words=True, delimiter=delimiter)


# What can be passed


class Rows:
    """A dataset as torch has them: a length and items, no iterator, and no end that an index finds."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


class Series:
    """As pandas has them: the items by labels, and in order by iteration."""

    ndim = 1

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, label: Any) -> Any:
        raise KeyError(label)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = with_labels(tmp_path_factory.mktemp("tagger"), ["O", "B-PER"])
    tell(pipe, {"anna": "B-PER"})
    return pipe


def test_kinds_of_inputs(tagger: Any) -> None:
    texts = ["anna lives", "in paris", "anna"]
    expected = [tagger(text) for text in texts]
    assert [len(found) for found in expected] == [1, 0, 1]
    assert tagger(texts) == tagger(tuple(texts)) == expected
    for several in (iter(texts), (text for text in texts), Rows(texts), Series(texts), np.array(texts)):
        results = tagger(several)
        assert isinstance(results, Iterator)
        assert list(results) == expected
    assert list(tagger({"a": text}["a"] for text in texts)) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"text": "anna"},
        [{"text": "anna"}],
        Rows([{"text": "anna"}]),
        {"anna", "paris"},
        np.array("anna"),
        np.array([["anna"]]),
        torch.tensor([1]),
        b"anna",
        3,
        None,
        ["anna", None],
        ["anna", b"anna"],
        [("anna", "paris")],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_text_is_refused(tagger: Any, bad: Any) -> None:
    """And not taken apart into keys, letters or rows."""
    for options in ({}, {"aggregation_strategy": "first"}):
        with pytest.raises(TypeError, match=r"token-classification takes (texts|a text)"):
            list(tagger(bad, **options))


def test_the_file_is_what_was_saved(tmp_path: Path) -> None:
    """Labels of a checkpoint keep their order and their hyphens."""
    names = ["O", "START-DATE", "B-END-DATE"]
    pipe = with_labels(tmp_path, names)
    assert list(json.loads((tmp_path / "config.json").read_text())["id2label"].values()) == names
    assert list(pipe.model.config.id2label.values()) == names
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64
