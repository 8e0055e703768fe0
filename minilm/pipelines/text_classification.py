"""text-classification (sentiment-analysis): the classes of a text, or of a pair of texts; and text-ranking:
texts by their relevance to a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..differences import once
from ..model import AutoModelForSequenceClassification
from ..sentence import CrossEncoder, Ran, Tokens
from .base import Pipeline, SentencePipeline, Work

Function = Literal["default", "sigmoid", "softmax", "none"]


@dataclass(frozen=True)
class Options:
    """`top_k`: number of classes to return, best first; None: all; by default only the best.
    `function_to_apply`: converts logits to scores; "default" is none for regression, sigmoid for one or
    independent labels, softmax otherwise. `truncation`: True cuts texts to `max_length` or the model's window
    without a warning, False never cuts. `return_all_scores`: older option to get all classes, in the order of
    the model."""

    top_k: int | Literal[""] | None = ""
    function_to_apply: Function | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    padding: Any = None
    return_all_scores: bool | None = None

    def __post_init__(self) -> None:
        if self.top_k not in ("", None) and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a positive integer or None, and is {self.top_k!r}")
        if self.function_to_apply not in (None, "default", "sigmoid", "softmax", "none"):
            given = self.function_to_apply
            raise ValueError(f"function_to_apply must be default, sigmoid, softmax or none, and is {given!r}")


class TextClassificationPipeline(Pipeline[Options]):
    """A text, or {"text": ..., "text_pair": ...} -> {"label", "score"}, or a list of them with `top_k`.

    As in transformers, a single text gives a list of one result, and a single pair gives its result directly.
    """

    task = "text-classification"
    model_class = AutoModelForSequenceClassification
    options_class = Options

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result for one input, or the results for several."""
        found = super().__call__(inputs, batch_size=batch_size, **options)
        return [found] if isinstance(inputs, str) and "top_k" not in options else found

    def prepare(self, item: Any, options: Options) -> Work:
        """One window."""
        text, pair = item, None
        if isinstance(item, Mapping):
            if not {"text"} <= set(item) <= {"text", "text_pair"}:
                raise ValueError(
                    f'a pair of texts is {{"text": ..., "text_pair": ...}}, not {dict(item)!r:.80}'
                )
            text, pair = item["text"], item.get("text_pair")
        elif isinstance(item, (list, tuple)):
            raise TypeError(f'a pair of texts is {{"text": ..., "text_pair": ...}}, not {item!r:.80}')
        pair = None if pair is None else self.text(pair)
        return self.encode(self.text(text), pair, options.truncation, options.max_length)

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Logits [num_labels] of each window."""
        logits: Tensor = self.model.answer(result.hidden, result.batch, None)["logits"]
        return list(logits.float().cpu())

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """The labels."""
        logits: Tensor = outputs[0]
        function = self._function(options.function_to_apply)
        scores = (
            logits.sigmoid()
            if function == "sigmoid"
            else logits.softmax(-1)
            if function == "softmax"
            else logits
        )
        labels = self.model.config.id2label
        found = [{"label": labels[i], "score": score} for i, score in enumerate(scores.tolist())]
        if options.return_all_scores is not None and options.top_k == "":
            message = f"{self.task}: return_all_scores is replaced by top_k=None, or top_k=1"
            once(f"{self.task}(return_all_scores=)", message, FutureWarning)
            if options.return_all_scores:
                return found
        best = sorted(found, key=lambda answer: -answer["score"])
        return best[0] if options.top_k == "" else best[: options.top_k]

    def _function(self, asked: Function | None) -> Function:
        if asked is not None and asked != "default":
            return asked
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return (
            "sigmoid"
            if config.problem_type == "multi_label_classification" or config.num_labels == 1
            else "softmax"
        )


@dataclass(frozen=True)
class Ranking:
    """`top_k`: number of documents to return, best first; None: all. `return_documents`: add their texts."""

    top_k: int | None = None
    return_documents: bool = False

    def __post_init__(self) -> None:
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a positive integer or None, and is {self.top_k!r}")


class TextRankingPipeline(SentencePipeline[Ranking]):
    """{"query": text, "documents": [text, ...]} -> the documents by their relevance, best first, as
    `CrossEncoder.rank` returns them: [{"corpus_id": number, "score": ...}, ...], with `return_documents` also
    "text". A pair, {"text": query, "text_pair": document} -> its score, a float.

        rank = pipeline("text-ranking", model="cross-encoder/ms-marco-MiniLM-L6-v2")
        rank({"query": "Who lives in Berlin?", "documents": ["Paris is old.", "Berlin is full of people."]})

    A task of the hub without a pipeline in transformers. The scores are those of `CrossEncoder.predict`.
    Other names are accepted too: source_sentence or source for the query, texts or sentences for the
    documents.
    """

    task = "text-ranking"
    model_class = CrossEncoder
    options_class = Ranking
    names = (("query", "source_sentence", "source"), ("documents", "texts", "sentences"))

    def __init__(self, model: Any, *, batch_size: int | None = None, **options: Any) -> None:
        if model.num_labels != 1:
            raise ValueError(
                f"text-ranking needs a model with one score per pair, and this one has {model.num_labels}"
            )
        super().__init__(model, batch_size=batch_size, **options)

    def prepare(self, item: Any, options: Ranking) -> Work:
        """The query and its documents; of a pair, one."""
        if isinstance(item, Mapping) and set(item) == {"text", "text_pair"}:
            return Work([], (self.text(item["text"]), [self.text(item["text_pair"])], True))
        return Work([], (*self.pair(item), False))

    def scored(self, works: list[Work], batch_size: int) -> list[list[float]]:
        """All pairs go through the model together."""
        pairs = [
            (query, document) for query, documents, _ in (w.state for w in works) for document in documents
        ]
        model: Any = self.model
        scores = iter(model.predict(pairs, batch_size, show_progress_bar=False).tolist())
        return [[next(scores) for _ in work.state[1]] for work in works]

    def finish(self, work: Work, outputs: list[Any], options: Ranking) -> Any:
        """The ranking, or the score of a pair."""
        _, documents, is_pair = work.state
        if is_pair:
            return outputs[0]
        order = sorted(range(len(outputs)), key=lambda number: -outputs[number])[: options.top_k]
        more = {n: {"text": documents[n]} if options.return_documents else {} for n in order}
        return [{"corpus_id": n, "score": outputs[n], **more[n]} for n in order]
