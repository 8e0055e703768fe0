"""Labels on the command line: options of `classify` for models that were not trained for the task."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CommandError, warn
from .options import DECODER, ENCODER, Runtime
from .texts import JSON_LINES, read_items

METHODS = {
    "embed": "the label whose text is most similar, by a sentence encoder",
    "score": "the label that a causal language model expects after the text",
    "cloze": "the label whose word a masked language model expects in a sentence",
    "nli": "the label that follows from the text, by a model trained on NLI",
}
TEMPLATES = {
    "embed": "{}",
    "score": "{text}\nCategory:",
    "cloze": "{text} This is {mask}.",
    "nli": "This is {}.",
}

Answers = Callable[[list[str]], list[list[float]]]
"""Texts -> a probability for each label."""


@dataclass
class Labels:
    """Labels, and how a model chooses among them without having been trained for it."""

    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Choose among these labels, by a model that was not trained for them. label=text gives the "
            "text that stands for a label.",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="With --labels: embed (similarity, the default), score (a causal language model, by default "
            f"{DECODER}), cloze (a masked language model) or nli.",
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="With --labels. embed, nli: with {} at the label. score: with {text}, the label follows. "
            "cloze: with {text} and {mask}.",
        ),
    ] = None
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Examples for embed and score: JSON lines with a text and a label, or .tsv with both. "
            "Without --labels, the labels are theirs.",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="With --labels: divide by what the model says of texts without content."
        ),
    ] = False

    @property
    def asked(self) -> bool:
        """Whether labels were given. Raises CommandError for options that need them."""
        found = self.labels is not None or self.examples is not None
        others = {"--method": self.method, "--template": self.template, "--calibrate": self.calibrate or None}
        without = [name for name, value in others.items() if value is not None]
        if without and not found:
            raise CommandError(f"{', '.join(without)} needs --labels or --examples")
        return found

    def check(self, field: str | None) -> tuple[str, dict[str, str], list[tuple[str, str]]]:
        """The method, label -> its text, and the examples. Raises CommandError before a model is loaded."""
        how = self.method or "embed"
        if how not in METHODS:
            raise CommandError(f"--method must be one of {', '.join(METHODS)}, and is {how!r}")
        if self.examples is not None and how not in ("embed", "score"):
            raise CommandError(f"--examples: only for the methods embed and score, not for {how}")
        if self.calibrate and how == "nli":
            raise CommandError("--calibrate: not for the method nli, which scores each label by itself")
        examples = [] if self.examples is None else _examples(self.examples, field or "text")
        if self.labels is None:
            texts = {label: label for _, label in examples}
        else:
            texts = _texts(self.labels)
        if len(texts) < 2:
            raise CommandError(f"there must be two or more labels, and there are {len(texts)}")
        unknown = next((label for _, label in examples if label not in texts), None)
        if unknown is not None:
            raise CommandError(
                f"--examples {self.examples}: has the label {unknown!r}, and --labels has {', '.join(texts)}"
            )
        return how, texts, examples

    def loaded(
        self, model: str, field: str | None, run: Runtime, batch_size: int
    ) -> tuple[list[str], str, Any]:
        """The labels, the model's name, and a function that loads it for a device and returns `Answers`."""
        how, texts, examples = self.check(field)
        if model == ENCODER and how == "score":
            model = DECODER
        if model == ENCODER and how in ("cloze", "nli"):
            kind = (
                "a masked language model, as bert-base-uncased"
                if how == "cloze"
                else "a model trained on NLI"
            )
            raise CommandError(f"--method {how} needs {kind}: name it with --model")
        template = TEMPLATES[how] if self.template is None else self.template
        make = {"embed": self._embed, "score": self._score, "cloze": self._cloze, "nli": self._nli}[how]

        def load(device: Any) -> Answers:
            options = {"device": device, "dtype": run.dtype, "weights": run.weights}
            return make(model, options, texts, examples, template, batch_size)

        return list(texts), model, load

    def _embed(
        self, model: str, options: Any, texts: Any, examples: Any, template: str, size: int
    ) -> Answers:
        from ..prompting import EmbeddingClassifier
        from ..sentence import SentenceEncoder

        made = EmbeddingClassifier(
            SentenceEncoder(model, **options),
            texts,
            hypothesis=template,
            examples=examples,
            calibrate=self.calibrate,
            batch_size=size,
        )
        return lambda items: made.probabilities(items).tolist()

    def _score(
        self, model: str, options: Any, texts: Any, examples: Any, template: str, size: int
    ) -> Answers:
        from ..model import AutoModelForCausalLM
        from ..prompting import FewShotTemplate, LabelScorer
        from ..text import AutoTokenizer

        prompt: Any = template
        if examples:
            shown = [(text, f" {texts[label].strip()}") for text, label in examples]
            prompt = FewShotTemplate(template, shown, k=len(shown))
        made = LabelScorer(
            AutoModelForCausalLM.from_pretrained(model, **options),
            prompt,
            texts,
            tokenizer=AutoTokenizer.from_pretrained(model),
            calibrate=self.calibrate,
            batch_size=size,
        )
        return lambda items: made.probabilities(items).tolist()

    def _cloze(
        self, model: str, options: Any, texts: Any, examples: Any, template: str, size: int
    ) -> Answers:
        from ..model import AutoModelForMaskedLM
        from ..prompting import ClozeClassifier
        from ..text import AutoTokenizer

        log = logging.getLogger("minilm.weights.loading")  # a missing head is reported below
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            found = AutoModelForMaskedLM.from_pretrained(model, **options)
        finally:
            log.setLevel(level)
        missing = found.load_report.initialised if found.load_report is not None else ()
        if missing:
            raise CommandError(
                f"{model} has no masked-lm head, so its answers would be random ({missing[0]} is missing): "
                "name a masked language model with --model"
            )
        made = ClozeClassifier(
            found,
            template,
            texts,
            tokenizer=AutoTokenizer.from_pretrained(model),
            calibrate=self.calibrate,
            batch_size=size,
        )
        return lambda items: made.probabilities(items).tolist()

    def _nli(self, model: str, options: Any, texts: Any, examples: Any, template: str, size: int) -> Answers:
        from ..pipelines import pipeline

        pipe = pipeline("zero-shot-classification", model=model, hypothesis_template=template, **options)
        said = list(texts.values())

        def answer(items: list[str]) -> list[list[float]]:
            found = pipe(items, said, batch_size=size)
            rows = (dict(zip(one["labels"], one["scores"], strict=True)) for one in found)
            return [[row[text] for text in said] for row in rows]

        return answer


