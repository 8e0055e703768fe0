"""One HTML page from a folder of results: tables, pictures, limits. Self-contained: no script, nothing is
loaded."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from . import report
from .results import ResultError, Results, rows

CSS = """ :root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #e3e6e9; --ours:
#0b6e4f; --bad: #b3261e; --paper: #fff; --band: #f5f7f8; } @media (prefers-color-scheme: dark) { :root {
--ink: #e8eaed; --soft: #a3adb6; --line: #363c42; --ours: #6fd3ab; --bad: #ff8a80; --paper: #16191c; --band:
#1e2327; } img { background: #fff; } } * { box-sizing: border-box; } body { margin: 0 auto; max-width:
1180px; padding: 24px 20px 80px; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui,
"Segoe UI", Roboto, "DejaVu Sans", sans-serif; } h1 { font-size: 26px; margin: 8px 0; } h2 { font-size:
20px; margin: 40px 0 8px; border-top: 2px solid var(--line); padding-top: 18px; } h3 { font-size: 15px;
margin: 26px 0 6px; } p, li { max-width: 78ch; } .soft { color: var(--soft); } nav a { margin-right: 14px; }
a { color: var(--ours); } img { max-width: 100%; border-radius: 4px; } .wide { overflow-x: auto; } table {
border-collapse: collapse; font-size: 13px; width: 100%; } th, td { padding: 4px 10px; text-align: right;
white-space: nowrap; border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; } th:last-child, td:last-child { text-align: left;
white-space: normal; color: var(--soft); min-width: 16ch; } tr.ours td { color: var(--ours); font-weight:
600; background: var(--band); } tr.none td { color: var(--soft); } tr.wrong td { color: var(--bad);
font-weight: 600; } """

METHOD = """Engines of one table ran in turn, A B C A B C …, each in a process of its own (ops and layers:
in one process); times are medians, with the range that holds the middle 60 % of the repeats. A ratio is the
median of the ratios round by round. Where the spread was too wide, the table says so in place of a ratio.
An engine whose output was wrong was not timed. The limits were measured in the same run."""


def picture(figure: Any) -> str:
    """A figure as an inline image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def table(cells: list[dict[str, Any]]) -> str:
    """One row of measurements as a table."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in report.HEADINGS)
    body = []
    for line in report.lines(cells):
        kind = (
            "wrong"
            if line.status == "wrong"
            else "ours"
            if line.ours and line.time
            else ""
            if line.time
            else "none"
        )
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
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(v)}</td>" for v in values) + "</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def limits_table(results: Results) -> str:
    """What the machine can do: each limit by the number of threads."""
    parts = []
    for limits in results.limits:
        names = list(dict.fromkeys(key.split("@")[0] for key in limits.table))
        threads = sorted({f"@{key.split('@')[1]}" for key in limits.table if "@" in key}) or [""]
        head = "".join(f"<th>{t.replace('@', 'threads: ') or 'device'}</th>" for t in threads)
        body = []
        for name in names:
            entries = [limits.table.get(name + t) for t in threads]
            cells = "".join(f"<td>{report.limit_words(name, e) if e else ''}</td>" for e in entries)
            how = next((e.how for e in entries if e and e.how), "")
            body.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{html.escape(how)}</td></tr>")
        title = f"Limits of the {limits.device}, measured in this run ({limits.how})"
        table = f"<thead><tr><th>limit</th>{head}<th></th></tr></thead><tbody>{''.join(body)}</tbody>"
        parts.append(f'<h3>{html.escape(title)}</h3><div class="wide"><table>{table}</table></div>')
    return "".join(parts)


def section(name: str, results: Results, identifier: str) -> str:
    """One run."""
    from matplotlib import pyplot

    from .plots import pictures

    parts = [f'<h2 id="{identifier}">{html.escape(name)}</h2>']
    lines = report.summary_lines(results, limits=False)
    parts += [f'<p class="soft">{html.escape(line)}</p>' for line in lines]
    parts.append(limits_table(results))
    when = f"{results.started} to {results.finished}"
    parts.append(f'<p class="soft">{html.escape(when)}; settings: {html.escape(_settings(results))}</p>')
    for figure in pictures(results).values():
        parts.append(f"<p>{picture(figure)}</p>")
        pyplot.close(figure)
    level = ""
    for place, cells in rows(results.cells).items():
        if place[0] != level:
            level = place[0]
            parts.append(f"<h3>Level: {html.escape(level)}</h3>")
        parts.append(f"<h3>{html.escape(report.headline(place, cells))}</h3>{table(cells)}")
    return "\n".join(parts)


def _settings(results: Results) -> str:
    kept = ("rounds", "block_seconds", "budget_seconds", "threads", "seconds", "tiny")
    return ", ".join(f"{k} {results.settings[k]}" for k in kept if k in results.settings)


def build(folder: Path) -> str:
    """The page of all results in `folder` and below. Raises ResultError when there is none."""
    files = sorted(folder.rglob("*.json"))
    runs, refused = [], []
    for file in files:
        try:
            runs.append((str(file.relative_to(folder)), Results.read(file)))
        except ResultError as error:
            refused.append(str(error))
    if not runs:
        raise ResultError(f"{folder} holds no result of minilm bench" + "".join(f"; {r}" for r in refused))
    links = "".join(f'<a href="#run{i}">{html.escape(name)}</a>' for i, (name, _) in enumerate(runs))
    body = "\n".join(section(name, results, f"run{i}") for i, (name, results) in enumerate(runs))
    left = f"<p>Not shown: {html.escape('; '.join(refused))}</p>" if refused else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>minilm: measurements</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f"<body><h1>minilm: measurements</h1><p>{html.escape(METHOD)}</p><nav>{links}</nav>"
        f"{body}{left}</body></html>\n"
    )


def write(folder: Path, target: Path | None = None) -> Path:
    """Build the page of a folder and write it there as index.html (or to `target`)."""
    path = target or folder / "index.html"
    path.write_text(build(folder), encoding="utf-8")
    return path
