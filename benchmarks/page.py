"""One HTML page from a folder of results: the machine, bars of all engines, lost comparisons, and all
figures. Self-contained: no scripts, nothing is downloaded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import report, standing
from .results import ResultError, Results, rows, times

CSS = Path(__file__).with_name("page.css")

METHOD = """Engines of one table ran in turn, A B C A B C …, each in a separate process (ops and layers:
in one process); figures are medians, with the range of the middle 60 % of the repetitions. A ratio is
the median of the ratios of all rounds, with its range if that is wide.
An engine whose output was wrong was not timed. The limits were measured in the same run."""

TERMS = (
    ("like with like", "an engine is compared with minilm's variant whose weights have the same format"),
    (
        "1.25x faster",
        "the other engine takes 1.25 times as long; 1.25x slower: minilm takes 1.25 times as long",
    ),
    ("(1.1 to 1.9)", "the middle 60 % of the ratios, if they differ by more than 30 % of their median"),
    ("even", "the middle 60 % of the ratios lie on both sides of 1, close together"),
    ("unclear", "they lie on both sides of 1, far apart; or there were fewer than three repetitions"),
    ("of limit", "the minimum time by the measured bandwidth and arithmetic, divided by the measured time"),
    ("bound by", "the limit that takes longest: reading memory, copying, or arithmetic (fma, int8, gemm)"),
    ("read, copy", "bandwidth of plain loops over memory, in GB/s"),
    ("fma, int8", "peaks of multiply-adds in float32 and of 8-bit dot products, two operations each"),
    ("gemm", "the best matrix product of PyTorch's library"),
    ("prefill, decode", "reading a prompt; writing new tokens, one step at a time"),
    ("minilm reference", "minilm on plain PyTorch, to show the gain of its fast paths"),
)
Cells = list[dict[str, Any]]
SHOWN = 8
"""Number of losses that are shown unfolded."""


def e(text: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(text))


def picture(figure: Any, name: str) -> str:
    """A figure as an inline image, which scrolls separately on a narrow screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img alt="{e(name)}" src="data:image/png;base64,{data}"></div>'


# The first screen
def facts(results: Results) -> str:
    """Machine and limits as a row of boxes."""
    machine = results.machine
    cores = f"{machine['usable_cores']} cores" + (", virtual" if machine.get("virtual") else "")
    boxes = [("processor", machine["cpu"], cores)]
    if "gpu" in machine:
        boxes.append(("GPU", machine["gpu"]["name"], f"capability {machine['gpu']['capability']}"))
    kernels = machine["native_isa"] or "none"
    boxes.append(("minilm's kernels", kernels, machine["native_unavailable"] or "C++, chosen at run time"))
    for limits in results.limits:
        for name, words in (
            ("read", "reads memory"),
            ("fma", "32-bit arithmetic"),
            ("int8", "8-bit arithmetic"),
        ):
            keys = [k for k in limits.table if k.split("@")[0] == name]
            if keys:
                most = max(keys, key=lambda k: int(k.partition("@")[2] or 0))
                threads = most.partition("@")[2]
                with_threads = (
                    f"measured, {threads} thread{'s' * (threads != '1')}" if threads else "measured"
                )
                boxes.append((words, report.limit_words(name, limits.table[most]), with_threads))
    cells = "".join(f"<div><b>{e(a)}</b><strong>{e(b)}</strong><i>{e(c)}</i></div>" for a, b, c in boxes)
    return f'<div class="facts">{cells}</div>'


def lost(results: Results) -> str:
    """The numbers of comparisons won and lost; then the lost ones, the worst first."""
    found = list(standing.comparisons(results))
    parts = []
    if found:
        outcomes = {name: sum(c.outcome == name for c in found) for name in standing.OUTCOMES}
        counts = ", ".join(f"{n} {name}" for name, n in outcomes.items() if n)
        parts.append(
            f"<p><strong>{len(found)} comparison{'s' * (len(found) != 1)} of whole models, like with like: "
            f"{counts}.</strong></p>"
        )
    if wrong := [c for c in results.cells if c["ours"] and c["status"] == "wrong"]:
        names = ", ".join(f"{c['peer']} on {c['workload']}" for c in wrong)
        parts.append(f'<p class="lost">WRONG, of minilm\'s own: {e(names)}</p>')
    entries = _losses(found)
    if entries:
        parts.append(f"<h3>What was lost</h3>{_loss_table(entries[:SHOWN])}")
        if entries[SHOWN:]:
            more = f"<summary>{len(entries[SHOWN:])} more, less far behind</summary>"
            parts.append(f"<details>{more}{_loss_table(entries[SHOWN:])}</details>")
    below = list(standing.comparisons(results, ("op", "layer")))
    if entries := _losses(below):
        words = f"Ops and layers: {len(entries)} of {len(below)} comparisons lost"
        parts.append(f"<details><summary>{words}</summary>{_loss_table(entries)}</details>")
    return "".join(parts)


