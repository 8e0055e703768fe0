"""Results as tables, for a terminal (rich) and for the HTML page: the same cells, the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .limits import Limit
from .results import Results, rows, share, times
from .standing import against, counterpart, main
from .stats import MAX_SPREAD, summary, too_wide


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
    outcome: str
    """won, lost, even, unclear (see `stats.Ratio`); "" where nothing is compared."""
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


def lines(cells: list[dict[str, Any]], max_spread: float = MAX_SPREAD) -> list[Line]:
    """The cells of one row of a table (see `results.rows`), timed ones first, fastest first."""
    order = sorted(cells, key=lambda c: (times(c) is None, times(c).median if times(c) else 0.0))  # type: ignore[union-attr]
    return [_line(cell, cells, max_spread) for cell in order]


def _line(cell: dict[str, Any], cells: list[dict[str, Any]], max_spread: float) -> Line:
    taken = times(cell)
    name, status = cell["peer"], cell["status"]
    if taken is None:
        return Line(name, cell["ours"], "", "", "", "", "", "", "", why_not(cell), status)
    wide = too_wide(taken, max_spread)
    unit = cell.get("unit", "")
    rate = ""
    if unit not in ("", "s"):
        rate = f"{count(cell['units_per_call'] / taken.median)} {unit}/s"
    elif cell.get("peak_bytes"):
        rate = f"{cell['peak_bytes'] / 2**20:.0f} MiB"
    moved, computed, fraction = cell.get("bytes"), cell.get("operations"), share(cell)
    found, ours = against(cell, cells, max_spread), counterpart(cell, cells)
    compared = "ours" if ours is cell else "" if found is None or ours is None else str(found)
    if found is not None and ours is not None and ours is not cell and ours is not main(cells):
        compared += f" ({ours['peer']})"
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
        count(moved / taken.median / 1e9) if moved else "",
        count(computed / taken.median / 1e9) if computed else "",
        (f"{fraction:.0%}" if not wide else "-") if fraction is not None else "",
        compared,
        found.outcome if found is not None else "",
        "; ".join(remarks),
        status,
    )


def why_not(cell: dict[str, Any]) -> str:
    """Why a cell was not timed."""
    word = {"wrong": "WRONG, not timed"}.get(cell["status"], cell["status"])
    return f"{word}: {cell.get('reason') or 'no reason given'}"


HEADINGS = (
    "engine",
    "time [20 - 80 %]",
    "rate",
    "GB/s",
    "Gop/s",
    "of limit",
    "minilm is",
    "remarks",
)


def headline(place: tuple[Any, ...], cells: list[dict[str, Any]]) -> str:
    """The row's title: workload, threads, and what limits it."""
    _, workload, dtype, device, threads = place
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    timed = [c for c in cells if c.get("binding")]
    bound = f" · bound by {timed[0]['binding']}" if timed else ""
    return f"{workload} · {dtype} · {where}{bound}"


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
            bad = line.status == "wrong" or line.outcome == "lost"
            style = "red" if bad else "green" if line.ours else "dim" if not line.time else ""
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
    found += [f"A limit is in doubt: {doubt}." for doubt in results.settings.get("doubts", ())]
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
