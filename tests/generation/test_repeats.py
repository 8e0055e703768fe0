"""A sentence that stands in a text as often as allowed does not come again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilm import SamplingParams
from minilm.generation.repeats import SameSentence
from minilm.generation.sampling import Sampling, process

WORDS = ["I", " I", " am", " the", " sea", " sky", ".", "!", "\n", "\n\n", " -", "1", "2", "```", " x", ".\n"]


def text_of(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def tokens_of(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def rule(most: int) -> SameSentence:
    return SameSentence(most, lambda token: WORDS[token])


def ended_sentences(text: str) -> Counter[str]:
    """Those with a letter and two words or more, outside of code, by the text alone; with their stops, if
    they are short."""
    parts: list[str] = []
    code = False
    for line in re.findall(r"[^\n]*\n|[^\n]+$", text):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            parts += re.findall(r"[^.!]*[.!\n]", line)
    found = [(" ".join(part.rstrip(".!\n").split()), part[-1]) for part in parts]
    found = [(words, stop) for words, stop in found if " " in words and re.search("[a-zA-Z]", words)]
    return Counter(words if words.count(" ") > 2 else words + stop for words, stop in found)


WHOLE_WORDS = [" I", " am", " the", " sea", " sky", " x", " -", ".", "!", "\n"]


@given(st.integers(1, 3), st.lists(st.sampled_from(WHOLE_WORDS), max_size=8), st.randoms())
def test_no_sentence_comes_more_often(most: int, weights: list[str], random: Random) -> None:
    """A text written by drawing among few tokens, which would repeat them all the time."""
    excluded = rule(most)
    liked = tokens_of(*weights, " I", " am", " the", " sea", ".", "\n")
    text: list[int] = []
    for _ in range(60):
        allowed = [token for token in liked if token not in excluded(text)]
        if not allowed:
            break
        text.append(random.choice(allowed))
    assert max(ended_sentences(text_of(text)).values(), default=0) <= most, text_of(text)


LINE = ("I", " am", " the", " sea", "\n")


@pytest.mark.parametrize(
    ("text", "next_ones"),
    [
        ((*LINE, " I", " am", " the"), []),
        ((*LINE, *LINE, "I", " am"), []),
        ((*LINE, *LINE, "I", " am", " the"), [" sea"]),
        ((*LINE, " I", *LINE[1:], " I", " am", " the"), [" sea"]),  # spaces do not matter
        ((*LINE, *LINE[:-1], ".", "I", " am", " the"), [" sea"]),
        ((*LINE, *LINE, "I", " am", " the", " sky"), []),
        (("I", " am", ".", "I", " am", "!", " I", " am"), [".", "!"]),  # a short one may go on
        (("1", ".", "1", ".", "1"), []),  # numbers of lists
        (("1", "2", ".", "1", "2", ".", "1", "2"), []),
        (("```", "\n", *LINE, *LINE, "I", " am", " the"), []),
        (("```", "\n", *LINE, *LINE, "```", "\n", "I", " am", " the"), []),
        ((*LINE, *LINE, "```", "\n", "I", " am", " the"), []),
        ((*LINE, "```", "\n", "```", "\n", *LINE, "I", " am", " the"), [" sea"]),
        ((), []),
    ],
)
def test_what_may_not_come_next(text: tuple[str, ...], next_ones: list[str]) -> None:
    assert rule(2)(tokens_of(*text)) == set(tokens_of(*next_ones))


TEXT = st.lists(st.sampled_from([*WHOLE_WORDS, "```", "\n"]), max_size=30).map(
    lambda words: tokens_of(*words)
)


@given(st.lists(TEXT, min_size=1, max_size=3), st.data())
def test_what_was_read_before_does_not_matter(texts: list[list[int]], data: st.DataObject) -> None:
    """Several texts grow by one rule, in any order, some a few tokens at a time; some begin alike."""
    shared, lengths = rule(1), [0] * len(texts)
    texts = [texts[0][: data.draw(st.integers(0, 9))] + text for text in texts]
    for row in data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20)):
        lengths[row] += data.draw(st.integers(0, 4))
        text = texts[row][: lengths[row]]
        assert shared(text) == rule(1)(text)


def test_each_row_has_its_own_rule() -> None:
    text = tokens_of(*LINE, *LINE, "I", " am", " the")
    logits = torch.randn(3, len(WORDS))
    rows = [Sampling(excluded=rule(2)), Sampling(), Sampling(excluded=rule(3))]
    found = process(logits, rows, [[0]] * 3, [text] * 3)
    expected = logits.clone()
    expected[0, WORDS.index(" sea")] = -torch.inf
    assert torch.equal(found, expected)
    assert rows[0].counts
    assert not rows[0].untouched


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_the_option_is_checked(value: object) -> None:
    with pytest.raises(ValueError, match="max_same_sentence must be"):
        SamplingParams(max_same_sentence=value)  # type: ignore[arg-type]
