"""feature-extraction: the last hidden states of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model import AutoModel
from ..sentence import Ran, Tokens
from .base import Pipeline, Work, split


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
