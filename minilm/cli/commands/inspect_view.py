"""How `minilm inspect` shows a `Summary` to people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...conversion import DTYPES, Summary
from ..results import quantity, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def view(summary: Summary, *, weights: bool) -> Iterator[RenderableType]:
    """The parts to print, in order."""
    yield _overview(summary)
    yield _given(summary)
    yield _understood(summary)
    yield _parameters(summary)
    if weights:
        yield _weights(summary)


def _table(title: str, *, header: bool = True) -> Table:
    from rich.table import Table

    return Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=header,
    )


def _overview(summary: Summary) -> RenderableType:
    table = _table(summary.name, header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    spec = summary.spec
    family = summary.config.model_type
    table.add_row(
        "model", f"{family} {'decoder' if spec.causal else 'encoder'}, loaded by minilm.{summary.class_name}"
    )
    table.add_row("path", str(summary.path))
    files = [f"{name} ({size(count)})" for name, count in summary.files.items()]
    more = f" and {len(files) - 3} more, {size(sum(summary.files.values()))} in all" if len(files) > 3 else ""
    table.add_row("weights", f"{summary.format}: {', '.join(files[:3])}{more}")
    table.add_row("parameters", f"{summary.count:,} ({quantity(summary.count)})")
    table.add_row("in memory", ", ".join(f"{size(summary.memory(d))} in {_name(d)}" for d in DTYPES))
    if spec.causal:
        kv = ", ".join(f"{summary.kv_bytes(d):,} B in {_name(d)}" for d in DTYPES)
        full = size(summary.kv_bytes(DTYPES[1]) * spec.max_positions)
        table.add_row(
            "KV cache", f"a token: {kv}; {spec.max_positions:,} tokens: {full} in {_name(DTYPES[1])}"
        )
    contexts = sorted({min(count, spec.max_positions) for count in (1, 512, spec.max_positions)})
    work = ", ".join(f"{quantity(summary.flops(count))} at context {count:,}" for count in contexts)
    table.add_row("FLOPs per token", f"{work} (matrix products of the forward pass)")
    table.add_row("tokenizer", summary.tokenizer or "none")
    table.add_row("chat template", "yes" if summary.chat_template else "no")
    return table


def _given(summary: Summary) -> RenderableType:
    table = _table("Configuration, as the checkpoint gives it", header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in summary.given.items():
        text = json.dumps(value, ensure_ascii=False)
        table.add_row(key, text if len(text) <= 400 else f"{text[:400]} ... ({len(text)} characters)")
    return table


def _understood(summary: Summary) -> RenderableType:
    table = _table("Configuration, as minilm understands it", header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for field in fields(summary.spec):
        table.add_row(field.name, _value(getattr(summary.spec, field.name)))
    return table


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        runs: list[tuple[Any, int]] = []
        for item in value:
            runs = (
                [*runs[:-1], (item, runs[-1][1] + 1)] if runs and runs[-1][0] == item else [*runs, (item, 1)]
            )
        return ", ".join(f"{count} layers: {item or 'all'}" for item, count in runs) or "all layers see all"
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{field.name}={getattr(value, field.name)}" for field in fields(value))
    return "-" if value is None else str(value)


def _parameters(summary: Summary) -> RenderableType:
    table = _table("Parameters")
    table.add_column("name", style="cyan", overflow="fold")
    table.add_column("shape", no_wrap=True)
    for name in ("number", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for p in summary.parameters:
        rows.setdefault((_pattern(p.name), p.shape, p.stored or "missing"), []).append(p.count)
    for (name, shape, stored), counts in rows.items():
        times = f" x {len(counts)}" if "{i}" in name else ""
        share = f"{100 * sum(counts) / summary.count:.1f} %"
        table.add_row(name, f"{list(shape)}{times}", quantity(sum(counts)), share, stored)
    return table


def _weights(summary: Summary) -> RenderableType:
    from rich.text import Text

    table = _table("From the names in the checkpoint to those of the model")
    table.add_column("how", no_wrap=True)
    table.add_column("checkpoint, and below it the model", overflow="fold")
    for source, transform, target, count in _grouped(summary):
        how, _, reason = transform.partition(": ")
        name = Text(source or "(not in the checkpoint)").append(f"\n  {target or reason}", style="cyan")
        table.add_row(f"{how} x {count}" if count > 1 else how, name)
    return table


def _grouped(summary: Summary) -> Iterable[tuple[str, str, str, int]]:
    """(source, transform, target, how many): the same line of several layers is one, with {i} for the
    number."""
    rows: dict[tuple[str, str, str], int] = {}
    for entry in summary.weights:
        key = (_pattern(entry.source), entry.transform, _pattern(entry.target))
        rows[key] = rows.get(key, 0) + 1
    return [(*key, count) for key, count in rows.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
