"""`embed`, `similar`, `index` and `search`: texts as vectors, and the most similar ones to a query."""

from __future__ import annotations

from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CommandError, warn
from ..options import ENCODER, MODEL_HELP, Encoder, Runtime, command
from ..progress import counting
from ..results import Output, Record
from ..texts import FieldOption, FileOption, Item, Texts, chunks, read_items

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...sentence import SentenceEncoder

PANEL = "Encoders"
CHUNK = 1024
"""Texts that are read before the first result is written."""

TOP_K = 10
"""Texts that `search` finds."""

BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Texts that go through the model at once.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text to put before each text; some models need one.")
]

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the index.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(
        app,
        "embed",
        panel=PANEL,
        examples="""
            minilm embed "A man is eating food." "A cheetah chases its prey."
            minilm embed --file sentences.txt --output sentences.npy
            cat pages.jsonl | minilm embed --field body > embedded.jsonl
            """,
    )(embed)
    command(
        app,
        "similar",
        panel=PANEL,
        examples="""
            minilm similar "Who eats?" "A man is eating food." "The sky is blue."
            minilm similar "Who eats?" --file sentences.txt --top-k 3
            """,
    )(similar)
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


def embed(
    *,
    source: Texts,
    model: Encoder = ENCODER,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    prompt: Prompt = None,
    batch_size: BatchSize = 32,
    out: Output,
    run: Runtime,
) -> None:
    """Turn texts into vectors that are close if the texts have similar meanings.

    Pooling and normalisation are those of the model, as in sentence-transformers. An .npy file has one row
    per text.
    """
    out.check("embedding")
    items = source.read()
    with run.running(model) as device:
        encoder = _encoder(model, device, run)
        with out.writer(_embedding_table, "embedding") as write, counting("texts") as done:
            for chunk in chunks(items, CHUNK):
                vectors = _encode(encoder, chunk, batch_size, prompt, normalize or None)
                for item, vector in zip(chunk, vectors, strict=True):
                    write({**item.record, "text": item.text, "embedding": vector})
                done(len(chunk))


def similar(
    *,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="The text that the others are compared with.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; - or nothing reads standard input.")
    ] = None,
    file: FileOption = None,
    field: FieldOption = None,
    model: Encoder = ENCODER,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "-k", min=1, metavar="N", help="Show only the N most similar texts."),
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to put before the query; some models need one.")
    ] = None,
    prompt: Prompt = None,
    batch_size: BatchSize = 32,
    out: Output,
    run: Runtime,
) -> None:
    """Rank texts by similarity to a query, by the model's similarity function (usually cosine)."""
    import torch

    out.check()
    if not query.strip():
        raise CommandError("the query is empty")
    source = read_items(texts or [], file or [], field)
    with run.running(model) as device:
        encoder = _encoder(model, device, run)
        wanted = _encode(encoder, [Item(query)], batch_size, query_prompt, None)
        items: list[Item] = []
        scores: list[torch.Tensor] = []
        for chunk in chunks(source, CHUNK):
            items += chunk
            scores.append(encoder.similarity(wanted, _encode(encoder, chunk, batch_size, prompt, None))[0])
        score = torch.cat(scores).float()
        order = score.argsort(descending=True, stable=True)[:top_k].tolist()
        with out.writer(_ranking) as write:
            for rank, index in enumerate(order, start=1):
                item = items[index]
                write({**item.record, "rank": rank, "score": score[index], "text": item.text})


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
        with out.writer(_found) as write:
            for item, hits in zip(items, answers, strict=True):
                for rank, hit in enumerate(hits, start=1):
                    place = {"query": item.text, "rank": rank, "score": hit.score, "id": hit.id}
                    write({**item.record, **place, "text": hit.text, "metadata": hit.metadata})


def _encoder(model: str, device: Any, run: Runtime) -> SentenceEncoder:
    from ...sentence import SentenceEncoder

    return SentenceEncoder(model, device=device, dtype=run.dtype, weights=run.weights)


def _encode(
    encoder: SentenceEncoder, items: list[Item], batch_size: int, prompt: str | None, normalize: bool | None
) -> Any:
    """float [N, D] of numpy."""
    return encoder.encode(
        [item.text for item in items],
        batch_size=batch_size,
        prompt=prompt,
        normalize_embeddings=normalize,
        show_progress_bar=False,
    )


def _embedding_table(records: list[Record]) -> RenderableType:
    import numpy as np
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("text", style="cyan", overflow="ellipsis", no_wrap=True, max_width=31)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("first numbers", no_wrap=True)
    for record in records:
        vector = record["embedding"]
        first = " ".join(f"{x:+.3f}" for x in vector[:4].tolist()) + (" ..." if len(vector) > 4 else "")
        table.add_row(record["text"], str(len(vector)), f"{float(np.linalg.norm(vector)):.3f}", first)
    return table


def _ranking(records: list[Record]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("score", justify="right", style="green", no_wrap=True)
    table.add_column("text", overflow="fold")
    for record in records:
        table.add_row(str(record["rank"]), f"{float(record['score']):.4f}", record["text"])
    return table


def _made(records: list[Record]) -> RenderableType:
    (record,) = records
    count = f"{record['added']:,} text{'' if record['added'] == 1 else 's'}"
    return f"{record['index']}: {count} added, {record['texts']:,} in all, by {record['model']}"


def _found(records: list[Record]) -> RenderableType:
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
