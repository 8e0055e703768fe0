"""Like with like: which of minilm's variants an engine is compared with, and what was won, lost or even.

Engines are grouped by the bits of their weights. An engine is compared with minilm's variant of its own
format (llama.cpp q8_0 with minilm q8_0), else with the fastest of its group, else, where minilm has none of
that many bits, with the one in full precision."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .results import Results, rows, times
from .stats import MAX_SPREAD, Ratio, ratio

Cell = dict[str, Any]

GROUPS = {
    "fp32": "32-bit weights",
    "fp16": "16-bit weights",
    "bf16": "16-bit weights",
    "int8": "8-bit weights",
    "q4": "4-bit weights",
}
"""Precision of a cell -> the group it stands in. The order is that of tables."""
FORMATS = ("int8", "q8_0", "q4_0", "q4_1")
"""Last words of engines' names that name a format."""
OUTCOMES = ("won", "lost", "even", "unclear")
SWEEP = re.compile(r"sweep \d+ x \d+$")


def group(cell: Cell) -> str:
    """The group that a cell stands in."""
    precision: str = cell["precision"]
    return GROUPS.get(precision, precision)


def grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by group, in the order of `GROUPS`; in each the timed ones first, the fastest first."""
    found: dict[str, list[Cell]] = {name: [] for name in GROUPS.values()}
    for cell in sorted(cells, key=_order):
        found.setdefault(group(cell), []).append(cell)
    return {name: members for name, members in found.items() if members}


def heading(name: str, cells: Sequence[Cell]) -> str:
    """A group's name, and what it is compared with where minilm has nothing in it."""
    if any(c["ours"] and group(c) == name for c in cells) or not any(c["ours"] for c in cells):
        return name
    return f"{name}, beside minilm's 32"


def _order(cell: Cell) -> tuple[bool, float]:
    taken = times(cell)
    return (taken is None, taken.median if taken else 0.0)


def main(cells: Sequence[Cell]) -> Cell | None:
    """The fastest of ours in full precision (or of all ours); the specification only where there is no
    other."""
    mine = sorted((c for c in cells if c["ours"] and times(c)), key=_order)
    exact = [c for c in mine if c["precision"] == "fp32"] or mine
    fast = [c for c in exact if "reference" not in c["peer"]] or exact
    return fast[0] if fast else None


def counterpart(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """Ours that `cell` is compared with; itself for ours that others are compared with."""
    ours = [c for c in cells if c["ours"] and times(c)]
    format = cell["peer"].split()[-1]
    if format in FORMATS:
        named = next((c for c in ours if c["peer"].split()[-1] == format), None)
        if named is not None:
            return named
    return main([c for c in ours if group(c) == group(cell)]) or main(ours)


def against(cell: Cell, cells: Sequence[Cell], max_spread: float = MAX_SPREAD) -> Ratio | None:
    """How many times faster its counterpart is; None without one, for itself, and for what was not timed."""
    ours = counterpart(cell, cells)
    if ours is None or ours is cell or times(cell) is None:
        return None
    return ratio(ours["samples"], cell["samples"], max_spread)


@dataclass(frozen=True)
class Comparison:
    """One engine against its counterpart on one workload."""

    place: tuple[Any, ...]
    cell: Cell
    ours: Cell
    ratio: Ratio

    @property
    def outcome(self) -> str:
        """See `stats.Ratio`."""
        return self.ratio.outcome


def comparisons(results: Results, levels: Sequence[str] = ("end to end",)) -> Iterator[Comparison]:
    """All of a run, those of the curves left out. At the level of ops the specification counts as an engine:
    it is eager PyTorch."""
    for place, cells in rows(results.cells).items():
        if place[0] not in levels or SWEEP.search(place[1]):
            continue
        for cell in cells:
            other = not cell["ours"] or (place[0] == "op" and "reference" in cell["peer"])
            found, ours = against(cell, cells), counterpart(cell, cells)
            if other and found is not None and ours is not None:
                yield Comparison(place, cell, ours, found)


def explanation(workload: str) -> str:
    """What a workload of the end-to-end level is, for readers who do not know its name."""
    for pattern, words in (
        (r"(\d+) x (\d+)$", "{0} sentence(s) of {1} tokens at once"),
        (r"(\d+) mixed sentences", "{0} texts of 3 to 250 words, tokenisation included"),
        (r"prefill (\d+)$", "reading a prompt of {0} tokens, up to the first new one"),
        (r"decode after (\d+)$", "writing, token by token, after a prompt of {0}"),
        (r"decode, batch (\d+)$", "writing {0} texts at once, all their tokens counted"),
        (r"cold start$", "from the start of the process to the first result; less is better"),
    ):
        if found := re.search(pattern, workload):
            return words.format(*found.groups()).replace("1 sentence(s)", "1 sentence").replace("(s)", "s")
    return ""
