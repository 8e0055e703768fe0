"""What all pipelines share: reading inputs, batching windows of tokens, running the model."""

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
"""Batches that are tokenised and sorted by length together."""


@dataclass
class Work:
    """One input: the windows of tokens that the model is to see, and what is needed to read the answers."""

    windows: list[Tokens]
    state: Any = None
    cut: bool = False
    """The text was longer than the window, and its rest is not looked at."""


class Pipeline(ABC, Generic[OptionsT]):
    """A model and its tokenizer, called with texts.

    A text gives one result, a list a list of results, any other iterable an iterator that takes inputs only
    when results are asked for. Options of a call go before those that the pipeline was made with.
    `batch_size`: the most windows that go through the model at once; it does not change results.
    """

    task: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    options_class: ClassVar[type[Any]]
    older_names: ClassVar[Mapping[str, str]] = {}
    """Options by the names that transformers had for them."""
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
        """Where the model is."""
        return self.model.device

    def __repr__(self) -> str:
        return f"<{self.task} pipeline of {self.model.config.model_type} on {self.device}>"

    # What a task says of itself
    @abstractmethod
    def prepare(self, item: Any, options: OptionsT) -> Work:
        """Tokenise one input. Raises TypeError or ValueError for what is none."""

    @abstractmethod
    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """What the model says of each window."""

    @abstractmethod
    def finish(self, work: Work, outputs: list[Any], options: OptionsT) -> Any:
        """The result for one input, from what `head` gave for its windows."""

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
        """Options by name -> the task's options. Raises TypeError, ValueError."""
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
        """One window of a text or pair. What is too long is cut; without `truncation`, that will be said."""
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


def split(packed: Tensor, batch: Batch) -> list[Tensor]:
    """[T, ...] on the device -> float32 [tokens, ...] of each window, on the CPU."""
    return list(torch.split(packed.float().cpu(), batch.packed.lengths))
