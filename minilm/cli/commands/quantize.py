"""`quantize`: saves a model with fewer bits per weight, and measures the loss of quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import warn
from ..options import MODEL_HELP, DType, command
from ..progress import waiting
from ..results import Record, quantity, size
from ..texts import read_items

if TYPE_CHECKING:
    from ...conversion import Quantization

PANEL = "Files"


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    command(
        app,
        "quantize",
        panel=PANEL,
        examples="""
            minilm quantize SmolLM2-135M-Instruct smollm2-q4 --weights q4
            minilm quantize all-MiniLM-L6-v2 minilm-int8 --weights int8 --texts sentences.txt
            """,
    )(quantize)


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            "-w",
            metavar="FORMAT",
            help="int8, q8_0 (q8), q4_0 or q4_1 (q4); gguf keeps the formats of a GGUF file.",
        ),
    ] = "q4",
    dtype: DType = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Texts to measure the error on: one per line, or JSON lines (.jsonl); default: "
            "documentation that comes with Python. Repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="For a decoder: use the first N tokens of the texts.")
    ] = 2048,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model in a folder that is not empty.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Split larger weights into several files.")
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Save a model with quantised weights, and measure the error against float32.

    The measure for an encoder is the cosine of its embeddings with those in float32, for a decoder the
    perplexity compared with float32. All commands and `from_pretrained` load the folder.
    """
    given = [item.text for item in read_items([], texts, None)] if texts else None
    with waiting(f"quantising {source} and measuring the error"):
        from ...conversion import quantize as run

        done = run(
            source,
            destination,
            weights=weights,
            dtype=dtype,
            texts=given,
            tokens=tokens,
            force=force,
            max_shard_size=max_shard_size,
        )
    if done.error is None:
        why = "writes texts for texts" if done.conversion.tokenizer else "has no tokenizer"
        warn(f"{source} {why}, so the error was not measured")
    if as_json:
        typer.echo(json.dumps(_record(done), ensure_ascii=False))
        return
    formats = ", ".join(
        f"{count} {'matrix' if count == 1 else 'matrices'} in {name}"
        for name, count in done.conversion.quantised.items()
    )
    typer.echo(
        f"{done.conversion.folder}: {done.conversion.architecture}, "
        f"{quantity(done.conversion.parameters)} parameters, {formats or 'nothing quantised'}\n"
        f"weights: {size(done.before)} before, {size(done.after)} now"
    )
    if done.error is not None:
        typer.echo(_error(done))


def _error(done: Quantization) -> str:
    from ...conversion import Perplexities

    error = done.error
    if isinstance(error, Perplexities):
        change = 100 * (error.quantised / error.floating - 1)
        return (
            f"perplexity: {error.floating:.4g} in float32, {error.quantised:.4g} now ({change:+.2f} %), "
            f"on {error.tokens:,} tokens"
        )
    assert error is not None
    return (
        f"cosine of embeddings with those in float32: {error.mean:.6f} on average, {error.worst:.6f} at the "
        f"worst, of {error.count:,} texts"
    )


def _record(done: Quantization) -> Record:
    from dataclasses import asdict

    return {
        "folder": str(done.conversion.folder),
        "architecture": done.conversion.architecture,
        "parameters": done.conversion.parameters,
        "formats": done.conversion.quantised,
        "not_quantised": done.conversion.floating,
        "bytes_before": done.before,
        "bytes_after": done.after,
        "error": None if done.error is None else asdict(done.error),
    }
