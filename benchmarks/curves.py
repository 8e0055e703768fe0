"""Line charts: latency by length, throughput by batch size, scaling by threads.

One panel per number of bits of the weights; each line has its engine's name at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import harness, standing
from .drawing import SOFT, End, colour, dark, label_ends, log_numbers, marks
from .results import Results, times

SWEEP = re.compile(r"sweep (\d+) x (\d+)$")
GROUP_ORDER = tuple(dict.fromkeys(standing.GROUPS.values()))


@dataclass
class Line:
    """One engine: (x, middle, low, high) for each point."""

    cell: dict[str, Any]
    points: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass
class Picture:
    """The content of one picture."""

    name: str
    title: str
    x: str
    y: str
    lines: list[Line]
    logarithmic: bool = True


def all_pictures(results: Results) -> list[Picture]:
    """All line charts that the results have data for."""
    return [*_sweeps(results, "length"), *_sweeps(results, "batch"), *_scaling(results)]


def _sweeps(results: Results, axis: str) -> list[Picture]:
    """One picture per model, device, number of threads and (by batch size) length."""
    found: dict[tuple[str, str, int, int], dict[str, Line]] = {}
    for cell in results.cells:
        taken, matched = times(cell), SWEEP.search(cell["workload"])
        if cell["level"] != "end to end" or not matched or taken is None:
            continue
        batch, length = int(matched[1]), int(matched[2])
        key = (cell["model"], cell["device"], cell["threads"], 0 if axis == "length" else length)
        if axis == "length" and batch == 1:
            point = (float(length), taken.median * 1e3, taken.p20 * 1e3, taken.p80 * 1e3)
        elif axis == "batch":
            units = cell["units_per_call"]
            point = (float(batch), units / taken.median, units / taken.p80, units / taken.p20)
        else:
            continue
        line = found.setdefault(key, {}).setdefault(cell["peer"], Line(cell))
        line.points.append(point)
    stem = "latency-length" if axis == "length" else "throughput-batch"
    kept = {k: v for k, v in found.items() if len({p[0] for line in v.values() for p in line.points}) > 1}
    pictures = []
    for model, device, threads, length in kept:
        where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
        if axis == "length":
            title, x = "time for one sequence, by its length", "tokens in the sequence"
            y = "milliseconds (less is better)"
        else:
            title, x = f"sequences of {length} tokens, by how many go in at once", "sequences at once"
            y = "sentences a second (more is better)"
        same = len(kept) == 1
        parts = [stem, *([] if same else [model, where, *([f"{length}-tokens"] if length else [])])]
        name = "-".join(parts).lower().replace(" ", "-")
        lines = list(kept[model, device, threads, length].values())
        pictures.append(Picture(name, f"{model}: {title}; {where}", x, y, lines))
    return pictures


def _scaling(results: Results) -> list[Picture]:
    """Rate with n threads divided by the rate with one, for each engine (geometric mean over its
    workloads)."""
    lines: dict[str, Line] = {}
    rates: dict[str, dict[float, list[float]]] = {}
    one: dict[tuple[str, str], float] = {}
    cells = [
        (c, t) for c in results.cells if c["level"] == "end to end" and c["unit"] != "s" if (t := times(c))
    ]
    for cell, taken in cells:
        if cell["threads"] == 1:
            one[cell["peer"], cell["workload"]] = 1 / taken.median
    for cell, taken in cells:
        first = one.get((cell["peer"], cell["workload"]))
        if first:
            lines.setdefault(cell["peer"], Line(cell))
            rates.setdefault(cell["peer"], {}).setdefault(cell["threads"], []).append(
                1 / taken.median / first
            )
    if not any(len(points) > 1 for points in rates.values()):
        return []
    for name, points in rates.items():
        for threads, many in sorted(points.items()):
            middle = harness.geometric_mean(many)
            lines[name].points.append((float(threads), middle, middle, middle))
    title = "how many times faster with more threads"
    y = "rate over that of one thread"
    return [Picture("scaling", title, "threads", y, list(lines.values()), logarithmic=False)]


def draw(picture: Picture) -> Any:
    """A matplotlib figure with a panel for each group of engines."""
    from matplotlib import pyplot

    groups: dict[str, list[Line]] = {}
    for line in picture.lines:
        groups.setdefault(standing.group(line.cell), []).append(line)
    names = sorted(groups, key=lambda n: GROUP_ORDER.index(n) if n in GROUP_ORDER else len(GROUP_ORDER))
    # The first group, with most engines, takes the whole height; the others stand beside it.
    beside = len(names) - 1
    figure = pyplot.figure(figsize=(6.6 if not beside else 12.4, max(5.4, 2.9 * beside)))
    grid = figure.add_gridspec(max(beside, 1), 2 if beside else 1)
    panels = [figure.add_subplot(grid[:, 0])]
    for row in range(beside):
        panels.append(figure.add_subplot(grid[row, 1], sharex=panels[0], sharey=panels[0]))
    words = "middle of the repeats; thin upright strokes: the range of the middle 60 %"
    figure.suptitle(picture.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(words, fontsize=7.5, x=0.01, ha="left", color=SOFT)
    marked = marks([line.cell["peer"] for line in picture.lines])
    every = sorted({p[0] for line in picture.lines for p in line.points})
    for name, axes in zip(names, panels, strict=True):
        _axes(axes, picture, name, every)
    ends = [_lines(groups[name], axes, marked) for name, axes in zip(names, panels, strict=True)]
    if not picture.logarithmic:
        for axes in panels:
            axes.plot(every, every, "--", color=SOFT, linewidth=1)
            axes.text(
                every[0], every[-1], "dashed: as many times as threads", fontsize=7.5, color=SOFT, va="top"
            )
    for found, axes in zip(ends, panels, strict=True):
        label_ends(axes, found)
    return figure


def _axes(axes: Any, picture: Picture, name: str, every: Sequence[float]) -> None:
    low, high = every[0], every[-1]
    if picture.logarithmic:
        axes.set(xscale="log", yscale="log")
        axes.set_xlim(low / 1.25, high * (high / low) ** 0.5 * 1.25)  # on the right, room for the names
        log_numbers(axes.yaxis)
    else:
        axes.set_xlim(low - 0.1, high + 0.6 * (high - low) + 0.1)
    axes.set_xticks(every, [f"{x:g}" for x in every], minor=False)
    axes.set_xticks([], minor=True)
    axes.tick_params(labelleft=True, labelbottom=True)
    axes.set_xlabel(picture.x, fontsize=8)
    axes.set_ylabel(picture.y, fontsize=8)
    axes.set_title(name, loc="left", fontsize=9)


def _lines(lines: Sequence[Line], axes: Any, marked: dict[str, str]) -> list[End]:
    """Draw; returns the ends to be labelled."""
    ends = []
    for line in sorted(lines, key=lambda found: found.cell["ours"]):  # ours on top
        cell, points = line.cell, sorted(line.points)
        ours = cell["ours"] and "reference" not in cell["peer"]
        shade = colour(cell)
        x, middle = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            x,
            middle,
            color=shade,
            marker=marked[cell["peer"]],
            markersize=6 if ours else 5,
            linewidth=2.4 if ours else 1.2,
            label=cell["peer"],
        )
        axes.vlines(x, [p[2] for p in points], [p[3] for p in points], color=shade, linewidth=1, alpha=0.5)
        ends.append(End(x[-1], middle[-1], cell["peer"], dark(cell), bold=cell["ours"]))
    return ends
