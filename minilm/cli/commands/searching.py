"""`index` and `search`: an index of texts in a folder, and its texts that are most similar to a query."""

from __future__ import annotations

from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CommandError, warn
from ..options import ENCODER, MODEL_HELP, Encoder, Runtime, command
from ..progress import counting
from ..results import Output, Record
from ..texts import FieldOption, FileOption, Texts, read_items
from .encode import PANEL, BatchSize

if TYPE_CHECKING:
    from rich.console import RenderableType

TOP_K = 10

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the index.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(
        app,
        "index",
        panel=PANEL,
        examples="""
            minilm index faq.index --file faq.jsonl --field question
            minilm index faq.index --add "Where are you?" "When do you open?"
            cat pages.txt | minilm index pages.index --vectors int8
            """,
    )(index)
    command(
        app,
        "search",
        panel=PANEL,
        examples="""
            minilm search faq.index "How do I get a refund?"
            minilm search faq.index --file questions.txt --top-k 3 --json
            """,
    )(search)


def index(
    *,
    folder: Folder,
    source: Texts,
    add: Annotated[
        bool, typer.Option("--add", help="Add the texts to the index, with its model, prompts and vectors.")
    ] = False,
    model: Encoder = ENCODER,
    vectors: Annotated[
        str,
        typer.Option(
            metavar="DTYPE", help="How vectors are stored: float32, or float16 or int8 to save space."
        ),
    ] = "float32",
    query_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to put before each query; default: that of the model."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to put before each text; default: that of the model."),
    ] = None,
    batch_size: BatchSize = 32,
    out: Output,
    run: Runtime,
) -> None:
    """Make an index of texts, for `minilm search`. An index that is there is replaced, unless --add is given.

    The other fields of JSON lines are kept, and come back with the text. If the command is interrupted, the
    index is as it was before.
    """
    out.check()
    if add:
        given = {"--model": model != ENCODER, "--vectors": vectors != "float32"}
        given |= {"--prompt": prompt is not None, "--query-prompt": query_prompt is not None}
        wrong = [name for name, was_given in given.items() if was_given]
        if wrong:
            raise CommandError(f"{', '.join(wrong)}: those of the index are used with --add")
    texts, records = tee(source.read())
    field = source.field or "text"
    pairs: dict[str, Any] = {
        "texts": (item.text for item in texts),
        "metadata": ({k: v for k, v in item.record.items() if k != field} for item in records),
        "batch_size": batch_size,
    }
    from ...search import SearchIndex

    if add:
        found = SearchIndex.open(folder)
        model = found.model
    with run.running(model) as device:
        encoder = _encoder(model, device, run)
        with counting("texts") as done:
            if add:
                before = len(found)
                found = SearchIndex.open(folder, encoder)
                added = len(found.add(**pairs, progress=done))
            else:
                found = SearchIndex.build(
                    encoder,
                    folder=folder,
                    name=model,
                    dtype=vectors,
                    query_prompt=query_prompt,
                    document_prompt=prompt,
                    progress=done,
                    **pairs,
                )
                before, added = 0, len(found)
    with out.writer(_made) as write:
        write({"index": str(folder), "added": added, "texts": before + added, "model": found.model})


def search(
    *,
    folder: Folder,
    queries: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="Queries. Without any, or with -, standard input is read."),
    ] = None,
    file: FileOption = None,
    field: FieldOption = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", "-k", min=1, metavar="N", help=f"Number of texts to find per query; default: {TOP_K}."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help=f"{MODEL_HELP} Default: the model of the index."),
    ] = None,
    batch_size: BatchSize = 32,
    out: Output,
    run: Runtime,
) -> None:
    """Find the texts of an index that are most similar to a query, by comparing it with all of them.

    Another model than that of the index is an error.
    """
    out.check()
    items = list(read_items(queries or [], file or [], field))
    empty = next((number for number, item in enumerate(items, start=1) if not item.text.strip()), None)
    if empty is not None:
        raise CommandError(f"query {empty} is empty")
    from ...search import SearchIndex

    found = SearchIndex.open(folder)
    if not len(found):
        raise CommandError(f"{folder}: the index is empty; `minilm index {folder} --add` adds texts")
    if top_k is not None and top_k > len(found):
        warn(f"--top-k {top_k}: the index has {len(found)} text{'s' if len(found) > 1 else ''}")
    name = found.model if model is None else model
    with run.running(name) as device:
        found = SearchIndex.open(folder, _encoder(name, device, run))
        answers = found.search([item.text for item in items], top_k or TOP_K, batch_size=batch_size)
        with out.writer(_ranking) as write:
            for item, hits in zip(items, answers, strict=True):
                for rank, hit in enumerate(hits, start=1):
                    place = {"query": item.text, "rank": rank, "score": hit.score, "id": hit.id}
                    write({**item.record, **place, "text": hit.text, "metadata": hit.metadata})


def _encoder(model: str, device: Any, run: Runtime) -> Any:
    from ...sentence import SentenceEncoder

    return SentenceEncoder(model, device=device, dtype=run.dtype, weights=run.weights)


def _made(records: list[Record]) -> RenderableType:
    (record,) = records
    count = f"{record['added']:,} text{'' if record['added'] == 1 else 's'}"
    return f"{record['index']}: {count} added, {record['texts']:,} in all, by {record['model']}"


def _ranking(records: list[Record]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("score", justify="right", style="green", no_wrap=True)
    table.add_column("text", overflow="fold")
    several = len({record["query"] for record in records}) > 1
    for record in records:
        if several and record["rank"] == 1:
            table.add_row("", "", record["query"], style="cyan")
        table.add_row(str(record["rank"]), f"{record['score']:.4f}", record["text"])
    return table
