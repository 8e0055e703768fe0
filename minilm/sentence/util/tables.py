"""Input and output of `mine_hard_negatives`: pairs from a dataset, and columns in one of four formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Table:
    """The two columns of a dataset, and a function that builds a dataset of the same type."""

    names: tuple[str, str]
    anchors: list[str]
    positives: list[str]
    build: Callable[[dict[str, list[Any]]], Any]


def read(dataset: Any, anchor: str | None, positive: str | None) -> Table:
    """The columns. Raises ValueError or TypeError if there are none, or a value is not a text."""
    as_columns = hasattr(type(dataset), "from_dict") and isinstance(getattr(dataset, "column_names", 0), list)
    as_rows = isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes)
    if not (as_columns or as_rows) or isinstance(dataset, Mapping):
        raise TypeError(
            f"expected a datasets.Dataset or a list of dicts, got {type(dataset).__name__} (of a "
            "DatasetDict give one split)"
        )
    if not len(dataset):
        raise ValueError("the dataset is empty")
    if as_rows and not as_columns and not all(isinstance(row, Mapping) for row in dataset):
        row = next(row for row in dataset if not isinstance(row, Mapping))
        raise TypeError(f"expected a list of dicts, and one of them is {row!r:.60}")
    names = list(dataset.column_names if as_columns else dataset[0])
    for name in (anchor, positive):
        if name is not None and name not in names:
            raise ValueError(f"the dataset has no column {name!r}; it has {', '.join(map(str, names))}")
    anchor = anchor or next((name for name in names if name != positive), None)
    positive = positive or next((name for name in names if name != anchor), None)
    if anchor is None or positive is None or anchor == positive:
        raise ValueError(
            f"anchor and positive must be two columns; the dataset has {', '.join(map(str, names))}"
        )
    columns = []
    for name in (anchor, positive):
        texts = list(dataset[name]) if as_columns else [row.get(name) for row in dataset]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"row {number}: {name!r} must be a text, and is {text!r:.60}")
        columns.append(texts)
    build = type(dataset).from_dict if as_columns else _rows
    return Table((anchor, positive), columns[0], columns[1], build)


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Pairs:
    """Each text once."""

    queries: list[str]
    corpus: list[str]
    positives: list[list[int]]
    """The positives of each query, as indices into the corpus."""
    rows: list[int]
    """The number of rows of each query."""

    def listed(self) -> tuple[list[int], list[int]]:
        """All positives in one list: the index of the query of each, and its index in the corpus."""
        owners = [query for query, own in enumerate(self.positives) for _ in own]
        return owners, [place for own in self.positives for place in own]

    @classmethod
    def of(cls, table: Table, corpus: Iterable[str] | None) -> Pairs:
        if isinstance(corpus, str):
            raise TypeError("corpus must be a list of texts, and is a single text")
        more = list(corpus or ())
        for number, text in enumerate(more):
            if not isinstance(text, str):
                raise TypeError(f"corpus must be a list of texts, and number {number} is {text!r:.60}")
        texts = {text: place for place, text in enumerate(dict.fromkeys([*more, *table.positives]))}
        positives: dict[str, dict[int, None]] = {}
        rows: dict[str, int] = {}
        for query, positive in zip(table.anchors, table.positives, strict=True):
            positives.setdefault(query, {})[texts[positive]] = None
            rows[query] = rows.get(query, 0) + 1
        return cls(
            list(positives), list(texts), [list(own) for own in positives.values()], list(rows.values())
        )


# Output formats


@dataclass(frozen=True)
class Anchor:
    """A query with (index in the corpus, score) of its positives and negatives."""

    text: str
    positives: list[tuple[int, float]]
    negatives: list[tuple[int, float]]


def _columns(table: Table, more: Sequence[str]) -> dict[str, list[Any]]:
    for name in table.names:
        if name in more:
            raise ValueError(
                f"the dataset has a column {name!r}, which a new column of that name would replace: rename it"
            )
    return {name: [] for name in (*table.names, *more)}


def _append(columns: dict[str, list[Any]], *values: Any) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _triplets(anchors: list[Anchor], table: Table, corpus: list[str], count: int, scores: bool) -> Any:
    columns = _columns(table, ("negative", "scores") if scores else ("negative",))
    for anchor in anchors:
        for place, score in anchor.positives:
            for other, less in anchor.negatives:
                both = ([score, less],) if scores else ()
                _append(columns, anchor.text, corpus[place], corpus[other], *both)
    return columns


def _tuples(anchors: list[Anchor], table: Table, corpus: list[str], count: int, scores: bool) -> Any:
    names = [f"negative_{number}" for number in range(1, count + 1)]
    columns = _columns(table, (*names, "scores") if scores else names)
    for anchor in anchors:
        for place, score in anchor.positives if len(anchor.negatives) == count else ():
            texts = [corpus[other] for other, _ in anchor.negatives]
            every = ([score, *(less for _, less in anchor.negatives)],) if scores else ()
            _append(columns, anchor.text, corpus[place], *texts, *every)
    return columns


def _labeled_pairs(anchors: list[Anchor], table: Table, corpus: list[str], count: int, scores: bool) -> Any:
    columns = _columns(table, ("score" if scores else "label",))
    for anchor in anchors:
        for label, found in ((1, anchor.positives), (0, anchor.negatives)):
            for place, score in found:
                _append(columns, anchor.text, corpus[place], score if scores else label)
    return columns


def _labeled_lists(anchors: list[Anchor], table: Table, corpus: list[str], count: int, scores: bool) -> Any:
    columns = _columns(table, ("scores" if scores else "labels",))
    for anchor in anchors:
        for positive in anchor.positives if anchor.negatives else ():
            every = [positive, *anchor.negatives]
            labels = [score for _, score in every] if scores else [1] + [0] * len(anchor.negatives)
            _append(columns, anchor.text, [corpus[place] for place, _ in every], labels)
    return columns


Format = Callable[[list[Anchor], Table, list[str], int, bool], dict[str, list[Any]]]
"""(anchors, table, texts of the corpus, number of negatives, whether to add scores) -> columns."""
COLUMNS: dict[str, Format] = {
    "triplet": _triplets,
    "n-tuple": _tuples,
    "labeled-pair": _labeled_pairs,
    "labeled-list": _labeled_lists,
}


def report(anchors: list[Anchor], left_out: dict[str, int], count: int) -> None:
    """Print the number of pairs, their scores, and how many candidates each limit removed."""
    kinds = {
        "positives": [score for anchor in anchors for _, score in anchor.positives],
        "negatives": [score for anchor in anchors for _, score in anchor.negatives],
    }
    for name, scores in kinds.items():
        at = torch.tensor(scores, dtype=torch.float64)
        shown = (
            ", ".join(
                f"{what} {float(value):.4f}"
                for what, value in (
                    ("mean", at.mean()),
                    ("median", at.median()),
                    ("min", at.min()),
                    ("max", at.max()),
                )
            )
            if scores
            else "none"
        )
        print(f"{len(scores):,} {name}: {shown}")
    for name, number in left_out.items():
        print(f"{number:,} candidates were removed by {name}")
    few = sum(len(anchor.negatives) < count for anchor in anchors)
    if few:
        print(f"{few:,} of {len(anchors):,} anchors have fewer than {count} negatives")
