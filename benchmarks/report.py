"""Results as tables, for a terminal (rich) and for the HTML page: the same cells, the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .limits import Limit
from .results import Results, rows, share, times
from .stats import MAX_SPREAD, ratio, summary, too_wide


@dataclass(frozen=True)
class Line:
    """One engine on one workload, in words."""

    peer: str
    ours: bool
    time: str
    rate: str
    bandwidth: str
    arithmetic: str
    share: str
    ratio: str
    remark: str
    status: str


def seconds(value: float) -> str:
    """1.23 s, 4.56 ms, 7.8 us."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def count(value: float) -> str:
    """A rate in three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def baseline(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Ours that the ratios of a row are about: the fastest of ours in full precision (or of all ours)."""
    mine = [c for c in cells if c["ours"] and times(c)]
    exact = [c for c in mine if c["precision"] == "fp32"] or mine
    return min(exact, key=lambda c: times(c).median, default=None)  # type: ignore[union-attr]


def lines(cells: list[dict[str, Any]], max_spread: float = MAX_SPREAD) -> list[Line]:
    """The cells of one row of a table (see `results.rows`), timed ones first, fastest first."""
    ours = baseline(cells)
    order = sorted(cells, key=lambda c: (times(c) is None, times(c).median if times(c) else 0.0))  # type: ignore[union-attr]
    return [_line(cell, ours, max_spread) for cell in order]


def _line(cell: dict[str, Any], ours: dict[str, Any] | None, max_spread: float) -> Line:
    taken = times(cell)
    name, status = cell["peer"], cell["status"]
    if taken is None:
        word = {"wrong": "WRONG, not timed", "failed": "failed", "skipped": "skipped"}.get(status, status)
        remark = f"{word}: {cell.get('reason') or 'no reason given'}"
        return Line(name, cell["ours"], "", "", "", "", "", "", remark, status)
    wide = too_wide(taken, max_spread)
    unit = cell.get("unit", "")
    rate = ""
    if unit not in ("", "s"):
        rate = f"{count(cell['units_per_call'] / taken.median)} {unit}/s"
    elif cell.get("peak_bytes"):
        rate = f"{cell['peak_bytes'] / 2**20:.0f} MiB"
    moved, computed, fraction = cell.get("bytes"), cell.get("operations"), share(cell)
    against = ""
    if ours is not None and ours is not cell:
        against = str(ratio(ours["samples"], cell["samples"], max_spread))
    remarks = [wide] if wide else []
    detail = (cell.get("check") or {}).get("detail")
    if detail and cell["precision"] != "fp32":
        remarks.append(detail)
    if cell.get("launch_samples"):
        launched = summary(cell["launch_samples"]).median
        remarks.insert(0, f"with launch {seconds(launched)}; device time by {cell['timed_by']}")
    return Line(
        name,
        cell["ours"],
        f"{seconds(taken.median)} [{seconds(taken.p20)} - {seconds(taken.p80)}] x {taken.repeats}",
        rate,
        f"{moved / taken.median / 1e9:.1f}" if moved else "",
        f"{computed / taken.median / 1e9:.1f}" if computed else "",
        (f"{fraction:.0%}" if not wide else "-") if fraction is not None else "",
        "ours" if ours is cell else against,
        "; ".join(remarks),
        status,
    )


HEADINGS = ("engine", "time [20 - 80 %]", "rate", "GB/s", "Gop/s", "of limit", "ours is faster by", "remarks")


def headline(place: tuple[Any, ...], cells: list[dict[str, Any]]) -> str:
    """The row's title: workload, threads, and what limits it."""
    _, workload, dtype, device, threads = place
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    timed = [c for c in cells if c.get("binding")]
    bound = f" · bound by {timed[0]['binding']}" if timed else ""
    return f"{workload} · {dtype} · {where}{bound}"


