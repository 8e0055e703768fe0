"""Prompts with examples in them (Brown et al. 2020, arXiv:2005.14165).

    examples = [("A joy.", " positive"), ("A bore.", " negative"), ...]
    template = FewShotTemplate("Review: {text}\nSentiment:", examples, k=4, encoder=encoder)
    LabelScorer(model, template, ["positive", "negative"])

With an encoder, each item gets the examples that are nearest to it, the nearest last, where it counts most
(Liu et al. 2022, arXiv:2101.06804); without one, all items get the first `k` in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sentence import SentenceEncoder
from .templates import Item, Template


class FewShotTemplate:
    """A template, and examples of it with their answers.

    Args:
        template: of one item, which the answer follows.
        examples: items with their answers, as a model should give them: usually with a space before.
        k: how many of them are in a prompt.
        encoder: chooses the nearest `k` for each item, by the cosine of the filled templates.
        instruction: what stands before the examples.
        separator: what stands between them.
    """

    def __init__(
        self,
        template: str,
        examples: Sequence[tuple[Item, str]],
        *,
        k: int = 4,
        encoder: SentenceEncoder | None = None,
        instruction: str = "",
        separator: str = "\n\n",
    ) -> None:
        self.template = Template(template)
        if self.template.has_mask:
            raise ValueError("the answer follows the end of the prompt: a template without {mask}")
        if not isinstance(k, int) or not 0 <= k <= len(examples):
            raise ValueError(f"k must be from 0 to the number of examples, {len(examples)}, and is {k!r}")
        self.k, self.encoder, self.instruction, self.separator = k, encoder, instruction, separator
        self.names = self.template.names
        self.examples = [(self.render_one(item), answer) for item, answer in examples]
        self._vectors: Tensor | None = None

    def fields(self, item: Item) -> dict[str, str]:
        """The text of each field (`Template.fields`)."""
        return self.template.fields(item)

    def render_one(self, item: Item) -> str:
        """The template of one item, without examples."""
        return self.template.fill(self.fields(item))[0]

    def render(self, item: Item) -> str:
        """The whole prompt for an item, which its answer follows."""
        text = self.render_one(item)
        chosen = [self.examples[i] for i in self.nearest(text)]
        parts = [example + answer for example, answer in chosen]
        return self.separator.join([*([self.instruction] if self.instruction else []), *parts, text])

    def nearest(self, text: str) -> list[int]:
        """Which examples are in the prompt of a filled template, the nearest last."""
        if not self.k:
            return []
        if self.encoder is None:
            return list(range(self.k))
        if self._vectors is None:
            self._vectors = self._encoded([example for example, _ in self.examples])
        likeness = self._vectors @ self._encoded([text])[0]
        order = torch.sort(likeness, descending=True, stable=True).indices
        best: list[int] = order[: self.k].tolist()
        return best[::-1]

    def with_fewer(self) -> FewShotTemplate:
        """The same with one example less: the farthest goes, or without an encoder the last."""
        fewer = object.__new__(FewShotTemplate)
        fewer.__dict__.update(self.__dict__, k=self.k - 1)
        return fewer

    def _encoded(self, texts: list[str]) -> Tensor:
        assert self.encoder is not None
        vectors: Tensor = self.encoder.encode(
            texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors.float().cpu()
