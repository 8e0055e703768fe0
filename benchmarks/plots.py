"""Pictures of results: roofline, bars against the peers, curves over length, batch and threads. Needs
matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import harness, standing
from .limits import Limits
from .report import count
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
        dtypes = sorted({c.get("arithmetic", c["dtype"]) for c in cells})
        _roofs(limits, threads if device == "cpu" else None, dtypes, low, high, axes)
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
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    axes.set_title(
        f"Roofline: every op at every shape, {where}; the higher, the nearer to the limit", loc="left"
    )
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    return True


def _roofs(
    limits: Limits, threads: int | None, dtypes: Sequence[str], low: float, high: float, axes: Any
) -> None:
    peaks = {name: peak for peak, name in (limits.peak(dtype, threads) for dtype in dtypes) if peak}
    highest = max(peaks.values(), default=0.0)
    for what, style in (("read", "-"), ("copy", "--")):
        bandwidth = limits.get(what, threads)
        if bandwidth and highest:
            bend = highest / bandwidth
            label = f"{what} {bandwidth / 1e9:.3g} GB/s"
            slope = [low * bandwidth / 1e9, highest / 1e9]
            axes.plot([low, bend], slope, style, color="#333", linewidth=1, label=label)
    for (name, peak), style in zip(peaks.items(), ("-.", ":"), strict=False):
        label = f"{name} peak {peak / 1e9:.4g} Gop/s"
        start = peak / (limits.get("read", threads) or peak)
        axes.plot([start, high], [peak / 1e9] * 2, style, color="#333", linewidth=1.3, label=label)


def _rate(cell: dict[str, Any]) -> tuple[float, float, float]:
    taken = times(cell)
    assert taken is not None
    units = cell["units_per_call"]
    return units / taken.median, units / taken.p80, units / taken.p20


def bars(results: Results, place: tuple[Any, ...], axes: Any) -> bool:
    """One workload: all engines by the bits of their weights, in each group the fastest on top, with the
    20-80 % range, and beside each how many times faster minilm is."""
    cells = rows(results.cells)[place]
    timed = [c for c in cells if times(c)]
    if not timed:
        return False
    cold = timed[0]["unit"] == "s"
    at, names, most = 0.0, [], max(_extent(c, cold)[2] for c in timed)
    for group, members in standing.grouped(timed).items():
        axes.text(0, at, f" {standing.heading(group, timed)}", fontsize=7, color="#5b6670", va="center")
        for cell in members:
            at += 1
            middle, low, high = _extent(cell, cold)
            axes.barh(at, middle, color=_colour(cell), height=0.7)
            axes.plot([low, high], [at, at], color="#222", linewidth=1)
            found = standing.against(cell, cells)
            against = "" if found is None else "  unclear" if found.reason else f"  {found.value.median:.2f}x"
            lost = found is not None and not cell["ours"] and standing.outcome(found) == "lost"
            words = f" {middle:.2f}" if cold else f" {count(middle)}"
            colour = "#b3261e" if lost else "#222"
            axes.text(high + 0.005 * most, at, words + against, va="center", fontsize=7, color=colour)
            names.append((at, cell))
        at += 1.2
    axes.set_yticks([y for y, _ in names], [c["peer"] for _, c in names], fontsize=7)
    for label, (_, cell) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if cell["ours"] else "normal")
    workload = place[1].removeprefix(f"{cells[0]['model']} ")
    axes.set_title(f"{cells[0]['model']}: {workload}", loc="left", fontsize=9)
    axes.set_xlabel("seconds (less is better)" if cold else f"{timed[0]['unit']}/s", fontsize=8)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 0.6, -0.8)
    axes.set_xlim(0, 1.22 * most)
    return True


def _extent(cell: dict[str, Any], cold: bool) -> tuple[float, float, float]:
    taken = times(cell)
    assert taken is not None
    return (taken.median, taken.p20, taken.p80) if cold else _rate(cell)


def _line_style(cell: dict[str, Any]) -> dict[str, Any]:
    """Ours are thick and green, with a mark for each format; 8 bits are dashed, fewer dotted."""
    marks = {"int8": "s", "q8_0": "D", "q4_0": "v", "q4_1": "^"}
    lines = {"int8": "--", "q4": ":", "fp16": "-.", "bf16": "-."}
    style: dict[str, Any] = {"linestyle": lines.get(cell["precision"], "-"), "linewidth": 1, "marker": "o"}
    if cell["ours"]:
        mark = marks.get(cell["peer"].split()[-1], "o")
        style |= {"color": _colour(cell), "linewidth": 2.2, "marker": mark, "markersize": 6}
    return style


def curves(results: Results, axis: str, axes: Any) -> bool:
    """Milliseconds over the length of one sequence (axis="length"), or sentences a second over the batch
    (axis="batch")."""
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    shown: dict[str, dict[str, Any]] = {}
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
        shown[f"{cell['peer']} · {cell['model']}"] = cell
    best = sorted(series, key=lambda name: min(series[name])[1], reverse=axis == "batch")
    for name in best:
        points = sorted(series[name])
        x = [p[0] for p in points]
        (line,) = axes.plot(
            x, [p[1] for p in points], label=name, **({"markersize": 4} | _line_style(shown[name]))
        )
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
    axes.legend(
        fontsize=7,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        title="dashed: 8-bit weights",
        title_fontsize=7,
    )
    return True


def scaling(results: Results, axes: Any) -> bool:
    """Rate with n threads over the rate with one, for each engine (geometric mean over its workloads)."""
    by_engine: dict[str, dict[int, list[float]]] = {}
    shown: dict[str, dict[str, Any]] = {}
    one: dict[tuple[str, str], float] = {}
    cells = [c for c in _timed(results, "end to end") if c["unit"] != "s"]
    for cell in cells:
        if cell["threads"] == 1:
            one[cell["peer"], cell["workload"]] = _rate(cell)[0]
    for cell in cells:
        first = one.get((cell["peer"], cell["workload"]))
        if first:
            shown[cell["peer"]] = cell
            by_engine.setdefault(cell["peer"], {}).setdefault(cell["threads"], []).append(
                _rate(cell)[0] / first
            )
    if not any(len(points) > 1 for points in by_engine.values()):
        return False
    most = 1
    for name in sorted(by_engine, key=lambda n: -harness.geometric_mean(by_engine[n][max(by_engine[n])])):
        points = by_engine[name]
        x = sorted(points)
        most = max(most, x[-1])
        y = [harness.geometric_mean(points[n]) for n in x]
        axes.plot(x, y, label=name, **({"markersize": 4} | _line_style(shown[name])))
    axes.plot([1, most], [1, most], "--", color="#333", linewidth=1, label="as many times as threads")
    axes.set(xlabel="threads", ylabel="rate over that of one thread", xticks=range(1, most + 1))
    axes.set_title("Scaling over threads", loc="left")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return True


def pictures(results: Results, bars_too: bool = True) -> dict[str, Any]:
    """All pictures that the results have data for: name -> matplotlib figure. `bars_too`: also those that the
    page draws itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, Any] = {}

    def single(name: str, draw: Callable[..., bool], *arguments: Any) -> None:
        figure, axes = pyplot.subplots(figsize=(9.5, 4.8))
        if draw(results, *arguments, axes):
            found[name] = figure
        else:
            pyplot.close(figure)

    with pyplot.rc_context(STYLE):
        single("roofline", roofline)
        for title, places in _groups(results).items() if bars_too else ():
            columns = min(2, len(places))
            timed = [[c for c in rows(results.cells)[p] if times(c)] for p in places]
            height = max(len(cells) + 1.2 * len(standing.grouped(cells)) for cells in timed)
            down = -(-len(places) // columns)
            size = (5.4 * columns, down * (0.8 + 0.18 * height) + 0.3)
            figure, grid = pyplot.subplots(down, columns, figsize=size, squeeze=False)
            words = "beside each bar: how many times faster minilm is with weights of the same format"
            figure.suptitle(f"{words}; red: it is slower", fontsize=8, x=0.01, ha="left")
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