def matrix(results: Results, model: str, device: str, threads: int, max_spread: float = MAX_SPREAD) -> str:
    """All end-to-end cells of one model as a table in Markdown: engines down, workloads across; rate, and
    how many times ours is faster (below 1: slower). Lost, wrong and skipped cells are shown as such."""
    found = {}
    for place, cells in rows(results.cells).items():
        name = place[1].removeprefix(f"{model} ")
        here = place[0] == "end to end" and cells[0]["model"] == model and place[3:] == (device, threads)
        if here and not name.startswith("sweep "):
            found[name] = cells
    if not found:
        return ""
    names = list(dict.fromkeys(cell["peer"] for cells in found.values() for cell in cells))
    headings = [
        f"{model}, {threads} thread{'s' * (threads != 1)}",
        *(_heading(n, c) for n, c in found.items()),
    ]
    table = [f"| {' | '.join(headings)} |", "|---|" + "---|" * len(found)]
    for name in names:
        row = []
        for cells in found.values():
            cell = next((c for c in cells if c["peer"] == name), None)
            row.append(_matrix_cell(cell, baseline(cells), max_spread))
        if any(entry not in ("", "skipped") for entry in row):
            bold = "**" if name.startswith("minilm") else ""
            table.append(f"| {bold}{name}{bold} | " + " | ".join(row) + " |")
    return "\n".join(table) + "\n"


def _heading(name: str, cells: list[dict[str, Any]]) -> str:
    unit = cells[0]["unit"]
    return f"{name}, {'s, MiB' if unit == 's' else f'{unit}/s'}"


def _matrix_cell(cell: dict[str, Any] | None, ours: dict[str, Any] | None, max_spread: float) -> str:
    if cell is None:
        return ""
    taken = times(cell)
    if taken is None:
        return {"wrong": "WRONG"}.get(cell["status"], cell["status"])
    cold = cell["unit"] == "s"
    value = f"{taken.median:.2f}" if cold else count(cell["units_per_call"] / taken.median)
    if cold and cell.get("peak_bytes"):
        value += f", {cell['peak_bytes'] / 2**20:.0f}"
    if ours is None or ours is cell:
        return value
    against = ratio(ours["samples"], cell["samples"], max_spread)
    return f"{value} ({'spread too wide' if against.reason else f'{against.value.median:.2f}x'})"


def print_tables(results: Results, console: Any = None) -> None:
    """All rows on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for text in summary_lines(results):
        console.print(Text(text))
    for place, cells in rows(results.cells).items():
        table = Table(title=headline(place, cells), title_justify="left", title_style="bold", expand=False)
        for at, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if at in (0, 7) else "right", overflow="fold")
        for line in lines(cells):
            style = (
                "green" if line.ours else "red" if line.status == "wrong" else "dim" if not line.time else ""
            )
            values = (
                line.peer,
                line.time,
                line.rate,
                line.bandwidth,
                line.arithmetic,
                line.share,
                line.ratio,
            )
            table.add_row(*(Text(v) for v in (*values, line.remark)), style=style)
        console.print(table)


def summary_lines(results: Results, limits: bool = True) -> list[str]:
    """Machine, versions, limits, in a few lines."""
    machine = results.machine
    cores = f"{machine['usable_cores']} cores, {', '.join(machine['features']) or machine['architecture']}"
    kernels = machine["native_isa"] or machine["native_unavailable"]
    found = [f"{machine['cpu']}, {cores}; minilm's kernels: {kernels}"]
    if "gpu" in machine:
        found.append(f"{machine['gpu']['name']}, capability {machine['gpu']['capability']}")
    dirty = " with uncommitted changes" if machine.get("uncommitted") else ""
    found.append(
        f"commit {machine.get('commit')}{dirty}; "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    )
    if results.settings.get("busy_share", 0) > 0.1:
        found.append(
            f"The machine was not quiet at the start: {results.settings['busy_share']:.0%} of it was in use."
        )
    for measured in results.limits if limits else []:
        parts = [f"{name.replace('@', ' x ')} {limit_words(name, x)}" for name, x in measured.table.items()]
        found.append(f"limits ({measured.device}; {measured.how}): " + ", ".join(parts))
    return found


def limit_words(name: str, limit: Limit) -> str:
    """A limit with its unit, and whether its repeats spread too widely to be relied on."""
    unit = {"read": "GB/s", "copy": "GB/s", "clock": "GHz"}.get(name.split("@")[0].split()[0], "Gop/s")
    wide = " (spread wide)" if len(limit.repeats) >= 3 and too_wide(summary(limit.repeats)) else ""
    return f"{limit.value / 1e9:.3g} {unit}{wide}"
