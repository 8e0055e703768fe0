"""token-classification (ner): a class for each token, and the named entities that tokens make up.

Texts longer than the window of the model are read in overlapping windows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..model import AutoModelForTokenClassification, Batch
from ..sentence import Tokens, window
from .base import Pipeline, Work, split

if TYPE_CHECKING:
    from tokenizers import Encoding

Strategy = Literal["none", "simple", "first", "average", "max"]
STRATEGIES = ("none", "simple", "first", "average", "max")

Entity = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Options of transformers' pipeline.

    aggregation_strategy: none gives every token; simple groups neighbours of the same class; first, average
        and max do so after they have given all tokens of a word the class of its first token, of the
        highest mean score, or of its most certain token.
    ignore_labels: what is left out of the result.
    stride: tokens that windows of a long text have in common. If it is given, entities of overlapping
        windows are merged as transformers does it (the longer one stays); if not, every token gets its
        scores from the window where it has more context around it, and the text is treated as one.
    is_split_into_words: inputs are lists of words, which `delimiter` joins.
    """

    aggregation_strategy: Strategy = "none"
    ignore_labels: Sequence[str] = ("O",)
    stride: int | None = None
    is_split_into_words: bool = False
    delimiter: str = " "

    def __post_init__(self) -> None:
        strategy = getattr(self.aggregation_strategy, "value", self.aggregation_strategy)
        if strategy not in STRATEGIES:
            raise ValueError(
                f"aggregation_strategy must be one of {', '.join(STRATEGIES)}, and is {strategy!r}"
            )
        object.__setattr__(self, "aggregation_strategy", strategy)
        if self.stride is not None and (not isinstance(self.stride, int) or self.stride < 0):
            raise ValueError(f"stride must be a number of tokens, and is {self.stride!r}")
        if self.stride is not None and strategy == "none":
            raise ValueError(
                "stride merges entities of windows: it needs another aggregation_strategy than none"
            )
        if isinstance(self.ignore_labels, str):
            raise TypeError(f"ignore_labels must be a list of labels, and is {self.ignore_labels!r}")


@dataclass
class _Text:
    """A text and the windows that it is read in."""

    text: str
    encodings: list[Encoding]
    overlap: int
    """Tokens that neighbouring windows have in common."""
    words: list[int] | None = None
    """Where each word begins in the text, if it was given as words."""


@dataclass
class _Token:
    """A token with its scores, as the strategies see it."""

    word: str
    scores: Tensor
    start: int
    end: int
    index: int
    continues: bool
    """Whether it is part of the word before."""


