"""The roofline plot: how close each op comes to the limits of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .drawing import INK, SOFT, End, label_points
from .limits import Limits
from .results import Results, times

KINDS = (
    ("norm", "norms", "#6d3fa0", "^"),
    ("quantized_linear", "linear, quantised weights", "#1f5fa8", "D"),
    ("linear_cross_entropy", "loss", "#b5397f", "X"),
    ("cross_entropy", "loss", "#b5397f", "X"),
    ("linear", "linear", "#0b6e4f", "s"),
    ("attention", "attention", "#d06a00", "o"),
    ("", "rope, gated, cache", "#7a5c00", "v"),
)
"""(part of an op's name, label of such ops, colour, mark); the first match is used."""


def roofline(results: Results, axes: Any) -> bool:
    """Each op at its arithmetic intensity (operations per byte, by formula) under the measured limits: the
    fastest of minilm's implementations filled, the reference hollow. Each op is named once, at its highest
    point."""
    cells = [
        c for c in results.cells if c["level"] == "op" and times(c) and c.get("operations") and c["ours"]
    ]
    if not cells:
        return False
    device, threads = cells[0]["device"], max(c["threads"] for c in cells)
    cells = [c for c in cells if c["threads"] == threads and c["device"] == device]
    limits = next((x for x in results.limits if x.device == device), None)
    intensities = [c["operations"] / c["bytes"] for c in cells]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 10.0) * 3
    roofs: list[Any] = []
    if limits is not None:
        dtypes = sorted({c.get("arithmetic", c["dtype"]) for c in cells})
        roofs = _roofs(limits, threads if device == "cpu" else None, dtypes, low, high, axes)
    best: dict[Any, tuple[float, float, dict[str, Any]]] = {}
    plain: dict[Any, tuple[float, float, dict[str, Any]]] = {}
    spots: list[tuple[float, float]] = []
    for cell, x in zip(cells, intensities, strict=True):
        taken = times(cell)
        assert taken is not None
        y = cell["operations"] / taken.median / 1e9
        spots.append((x, y))
        _, _, shade, mark = _kind(cell)
        if "reference" in cell["peer"]:
            axes.plot(x, y, mark, color=shade, markersize=4.5, alpha=0.45, markerfacecolor="none")
            plain[cell["workload"]] = (x, y, cell)
        elif cell["workload"] not in best or y > best[cell["workload"]][1]:
            best[cell["workload"]] = (x, y, cell)
    named: dict[str, End] = {}
    shown = sorted(
        (plain | best).values(), key=lambda found: found[2].get("op") != "linear"
    )  # many: at the back
    for x, y, cell in shown:
        _, kind, shade, mark = _kind(cell)
        op = cell.get("op", kind)
        if cell["workload"] in best:
            axes.plot(x, y, mark, color=shade, markersize=5.5)
        if op not in named or y > named[op].y:
            named[op] = End(x, y, op.replace("_", " "), shade)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (by formula)")
    axes.set_ylabel("Gop/s: thousand million operations per second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    axes.set_title(
        f"How close each op comes to the limits of the machine ({where})",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    kinds = list({_kind(c)[1]: _kind(c) for c in cells}.values())
    _legend(axes, roofs, kinds, bool(plain))
    label_points(axes, list(named.values()), spots, _along(axes))
    return True


def _along(axes: Any) -> list[tuple[float, float]]:
    """Points on the lines of the limits, which names should not cover."""
    found = []
    for line in axes.get_lines():
        (x, y) = line.get_data()
        if len(x) == 2:
            steps = [at / 200 for at in range(201)]
            found += [(x[0] ** (1 - t) * x[1] ** t, y[0] ** (1 - t) * y[1] ** t) for t in steps]
    return found


def _kind(cell: dict[str, Any]) -> tuple[str, str, str, str]:
    return next(kind for kind in KINDS if kind[0] in cell.get("op", ""))


def _legend(
    axes: Any, roofs: Sequence[Any], kinds: Sequence[tuple[str, str, str, str]], reference: bool
) -> None:
    from matplotlib.lines import Line2D

    def mark(shade: str, shape: str, words: str, **options: Any) -> Any:
        return Line2D(
            [], [], linestyle="none", color=shade, marker=shape, markersize=5.5, label=words, **options
        )

    entries = [*roofs, *(mark(shade, shape, words) for _, words, shade, shape in kinds)]
    entries.append(mark(INK, "o", "filled: minilm's fastest implementation"))
    if reference:
        entries.append(mark(SOFT, "o", "hollow: minilm on plain PyTorch", markerfacecolor="none"))
    axes.legend(handles=entries, fontsize=7.5, loc="lower right", framealpha=0.95)


def _roofs(
    limits: Limits, threads: int | None, dtypes: Sequence[str], low: float, high: float, axes: Any
) -> list[Any]:
    """Draw the measured limits. Peaks are named on their lines; the slopes are returned, for the legend."""
    slopes: list[Any] = []
    peaks = {name: peak for peak, name in (limits.peak(dtype, threads) for dtype in dtypes) if peak}
    highest = max(peaks.values(), default=0.0)
    for what, words, style in (("read", "reads", "-"), ("copy", "copies", "--")):
        bandwidth = limits.get(what, threads)
        if bandwidth and highest:
            slopes += axes.plot(
                [low, highest / bandwidth],
                [low * bandwidth / 1e9, highest / 1e9],
                style,
                color="#333",
                linewidth=1,
                label=f"limit: {words} memory at {bandwidth / 1e9:.3g} GB/s",
            )
    for (name, peak), style in zip(peaks.items(), ("-.", ":"), strict=False):
        start = peak / (limits.get("read", threads) or peak)
        axes.plot([start, high], [peak / 1e9] * 2, style, color="#333", linewidth=1.3)
        words = {"fma": "32-bit multiply-adds", "int8": "8-bit dot products"}.get(name, name)
        axes.annotate(
            f"limit: {words}, {peak / 1e9:,.4g} Gop/s",
            (high, peak / 1e9),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7.5,
            color="#333",
            ha="right",
        )
    return slopes
