"""Shared by all pictures: one family of colours per engine, distinct marks, labels that do not overlap. Needs
matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
INK, SOFT, BAD = "#22282e", "#5b6670", "#b3261e"
REFERENCE = "#81861a"
"""minilm on plain PyTorch."""

FAMILIES = {
    "minilm": "#0b6e4f",
    "transformers": "#d06a00",
    "sentence-transformers": "#b5397f",
    "onnxruntime": "#1f5fa8",
    "openvino": "#6d3fa0",
    "ctranslate2": "#9c3a26",
    "llama.cpp": "#3d4247",
}
"""First word of an engine's name -> the colour of its family."""
OTHER = "#7d8790"
PALER = {"fp16": 0.3, "bf16": 0.3, "int8": 0.3, "q4": 0.45}
"""Precision -> the share of white that is mixed into the family's colour."""
MARKS = {
    "minilm": "o",
    "minilm reference": "P",
    "minilm bf16": "s",
    "minilm int8": "o",
    "minilm q8_0": "D",
    "minilm q4_1": "^",
    "transformers eager": "v",
    "transformers sdpa": "<",
    "transformers compiled": ">",
    "sentence-transformers": "X",
    "onnxruntime": "s",
    "onnxruntime int8": "s",
    "openvino": "D",
    "openvino bf16": "D",
    "ctranslate2": "^",
    "ctranslate2 int8": "^",
}
SHADES = {
    "minilm q8_0": 0.5,
    "minilm q4_1": 0.6,
    "transformers sdpa": 0.25,
    "transformers eager": 0.45,
    "onnxruntime genai": 0.0,
    "onnxruntime genai int4": 0.45,
    "llama.cpp q8_0": 0.4,
    "llama.cpp q4_1": 0.6,
}
"""Engines that would otherwise have the colour of a related engine in the same picture."""
SPARE = ("h", "p", "*", "d", "8", "H", "v", "<", ">", "X")


def colour(cell: dict[str, Any]) -> str:
    """The colour of an engine's variant: that of its family, paler for fewer bits per weight."""
    peer = cell["peer"]
    if _reference(cell):
        return REFERENCE
    base = FAMILIES.get(peer.split()[0], OTHER)
    return paler(base, SHADES.get(peer, PALER.get(cell.get("precision", "fp32"), 0.0)))


def dark(cell: dict[str, Any]) -> str:
    """The colour of an engine's name: that of its family, unmixed."""
    return colour(
        {**cell, "precision": "fp32", "peer": cell["peer"] if _reference(cell) else cell["peer"].split()[0]}
    )


def _reference(cell: dict[str, Any]) -> bool:
    return cell["peer"].startswith("minilm") and "reference" in cell["peer"]


