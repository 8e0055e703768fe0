"""`tokenize`, `inspect`, `convert`: commands about files, which do not run a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CommandError, note, warn
from ..options import ENCODER, MODEL_HELP, DType, Encoder, command
from ..progress import waiting
from ..results import Output, Record, console, quantity, size
from ..texts import Texts

if TYPE_CHECKING:
    from rich.console import RenderableType


PANEL = "Files"


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(
        app,
        "tokenize",
        panel=PANEL,
        examples="""
            minilm tokenize "Transformers, taken apart."
            minilm tokenize --model SmolLM2-135M-Instruct --file poems.txt --json
            """,
    )(tokenize)
    command(
        app,
        "inspect",
        panel=PANEL,
        examples="""
            minilm inspect all-MiniLM-L6-v2
            minilm inspect SmolLM2-135M-Instruct --weights
            minilm inspect models/my-bert --json
            """,
    )(inspect)
    command(
        app,
        "convert",
        panel=PANEL,
        examples="""
            minilm convert SmolLM2-135M-Instruct smollm2 --dtype bfloat16
            minilm convert model.Q8_0.gguf models/my-llama --force
            """,
    )(convert)


def tokenize(
    *,
    source: Texts,
    model: Encoder = ENCODER,
    pair: Annotated[str | None, typer.Option(metavar="TEXT", help="A second text, for pairs.")] = None,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Add the special tokens that the model expects.")
    ] = True,
    out: Output,
) -> None:
    """Show how a model's tokenizer splits texts: ids, tokens, and the characters of each."""
    out.check()
    items = source.read()
    note(f"loading the tokenizer of {model} ...")
    from ...text import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with out.writer(_token_tables) as write:
        for item in items:
            encoded = tokenizer(
                item.text, pair, add_special_tokens=special, return_offsets_mapping=True, verbose=False
            )
            ids = list(encoded["input_ids"])
            result: Record = {
                "ids": ids,
                "tokens": tokenizer.convert_ids_to_tokens(ids),
                "offsets": [list(span) for span in encoded["offset_mapping"]],
            }
            if pair is not None:
                result["pair"] = pair
                result["sequence_ids"] = encoded.sequence_ids()
            write({**item.record, "text": item.text, **result})


def _token_tables(records: list[Record]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for record in records:
        table = Table(box=None, pad_edge=False)
        for name in ("position", "id", "characters"):
            table.add_column(name, justify="right")
        table.add_column("token", style="cyan", overflow="fold")
        table.add_column("text", overflow="fold")
        of = record.get("sequence_ids") or [0] * len(record["ids"])
        texts = {0: record["text"], 1: record.get("pair", "")}
        rows = zip(record["ids"], record["tokens"], record["offsets"], of, strict=True)
        for position, (number, token, (start, end), sequence) in enumerate(rows):
            span = texts.get(sequence, "")[start:end] if end > start else ""
            where = f"{start}-{end}" if end > start else ""
            table.add_row(str(position), str(number), where, token, repr(span)[1:-1] if span else "")
        parts += [Text(record["text"], style="bold"), table, Text(f"{len(record['ids'])} tokens\n")]
    return Group(*parts)


def inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Default: {ENCODER}.")
    ] = None,
    by_option: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="The same, as an option.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also show the model's name for each tensor of the checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a checkpoint contains: configuration, parameters, memory, KV cache, FLOPs per token,
    tokenizer.

    Only the headers of its files are read, so this is quick for models of any size.
    """
    if model is not None and by_option is not None:
        raise CommandError(f"two models were named: {model} and {by_option}")
    name = model or by_option or ENCODER
    note(f"reading {name} ...")
    from ...conversion import summarise

    summary = summarise(name)
    if as_json:
        typer.echo(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        return
    from .inspect_view import view

    out = console()
    for part in view(summary, weights=weights, width=out.width):
        out.print(part)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    dtype: DType = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model in a folder that is not empty.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Split larger weights into several files.")
    ] = "5GB",
) -> None:
    """Convert a checkpoint (GGUF or any supported format) to a folder of safetensors that transformers loads.

    The tokenizer is copied too. If there is an error, the destination is unchanged.
    """
    with waiting(f"converting {source}"):
        from ...conversion import convert as run

        done = run(source, destination, dtype=dtype, force=force, max_shard_size=max_shard_size)
    reasons: dict[str, list[str]] = {}
    for name, reason in done.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        note(f"left out: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})")
    if not done.tokenizer:
        warn(f"{source} has no tokenizer, so {destination} has none")
    total = sum(done.files.values())
    typer.echo(
        f"{done.folder}: {done.architecture}, {quantity(done.parameters)} parameters in "
        f"{str(done.dtype).removeprefix('torch.')}, {len(done.files)} files, {size(total)}"
    )
