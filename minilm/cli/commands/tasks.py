"""`fill-mask`, `classify`, `ner`, `qa`: tasks of encoders with a head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CommandError, warn
from ..labels import Labels
from ..options import ENCODER, Encoder, Runtime, command
from ..results import Output, Record
from ..texts import FieldOption, FileOption, Texts, chunks, read_items

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PANEL = "Encoders with a head"
CHUNK = 256
"""Texts that are read before the first result is written."""

Untrained = Annotated[
    bool,
    typer.Option(
        "--untrained", help="Run even if the checkpoint lacks the head; the answers are then random."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Texts that go through the model at once.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(
        app,
        "fill-mask",
        panel=PANEL,
        examples="""
            minilm fill-mask --model bert-base-uncased "Paris is the [MASK] of France."
            minilm fill-mask --model models/my-bert --file cloze.txt --top-k 3 --json
            """,
    )(fill_mask)
    command(
        app,
        "classify",
        panel=PANEL,
        examples="""
            minilm classify --model distilbert-base-uncased-finetuned-sst-2-english "What a film!"
            minilm classify --model models/nli "A man eats." --pair "Somebody eats." --top-k 3
            minilm classify --labels sport,politics,weather "Rain is expected in the north."
            minilm classify --labels good,bad --method score --examples rated.tsv --file reviews.txt
            """,
    )(classify)
    command(
        app,
        "ner",
        panel=PANEL,
        examples="""
            minilm ner --model dslim/bert-base-NER "Ada Lovelace was born in London."
            minilm ner --model models/tagger --file report.txt --aggregation max --output found.jsonl
            """,
    )(ner)
    command(
        app,
        "qa",
        panel=PANEL,
        examples="""
            minilm qa --model deepset/tinyroberta-squad2 "Where was Ada born?" "Ada was born in London."
            minilm qa --model models/reader "Who pays for repairs?" --file contract.txt
            """,
    )(qa)


def fill_mask(
    *,
    source: Texts,
    model: Encoder = ENCODER,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Number of tokens to show per mask.")
    ] = 5,
    untrained: Untrained = False,
    batch_size: BatchSize = 8,
    out: Output,
    run: Runtime,
) -> None:
    """Predict the tokens at the mask token of a text ([MASK], or <mask> for RoBERTa).

    Needs a model with a masked-LM head; the default model has none.
    """
    out.check()
    items = source.read()
    with run.running(model) as device:
        pipe = _pipeline("fill-mask", model, device, run, untrained)
        with out.writer(_filled_table) as write:
            for chunk in chunks(items, CHUNK):
                texts = tuple(
                    item.text for item in chunk
                )  # for a list of one text, the pipeline returns its result without a list
                answers = pipe(texts, top_k=top_k, batch_size=batch_size)
                for item, answer in zip(chunk, answers, strict=True):
                    masks = answer if answer and isinstance(answer[0], list) else [answer]
                    write({**item.record, "text": item.text, "masks": masks})


def classify(
    *,
    source: Texts,
    model: Encoder = ENCODER,
    pair: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A second text, for models that classify pairs.")
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", "-k", min=1, metavar="N", help="Number of classes to show, the most probable first."
        ),
    ] = 1,
    untrained: Untrained = False,
    batch_size: BatchSize = 8,
    choice: Labels,
    out: Output,
    run: Runtime,
) -> None:
    """Classify texts: sentiment, topic, entailment, or whatever the model was trained for.

    Needs a model with a sequence-classification head; the default model has none. With --labels or --examples
    no such head is needed: the model chooses among labels that it was not trained for (docs/prompting.md).
    """
    out.check()
    if choice.asked:
        if pair is not None or untrained:
            raise CommandError(f"{'--untrained' if pair is None else '--pair'} has no effect with --labels")
        _classify_by_labels(choice, source, model, top_k, batch_size, out, run)
        return
    items = source.read()
    with run.running(model) as device:
        pipe = _pipeline("text-classification", model, device, run, untrained)
        with out.writer(_class_table) as write:
            for chunk in chunks(items, CHUNK):
                inputs: list[Any] = [item.text for item in chunk]
                if pair is not None:
                    inputs = [{"text": text, "text_pair": pair} for text in inputs]
                answers = pipe(inputs, top_k=top_k, batch_size=batch_size)
                for item, answer in zip(chunk, answers, strict=True):
                    paired = {} if pair is None else {"pair": pair}
                    best = answer[0]
                    result = {"label": best["label"], "score": best["score"]}
                    ranked = {"labels": answer} if top_k > 1 else {}
                    write({**item.record, "text": item.text, **paired, **result, **ranked})


def _classify_by_labels(
    choice: Labels, source: Texts, model: str, top_k: int, batch_size: int, out: Output, run: Runtime
) -> None:
    items = source.read()
    labels, model, load = choice.loaded(model, source.field, run, batch_size)
    with run.running(model) as device:
        answers = load(device)
        with out.writer(_class_table) as write:
            for chunk in chunks(items, CHUNK):
                rows = answers([item.text for item in chunk])
                for item, row in zip(chunk, rows, strict=True):
                    order = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
                    answer = [{"label": labels[i], "score": row[i]} for i in order]
                    ranked = {"labels": answer} if top_k > 1 else {}
                    write({**item.record, "text": item.text, **answer[0], **ranked})


def ner(
    *,
    source: Texts,
    model: Encoder = ENCODER,
    aggregation: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="How tokens are joined to entities: none (each token), simple, first, average or max.",
        ),
    ] = "simple",
    untrained: Untrained = False,
    batch_size: BatchSize = 8,
    out: Output,
    run: Runtime,
) -> None:
    """Find names of people, places and other entities in texts, with their positions (in characters).

    Needs a model with a token-classification head; the default model has none. Texts may be longer than the
    model's window.
    """
    out.check()
    strategies = ("none", "simple", "first", "average", "max")
    if aggregation not in strategies:
        raise CommandError(f"--aggregation must be one of {', '.join(strategies)}, and is {aggregation!r}")
    items = source.read()
    with run.running(model) as device:
        pipe = _pipeline("token-classification", model, device, run, untrained)
        with out.writer(_entity_table) as write:
            for chunk in chunks(items, CHUNK):
                texts = [item.text for item in chunk]
                answers = pipe(texts, aggregation_strategy=aggregation, batch_size=batch_size)
                for item, answer in zip(chunk, answers, strict=True):
                    write({**item.record, "text": item.text, "entities": answer})


def qa(
    *,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    contexts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONTEXT",
            help="Texts to find the answer in. Without any, or with -, standard input is read.",
        ),
    ] = None,
    file: FileOption = None,
    field: FieldOption = None,
    model: Encoder = ENCODER,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Number of answers per context.")
    ] = 1,
    no_answer: Annotated[
        bool, typer.Option("--no-answer", help="Allow an empty answer (models trained on SQuAD 2).")
    ] = False,
    untrained: Untrained = False,
    out: Output,
    run: Runtime,
) -> None:
    """Find the part of a text that answers a question, with its position (in characters).

    Needs a model with a question-answering head; the default model has none. A text file or standard input is
    one context, which may be longer than the model's window. JSON lines have one context each, in the field
    `context`.
    """
    out.check()
    items = read_items(contexts or [], file or [], field, whole=True, default_field="context")
    with run.running(model) as device:
        pipe = _pipeline("question-answering", model, device, run, untrained)
        with out.writer(_answer_table) as write:
            for item in items:
                answers = pipe(
                    question=question, context=item.text, top_k=top_k, handle_impossible_answer=no_answer
                )
                for answer in answers if isinstance(answers, list) else [answers]:
                    write({**item.record, "question": question, **answer})


def _pipeline(task: str, model: str, device: Any, run: Runtime, untrained: bool) -> Any:
    """The pipeline. Raises CommandError if its answers would be random, unless --untrained was given."""
    from ...pipelines import pipeline

    log = logging.getLogger("minilm.weights.loading")  # a missing head is reported below
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        pipe = pipeline(task, model=model, device=device, dtype=run.dtype, weights=run.weights)
    finally:
        log.setLevel(level)
    missing = pipe.model.load_report.initialised
    if missing and not untrained:
        kind = pipe.model.head_kind
        raise CommandError(
            f"{model} has no {kind} head, so its answers would be random ({missing[0]} is missing): name a "
            "model that has one with --model, or run it anyway with --untrained"
        )
    if missing:
        warn(f"{model} has no weights for {', '.join(missing)}: the answers are random")
    return pipe


def _table(*columns: tuple[str, str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, style in columns:
        number = name in ("score", "characters", "mask")
        table.add_column(
            name, style=style, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return table


def _filled_table(records: list[Record]) -> RenderableType:
    table = _table(("mask", "dim"), ("score", "green"), ("token", "cyan"), ("text", ""))
    for record in records:
        for number, mask in enumerate(record["masks"], start=1):
            for guess in mask:
                table.add_row(str(number), f"{guess['score']:.4f}", guess["token_str"], guess["sequence"])
    return table


def _class_table(records: list[Record]) -> RenderableType:
    table = _table(("score", "green"), ("label", "cyan"), ("text", ""))
    for record in records:
        for index, answer in enumerate(record.get("labels", [record])):
            table.add_row(f"{answer['score']:.4f}", str(answer["label"]), "" if index else record["text"])
    return table


def _entity_table(records: list[Record]) -> RenderableType:
    table = _table(
        ("entity", "cyan"), ("score", "green"), ("characters", "dim"), ("word", ""), ("text", "dim")
    )
    for record in records:
        for index, found in enumerate(record["entities"] or [{}]):
            label = found.get("entity_group", found.get("entity", "none found"))
            score = f"{found['score']:.4f}" if found else ""
            where = f"{found['start']}-{found['end']}" if found else ""
            table.add_row(label, score, where, found.get("word", ""), "" if index else record["text"])
    return table


def _answer_table(records: list[Record]) -> RenderableType:
    table = _table(("score", "green"), ("characters", "dim"), ("answer", "cyan"))
    for record in records:
        table.add_row(
            f"{record['score']:.4f}", f"{record['start']}-{record['end']}", record["answer"] or "(no answer)"
        )
    return table
