"""Pictures of results: roofline, bars against the peers, curves over length, batch and threads. Needs
matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .limits import Limits
from .results import Results, rows, times

OURS, SECOND, OTHER = "#0b6e4f", "#7bc8a4", "#9aa5b1"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "minilm",
}


def _colour(cell: dict[str, Any]) -> str:
    if not cell["ours"]:
        return OTHER
    return SECOND if "reference" in cell["peer"] else OURS


def _timed(results: Results, level: str) -> list[dict[str, Any]]:
    return [c for c in results.cells if c["level"] == level and times(c)]


def roofline(results: Results, axes: Any) -> bool:
    """Each implementation of each op at its intensity (operations a byte, by formula), under the measured
    roofs."""
    cells = [c for c in _timed(results, "op") if c.get("operations") and c["ours"]]
    if not cells:
        return False
    device, threads = cells[0]["device"], max(c["threads"] for c in cells)
    cells = [c for c in cells if c["threads"] == threads and c["device"] == device]
    limits = next((x for x in results.limits if x.device == device), None)
    intensities = [c["operations"] / c["bytes"] for c in cells]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 10.0) * 3
    if limits is not None:
        _roofs(limits, threads if device == "cpu" else None, cells[0]["dtype"], low, high, axes)
    marks = {"native": "^", "triton": "s", "torch": "D", "reference": "o"}
    seen: set[str] = set()
    for cell, intensity in zip(cells, intensities, strict=True):
        taken = times(cell)
        assert taken is not None
        backend = cell["peer"].removeprefix("minilm ")
        label = None if backend in seen else cell["peer"]
        seen.add(backend)
        axes.plot(
            intensity,
            cell["operations"] / taken.median / 1e9,
            marks.get(backend, "x"),
            color=_colour(cell),
            markersize=5,
            alpha=0.75,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (by formula)", ylabel="Gop/s")
    axes.set_title(f"Roofline: every op at every shape, {device}", loc="left")
    axes.legend(fontsize=8, loc="lower right")
    return True


def _roofs(limits: Limits, threads: int | None, dtype: str, low: float, high: float, axes: Any) -> None:
    peak, name = limits.peak(dtype, threads)
    for what, style in (("read", "-"), ("copy", "--")):
        bandwidth = limits.get(what, threads)
        if bandwidth and peak:
            bend = peak / bandwidth
            axes.plot([low, bend], [low * bandwidth / 1e9, peak / 1e9], style, color="#333", linewidth=1)
            axes.annotate(
                f"{what} {bandwidth / 1e9:.3g} GB/s",
                (low * 1.2, low * 1.2 * bandwidth / 1e9),
                rotation=32,
                fontsize=7,
                va="bottom" if what == "copy" else "top",
            )
            axes.plot([bend, high], [peak / 1e9] * 2, "-", color="#333", linewidth=1)
    if peak:
        axes.annotate(
            f"{name} peak {peak / 1e9:.4g} Gop/s", (high, peak / 1e9), fontsize=7, ha="right", va="bottom"
        )


def _rate(cell: dict[str, Any]) -> tuple[float, float, float]:
    taken = times(cell)
    assert taken is not None
    units = cell["units_per_call"]
    return units / taken.median, units / taken.p80, units / taken.p20


def bars(results: Results, place: tuple[Any, ...], axes: Any) -> bool:
    """One workload: all engines, fastest on top, with the 20-80 % range; engines that were not timed by
    name."""
    cells = rows(results.cells)[place]
    timed = sorted((c for c in cells if times(c)), key=lambda c: _rate(c)[0])
    if not timed:
        return False
    cold = timed[0]["unit"] == "s"
    for at, cell in enumerate(timed):
        taken = times(cell)
        assert taken is not None
        middle, low, high = (taken.median, taken.p20, taken.p80) if cold else _rate(cell)
        axes.barh(at, middle, color=_colour(cell), height=0.7)
        axes.plot([low, high], [at, at], color="#222", linewidth=1)
        axes.annotate(f" {middle:.3g}", (high, at), va="center", fontsize=7)
    axes.set_yticks(range(len(timed)), [c["peer"] for c in timed], fontsize=7)
    for label, cell in zip(axes.get_yticklabels(), timed, strict=True):
        label.set_fontweight("bold" if cell["ours"] else "normal")
    axes.set_title(place[1], loc="left", fontsize=9)
    axes.set_xlabel("seconds (less is better)" if cold else f"{timed[0]['unit']}/s", fontsize=8)
    axes.grid(False, axis="y")
    axes.set_xlim(0, None)
    axes.margins(x=0.12)
    return True


def curves(results: Results, axis: str, axes: Any) -> bool:
    """Milliseconds over the length of one sequence (axis="length"), or sentences a second over the batch
    (axis="batch")."""
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    colours: dict[str, str] = {}
    for cell in _timed(results, "end to end"):
        found = re.search(r"sweep (\d+) x (\d+)$", cell["workload"])
        taken = times(cell)
        if not found or taken is None:
            continue
        batch, length = int(found[1]), int(found[2])
        if axis == "length" and batch == 1:
            point = (length, taken.median * 1e3, taken.p20 * 1e3, taken.p80 * 1e3)
        elif axis == "batch" and (batch > 1 or length in (8, 128)):
            point = (batch, *_rate(cell))
        else:
            continue
        series.setdefault(f"{cell['peer']} · {cell['model']}", []).append(point)
        colours[f"{cell['peer']} · {cell['model']}"] = _colour(cell)
    for name, points in series.items():
        points.sort()
        x = [p[0] for p in points]
        style: dict[str, Any] = {"linewidth": 1}
        if colours[name] != OTHER:
            style = {"color": colours[name], "linewidth": 2.2}
        (line,) = axes.plot(x, [p[1] for p in points], marker="o", markersize=3, label=name, **style)
        axes.fill_between(
            x, [p[2] for p in points], [p[3] for p in points], color=line.get_color(), alpha=0.15
        )
    if not series:
        return False
    ticks = sorted({p[0] for points in series.values() for p in points})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens in the one sequence" if axis == "length" else "sequences in the batch")
    axes.set_ylabel("ms" if axis == "length" else "sentences/s")
    axes.set_title("Latency over length" if axis == "length" else "Throughput over the batch", loc="left")
    axes.legend(fontsize=6)
    return True


def scaling(results: Results, axes: Any) -> bool:
    """Rate with n threads over the rate with one, for each engine (geometric mean over its workloads)."""
    by_engine: dict[str, dict[int, list[float]]] = {}
    one: dict[tuple[str, str], float] = {}
    cells = [c for c in _timed(results, "end to end") if c["unit"] != "s"]
    for cell in cells:
        if cell["threads"] == 1:
            one[cell["peer"], cell["workload"]] = _rate(cell)[0]
    for cell in cells:
        first = one.get((cell["peer"], cell["workload"]))
        if first:
            by_engine.setdefault(cell["peer"], {}).setdefault(cell["threads"], []).append(
                _rate(cell)[0] / first
            )
    if not any(len(points) > 1 for points in by_engine.values()):
        return False
    most = 1
    for name, points in by_engine.items():
        x = sorted(points)
        most = max(most, x[-1])
        y = [math.exp(sum(map(math.log, points[n])) / len(points[n])) for n in x]
        style = {"color": OURS, "linewidth": 2.2} if name.startswith("minilm") else {"linewidth": 1}
        axes.plot(x, y, marker="o", markersize=3, label=name, **style)
    axes.plot([1, most], [1, most], "--", color="#333", linewidth=1, label="as many times as threads")
    axes.set(xlabel="threads", ylabel="rate over that of one thread", xticks=range(1, most + 1))
    axes.set_title("Scaling over threads", loc="left")
    axes.legend(fontsize=6)
    return True


def pictures(results: Results) -> dict[str, Any]:
    """All pictures that the results have data for: name -> matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, Any] = {}

    def single(name: str, draw: Callable[..., bool], *arguments: Any) -> None:
        figure, axes = pyplot.subplots(figsize=(7.5, 4.8))
        if draw(results, *arguments, axes):
            found[name] = figure
        else:
            pyplot.close(figure)

    with pyplot.rc_context(STYLE):
        single("roofline", roofline)
        for title, places in _groups(results).items():
            columns = min(2, len(places))
            height = max(sum(1 for c in rows(results.cells)[p] if times(c)) for p in places)
            down = -(-len(places) // columns)
            size = (5.4 * columns, down * (0.9 + 0.22 * height))
            figure, grid = pyplot.subplots(down, columns, figsize=size, squeeze=False)
            for place, axes in zip(places, grid.flat, strict=False):
                bars(results, place, axes)
            for axes in grid.flat[len(places) :]:
                axes.set_visible(False)
            found[title] = figure
        single("latency-length", curves, "length")
        single("throughput-batch", curves, "batch")
        single("scaling", scaling)
    return found


def _groups(results: Results) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of bars by model, device and threads."""
    groups: dict[str, list[tuple[Any, ...]]] = {}
    for place, cells in rows(results.cells).items():
        if place[0] == "end to end" and any(times(c) for c in cells):
            if re.search(r"sweep \d+ x", place[1]):
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