def _texts(labels: str) -> dict[str, str]:
    """ "a,b=text" -> {"a": "a", "b": "text"}."""
    found: dict[str, str] = {}
    for part in labels.split(","):
        label, equals, text = (piece.strip() for piece in part.partition("="))
        text = text if equals else label
        if not label or not text:
            raise CommandError(
                f"--labels: expected A,B,... or A=text,..., and {labels!r:.60} has an empty label"
            )
        if label in found:
            raise CommandError(f"--labels has {label!r} twice")
        if text in found.values():
            raise CommandError(f"--labels: two labels have the text {text!r}")
        found[label] = text
    return found


def _examples(file: Path, field: str) -> list[tuple[str, str]]:
    """Texts with their labels."""
    found: list[tuple[str, str]] = []
    if file.suffix in JSON_LINES:
        for number, item in enumerate(read_items([], [file], field), start=1):
            label = item.record.get("label")
            if not isinstance(label, str) or not label.strip():
                raise CommandError(f"{file}: example {number} has no text in the field 'label'")
            found.append((item.text, label.strip()))
    elif file.suffix == ".tsv":
        with open(file, encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
                if len(row) != 2 or not all(part.strip() for part in row):
                    raise CommandError(f"{file}: line {number} must be a text, a tab and a label")
                found.append((row[0].strip(), row[1].strip()))
    else:
        raise CommandError(f"--examples {file}: expected a name that ends in .jsonl or .tsv")
    if not found:
        raise CommandError(f"there is no example in {file}")
    if len(set(found)) < len(found):
        warn(f"{file}: {len(found) - len(set(found))} examples are there twice")
    return found
