"""What classifiers by prompt share: from the log probabilities of labels to a choice."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from ..model import PreTrainedModel
from ..sentence import window
from ..text import Tokenizer
from .calibration import NOTHING, calibrated
from .few_shot import FewShotTemplate
from .templates import Item, Template


class PromptClassifier(ABC):
    """A pre-trained model that chooses among labels, by the score of each in a prompt."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    template: Template | FewShotTemplate
    labels: list[str]
    calibrate: bool
    _prior: Tensor | None = None
    """Scores of the items without content."""

    @abstractmethod
    def scores(self, items: Iterable[Item]) -> Tensor:
        """The log probability of each label, float32 [items, labels]."""

    def predict(self, items: Iterable[Item]) -> list[str]:
        """The most probable label of each item."""
        return [self.labels[best] for best in self.probabilities(items).argmax(-1).tolist()]

    def probabilities(self, items: Iterable[Item]) -> Tensor:
        """The probability of each label, float32 [items, labels] in the order of `labels`; rows sum to 1."""
        scores = self.scores(items)
        if self.calibrate:
            if self._prior is None:
                self._prior = self.scores([dict.fromkeys(self.template.names, text) for text in NOTHING])
            scores = calibrated(scores, self._prior)
        return scores.softmax(-1)

    def _check(self, items: Iterable[Item]) -> Iterable[Item]:
        if isinstance(items, str):
            raise TypeError("expected several items, [text, ...], and got one text")
        return items

    def _warn_of_cuts(self, cut: int, count: int) -> None:
        if cut:
            longest = window(self.model, self.tokenizer)
            warnings.warn(f"{cut} of {count} texts were cut: a prompt has {longest} tokens", stacklevel=3)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        return spans
