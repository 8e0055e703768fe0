"""Results as Markdown tables: one for a README, and tables of the encoder, the decoder and cold starts.

The table for a README has one row per workload: minilm's measurement, and the fastest other engine with as
many bits per weight. The other tables have one row per engine, grouped by the bits of the weights, and one
column per workload. minilm's rows show measurements; the others show how many times faster minilm's variant
of the same format is, or that it is slower."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import shapes
from .report import count
from .results import ResultError, Results, rows, times
from .standing import GROUPS, SWEEP, against, counterpart, grouped, heading, main

Cells = list[dict[str, Any]]

LEGEND = (
    "Rows of minilm: measurements. Other rows: how many times faster minilm is with weights of the same "
    "format, as the median of interleaved rounds; in bold if it is slower. In brackets: the range of the "
    "middle 60 % of the rounds, if they differ by more than 30 %. *Even*, *unclear*: the rounds disagree "
    "about which is faster, by a little or a lot.\n"
)
BESIDE = (
    "Each figure is minilm's, followed by the comparison with the fastest other engine whose weights "
    "have as many bits.\n"
)


def overview(results: Results, models: Sequence[str] = (), threads: int | None = None) -> str:
    """One table: a row per workload, a column per number of bits (see `tables` for the arguments)."""
    found, threads = _found(results, threads)
    lines: list[str] = []
    groups: list[str] = []
    for model in _chosen(found, models):
        for cells in found[model].values():
            groups += [
                name for name in grouped([c for c in cells if c["ours"] and times(c)]) if name not in groups
            ]
    groups.sort(key=list(dict.fromkeys(GROUPS.values())).index)
    for model in _chosen(found, models):
        for name, cells in found[model].items():
            unit = "s" if cells[0]["unit"] == "s" else f"{cells[0]['unit']}/s"
            entries = [_nearest(cells, group) or "-" for group in groups]
            lines.append(f"| {model}, {_short(name)}, {unit} | {' | '.join(entries)} |")
    if not lines:
        return ""
    head = f"| {_threads(threads)} | {' | '.join(groups)} |"
    return "\n".join([BESIDE, head, "|---|" + "---|" * len(groups), *lines]) + "\n"


def _nearest(cells: Cells, group: str) -> str:
    """minilm's figure in a group, and its ratio to the fastest other engine there."""
    members = grouped([c for c in cells if times(c)]).get(group, [])
    others = [c for c in members if not c["ours"]]
    ours = main([c for c in members if c["ours"]])
    if not others:
        return f"**{_measured(ours)}**" if ours is not None else ""
    nearest = counterpart(others[0], cells)
    ratio = against(others[0], cells)
    if nearest is None or nearest not in members or ratio is None:
        return ""
    words = str(ratio).partition(":")[0]
    words = f"**{words}**" if ratio.outcome == "lost" else words
    joined = "with" if ratio.outcome == "even" else "beside" if ratio.outcome == "unclear" else "than"
    return f"**{_measured(nearest)}**, {words} {joined} {others[0]['peer']}"


def _measured(cell: dict[str, Any]) -> str:
    taken = times(cell)
    assert taken is not None
    return f"{taken.median:.2f}" if cell["unit"] == "s" else count(cell["units_per_call"] / taken.median)


def tables(results: Results, models: Sequence[str] = (), threads: int | None = None) -> str:
    """The tables of one run. `models`: default: the first encoder and the first decoder that were measured;
    `threads`: default: the largest number that was used."""
    found, threads = _found(results, threads)
    chosen = _chosen(found, models)
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


def page(results: Results, run: str, pictures: Sequence[str]) -> str:
    """README.md of a folder of results: the tables of the run `run`, and the existing pictures."""
    shown = "\n\n".join(f"![{name.replace('-', ' ')}](pictures/{name}.png)" for name in pictures)
    machine = f"{results.machine['cpu']}, {results.machine['usable_cores']} cores"
    rest = "`index.html` has every run and every figure."
    head = f"# Measurements: {machine}\n\nTables of `{run}`, and pictures. {rest}"
    return "\n\n".join((head, overview(results).rstrip(), tables(results).rstrip(), shown)).rstrip() + "\n"


def newest(folder: Path) -> tuple[str, Results] | None:
    """The newest run in a folder with whole models of both kinds; else the newest with whole models."""
    runs: list[tuple[bool, str, str, Results]] = []
    for file in folder.glob("*.json"):
        try:
            results = Results.read(file)
        except ResultError:
            continue
        kinds = {
            c["model"] in shapes.ENCODERS for c in results.cells if c["level"] == "end to end" and times(c)
        }
        if kinds:
            runs.append((len(kinds) > 1, results.started, file.name, results))
    if not runs:
        return None
    _, _, name, results = max(runs, key=lambda run: run[:3])
    return name, results


def write(folder: Path) -> Path | None:
    """Write README.md of a folder of results; None if there is no run with whole models."""
    found = newest(folder)
    if found is None:
        return None
    target = folder / "README.md"
    names = sorted(file.stem for file in (folder / "pictures").glob("*.png"))
    target.write_text(page(found[1], found[0], names), encoding="utf-8")
    return target


def _found(results: Results, threads: int | None) -> tuple[dict[str, dict[str, Cells]], int]:
    """Model -> workload -> its cells, and their number of threads."""
    found: dict[str, dict[str, Cells]] = {}
    used = [c["threads"] for c in results.cells if c["level"] == "end to end"]
    threads = threads or max(used, default=0)
    for place, cells in rows(results.cells).items():
        if place[0] == "end to end" and place[4] == threads and not SWEEP.search(place[1]):
            model = cells[0]["model"]
            found.setdefault(model, {})[place[1].removeprefix(f"{model} ")] = cells
    return found, threads


def _chosen(found: dict[str, dict[str, Cells]], models: Sequence[str]) -> list[str]:
    return [m for m in models if m in found] if models else _first_of_each(list(found))


def _first_of_each(models: Sequence[str]) -> list[str]:
    encoders = [m for m in models if m in shapes.ENCODERS]
    return encoders[:1] + [m for m in models if m not in shapes.ENCODERS][:1]


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def _short(workload: str) -> str:
    """A short heading."""
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
    """Engines of minilm first; an engine without any measurement has no row."""
    order = {c["peer"]: at for at, c in enumerate(c for cells in columns.values() for c in cells)}
    for name in sorted(names, key=lambda n: (not n.startswith("minilm"), "reference" in n, order[n])):
        row = [_entry(name, cells) for cells in columns.values()]
        if any(row):
            shown = f"**{name}**" if name.startswith("minilm") else name
            yield f"| {shown} | " + " | ".join(entry or "-" for entry in row) + " |"


def _entry(name: str, cells: Cells) -> str:
    """One engine on one workload; "" if it was not measured."""
    cell = next((c for c in cells if c["peer"] == name), None)
    if cell is None or cell["status"] == "skipped":
        return ""
    taken = times(cell)
    if taken is None:
        return "**WRONG**" if cell["status"] == "wrong" else cell["status"]
    cold = cell["unit"] == "s"
    memory = f" ({cell['peak_bytes'] / 2**20:.0f} MiB)" if cold and cell.get("peak_bytes") else ""
    if counterpart(cell, cells) is cell:
        return _measured(cell) + memory
    found = against(cell, cells)
    if found is None:
        return ""
    words = str(found).partition(":")[0].replace(" faster", "")
    return (f"**{words}**" if found.outcome == "lost" else words) + memory
