"""`embed` and `similar`: texts as vectors, and their similarity to a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CommandError
from ..options import ENCODER, Encoder, Runtime, command
from ..progress import counting
from ..results import Output, Record
from ..texts import FieldOption, FileOption, Item, Texts, chunks, read_items

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...sentence import SentenceEncoder

PANEL = "Encoders"
CHUNK = 1024
"""Texts that are read before the first result is written."""

BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Texts that go through the model at once.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text to put before each text; some models need one.")
]


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
