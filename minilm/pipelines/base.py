"""Base class of all pipelines: reads inputs, batches windows of tokens, runs the model."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..differences import renamed
from ..model import Batch, PreTrainedModel
from ..sentence import Ran, Tokens, by_length, check_batch_size, chunks, in_order, run, window
from ..text import Tokenizer

OptionsT = TypeVar("OptionsT")

_SLAB = 16
"""Number of batches that are tokenised and sorted by length together."""


@dataclass
class Work:
    """One input: its windows of tokens for the model, and what is needed to interpret the outputs."""

    windows: list[Tokens]
    state: Any = None
    cut: bool = False
    """True if the text was longer than the window, and was cut."""


class Pipeline(ABC, Generic[OptionsT]):
    """A model and its tokenizer, called with texts.

    A text gives one result, a list a list of results, any other iterable a lazy iterator. Options of a call
    override those of the constructor. `batch_size`: maximum number of windows per forward pass; it does not
    change results.
    """

    task: ClassVar[str]
    model_class: ClassVar[type[Any]]
    options_class: ClassVar[type[Any]]
    older_names: ClassVar[Mapping[str, str]] = {}
    """Older names of options in transformers -> current names."""
    default_batch_size: ClassVar[int] = 32

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int | None = None, **options: Any
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = None if batch_size is None else check_batch_size(batch_size)
        self.defaults = options
        self.parse(options)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def __repr__(self) -> str:
        return f"<{self.task} pipeline of {self.model.config.model_type} on {self.device}>"

    # To be defined by each task
    @abstractmethod
    def prepare(self, item: Any, options: OptionsT) -> Work:
        """Tokenise one input. Raises TypeError or ValueError for invalid input."""

    @abstractmethod
    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """The model's output for each window."""

    @abstractmethod
    def finish(self, work: Work, outputs: list[Any], options: OptionsT) -> Any:
        """The result for one input, from the outputs of `head` for its windows."""

    def is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is one input, not several."""
        return isinstance(inputs, (str, Mapping))

    # Calling
    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result for one input, or the results for several."""
        parsed = self.parse({**self.defaults, **options})
        size = self.batch_size if batch_size is None else check_batch_size(batch_size)
        if self.is_single(inputs):
            [result] = self.results([inputs], parsed, size or self.default_batch_size)
            return result
        if isinstance(inputs, (list, tuple)):
            return list(self.results(inputs, parsed, size or self.default_batch_size))
        return self.results(
            in_order(inputs, f"{self.task} takes a text or several, and got"), parsed, size or 1, slab=1
        )

    def parse(self, options: dict[str, Any]) -> OptionsT:
        """Options by name -> the task's `Options`. Raises TypeError or ValueError."""
        options = renamed(self.task, options, self.older_names)
        known = [field.name for field in fields(self.options_class)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"{self.task} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        parsed: OptionsT = self.options_class(**options)
        return parsed

    def results(
        self, items: Iterable[Any], options: OptionsT, batch_size: int, slab: int = _SLAB
    ) -> Iterator[Any]:
        """The results, in the order of the inputs, `slab` batches at a time."""
        cut = count = 0
        for chunk in chunks(items, batch_size * slab):
            works = [self.prepare(item, options) for item in chunk]
            count, cut = count + len(works), cut + sum(work.cut for work in works)
            outputs = self._outputs([tokens for work in works for tokens in work.windows], batch_size)
            for work in works:
                yield self.finish(work, [next(outputs) for _ in work.windows], options)
        if cut:
            longest = window(self.model, self.tokenizer)
            warnings.warn(
                f"{cut} of {count} texts have more than {longest} tokens, and were cut", stacklevel=3
            )

    def _outputs(self, windows: list[Tokens], batch_size: int) -> Iterator[Any]:
        outputs: list[Any] = [None] * len(windows)
        with torch.inference_mode():
            for places in by_length([len(tokens) for tokens in windows], batch_size):
                chosen = [windows[i] for i in places]
                result = run(self.model, chosen)
                for i, output in zip(places, self.head(result, chosen), strict=True):
                    outputs[i] = output
        return iter(outputs)

    # Helpers of tasks
    def text(self, item: Any) -> str:
        """`item` if it is a text."""
        if not isinstance(item, str):
            raise TypeError(f"{self.task} takes texts, and got {type(item).__name__}: {item!r:.60}")
        return item

    def encode(
        self,
        text: str,
        pair: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
    ) -> Work:
        """One window of a text or pair. A long text is cut, with a warning if no option asks for it."""
        longest = window(self.model, self.tokenizer)
        cuts = truncation not in (False, "do_not_truncate")
        encoded = self.tokenizer(
            [text],
            None if pair is None else [pair],
            truncation=("longest_first" if truncation in (None, True) else truncation) if cuts else False,
            max_length=min(longest, max_length or longest) if cuts else None,
            return_truncated=True,
            verbose=False,
        )
        types = encoded["token_type_ids"][0] if "token_type_ids" in encoded else None
        tokens = Tokens(encoded["input_ids"][0], types if types is not None and any(types) else None)
        if not len(tokens):
            raise ValueError(f"{self.task} needs a text with at least one token, and {text!r:.60} has none")
        silent = truncation is not None or max_length is not None
        return Work([tokens], cut=not silent and encoded["truncated"][0])


class SentencePipeline(Pipeline[OptionsT]):
    """A text compared with others: a SentenceEncoder or CrossEncoder encodes or scores them by itself."""

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


def split(packed: Tensor, batch: Batch) -> list[Tensor]:
    """[T, ...] on the device -> float32 [tokens, ...] per window, on the CPU."""
    return list(torch.split(packed.float().cpu(), batch.packed.lengths))
