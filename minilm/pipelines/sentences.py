"""sentence-similarity and text-ranking: a text compared with others, by a sentence encoder or cross-encoder.

transformers has no such pipelines; the hub has the tasks. Inputs are those of the hub's task pages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..sentence import CrossEncoder, Ran, SentenceEncoder, Tokens, chunks
from .base import OptionsT, Pipeline, Work


class SentencePipeline(Pipeline[OptionsT]):
    """What both pipelines share: the model encodes or scores texts by itself."""

    names: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    """The keys of an input: of the one text, and of the several; the first of each is the usual one."""

    def __init__(self, model: Any, *, batch_size: int | None = None, **options: Any) -> None:
        super().__init__(model, model.tokenizer, batch_size=batch_size, **options)

    def __repr__(self) -> str:
        return f"<{self.task} pipeline of a {type(self.model).__name__} on {self.device}>"

    def pair(self, item: Any) -> tuple[str, list[str]]:
        """The one text and the several of an input. Raises TypeError or ValueError."""
        one, many = self.names
        if not isinstance(item, Mapping):
            raise TypeError(
                f'{self.task} takes {{"{one[0]}": text, "{many[0]}": [text, ...]}}, and got '
                f"{type(item).__name__}: {item!r:.60}"
            )
        keys = [key for key in item if key in one], [key for key in item if key in many]
        if any(len(found) != 1 for found in keys) or len(item) != 2:
            raise ValueError(
                f'{self.task} takes the keys "{one[0]}" and "{many[0]}", and got {list(item)!r:.80}'
            )
        texts = item[keys[1][0]]
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"{self.task}: {keys[1][0]} must be a list of texts, and is {texts!r:.60}")
        return self.text(item[keys[0][0]]), [self.text(text) for text in texts]

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """Not used: the model runs in `results`."""
        raise NotImplementedError

    @abstractmethod
    def scored(self, works: list[Work], batch_size: int) -> list[list[float]]:
        """The scores of the texts of each input."""

    def results(
        self, items: Iterable[Any], options: OptionsT, batch_size: int, slab: int = 16
    ) -> Iterator[Any]:
        """The results, in the order of the inputs."""
        for chunk in chunks(items, slab):
            works = [self.prepare(item, options) for item in chunk]
            for work, scores in zip(works, self.scored(works, batch_size), strict=True):
                yield self.finish(work, scores, options)


@dataclass(frozen=True)
class Similarity:
    """`prompt`, `prompt_name`: a text to put before all texts, or the name of one in the model's prompts."""

    prompt: str | None = None
    prompt_name: str | None = None


class SentenceSimilarityPipeline(SentencePipeline[Similarity]):
    """{"source_sentence": text, "sentences": [text, ...]} -> the similarity of each, a list of floats.

        compare = pipeline("sentence-similarity", model="all-MiniLM-L6-v2")
        compare({"source_sentence": "Who eats?", "sentences": ["A man has lunch.", "The sky is blue."]})

    The similarity is `SentenceEncoder.similarity`: the cosine, unless the model's files name another one.
    """

    task = "sentence-similarity"
    model_class = SentenceEncoder
    options_class = Similarity
    names = (("source_sentence", "source"), ("sentences",))

    def prepare(self, item: Any, options: Similarity) -> Work:
        """The texts of an input, and the prompt."""
        return Work([], (*self.pair(item), options))

    def scored(self, works: list[Work], batch_size: int) -> list[list[float]]:
        """All texts are encoded together, equal ones once."""
        encoder: Any = self.model
        texts = list(dict.fromkeys(text for work in works for text in (work.state[0], *work.state[1])))
        options: Similarity = works[0].state[2]
        vectors = encoder.encode(
            texts,
            batch_size,
            prompt=options.prompt,
            prompt_name=options.prompt_name,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        row = {text: number for number, text in enumerate(texts)}
        return [
            encoder.similarity(vectors[row[source]], vectors[[row[text] for text in others]])[0].tolist()
            if others
            else []
            for source, others, _ in (work.state for work in works)
        ]

    def finish(self, work: Work, outputs: list[Any], options: Similarity) -> Any:
        """The similarities."""
        return outputs


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

    The scores are those of `CrossEncoder.predict`. Other names are accepted too: source_sentence or source
    for the query, texts or sentences for the documents.
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
