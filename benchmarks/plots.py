"""Pictures of results: roofline, bars of all engines, and the line charts of `curves`. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import curves, standing
from .drawing import BAD, INK, SOFT, STYLE, colour
from .report import count
from .results import Results, rows, times
from .roofline import roofline


def _rate(cell: dict[str, Any]) -> tuple[float, float, float]:
    taken = times(cell)
    assert taken is not None
    units = cell["units_per_call"]
    return units / taken.median, units / taken.p80, units / taken.p20


def bars(results: Results, place: tuple[Any, ...], axes: Any) -> bool:
    """One workload: all engines grouped by the bits of their weights, the fastest of each group first, with
    the 20-80 % range, and how many times faster minilm is."""
    cells = rows(results.cells)[place]
    timed = [c for c in cells if times(c)]
    if not timed:
        return False
    cold = timed[0]["unit"] == "s"
    at, names, most = 0.0, [], max(_extent(c, cold)[2] for c in timed)
    for group, members in standing.grouped(timed).items():
        axes.text(0, at, f" {standing.heading(group, timed)}", fontsize=7, color=SOFT, va="center")
        for cell in members:
            at += 1
            middle, low, high = _extent(cell, cold)
            axes.barh(at, middle, color=colour(cell), height=0.7)
            axes.plot([low, high], [at, at], color=INK, linewidth=1)
            found = standing.against(cell, cells)
            against = "" if found is None else f"  · {str(found).partition(':')[0]}"
            lost = found is not None and not cell["ours"] and found.outcome == "lost"
            words = f" {middle:.2f}" if cold else f" {count(middle)}"
            axes.text(
                high + 0.005 * most, at, words + against, va="center", fontsize=7, color=BAD if lost else INK
            )
            names.append((at, cell))
        at += 1.2
    axes.set_yticks([y for y, _ in names], [c["peer"] for _, c in names], fontsize=7)
    for label, (_, cell) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if cell["ours"] else "normal")
    workload = place[1].removeprefix(f"{cells[0]['model']} ")
    words = standing.explanation(place[1])
    title = ": ".join(filter(None, (workload, words)))
    axes.set_title(title if len(title) <= 80 else words, loc="left", fontsize=9)
    axes.set_xlabel("seconds (less is better)" if cold else f"{timed[0]['unit']}/s", fontsize=8)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 0.6, -0.8)
    axes.set_xlim(0, 1.42 * most)
    return True


def _extent(cell: dict[str, Any], cold: bool) -> tuple[float, float, float]:
    taken = times(cell)
    assert taken is not None
    return (taken.median, taken.p20, taken.p80) if cold else _rate(cell)


def pictures(results: Results, bars_too: bool = True) -> dict[str, Any]:
    """All pictures that the results have data for: name -> matplotlib figure. `bars_too`: also the bars,
    which the page draws itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, Any] = {}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(10.5, 6))
        if roofline(results, axes):
            found["roofline"] = figure
        else:
            pyplot.close(figure)
        for title, places in _groups(results).items() if bars_too else ():
            found[title] = _all_bars(results, places)
        for picture in curves.all_pictures(results):
            found[picture.name] = curves.draw(picture)
    return found


def _all_bars(results: Results, places: list[tuple[Any, ...]]) -> Any:
    """One model's workloads side by side."""
    from matplotlib import pyplot

    cells = [rows(results.cells)[place] for place in places]
    timed = [[c for c in found if times(c)] for found in cells]
    height = max(len(found) + 1.2 * len(standing.grouped(found)) for found in timed)
    columns = min(2, len(places))
    down = -(-len(places) // columns)
    size = (5.8 * columns, down * (0.8 + 0.18 * height) + 0.3)
    figure, grid = pyplot.subplots(down, columns, figsize=size, squeeze=False)
    _, _, _, device, threads = places[0]
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    title = f"{cells[0][0]['model']}, {where}. Beside each bar: its figure, then how much faster or slower"
    words = "minilm is with weights of the same format (red: slower)."
    figure.suptitle(
        f"{title}\n{words}" if columns == 1 else f"{title} {words}", fontsize=9, x=0.01, ha="left"
    )
    for place, axes in zip(places, grid.flat, strict=False):
        bars(results, place, axes)
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    return figure


def _groups(results: Results) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of bars by model, device and threads."""
    groups: dict[str, list[tuple[Any, ...]]] = {}
    for place, cells in rows(results.cells).items():
        if place[0] == "end to end" and any(times(c) for c in cells):
            if standing.SWEEP.search(place[1]):
                continue
            where = f"{place[4]}-threads" if place[3] == "cpu" else place[3]
            groups.setdefault(f"{cells[0]['model']}-{where}".lower().replace(" ", "-"), []).append(place)
    return groups


def save(results: Results, folder: Path, prefix: str = "", most: int = 100) -> list[Path]:
    """Write the pictures (the first `most`) as PNG; returns the files."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, figure in pictures(results).items():
        if len(written) < most:
            path = folder / f"{prefix}{name}.png"
            figure.savefig(path, dpi=120, metadata={"Software": None})
            written.append(path)
        pyplot.close(figure)
    return written
