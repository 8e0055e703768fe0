"""Results as tables in Markdown that fit a README: the encoder's, the decoder's, that of cold starts.

Engines down, by the bits of their weights; workloads across. In minilm's rows stands what was measured, in
the others how many times faster minilm's variant of the same format is, or that it is slower."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from . import shapes
from .report import count
from .results import Results, rows, times
from .standing import SWEEP, against, counterpart, grouped, heading, outcome

Cells = list[dict[str, Any]]

LEGEND = (
    "Rows of minilm: what was measured. Other rows: how many times faster minilm is, with weights of the "
    "same format, as a median of interleaved rounds; in bold where it is slower. *Unclear*: the rounds "
    "differ too much to say.\n"
)


def tables(results: Results, models: Sequence[str] = (), threads: int | None = None) -> str:
    """The tables of one run. `models`: those to show, else the first encoder and the first decoder that were
    measured; `threads`: else the most that were used."""
    found: dict[str, dict[str, Cells]] = {}
    used = [c["threads"] for c in results.cells if c["level"] == "end to end"]
    threads = threads or max(used, default=0)
    for place, cells in rows(results.cells).items():
        if place[0] == "end to end" and place[4] == threads and not SWEEP.search(place[1]):
            model = cells[0]["model"]
            found.setdefault(model, {})[place[1].removeprefix(f"{model} ")] = cells
    chosen = [m for m in models if m in found] if models else _first_of_each(list(found))
    parts = [LEGEND] if chosen else []
    for model in chosen:
        warm = {_short(name): cells for name, cells in found[model].items() if name != "cold start"}
        if warm:
            unit = next(iter(warm.values()))[0]["unit"]
            parts.append(_table(f"{model}, {_threads(threads)}, {unit}/s", warm))
    cold = {m: found[m]["cold start"] for m in chosen if "cold start" in found[m]}
    if cold:
        parts.append(_table(f"cold start, {_threads(threads)}, s (most memory)", cold))
    return "\n".join(parts)


def _first_of_each(models: Sequence[str]) -> list[str]:
    encoders = [m for m in models if m in shapes.ENCODERS]
    return encoders[:1] + [m for m in models if m not in shapes.ENCODERS][:1]


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def _short(workload: str) -> str:
    """A heading of few letters."""
    return re.sub(r"(\d+) mixed sentences.*", r"\1 texts", workload)


def _table(title: str, columns: dict[str, Cells]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    every = [cell for cells in columns.values() for cell in cells]
    for name, members in grouped(every).items():
        body = list(_rows(list(dict.fromkeys(c["peer"] for c in members)), columns))
        if body:
            lines += [f"| *{heading(name, every)}* |" + " |" * len(columns), *body]
    return "\n".join(lines) + "\n"


def _rows(names: Sequence[str], columns: dict[str, Cells]) -> Iterator[str]:
    """Ours first; an engine of which nothing is to be told has no row."""
    order = {c["peer"]: at for at, c in enumerate(c for cells in columns.values() for c in cells)}
    for name in sorted(names, key=lambda n: (not n.startswith("minilm"), "reference" in n, order[n])):
        row = [_entry(name, cells) for cells in columns.values()]
        if any(row):
            shown = f"**{name}**" if name.startswith("minilm") else name
            yield f"| {shown} | " + " | ".join(entry or "-" for entry in row) + " |"


def _entry(name: str, cells: Cells) -> str:
    """One engine on one workload; "" where it was not measured."""
    cell = next((c for c in cells if c["peer"] == name), None)
    if cell is None or cell["status"] == "skipped":
        return ""
    taken = times(cell)
    if taken is None:
        return "**WRONG**" if cell["status"] == "wrong" else cell["status"]
    cold = cell["unit"] == "s"
    memory = f" ({cell['peak_bytes'] / 2**20:.0f} MiB)" if cold and cell.get("peak_bytes") else ""
    if counterpart(cell, cells) is cell:
        return (f"{taken.median:.2f}" if cold else count(cell["units_per_call"] / taken.median)) + memory
    found = against(cell, cells)
    if found is None:
        return ""
    if found.reason:
        return f"unclear{memory}"
    words = f"{found.value.median:.2f}x"
    return (f"**{words}, slower**" if outcome(found) == "lost" else words) + memory
