"""Results as tables with the same cells and words, for a terminal (rich) and for the HTML page."""

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
    """won, lost, even, unclear (see `stats.Ratio`); "" if nothing is compared."""
    remark: str
    status: str


def seconds(value: float) -> str:
    """1.23 s, 4.56 ms, 7.8 us."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def count(value: float) -> str:
    """A rate with three digits."""
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


BUSY = 0.1
"""Share of the processors that other programs may use before it is reported."""

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
    """The row's title: workload, threads, and the binding limit."""
    _, workload, dtype, device, threads = place
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    timed = [c for c in cells if c.get("binding")]
    bound = f" · bound by {timed[0]['binding']}" if timed else ""
    return f"{workload} · {dtype} · {where}{bound}"


WIDE = 130
"""Minimum width of a terminal for tables with all columns."""


def print_tables(results: Results, console: Any = None) -> None:
    """Print all rows on a terminal. A narrow terminal gets the most important columns, and below each table
    the reasons why engines were not timed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for text in summary_lines(results):
        console.print(Text(text))
    wide = console.width >= WIDE
    shown = range(8) if wide else (0, 1, 5, 6)
    for place, cells in rows(results.cells).items():
        console.print(Text(f"\n{headline(place, cells)}", style="bold"))
        table = Table(box=None, pad_edge=False)
        for at in shown:
            heading = HEADINGS[at] if wide else HEADINGS[at].partition(" [")[0]
            left = at in (0, 6, 7)
            table.add_column(heading, justify="left" if left else "right", no_wrap=at < 6, overflow="fold")
        found = lines(cells)
        for line in found if wide else [line for line in found if line.time]:
            bad = line.status == "wrong" or line.outcome == "lost"
            style = "red" if bad else "green" if line.ours else "dim" if not line.time else ""
            values = (
                line.peer,
                line.time if wide else line.time.partition(" [")[0],
                line.rate,
                line.bandwidth,
                line.arithmetic,
                line.share,
                line.ratio,
                line.remark,
            )
            table.add_row(*(Text(values[at]) for at in shown), style=style)
        if table.row_count:
            console.print(table)
        if not wide:
            for reason, names in _reasons(found).items():
                style = "red" if "WRONG" in reason else "dim"
                console.print(Text(f"{', '.join(names)}: {reason}", style=style))


def _reasons(found: list[Line]) -> dict[str, list[str]]:
    """Why engines were not timed -> those engines."""
    reasons: dict[str, list[str]] = {}
    for line in found:
        if not line.time:
            reasons.setdefault(line.remark, []).append(line.peer)
    return reasons


def left_out(names: list[str]) -> str:
    """A short summary of what there was no time for."""
    ops = [name for name in names if " [" in name]
    grouped: dict[str, list[str]] = {}
    for name in names:
        if " [" not in name:
            model, _, what = name.partition(": ")
            grouped.setdefault(model, []).append(what)
    rest = [f"{model}: {', '.join(found)}" if found != [""] else model for model, found in grouped.items()]
    if ops:
        kinds = list(dict.fromkeys(name.partition(" [")[0] for name in ops))
        rest.insert(0, f"{len(ops)} shape{'s' * (len(ops) != 1)} of ops ({', '.join(kinds)})")
    return f"Left out for lack of time: {'; '.join(rest)}."


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
    found += [f"A limit is doubtful: {doubt}." for doubt in results.settings.get("doubts", ())]
    found += busy(results)
    if names := results.settings.get("left_out"):
        found.append(left_out(names))
    for measured in results.limits if limits else []:
        parts = [f"{name.replace('@', ' x ')} {limit_words(name, x)}" for name, x in measured.table.items()]
        found.append(f"limits ({measured.device}; {measured.how}): " + ", ".join(parts))
    return found


def busy(results: Results) -> list[str]:
    """Sentences about other load on the machine; none if it was idle."""
    found = []
    if (share := results.settings.get("busy_share", 0)) > BUSY:
        found.append(f"The machine was not idle at the start: {share:.0%} of its processors were in use.")
    loads = [cell["load"] for cell in results.cells if cell.get("load")]
    taken = sorted(load["others_share"] for load in loads if load.get("others_share") is not None)
    if taken and taken[-1] > BUSY:
        middle = taken[len(taken) // 2]
        found.append(
            f"Other programs used {middle:.0%} of the processors during the measurements, and up to "
            f"{taken[-1]:.0%}: the speeds are too low and vary."
        )
    stolen = sorted(load["steal_share"] for load in loads if load.get("steal_share") is not None)
    if stolen and stolen[-1] > BUSY:
        found.append(f"The host gave up to {stolen[-1]:.0%} of the processors to other virtual machines.")
    return found


def limit_words(name: str, limit: Limit) -> str:
    """A limit with its unit, and whether it varies too widely to be reliable."""
    unit = {"read": "GB/s", "copy": "GB/s", "clock": "GHz"}.get(name.split("@")[0].split()[0], "Gop/s")
    wide = " (varies widely)" if len(limit.repeats) >= 3 and too_wide(summary(limit.repeats)) else ""
    return f"{limit.value / 1e9:.3g} {unit}{wide}"
