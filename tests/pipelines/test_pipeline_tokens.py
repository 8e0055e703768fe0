"""token-classification against transformers.pipeline: strategies, offsets, windows."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same, mend
from tiny_models import TEXTS, save_model

from minilm.pipelines import pipeline

FAMILIES = ("bert", "roberta", "distilbert", "mpnet", "electra")
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
STRATEGIES = ("none", "simple", "first", "average", "max")

HEURISTIC = "ignore:the tokenizer does not mark words:UserWarning"
"""RoBERTa's tokenizer has no prefix for tokens within a word; both implementations warn."""

pytestmark = pytest.mark.filterwarnings(HEURISTIC, "ignore:Tokenizer does not support real words:UserWarning")

UNICODE = [
    "Éric's café in Nürnberg\u00a0– naïve, 北京大学 and e\u0301 (combining)",
    "  two  spaces, tabs\tand\nlines ",
    "👩\u200d👩\u200d👧 family 😀😀 emoji",
    "ÅNGSTRÖM ﬁne ligatures ½ İstanbul ΟΔΟΣ",
    "",
    " ",
    "...!?",
]


def as_written(found: Any, text: str) -> Any:
    """What transformers found in a text, with the words of entities as they are written there: its own are
    tokens put together again (lower-cased, without accents, with spaces around punctuation), and may have
    white space at their ends."""
    written = []
    for entity in found:
        start, end = entity["start"], entity["end"]
        while "entity_group" in entity and text[start:end].strip() and text[start].isspace():
            start += 1
        while "entity_group" in entity and text[start:end].strip() and text[end - 1].isspace():
            end -= 1
        word = text[start:end] if "entity_group" in entity else entity["word"]
        written.append({**entity, "word": word, "start": start, "end": end})
    return written


