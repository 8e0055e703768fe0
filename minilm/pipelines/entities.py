"""Grouping tokens into words and words into entities, by label prefixes and word boundaries.

token    Ang ##ela lives in  New   York  .
label    B-PER ... O     O   B-LOC I-LOC O
word     |       | |   | | | |   | |  |  |
entity   |       |           |        |
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

ItemT = TypeVar("ItemT")

_INSIDE = ("B-", "I-")
_MORE = ("E-", "S-", "L-", "U-", "M-")
"""Prefixes of BIOES and BILOU in addition to B- and I-: last, single, last, unit, middle."""

_WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai to Khmer
    *((0x3040, 0x30FF), (0x3100, 0x312F), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),  # kana, bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),  # ideographs
)
"""Scripts whose words have no spaces between them, as ranges of characters."""


class Label(NamedTuple):
    """A parsed label: B-PER -> (PER, begins an entity)."""

    kind: str
    begins: bool = False
    ends: bool = False


class Labels:
    """The labels of a model. B- and I- are prefixes; E-, S-, L-, U- and M- are prefixes if there is a B- or
    I- label of the same kind (E-PER with B-PER, but not E-MAIL alone); others are not (START-DATE)."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def read(self, name: str) -> Label:
        """Parse a label."""
        prefix, kind = name[:2], name[2:]
        if prefix in _INSIDE:
            return Label(kind, begins=prefix == "B-")
        if prefix in _MORE and any(inside + kind in self.names for inside in _INSIDE):
            return Label(kind, begins=prefix in ("S-", "U-"), ends=prefix in ("E-", "L-", "S-", "U-"))
        return Label(name)

    def groups(self, items: Sequence[ItemT], names: Sequence[str]) -> Iterator[list[ItemT]]:
        """Groups of neighbours of one kind, split where an entity begins or ends; `names`: their labels."""
        group: list[ItemT] = []
        last, outside = Label(""), False
        for item, name in zip(items, names, strict=True):
            label = self.read(name)
            other = label.kind != last.kind or (name == "O") != outside
            if group and (label.begins or last.ends or other):
                yield group
                group = []
            group.append(item)
            last, outside = label, name == "O"
        if group:
            yield group

    def ignored(self, name: str, ignored: Sequence[str]) -> bool:
        """Whether a group whose first label is `name` is ignored. "O" is the label for no entity, not a kind
        of entity of that name (B-O)."""
        kind = self.read(name).kind
        return kind in ignored and not (kind == "O" and name != "O")


def same_word(text: str, start: int, before: int) -> bool:
    """Whether the token that starts at `start` in the text and the one that ends at `before` belong to the
    same word, as far as this can be decided without knowing the language.

    Words end at white space (of any kind: line breaks, no-break and zero-width spaces), and, in scripts
    without spaces, at every token. Tokens that share a character, and marks with the letter before them, are
    never separated.
    """
    if start <= 0:
        return False
    if start < before:  # bytes of one character
        return True
    around = text[start - 1 : start + 1]
    if any(character.isspace() or character == "\u200b" for character in around):
        return False
    if unicodedata.category(around[-1]).startswith("M"):
        return True
    return not any(_without_spaces(character) for character in around)


def _without_spaces(character: str) -> bool:
    number = ord(character)
    return number >= 0x0E00 and any(first <= number <= last for first, last in _WITHOUT_SPACES)


def visible(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) without white space at its ends, unless nothing would remain."""
    found = text[start:end]
    if not found.strip():
        return start, end
    return end - len(found.lstrip()), start + len(found.rstrip())
