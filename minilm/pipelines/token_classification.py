"""token-classification (ner): a class for each token, and named entities formed from the tokens.

Texts longer than the model's window are read in overlapping windows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..differences import once
from ..model import AutoModelForTokenClassification
from ..sentence import Ran, Tokens, window
from .base import Pipeline, Work, split
from .entities import Labels, same_word, visible

if TYPE_CHECKING:
    from tokenizers import Encoding

Strategy = Literal["none", "simple", "first", "average", "max"]
STRATEGIES = ("none", "simple", "first", "average", "max")

Entity = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Options of transformers' pipeline.

    aggregation_strategy: "none" returns every token; "simple" groups neighbours of the same class; "first",
        "average" and "max" do so after giving all tokens of a word one class: that of its first token, the
        one with the highest mean score, or that of its most certain token.
    ignore_labels: labels to leave out of the result, or with a strategy kinds of entities (PER).
    stride: number of tokens by which windows of a long text overlap. If given, entities of overlapping
        windows are merged as in transformers (the longer one is kept); if not, every token gets its scores
        from the window with more context around it, and the text is treated as a whole.
    is_split_into_words: inputs are lists of words, joined by `delimiter`.
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
    """A text and its windows."""

    text: str
    encodings: list[Encoding]
    overlap: int
    """Number of tokens by which neighbouring windows overlap."""
    words: list[int] | None = None
    """Start of each word in the text, if it was given as words."""


@dataclass
class _Token:
    """A token with its scores, for the aggregation strategies."""

    word: str
    scores: Tensor
    start: int
    end: int
    index: int
    number: int | None
    """Index of its word, by the tokenizer, or among the given words."""
    continues: bool
    """Whether it belongs to the same word as the token before."""


class TokenClassificationPipeline(Pipeline[Options]):
    """A text -> its tokens {"entity", "score", "index", "word", "start", "end"}, or, with an aggregation
    strategy, its entities {"entity_group", "score", "word", "start", "end"}.

    `start` and `end` are characters of the original text (of words: joined by `delimiter`). The `word` of an
    entity is the original text there; that of a token is the token.
    """

    task = "token-classification"
    model_class = AutoModelForTokenClassification
    options_class = Options

    def parse(self, options: dict[str, Any]) -> Options:
        """As in `Pipeline`; `grouped_entities` and `ignore_subwords` are older names for two strategies."""
        older = [name for name in ("grouped_entities", "ignore_subwords") if name in options]
        if older:
            named = " and ".join(older)
            if "aggregation_strategy" in options:
                raise TypeError(f"{self.task}: {named} is an older form of aggregation_strategy: give one")
            options = dict(options)
            grouped, whole = (options.pop(name, False) for name in ("grouped_entities", "ignore_subwords"))
            strategy = "none" if not grouped else "first" if whole else "simple"
            options["aggregation_strategy"] = strategy
            message = f"{self.task}: {named} is replaced by aggregation_strategy={strategy!r}"
            once(f"{self.task}({named})", message, FutureWarning)
        return super().parse(options)

    def is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is a text (or a dict, which is an error); lists are several texts, or several
        lists of words."""
        return isinstance(inputs, (str, Mapping))

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
        """Split the text into windows."""
        text, words = self._words(item, options) if options.is_split_into_words else (self.text(item), None)
        longest = window(self.model, self.tokenizer)
        room = longest - self.tokenizer.num_special_tokens_to_add()
        overlap = room // 4 if options.stride is None else options.stride
        if overlap >= room:
            raise ValueError(f"stride must be less than the {room} tokens of a window, and is {overlap}")
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
        """The words as one text, and the start of each."""
        if not isinstance(item, (list, tuple)):
            raise TypeError(
                f"with is_split_into_words an input is a list of words, not {type(item).__name__}"
            )
        starts, end = [], 0
        for word in item:
            starts.append(end)
            end += len(self.text(word)) + len(options.delimiter)
        return options.delimiter.join(item), starts

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Probabilities [tokens, num_labels] of each window."""
        assert isinstance(self.model, AutoModelForTokenClassification)
        return [logits.softmax(-1) for logits in split(self.model.head(result.hidden), result.batch)]

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """Tokens or entities, without the ignored ones."""
        text: _Text = work.state
        if self._prefix is None and options.aggregation_strategy in ("first", "average", "max"):
            message = "the tokenizer does not mark words; words are assumed to end at white space"
            warnings.warn(message, stacklevel=2)
        if options.stride is None or len(outputs) < 2:
            tokens = [token for part in self._windows(text, outputs, share=True) for token in part]
            return self._entities(text.text, tokens, options)
        parts = self._windows(text, outputs, share=False)
        return _merged([entity for part in parts for entity in self._entities(text.text, part, options)])

    # Tokens
    def _windows(self, text: _Text, outputs: list[Tensor], *, share: bool) -> Iterator[list[_Token]]:
        """The tokens of each window, without special tokens. With `share`, windows do not overlap: each keeps
        the half of the overlap that is farther from its edge."""
        last, seen = len(outputs) - 1, 0
        before: _Token | None = None
        for number, (encoding, scores) in enumerate(zip(text.encodings, outputs, strict=False)):
            real = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
            columns = list(
                zip(encoding.tokens, encoding.ids, encoding.offsets, encoding.word_ids, strict=True)
            )
            if number == 0 and real:
                seen = real[0]
            if share:
                skipped = text.overlap // 2 if number else 0
                left = text.overlap - text.overlap // 2 if number < last else 0
                real = real[skipped : len(real) - left]
            indices = range(seen, seen + len(real)) if share else real
            seen += len(real)
            before = before if share else None
            found: list[_Token] = []
            for i, index in zip(real, indices, strict=True):
                before = self._token(text, columns[i], index, scores[i], before)
                found.append(before)
            yield found

    def _token(
        self,
        text: _Text,
        column: tuple[str, int, tuple[int, int], int | None],
        index: int,
        scores: Tensor,
        before: _Token | None,
    ) -> _Token:
        token, token_id, (start, end), word = column
        if text.words is not None and word is not None:
            start, end = start + text.words[word], end + text.words[word]
        if before is None or (text.words is not None and word != before.number):
            continues = False
        elif self._prefix:
            continues = word == before.number and token.startswith(self._prefix)
        else:
            continues = same_word(text.text, start, before.end)
        if token_id == self.tokenizer.unk_token_id:
            token = text.text[start:end]
        return _Token(token, scores, start, end, index, word, continues)

    @property
    def _prefix(self) -> str | None:
        """The prefix of tokens within a word, if the tokenizer has one (BERT's ##)."""
        found = getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        return str(found) if found else None

    # Entities
    def _entities(self, text: str, tokens: list[_Token], options: Options) -> list[Entity]:
        """The tokens or entities, without the ignored ones."""
        strategy, names = options.aggregation_strategy, self.model.config.id2label
        if strategy in ("none", "simple"):
            words = [[token] for token in tokens]
        else:
            words = list(_words(tokens))
        scores = [_of_word(word, strategy) for word in words]
        best = [int(row.argmax()) for row in scores]
        certain = [float(row[i]) for row, i in zip(scores, best, strict=True)]
        labels = [names[i] for i in best]
        if strategy == "none":
            return [
                {
                    "entity": label,
                    "score": score,
                    "index": token.index,
                    "word": token.word,
                    "start": token.start,
                    "end": token.end,
                }
                for token, label, score in zip(tokens, labels, certain, strict=True)
                if label not in options.ignore_labels
            ]
        scheme = Labels(names.values())
        return [
            {
                "entity_group": scheme.read(labels[group[0]]).kind,
                "score": sum(certain[i] for i in group) / len(group),
                **_span(text, [token for i in group for token in words[i]]),
            }
            for group in scheme.groups(range(len(words)), labels)
            if not scheme.ignored(labels[group[0]], options.ignore_labels)
        ]


def _span(text: str, tokens: list[_Token]) -> Entity:
    """The span of tokens in the text, and the text there, without white space at its ends, which some
    tokenizers include in a token."""
    there = [token for token in tokens if token.start < token.end] or tokens
    start, end = visible(text, min(t.start for t in there), max(t.end for t in there))
    return {"word": text[start:end], "start": start, "end": end}


def _of_word(tokens: list[_Token], strategy: Strategy) -> Tensor:
    """The scores of a word."""
    if strategy == "max":
        return max(tokens, key=lambda token: float(token.scores.max())).scores
    if strategy == "average":
        return torch.stack([token.scores for token in tokens]).mean(0)
    return tokens[0].scores


def _words(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    """Group the tokens into words."""
    word: list[_Token] = []
    for token in tokens:
        if word and not token.continues:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _merged(entities: list[Entity]) -> list[Entity]:
    """Of overlapping entities keep the longer one, and of two of equal length the more certain one."""
    merged: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: int(entity["start"])):
        if not merged or not merged[-1]["start"] <= entity["start"] < merged[-1]["end"]:
            merged.append(entity)
        elif _weight(entity) > _weight(merged[-1]):
            merged[-1] = entity
    return merged


def _weight(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
