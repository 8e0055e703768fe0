"""Prints a `Summary` for `minilm inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...config import LARGEST
from ...conversion import DTYPES, Summary
from ...families import ENCODER_DECODERS
from ..results import quantity, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def view(summary: Summary, *, weights: bool, width: int) -> Iterator[RenderableType]:
    """The parts to print on a terminal of `width` columns, in order."""
    yield _overview(summary)
    yield _given(summary)
    yield _understood(summary)
    yield from _parameters(summary, width)
    if weights:
        yield from _weights(summary, width)


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
    both = summary.config.model_type in ENCODER_DECODERS and summary.head != "encoder"
    kind = "encoder-decoder" if both else "decoder" if spec.causal else "encoder"
    table.add_row("model", f"{family} {kind}, loaded by minilm.{summary.class_name}")
    table.add_row("path", str(summary.path))
    files = [f"{name} ({size(count)})" for name, count in summary.files.items()]
    more = f" and {len(files) - 3} more, {size(sum(summary.files.values()))} in all" if len(files) > 3 else ""
    table.add_row("weights", f"{summary.format}: {', '.join(files[:3])}{more}")
    table.add_row("parameters", f"{summary.count:,} ({quantity(summary.count)})")
    for label, words in _memory(summary):
        table.add_row(label, words)
    if spec.causal:
        kv = ", ".join(f"{summary.kv_bytes(d):,} B in {_name(d)}" for d in DTYPES)
        full = size(summary.kv_bytes(DTYPES[1]) * spec.max_positions)
        table.add_row(
            "KV cache", f"a token: {kv}; {spec.max_positions:,} tokens: {full} in {_name(DTYPES[1])}"
        )
    longest = spec.max_positions
    contexts = sorted({min(count, longest) for count in (1, 512, longest) if count != LARGEST})
    work = ", ".join(f"{quantity(summary.flops(count))} at context {count:,}" for count in contexts)
    table.add_row("FLOPs per token", f"{work} (matrix products of the forward pass)")
    table.add_row("tokenizer", summary.tokenizer or "none")
    table.add_row("chat template", "yes" if summary.chat_template else "no")
    return table


def _memory(summary: Summary) -> Iterator[tuple[str, str]]:
    """The memory of the weights: first as the model is loaded by default."""
    stored, default = summary.stored_memory, _name(summary.dtype)
    if stored is not None and summary.format == "GGUF":
        yield "in memory", f"{size(stored)} as stored (minilm chat; elsewhere --weights gguf)"
        yield "", f"{size(summary.default_memory)} in {default} (other commands and from_pretrained)"
    elif stored is not None:
        yield "in memory", f"{size(stored)} as stored, which is the default when loading"
    else:
        yield "in memory", f"{size(summary.default_memory)} in {default}, the default when loading"
    others = [d for d in DTYPES if d != summary.dtype or (stored is not None and summary.format != "GGUF")]
    yield "", ", ".join(f"{size(summary.memory(d))} in {_name(d)}" for d in others)


def _given(summary: Summary) -> RenderableType:
    table = _table("Configuration in the checkpoint", header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in summary.given.items():
        text = json.dumps(value, ensure_ascii=False)
        table.add_row(key, text if len(text) <= 400 else f"{text[:400]} ... ({len(text)} characters)")
    return table


def _understood(summary: Summary) -> RenderableType:
    table = _table("Configuration in minilm", header=False)
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
        return (
            ", ".join(f"{count} layers: {item or 'all'}" for item, count in runs) or "no layer has a window"
        )
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{field.name}={getattr(value, field.name)}" for field in fields(value))
    return "-" if value is None else str(value)


def _parameters(summary: Summary, width: int) -> Iterator[RenderableType]:
    """One row per parameter; on a narrow terminal its name is on a separate line, uncut."""
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for p in summary.parameters:
        rows.setdefault((_pattern(p.name), p.shape, p.stored or "missing"), []).append(p.count)
    told = []
    for (name, shape, stored), counts in rows.items():
        times = f" x {len(counts)}" if "{i}" in name else ""
        share = f"{100 * sum(counts) / summary.count:.1f} %"
        told.append((name, f"{list(shape)}{times}", quantity(sum(counts)), share, stored))
    heads = ("name", "shape", "number", "share", "stored as")
    needed = sum(max(len(row[at]) for row in [heads, *told]) for at in range(5)) + 8
    if needed > width:
        yield from _narrow("Parameters", [(row[0], ", ".join(row[1:])) for row in told])
        return
    table = _table("Parameters")
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for name in ("number", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    for row in told:
        table.add_row(*row)
    yield table


def _weights(summary: Summary, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    title = "Names in the checkpoint and in the model"
    told = []
    for source, transform, target, count in _grouped(summary):
        how, _, reason = transform.partition(": ")
        told.append(
            (f"{how} x {count}" if count > 1 else how, source or "(not in the checkpoint)", target or reason)
        )
    names = max((max(len(source), len(target) + 2) for _, source, target in told), default=0)
    if max((len(how) for how, _, _ in told), default=0) + 2 + names > width:
        yield from _narrow(title, [(source, f"{how}: {target}") for how, source, target in told])
        return
    table = _table(title)
    table.add_column("how", no_wrap=True)
    table.add_column("checkpoint (model below it)", overflow="fold")
    for how, source, target in told:
        table.add_row(how, Text(source).append(f"\n  {target}", style="cyan"))
    yield table


def _narrow(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[RenderableType]:
    """One line per name, with its description indented below."""
    from rich.padding import Padding
    from rich.text import Text

    yield Text(f"\n{title}", style="bold")
    for name, told in rows:
        yield Text(name, style="cyan", overflow="fold")
        yield Padding(Text(told, overflow="fold"), (0, 0, 0, 2))


def _grouped(summary: Summary) -> Iterable[tuple[str, str, str, int]]:
    """(source, transform, target, count): lines that are the same in several layers are merged, with {i} for
    the number."""
    rows: dict[tuple[str, str, str], int] = {}
    for entry in summary.weights:
        key = (_pattern(entry.source), entry.transform, _pattern(entry.target))
        rows[key] = rows.get(key, 0) + 1
    return [(*key, count) for key, count in rows.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
