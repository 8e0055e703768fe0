"""Prompts with examples in them (Brown et al. 2020, arXiv:2005.14165).

    examples = [("A joy.", " positive"), ("A bore.", " negative"), ...]
    template = FewShotTemplate("Review: {text}\nSentiment:", examples, k=4, encoder=encoder)
    LabelScorer(model, template, ["positive", "negative"])

With an encoder, each item gets the examples most similar to it, the most similar one last, next to the item
(Liu et al. 2022, arXiv:2101.06804). Without one, all items get the first `k` examples in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sentence import SentenceEncoder
from .templates import Item, Template


class FewShotTemplate:
    """A template preceded by examples with their answers.

    Args:
        template: of one item; the answer follows its end.
        examples: items with their answers, exactly as the model should write them, usually
            with a space first.
        k: number of examples per prompt.
        encoder: chooses the `k` most similar examples for each item, by the cosine of the filled templates.
        instruction: text before the examples.
        separator: text between the examples.
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
            raise ValueError("the answer follows the end of the prompt, so the template must not have {mask}")
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
        """The filled template of an item, without examples."""
        return self.template.fill(self.fields(item))[0]

    def render(self, item: Item) -> str:
        """The whole prompt for an item; its answer follows the end."""
        text = self.render_one(item)
        chosen = [self.examples[i] for i in self.nearest(text)]
        parts = [example + answer for example, answer in chosen]
        return self.separator.join([*([self.instruction] if self.instruction else []), *parts, text])

    def nearest(self, text: str) -> list[int]:
        """Indices of the examples in the prompt of a filled template, the most similar last."""
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
        """The same with one example less: without the least similar one, or, without an encoder, the last
        one."""
        fewer = object.__new__(FewShotTemplate)
        fewer.__dict__.update(self.__dict__, k=self.k - 1)
        return fewer

    def _encoded(self, texts: list[str]) -> Tensor:
        assert self.encoder is not None
        vectors: Tensor = self.encoder.encode(
            texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors.float().cpu()