def paler(base: str, share: float) -> str:
    """A colour (#rrggbb) with a share of white."""
    parts = (int(base[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def marks(names: Sequence[str]) -> dict[str, str]:
    """A mark for each engine of one picture, all different as long as there are enough marks."""
    found: dict[str, str] = {}
    for name in names:
        wish = MARKS.get(name)
        free = [mark for mark in (wish, *SPARE) if mark and mark not in found.values()]
        found[name] = free[0] if free else wish or "."
    return found


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near those wanted, in the same order, at least `gap` apart and within `low`..`high` where that
    many have room."""
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    # Blocks of touching labels: (sum of what is wanted for the first, members); each lies at its mean.
    blocks: list[list[float]] = []
    for rank in order:
        blocks.append([wanted[rank]])
        while len(blocks) > 1 and _bottom(blocks[-1], gap, low, high) < (
            _bottom(blocks[-2], gap, low, high) + len(blocks[-2]) * gap
        ):
            last = blocks.pop()
            blocks[-1] += last
    heights = [0.0] * len(wanted)
    places = iter(order)
    for block in blocks:
        start = _bottom(block, gap, low, high)
        for step in range(len(block)):
            heights[next(places)] = start + step * gap
    return heights


def _bottom(block: Sequence[float], gap: float, low: float, high: float) -> float:
    middle = sum(value - at * gap for at, value in enumerate(block)) / len(block)
    return max(low, min(middle, high - (len(block) - 1) * gap))


@dataclass
class End:
    """The end of a line, in data coordinates, and its label."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


def label_ends(axes: Any, ends: Sequence[End], size: float = 7.5) -> None:
    """Write each line's name to the right of its end, one above the other without overlaps; a thin line leads
    from the end to a name that had to move."""
    if not ends:
        return
    axes.figure.draw_without_rendering()  # the layout must be settled
    pixels = [axes.transData.transform((end.x, end.y)) for end in ends]
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    gap = size * 1.3 * dpi / 72
    heights = apart([y for _, y in pixels], gap, box.y0 + gap / 2, box.y1 - gap / 2)
    right = max(x for x, _ in pixels) + 16 * dpi / 72
    for end, (x, y), height in zip(ends, pixels, heights, strict=True):
        axes.annotate(
            end.text,
            (end.x, end.y),
            xytext=((right - x) * 72 / dpi, (height - y) * 72 / dpi),
            textcoords="offset points",
            fontsize=size,
            va="center",
            color=end.colour,
            fontweight="bold" if end.bold else "normal",
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "relpos": (0, 0.5)}
            | {"shrinkA": 1, "shrinkB": 4},
            annotation_clip=False,
        ).set_in_layout(False)


def label_points(
    axes: Any,
    points: Sequence[End],
    among: Sequence[tuple[float, float]],
    lines: Sequence[tuple[float, float]] = (),
    size: float = 7.5,
) -> None:
    """Write the name of each of `points` beside it, where it covers no other name, and as few as possible of
    the marks `among` and, which is less bad, of the points on `lines` (data coordinates)."""
    figure = axes.figure
    figure.draw_without_rendering()
    box, scale = axes.get_window_extent(), figure.dpi / 72
    others = [(tuple(axes.transData.transform(point)), 60.0) for point in among]
    others += [(tuple(axes.transData.transform(point)), 6.0) for point in lines]
    taken: list[tuple[float, float, float, float]] = []
    led: list[tuple[float, float]] = []
    renderer = figure.canvas.get_renderer()
    for point in sorted(points, key=lambda p: -p.y):
        x, y = axes.transData.transform((point.x, point.y))
        text = axes.annotate(
            point.text,
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=size,
            color=point.colour,
            ha="center",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": point.colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        wide, high = extent.width / 2 + 2, min(extent.height, size * 1.4 * scale) / 2 + 1
        best: tuple[float, float, float] | None = None
        for dx, dy in _places(scale):
            dx += wide if dx > 0 else -wide if dx < 0 else 0
            place = (x + dx - wide, y + dy - high, x + dx + wide, y + dy + high)
            inside = box.x0 <= place[0] and place[2] <= box.x1 and box.y0 <= place[1] and place[3] <= box.y1
            leader = [(x + dx * at / 12, y + dy * at / 12) for at in range(1, 12)]
            crossed = any(_within(spot, other) for spot in leader for other in taken)
            if not inside or crossed or any(_meet(place, other) for other in taken):
                continue
            if any(_within(spot, place) for spot in led):
                continue
            covered = sum(
                weight
                for (a, b), weight in others
                if place[0] - 6 <= a <= place[2] + 6 and place[1] - 6 <= b <= place[3] + 6
            )
            cost = covered + (dx * dx + dy * dy) ** 0.5 / scale
            if best is None or cost < best[0]:
                best = (cost, dx, dy)
        if best is None:  # no room: leave out a name rather than overlap two
            text.remove()
            continue
        _, dx, dy = best
        led += [(x + dx * at / 12, y + dy * at / 12) for at in range(1, 12)]
        taken.append((x + dx - wide, y + dy - high, x + dx + wide, y + dy + high))
        text.xyann = (dx / scale, dy / scale)


def _places(scale: float) -> Iterator[tuple[float, float]]:
    """Offsets to try, nearest first."""
    for radius in (9, 14, 20, 27, 35, 44, 54, 66, 80, 96):
        for across in (0, 1, -1, 0.5, -0.5, 0.2, -0.2):
            for up in (1, -1, 0.5, -0.5, 0):
                if across or up:
                    yield across * radius * scale, up * radius * scale


def _within(spot: tuple[float, float], box: tuple[float, ...]) -> bool:
    return box[0] < spot[0] < box[2] and box[1] < spot[1] < box[3]


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def log_numbers(axis: Any) -> None:
    """Show plain numbers at 1, 2 and 5 times each power of ten only."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