def one_rule(text: str, family: str, strategy: str) -> bool:
    """Whether transformers has the same words. It takes a token of BERT's to be within a word where it is
    longer than what it stands for, and those of RoBERTa to be so where there is no space before them."""
    if strategy in ("none", "simple"):
        return True
    if family == "roberta":
        plain = all(
            c == " " or (c.isascii() and not c.isspace()) or (c.isalpha() and ord(c) < 0x250) for c in text
        )
        return plain and "  " not in text
    return unicodedata.is_normalized("NFC", text) and len(text.lower()) == len(text) and text.isprintable()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_model(
            tmp_path_factory.mktemp(family), family, "ForTokenClassification", seed=3, **LABELS
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    return {
        family: (
            pipeline("ner", model=folder, device="cpu"),
            mend(transformers.pipeline("ner", model=str(folder), device=-1)),
        )
        for family, folder in folders.items()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_strategies(pairs: Any, family: str, strategy: str) -> None:
    ours, theirs = pairs[family]
    texts = [text[:120] for text in TEXTS if text] + [text for text in UNICODE if text]
    texts = [text for text in texts if one_rule(text, family, strategy)]
    assert len(texts) >= 5
    expected = theirs(texts, aggregation_strategy=strategy)
    expected = [as_written(found, text) for found, text in zip(expected, texts, strict=True)]
    key = "entity" if strategy == "none" else "entity_group"
    assert len({entity[key] for entities in expected for entity in entities}) >= 2 + (family == "bert")
    assert_same(ours(texts, aggregation_strategy=strategy), expected)
    assert_same(ours(texts[0], aggregation_strategy=strategy), expected[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_to_ignore(pairs: Any, family: str, strategy: str) -> None:
    ours, theirs = pairs[family]
    for ignored in ([], ["MISC", "PER", "B-PER"], ["O", "LOC", "I-LOC", "MISC"]):
        options = {"aggregation_strategy": strategy, "ignore_labels": ignored}
        text = TEXTS[2] if one_rule(TEXTS[2], family, strategy) else TEXTS[0]
        assert_same(ours(text, **options), as_written(theirs(text, **options), text))
    everything = ours(TEXTS[2], aggregation_strategy=strategy, ignore_labels=[])
    assert_same(
        [e for e in everything if e.get("entity", e.get("entity_group")) != "O"],
        ours(TEXTS[2], aggregation_strategy=strategy),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_are_characters_of_the_text(pairs: Any, family: str) -> None:
    ours, _ = pairs[family]
    for text in [*TEXTS, *UNICODE]:
        tokens = ours(text, ignore_labels=[])
        assert all(0 <= token["start"] <= token["end"] <= len(text) for token in tokens)
        words = ours(text, ignore_labels=[], aggregation_strategy="first")
        covered = "".join(text[word["start"] : word["end"]] for word in words)
        kept = [c for c in text if not c.isspace()]
        missing = len(kept) - len([c for c in covered if not c.isspace()])
        assert missing <= text.count("\u200d") + text.count("\u0301"), (text, covered)


def test_no_text_has_no_entities(pairs: Any) -> None:
    for ours, _ in pairs.values():
        assert ours("", ignore_labels=[]) == []
        assert ours(["", "anna"], ignore_labels=[], aggregation_strategy="simple")[0] == []
        assert ours([]) == []


@settings(max_examples=30)
@given(
    text=st.text(min_size=1, max_size=40),
    strategy=st.sampled_from(STRATEGIES),
    family=st.sampled_from(["bert", "roberta"]),
)
def test_any_text(text: str, strategy: str, family: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    ours, theirs = _drawn_pair(family)
    options = {"aggregation_strategy": strategy, "ignore_labels": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ours(text, **options)
        if one_rule(text, family, strategy):
            assert_same(found, as_written(theirs(text, **options), text))


def _drawn_pair(family: str, cache: dict[str, Any] = {}) -> Any:  # noqa: B006 - hypothesis takes no module fixtures
    if family not in cache:
        import tempfile

        cache[family + "/"] = tempfile.TemporaryDirectory()
        folder = save_model(
            Path(cache[family + "/"].name), family, "ForTokenClassification", positions=200, **LABELS
        )
        theirs = transformers.pipeline("ner", model=str(folder), device=-1)
        cache[family] = pipeline("ner", model=folder, device="cpu"), theirs
    return cache[family]


# Windows

LONG = [
    "John Smith lives in Paris, the old city of France. " * 12,
    "Éric was in 北京 and Nürnberg, where Mary Smithers works; " * 9,
    "anna " * 63,
]


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "stride", [pytest.param(0, marks=pytest.mark.slow), 7, pytest.param(30, marks=pytest.mark.slow)]
)
def test_windows_with_a_stride(pairs: Any, family: str, strategy: str, stride: int) -> None:
    ours, theirs = pairs[family]
    options = {"aggregation_strategy": strategy, "stride": stride}
    for text in [*LONG, "anna"]:
        if one_rule(text, family, strategy):
            assert_same(ours(text, **options), as_written(theirs(text, **options), text))
    assert_same(
        ours([*LONG, "anna"], batch_size=2, **options), [ours(text, **options) for text in [*LONG, "anna"]]
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_read_to_their_end(pairs: Any, family: str, strategy: str) -> None:
    """Without a stride every token of a long text is there once, with the scores of the window around it."""
    ours, theirs = pairs[family]
    for text in LONG:
        tokens = ours(text, ignore_labels=[])
        whole = theirs.tokenizer(text, return_offsets_mapping=True, verbose=False)
        count = len(whole["input_ids"])
        assert count > 64
        assert [token["index"] for token in tokens] == list(range(1, count - 1))
        assert [(token["start"], token["end"]) for token in tokens] == whole["offset_mapping"][1:-1]
        first = theirs(text, ignore_labels=[])  # cut to the window
        shared = 62 - 62 // 4  # of the first window, what no other window has
        assert_same(tokens[:shared], first[:shared])
        entities = ours(text, ignore_labels=[], aggregation_strategy=strategy)
        starts = [entity["start"] for entity in entities]
        assert starts == sorted(starts)
        assert not text[entities[-1]["end"] :].strip()
    assert_same(
        ours(LONG, aggregation_strategy=strategy, batch_size=3),
        [ours(t, aggregation_strategy=strategy) for t in LONG],
    )


def test_windows_take_scores_from_the_middle(pairs: Any) -> None:
    """Tokens of the overlap get what the model says in the window where they are farther from the edge."""
    ours, theirs = pairs["bert"]
    room, overlap = 62, 62 // 4
    ids = theirs.tokenizer(LONG[0], add_special_tokens=False, verbose=False)["input_ids"]
    second = theirs.tokenizer.decode(ids[room - overlap : 2 * room - overlap])
    expected = theirs(second, ignore_labels=[])
    found = ours(LONG[0], ignore_labels=[])
    assert len(expected) == room
    begin = room - overlap + overlap // 2
    for token, reference in zip(
        found[begin : 2 * room - 2 * overlap], expected[overlap // 2 :], strict=False
    ):
        assert (token["word"], token["entity"]) == (reference["word"], reference["entity"])
        assert token["score"] == pytest.approx(reference["score"], abs=1e-5)


# Words


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_words(pairs: Any, family: str, strategy: str) -> None:
    ours, theirs = pairs[family]
    words = ["John", "Smithers", "lives", "in", "北京", "Nürnberg", "."]
    options = {"is_split_into_words": True, "aggregation_strategy": strategy}
    text = " ".join(words)
    assert_same(ours(words, **options), as_written(theirs(words, **options)[0], text))
    first, second = theirs([words, ["anna"]], **options)
    assert_same(ours([words, ["anna"]], **options), [as_written(first, text), as_written(second, "anna")])
    [joined] = theirs([words], delimiter="--", **options)
    assert_same(ours([words], delimiter="--", **options), [as_written(joined, "--".join(words))])


# Bad input


def test_bad_input(pairs: Any, folders: dict[str, Path]) -> None:
    ours, _ = pairs["bert"]
    with pytest.raises(
        ValueError,
        match="aggregation_strategy must be one of none, simple, first, average, max, and is 'last'",
    ):
        ours("anna", aggregation_strategy="last")
    with pytest.raises(
        ValueError, match="stride merges entities of windows: it needs another aggregation_strategy"
    ):
        ours("anna", stride=3)
    with pytest.raises(ValueError, match="stride must be less than the 62 tokens of a window, and is 62"):
        ours("anna", stride=62, aggregation_strategy="simple")
    with pytest.raises(ValueError, match="stride must be a number of tokens, and is -1"):
        ours("anna", stride=-1, aggregation_strategy="simple")
    with pytest.raises(TypeError, match="ignore_labels must be a list of labels, and is 'O'"):
        ours("anna", ignore_labels="O")
    with pytest.raises(TypeError, match="takes texts, and got list"):
        ours([["anna"]])
    with pytest.raises(TypeError, match="with is_split_into_words an input is a list of words, not str"):
        ours(["anna", ["lives"]], is_split_into_words=True)
    with pytest.raises(TypeError, match="token-classification has no option agg"):
        pipeline("ner", model=folders["bert"], agg="simple")