def _losses(found: list[standing.Comparison]) -> list[standing.Comparison]:
    return sorted((c for c in found if c.outcome == "lost"), key=lambda c: c.ratio.value.median)


def _where(device: str, threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device


def _loss_table(entries: list[standing.Comparison]) -> str:
    body = "".join(
        f'<tr class="lost"><td>{e(f"{c.place[1]} · {_where(*c.place[3:])}")}</td><td>{e(c.cell["peer"])}</td>'
        f"<td>{e(c.ours['peer'])}</td><td>{e(str(c.ratio))}</td></tr>"
        for c in entries
    )
    names = ("workload", "faster engine", "minilm's variant", "minilm is")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table class="losses"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


# Bars
def bars(cells: Cells) -> str:
    """One workload: one bar per engine, grouped by the bits of the weights; the names of engines that were
    not timed."""
    timed = [c for c in cells if times(c)]
    unit = "s" if cells[0]["unit"] == "s" else f"{cells[0]['unit']}/s"
    most = max((_extent(c)[2] for c in timed), default=1.0)
    parts = []
    for name, members in standing.grouped(timed).items():
        columns = (standing.heading(name, timed), "", unit, "minilm is")
        heads = "".join(f"<span>{e(word)}</span>" for word in columns)
        bodies = "".join(_bar(c, cells, most) for c in members)
        parts.append(f'<div class="row group">{heads}</div>{bodies}')
    refused: dict[tuple[str, bool], list[str]] = {}
    for cell in cells:
        if not times(cell):
            refused.setdefault((report.why_not(cell), cell["status"] == "wrong"), []).append(cell["peer"])
    for (reason, wrong), names in refused.items():
        parts.append(f'<div class="none{" wrong" * wrong}">{e(", ".join(names))} {e(reason)}</div>')
    workload = cells[0]["workload"].removeprefix(f"{cells[0].get('model')} ")
    words = standing.explanation(cells[0]["workload"])
    head = f'<h4>{e(workload)}</h4><p class="soft">{e(words)}</p>'
    return f'<div class="card">{head}{"".join(parts)}</div>'


def _extent(cell: dict[str, Any]) -> tuple[float, float, float]:
    """Median, low and high of the figure in the bar."""
    taken = times(cell)
    assert taken is not None
    if cell["unit"] == "s":
        return taken.median, taken.p20, taken.p80
    units = cell["units_per_call"]
    return units / taken.median, units / taken.p80, units / taken.p20


def _bar(cell: dict[str, Any], cells: Cells, most: float) -> str:
    middle, low, high = _extent(cell)
    found = standing.against(cell, cells)
    ratio, kind = "", ""
    if found is not None:
        ratio = str(found).partition(":")[0]
        kind = " lost" if found.outcome == "lost" and not cell["ours"] else ""
    ours = (" spec" if "reference" in cell["peer"] else " ours") if cell["ours"] else ""
    width, left, right = (f"{100 * v / most:.1f}%" for v in (middle, low, max(high - low, 0.0)))
    value = f"{middle:.2f}" if cell["unit"] == "s" else report.count(middle)
    return (
        f'<div class="row{ours}{kind}"><span>{e(cell["peer"])}</span><span class="track">'
        f'<span class="bar" style="width:{width}"></span>'
        f'<span class="range" style="left:{left};width:{right}"></span></span>'
        f'<span class="value">{value}</span><span class="ratio">{e(ratio)}</span></div>'
    )


def workloads(results: Results) -> str:
    """The bars of all models; those with the most threads are unfolded."""
    found: dict[tuple[Any, ...], list[Cells]] = {}
    for place, cells in rows(results.cells).items():
        if place[0] == "end to end" and not standing.SWEEP.search(place[1]):
            found.setdefault((cells[0]["model"], place[3], place[4]), []).append(cells)
    most = max((threads for _, _, threads in found), default=0)
    parts = []
    for (model, device, threads), group in sorted(found.items(), key=lambda item: -item[0][2]):
        cards = f'<div class="cards">{"".join(map(bars, group))}</div>'
        title = f"{e(model)} · {e(_where(device, threads))}"
        parts.append(
            f"<h3>{title}</h3>{cards}"
            if threads == most
            else f"<details><summary>{title}</summary>{cards}</details>"
        )
    return "".join(parts)


# Tables
def table(cells: Cells) -> str:
    """One row of measurements as a table."""
    head = "".join(f"<th>{e(h)}</th>" for h in report.HEADINGS)
    body = []
    for line in report.lines(cells):
        kind = "none" if not line.time else "ours" if line.ours else ""
        kind = "wrong" if line.status == "wrong" else "lost" if line.outcome == "lost" else kind
        values = (
            line.peer,
            line.time,
            line.rate,
            line.bandwidth,
            line.arithmetic,
            line.share,
            line.ratio,
            line.remark,
        )
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{e(v)}</td>" for v in values) + "</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def limits_table(results: Results) -> str:
    """The limits of the machine by the number of threads."""
    parts = []
    for limits in results.limits:
        names = list(dict.fromkeys(key.split("@")[0] for key in limits.table))
        threads = sorted({f"@{key.split('@')[1]}" for key in limits.table if "@" in key}) or [""]
        head = "".join(f"<th>{t.replace('@', 'threads: ') or 'device'}</th>" for t in threads)
        body = []
        for name in names:
            entries = [limits.table.get(name + t) for t in threads]
            cells = "".join(f"<td>{report.limit_words(name, x) if x else ''}</td>" for x in entries)
            how = next((x.how for x in entries if x and x.how), "")
            body.append(f"<tr><td>{e(name)}</td>{cells}<td>{e(how)}</td></tr>")
        title = f"Limits of the {limits.device}, measured in this run ({limits.how})"
        inner = f"<thead><tr><th>limit</th>{head}<th></th></tr></thead><tbody>{''.join(body)}</tbody>"
        parts.append(
            f'<details><summary>{e(title)}</summary><div class="wide"><table>{inner}</table></div></details>'
        )
    return "".join(parts)


def _details(results: Results) -> Iterator[str]:
    """All tables, folded by level and model."""
    found: dict[tuple[str, str], list[str]] = {}
    for place, cells in rows(results.cells).items():
        one = f"<h4>{e(report.headline(place, cells))}</h4>{table(cells)}"
        found.setdefault((place[0], cells[0].get("model") or ""), []).append(one)
    for (level, model), tables in found.items():
        title = f"{level}{', ' * bool(model)}{model}: {len(tables)} table{'s' * (len(tables) != 1)}"
        yield f"<details><summary>{e(title)}</summary>{''.join(tables)}</details>"


def section(name: str, results: Results, identifier: str) -> str:
    """One run."""
    from matplotlib import pyplot

    from .plots import pictures

    parts = [f'<h2 id="{identifier}">{e(name)}</h2>', facts(results)]
    if results.settings.get("tiny"):
        parts.append('<p class="lost">Toy sizes: this proves that a command works and measures nothing.</p>')
    parts += [lost(results), workloads(results)]
    figures = pictures(results, bars_too=False)
    if figures:
        parts.append("<h3>Curves and roofs</h3>")
    for title, figure in figures.items():
        parts.append(picture(figure, title.replace("-", " ")))
        pyplot.close(figure)
    parts.append("<h3>Every figure</h3>")
    parts += _details(results)
    parts.append(limits_table(results))
    when = f"{results.started} to {results.finished}; settings: {_settings(results)}"
    parts += [f'<p class="soft">{e(x)}</p>' for x in (*report.summary_lines(results, limits=False), when)]
    return "\n".join(parts)


def _contents(results: Results) -> str:
    """The content of a run in one line."""
    timed = sum(times(cell) is not None for cell in results.cells)
    models = list(dict.fromkeys(cell["model"] for cell in results.cells if cell.get("model")))
    levels = list(dict.fromkeys(cell["level"] for cell in results.cells))
    return f"{', '.join(levels)} · {', '.join(models) or 'no model'} · {timed} timed"


def _settings(results: Results) -> str:
    kept = ("rounds", "block_seconds", "budget_seconds", "threads", "seconds", "tiny")
    return ", ".join(f"{k} {results.settings[k]}" for k in kept if k in results.settings)


def build(folder: Path) -> str:
    """The page of all results in `folder` and below, the newest run first. Raises ResultError if there is
    none."""
    runs, refused = [], []
    for file in sorted(folder.rglob("*.json")):
        try:
            runs.append((str(file.relative_to(folder)), Results.read(file)))
        except ResultError as error:
            refused.append(str(error))
    if not runs:
        raise ResultError(f"{folder} holds no result of minilm bench" + "".join(f"; {r}" for r in refused))
    runs.sort(key=lambda run: (run[1].started, run[0]), reverse=True)
    links = "".join(
        f'<li><a href="#run{i}">{e(name)}</a> {e(_contents(results))}</li>'
        for i, (name, results) in enumerate(runs)
    )
    nav = f"<nav><ul>{links}</ul></nav>" if len(runs) > 1 else ""
    body = "\n".join(section(name, results, f"run{i}") for i, (name, results) in enumerate(runs))
    left = f"<p>Not shown: {e('; '.join(refused))}</p>" if refused else ""
    terms = "".join(f"<dt>{e(a)}</dt><dd>{e(b)}</dd>" for a, b in TERMS)
    title = "How it was measured, and what the words mean"
    how = f"<details><summary>{title}</summary><p>{e(METHOD)}</p><dl>{terms}</dl></details>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>minilm: measurements</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS.read_text()}</style></head>"
        f"<body><h1>minilm: measurements</h1>{nav}{how}{body}{left}</body></html>\n"
    )


def write(folder: Path, target: Path | None = None) -> Path:
    """Build the page of a folder and write it there as index.html (or to `target`)."""
    path = target or folder / "index.html"
    path.write_text(build(folder), encoding="utf-8")
    return path
