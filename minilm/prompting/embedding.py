"""Classification by a sentence encoder: the label whose description or examples are most similar to the text.

    classify = EmbeddingClassifier("all-MiniLM-L6-v2", ["sport", "politics"], hypothesis="This is about {}.")
    classify.predict(["The striker scored twice."])   # ["sport"]

Without examples a label is known by its description alone (dataless classification, Chang et al. 2008; for
sentence encoders see Schopf et al. 2022, arXiv:2211.16285). With examples, its vector is the mean of theirs
and of the description (Snell et al. 2017, arXiv:1703.05175), so a few examples per label already help.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sentence import SentenceEncoder, check_batch_size
from .classifier import PromptClassifier
from .templates import Item, Template


class EmbeddingClassifier(PromptClassifier):
    """A sentence encoder that chooses among labels by cosine similarity.

    Args:
        encoder: a SentenceEncoder, or its name.
        labels: the labels, or label -> one or several descriptions.
        hypothesis: has ``{}`` at the description: "This text is about {}."
        template: of the items, if they have several fields.
        examples: items with their labels.
        temperature: the score of a label is its cosine divided by this. The default, 1 / 20, is the scale
            with which sentence encoders are usually trained.
        calibrate: subtract the scores of items without content (`calibration`).
        batch_size: texts that go through the model at once; it does not change the results.
    """

    template: Template

    def __init__(
        self,
        encoder: SentenceEncoder | str | os.PathLike[str],
        labels: Sequence[str] | Mapping[str, str | Sequence[str]],
        *,
        hypothesis: str = "{}",
        template: str = "{text}",
        examples: Sequence[tuple[Item, str]] = (),
        temperature: float = 0.05,
        calibrate: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.template = Template(template)
        if self.template.has_mask:
            raise ValueError("the label is compared with the text, so the template must not have {mask}")
        described = _descriptions(labels)
        self.labels = list(described)
        unknown = next((label for _, label in examples if label not in described), None)
        if unknown is not None:
            raise ValueError(
                f"an example has the label {unknown!r}, and the labels are {', '.join(self.labels)}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be a positive number, and is {temperature!r}")
        self.temperature, self.calibrate = temperature, calibrate
        self.batch_size = check_batch_size(batch_size)
        texts = {
            label: [
                *(_filled(hypothesis, said) for said in described[label]),
                *(self.template.render(item) for item, name in examples if name == label),
            ]
            for label in self.labels
        }
        self.encoder = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
        self.model, self.tokenizer = self.encoder.transformer.model, self.encoder.tokenizer
        means = [self._encoded(known).mean(0) for known in texts.values()]
        self._vectors = normalize(torch.stack(means), dim=-1)

    def scores(self, items: Iterable[Item]) -> Tensor:
        """log of the softmax of cosine / temperature, float32 [items, labels]."""
        texts = [self.template.render(item) for item in self._check(items)]
        return (self._encoded(texts) @ self._vectors.T / self.temperature).log_softmax(-1)

    def _encoded(self, texts: list[str]) -> Tensor:
        """Vectors of length 1, float32 [texts, D] on the CPU."""
        vectors: Tensor = self.encoder.encode(
            texts, self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return normalize(vectors.float().cpu(), dim=-1)


def _descriptions(labels: Sequence[str] | Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if isinstance(labels, str) or len(labels) < 2:
        raise ValueError(f"labels must be two or more texts, and are {labels!r:.80}")
    pairs = labels.items() if isinstance(labels, Mapping) else ((label, label) for label in labels)
    found = {label: (said,) if isinstance(said, str) else tuple(said) for label, said in pairs}
    if len(found) < len(labels):
        raise ValueError(f"labels must be different texts, and are {labels!r:.80}")
    for label, said in found.items():
        if not said or not all(isinstance(text, str) and text.strip() for text in said):
            raise ValueError(f"the label {label!r} needs a text that describes it, and has {said!r:.60}")
    return found


def _filled(hypothesis: str, said: str) -> str:
    if hypothesis.count("{}") != 1:
        raise ValueError(f"hypothesis must have one {{}} for the label, and is {hypothesis!r:.80}")
    return hypothesis.replace("{}", said)
