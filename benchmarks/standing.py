"""Comparisons: which of minilm's variants an engine is compared with, and which comparisons were won, lost or
even.

Engines are grouped by the bits of their weights. An engine is compared with minilm's variant of its own
format (llama.cpp q8_0 with minilm q8_0), else with the fastest of its group, else, if minilm has none with
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
"""Precision of a cell -> its group. The order is that of tables."""
FORMATS = ("int8", "q8_0", "q4_0", "q4_1")
"""Last words of engine names that are formats."""
OUTCOMES = ("won", "lost", "even", "unclear")
SWEEP = re.compile(r"sweep \d+ x \d+$")


def group(cell: Cell) -> str:
    """The group of a cell."""
    precision: str = cell["precision"]
    return GROUPS.get(precision, precision)


def grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by group, in the order of `GROUPS`; in each, timed ones first, the fastest first."""
    found: dict[str, list[Cell]] = {name: [] for name in GROUPS.values()}
    for cell in sorted(cells, key=_order):
        found.setdefault(group(cell), []).append(cell)
    return {name: members for name, members in found.items() if members}


def heading(name: str, cells: Sequence[Cell]) -> str:
    """A group's name, and what it is compared with if minilm has no engine in it."""
    if any(c["ours"] and group(c) == name for c in cells) or not any(c["ours"] for c in cells):
        return name
    return f"{name}, beside minilm's 32"


def _order(cell: Cell) -> tuple[bool, float]:
    taken = times(cell)
    return (taken is None, taken.median if taken else 0.0)


def main(cells: Sequence[Cell]) -> Cell | None:
    """The fastest of minilm's engines in full precision (or of all of them); the specification only if there
    is no other."""
    mine = sorted((c for c in cells if c["ours"] and times(c)), key=_order)
    exact = [c for c in mine if c["precision"] == "fp32"] or mine
    fast = [c for c in exact if "reference" not in c["peer"]] or exact
    return fast[0] if fast else None


def counterpart(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """minilm's engine that `cell` is compared with; for an engine of minilm that others are compared with,
    itself."""
    ours = [c for c in cells if c["ours"] and times(c)]
    format = cell["peer"].split()[-1]
    if format in FORMATS:
        named = next((c for c in ours if c["peer"].split()[-1] == format), None)
        if named is not None:
            return named
    return main([c for c in ours if group(c) == group(cell)]) or main(ours)


def against(cell: Cell, cells: Sequence[Cell], max_spread: float = MAX_SPREAD) -> Ratio | None:
    """How many times faster its counterpart is; None without a counterpart, for itself, and if it was not
    timed."""
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
    """All comparisons of a run, without those of the curves. At the op level, the specification (eager
    PyTorch) counts as another engine."""
    for place, cells in rows(results.cells).items():
        if place[0] not in levels or SWEEP.search(place[1]):
            continue
        for cell in cells:
            other = not cell["ours"] or (place[0] == "op" and "reference" in cell["peer"])
            found, ours = against(cell, cells), counterpart(cell, cells)
            if other and found is not None and ours is not None:
                yield Comparison(place, cell, ours, found)


def explanation(workload: str) -> str:
    """Explanations of the names of end-to-end workloads."""
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
