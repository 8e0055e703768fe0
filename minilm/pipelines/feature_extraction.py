"""feature-extraction: the last hidden states of a text; and sentence-similarity: texts compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model import AutoModel
from ..sentence import Ran, SentenceEncoder, Tokens
from .base import Pipeline, SentencePipeline, Work, split


@dataclass(frozen=True)
class Options:
    """`return_tensors`: return a tensor, not nested lists. `truncation`: True cuts texts to `max_length` or
    the model's window without a warning, False never cuts. `tokenize_kwargs` may contain both, too."""

    return_tensors: bool = False
    truncation: bool | str | None = None
    max_length: int | None = None
    padding: Any = None
    tokenize_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        unknown = set(self.tokenize_kwargs or {}) - {"truncation", "max_length", "padding", "return_tensors"}
        if unknown:
            raise TypeError(
                f"tokenize_kwargs takes truncation and max_length, not {', '.join(sorted(unknown))}"
            )


class FeatureExtractionPipeline(Pipeline[Options]):
    """A text -> its hidden states as nested lists of the shape [1, tokens, C]."""

    task = "feature-extraction"
    model_class = AutoModel
    options_class = Options

    def prepare(self, item: Any, options: Options) -> Work:
        """One window."""
        asked = {
            "truncation": options.truncation,
            "max_length": options.max_length,
            **(options.tokenize_kwargs or {}),
        }
        return self.encode(self.text(item), None, asked["truncation"], asked["max_length"])

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Hidden states [tokens, C] of each window."""
        return split(result.hidden, result.batch)

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """Add a batch dimension of 1, as in transformers."""
        return outputs[0][None] if options.return_tensors else outputs[0][None].tolist()


@dataclass(frozen=True)
class Similarity:
    """`prompt`, `prompt_name`: a text to put before all texts, or the name of one in the model's prompts."""

    prompt: str | None = None
    prompt_name: str | None = None


class SentenceSimilarityPipeline(SentencePipeline[Similarity]):
    """{"source_sentence": text, "sentences": [text, ...]} -> the similarity of each, a list of floats.

        compare = pipeline("sentence-similarity", model="all-MiniLM-L6-v2")
        compare({"source_sentence": "Who eats?", "sentences": ["A man has lunch.", "The sky is blue."]})

    A task of the hub, with the inputs of its page; transformers has no such pipeline. The similarity is
    `SentenceEncoder.similarity`: the cosine, unless the model's files name another one.
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
