"""Named entities by prompting: each span of a text is put into a sentence that says what it is (Cui et al.
2021, arXiv:2106.01760).

    words = {"person": "person", "place": ["city", "country"], "none": "word"}
    find = PromptedEntities(ClozeClassifier("bert-base-cased", "{text} {span} is a {mask}.", words))
    find("John lives in Paris.")   # [{"entity_group": "person", "score": ..., "word": "John", ...}, ...]
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from torch import Tensor

from .templates import Item


class Classifier(Protocol):
    """A `ClozeClassifier` or `LabelScorer` whose template has the fields text and span."""

    labels: list[str]

    def probabilities(self, items: list[Item]) -> Tensor:
        """[items, labels]."""


class PromptedEntities:
    """Finds entities by classifying every span of a text.

    Args:
        classifier: its template has the fields ``{text}`` and ``{span}``.
        none: the label of spans that are not entities.
        max_words: the longest span, in words. A text of n words has up to n * max_words spans, each of which
            is one prompt.
    """

    def __init__(self, classifier: Classifier, *, none: str = "none", max_words: int = 3) -> None:
        if none not in classifier.labels:
            raise ValueError(
                "none= must be the label of spans that are not entities, one of "
                f"{', '.join(classifier.labels)}"
            )
        if not isinstance(max_words, int) or max_words < 1:
            raise ValueError(f"max_words must be a positive integer, and is {max_words!r}")
        self.classifier, self.none, self.max_words = classifier, none, max_words

    def __call__(self, text: str) -> list[dict[str, Any]]:
        """The entities in the order of the text, {"entity_group", "score", "word", "start", "end"}. Of
        overlapping spans, the one with the highest score is kept."""
        words = [match.span() for match in re.finditer(r"\w+(?:['’-]\w+)*", text)]
        spans = [
            (words[i][0], words[j][1])
            for i in range(len(words))
            for j in range(i, min(i + self.max_words, len(words)))
            if not re.search(r"[.!?;:,()]", text[words[i][0] : words[j][1]])
        ]
        if not spans:
            return []
        items: list[Item] = [{"text": text, "span": text[start:end]} for start, end in spans]
        scores, best = self.classifier.probabilities(items).max(-1)
        found = [
            (score, start, end, self.classifier.labels[label])
            for score, label, (start, end) in zip(scores.tolist(), best.tolist(), spans, strict=True)
            if self.classifier.labels[label] != self.none
        ]
        kept: list[tuple[float, int, int, str]] = []
        for entity in sorted(found, key=lambda entity: (-entity[0], entity[1])):
            if all(entity[2] <= start or entity[1] >= end for _, start, end, _ in kept):
                kept.append(entity)
        return [
            {"entity_group": label, "score": score, "word": text[start:end], "start": start, "end": end}
            for score, start, end, label in sorted(kept, key=lambda entity: entity[1])
        ]