class TokenClassificationPipeline(Pipeline[Options]):
    """A text -> its tokens {"entity", "score", "index", "word", "start", "end"}, or, with an aggregation
    strategy, its entities {"entity_group", "score", "word", "start", "end"}. `start` and `end` are
    characters of the text."""

    task = "token-classification"
    model_class = AutoModelForTokenClassification
    options_class = Options

    def is_single(self, inputs: Any) -> bool:
        """A text; lists are several texts, or several lists of words."""
        return isinstance(inputs, str)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result for one text, or the results for several; a list of words is one text."""
        words = self.parse({**self.defaults, **options}).is_split_into_words
        if (
            words
            and isinstance(inputs, (list, tuple))
            and inputs
            and all(isinstance(word, str) for word in inputs)
        ):
            return super().__call__([inputs], batch_size=batch_size, **options)[0]
        return super().__call__(inputs, batch_size=batch_size, **options)

    def prepare(self, item: Any, options: Options) -> Work:
        """As many windows as the text needs."""
        text, words = self._words(item, options) if options.is_split_into_words else (self.text(item), None)
        longest = window(self.model, self.tokenizer)
        room = longest - self.tokenizer.num_special_tokens_to_add()
        overlap = room // 4 if options.stride is None else options.stride
        if overlap >= room:
            raise ValueError(
                f"stride must be less than the {room} tokens that a window has, and is {overlap}"
            )
        encoded = self.tokenizer(
            [list(item) if words is not None else text],
            truncation=True,
            max_length=longest,
            stride=overlap,
            return_overflowing_tokens=True,
            is_split_into_words=words is not None,
            verbose=False,
        )
        windows = [Tokens(ids) for ids in encoded["input_ids"] if ids]
        return Work(windows, _Text(text, encoded.encodings or [], overlap, words))

    def _words(self, item: Any, options: Options) -> tuple[str, list[int]]:
        """The words as one text, and where each begins."""
        if not isinstance(item, (list, tuple)):
            raise TypeError(
                f"with is_split_into_words an input is a list of words, not {type(item).__name__}"
            )
        starts, end = [], 0
        for word in item:
            starts.append(end)
            end += len(self.text(word)) + len(options.delimiter)
        return options.delimiter.join(item), starts

    def head(self, hidden: Tensor, batch: Batch, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Probabilities [tokens, num_labels] of each window."""
        assert isinstance(self.model, AutoModelForTokenClassification)
        return [logits.softmax(-1) for logits in split(self.model.head(hidden), batch)]

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """Tokens or entities, without those that are to be ignored."""
        text: _Text = work.state
        if options.stride is None or len(outputs) < 2:
            tokens = [token for part in self._windows(text, outputs, options, share=True) for token in part]
            return _kept(self._entities(tokens, options), options)
        parts = self._windows(text, outputs, options, share=False)
        return _merged([entity for part in parts for entity in _kept(self._entities(part, options), options)])

    # Tokens
    def _windows(
        self, text: _Text, outputs: list[Tensor], options: Options, *, share: bool
    ) -> Iterator[list[_Token]]:
        """The tokens of each window, without the special ones. With `share`, windows have no token in
        common: each keeps the half of the overlap that is farther from its edge."""
        last, seen = len(outputs) - 1, 0
        for number, (encoding, scores) in enumerate(zip(text.encodings, outputs, strict=False)):
            real = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
            columns = list(
                zip(encoding.tokens, encoding.ids, encoding.offsets, encoding.word_ids, strict=True)
            )
            if number == 0 and real:
                seen = real[0]
            if share:
                before = text.overlap // 2 if number else 0
                after = text.overlap - text.overlap // 2 if number < last else 0
                real = real[before : len(real) - after]
            indices = range(seen, seen + len(real)) if share else real
            seen += len(real)
            yield [
                self._token(text, columns[i], index, scores[i], options)
                for i, index in zip(real, indices, strict=True)
            ]

    def _token(
        self,
        text: _Text,
        column: tuple[str, int, tuple[int, int], int | None],
        index: int,
        scores: Tensor,
        options: Options,
    ) -> _Token:
        token, token_id, (start, end), word = column
        if text.words is not None and word is not None:
            start, end = start + text.words[word], end + text.words[word]
        written = text.text[start:end]
        if getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None):
            continues = len(token) != len(written)  # the prefix of a token within a word makes the difference
        else:
            if options.aggregation_strategy in ("first", "average", "max"):
                message = "the tokenizer does not tell words apart; they are taken to end at spaces"
                warnings.warn(message, stacklevel=2)
            continues = start > 0 and " " not in text.text[start - 1 : start + 1]
        if token_id == self.tokenizer.unk_token_id:
            token, continues = written, False
        return _Token(token, scores, start, end, index, continues)

    # Entities
    def _entities(self, tokens: list[_Token], options: Options) -> list[Entity]:
        if options.aggregation_strategy in ("none", "simple"):
            found = [self._classified(token.scores, [token], token.word) for token in tokens]
            for entity, token in zip(found, tokens, strict=True):
                entity["index"] = token.index
        else:
            found = [self._word(word, options.aggregation_strategy) for word in _words(tokens)]
        if options.aggregation_strategy == "none":
            order = ("entity", "score", "index", "word", "start", "end")
            return [{key: entity[key] for key in order} for entity in found]
        return [self._group(group) for group in _groups(found)]

    def _classified(self, scores: Tensor, tokens: list[_Token], word: str) -> Entity:
        best = int(scores.argmax())
        return {
            "entity": self.model.config.id2label[best],
            "score": float(scores[best]),
            "word": word,
            "start": tokens[0].start,
            "end": tokens[-1].end,
        }

    def _word(self, tokens: list[_Token], strategy: Strategy) -> Entity:
        """The tokens of a word, with one class for all."""
        if strategy == "first":
            scores = tokens[0].scores
        elif strategy == "max":
            scores = max(tokens, key=lambda token: float(token.scores.max())).scores
        else:
            scores = torch.stack([token.scores for token in tokens]).mean(0)
        return self._classified(
            scores, tokens, self.tokenizer.convert_tokens_to_string([t.word for t in tokens])
        )

    def _group(self, entities: list[Entity]) -> Entity:
        """Neighbours of one class as one entity."""
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": sum(entity["score"] for entity in entities) / len(entities),
            "word": self.tokenizer.convert_tokens_to_string([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }


def _words(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    """The tokens in words."""
    word: list[_Token] = []
    for token in tokens:
        if word and not token.continues:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _groups(entities: Sequence[Entity]) -> Iterator[list[Entity]]:
    """Neighbours of the same class; one that begins an entity (B-) begins a group."""
    group: list[Entity] = []
    for entity in entities:
        begins, tag = _tag(entity["entity"])
        if group and (begins or tag != _tag(group[-1]["entity"])[1]):
            yield group
            group = []
        group.append(entity)
    if group:
        yield group


def _tag(label: str) -> tuple[bool, str]:
    """B-PER -> (True, PER); I-PER and PER -> (False, PER)."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _kept(entities: list[Entity], options: Options) -> list[Entity]:
    return [
        entity
        for entity in entities
        if entity.get("entity", entity.get("entity_group")) not in options.ignore_labels
    ]


def _merged(entities: list[Entity]) -> list[Entity]:
    """Of entities that overlap, the longer one, and of two of the same length the more certain one."""
    merged: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: int(entity["start"])):
        if not merged or not merged[-1]["start"] <= entity["start"] < merged[-1]["end"]:
            merged.append(entity)
        elif _weight(entity) > _weight(merged[-1]):
            merged[-1] = entity
    return merged


def _weight(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
