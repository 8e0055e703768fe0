"""Prompts with fields: templates, the words for labels, and cutting texts to fit."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

Item = str | Mapping[str, str]
"""A text for the field ``{text}``, or a dict with a text for each field."""
Words = Mapping[str, str | Sequence[str]]
"""Label -> the word or words that stand for it."""

MASK = "mask"
"""The field of the answer."""


class Template:
    """A prompt with fields in braces: ``Template("{text} It was {mask}.")``.

    ``{mask}`` marks the answer; the other fields are filled from the item. ``{{`` and ``}}`` stand for
    braces. Raises ValueError for an invalid template.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"the template {template!r:.80} cannot be read: {error}") from None
        self._parts: list[tuple[str, str | None]] = []
        for literal, name, form, conversion in parts:
            if name is not None and (not name.isidentifier() or form or conversion):
                raise ValueError(
                    f"a field of a template must be a name in braces, and {template!r:.80} has {{{name}}}"
                )
            self._parts.append((literal, name))
        names = [name for _, name in self._parts if name is not None]
        if names.count(MASK) > 1:
            raise ValueError(
                f"a template must have one {{mask}}, and {template!r:.80} has {names.count(MASK)}"
            )
        self.has_mask = MASK in names
        self.names = tuple(dict.fromkeys(name for name in names if name != MASK))
        """The fields that are filled from the item."""

    def fields(self, item: Item) -> dict[str, str]:
        """The text of each field. Raises TypeError or ValueError if the item does not have them all."""
        if isinstance(item, str):
            if len(self.names) > 1:
                raise ValueError(
                    f"the template has the fields {', '.join(self.names)}: give a dict with a text for "
                    f"each, {{name: text}}, and not {item!r:.60}"
                )
            return dict.fromkeys(self.names, item)
        if not isinstance(item, Mapping):
            raise TypeError(
                f"an item must be a text or {{field: text}}, and is {type(item).__name__}: {item!r:.60}"
            )
        for name in self.names:
            if not isinstance(item.get(name), str):
                came = (
                    f"{item[name]!r:.40}"
                    if name in item
                    else f"only {', '.join(map(str, item)) or 'nothing'}"
                )
                raise ValueError(f"the template needs a text for {{{name}}}, and the item has {came}")
        return {name: item[name] for name in self.names}

    def fill(self, fields: Mapping[str, str], answer: str = "") -> tuple[str, int]:
        """The prompt with `answer` in its place, and the position where the answer begins."""
        text, at = "", -1
        for literal, name in self._parts:
            text += literal
            if name == MASK:
                at = len(text)
                text += answer
            elif name is not None:
                text += fields[name]
        return text, at

    def render(self, item: Item) -> str:
        """The prompt of an item, without an answer."""
        return self.fill(self.fields(item))[0]


def shortened(
    fields: Mapping[str, str], excess: int, spans: Callable[[str], Sequence[tuple[int, int]]]
) -> dict[str, str]:
    """The fields after cutting the last `excess` tokens of the longest one. `spans` gives the start and end
    of each token of a text. Raises ValueError if nothing of that field would be left."""
    found = {name: spans(text) for name, text in fields.items()}
    longest = max(found, key=lambda name: len(found[name]), default=None)
    if longest is None or len(found[longest]) <= excess:
        raise ValueError(f"the prompt has {excess} tokens too many, and no field is long enough to be cut")
    end = found[longest][len(found[longest]) - excess - 1][1]
    return {**fields, longest: fields[longest][:end]}


def words_of(words: Words) -> dict[str, tuple[str, ...]]:
    """Label -> its words. Raises ValueError for fewer than two labels, and for a label without words."""
    if not isinstance(words, Mapping) or len(words) < 2:
        raise ValueError(
            f"words must have two or more labels, {{label: word or words}}, and is {words!r:.80}"
        )
    found = {label: (said,) if isinstance(said, str) else tuple(said) for label, said in words.items()}
    for label, said in found.items():
        if not said or not all(isinstance(word, str) and word.strip() for word in said):
            raise ValueError(f"the label {label!r} needs a word that stands for it, and has {said!r}")
    return found
