"""Classification by a masked language model that was not trained for the task (Schick & Schuetze 2021,
arXiv:2001.07676).

    classify = ClozeClassifier(
        "bert-base-uncased", "{text} It was {mask}.", {"positive": ["great", "good"], "negative": "terrible"}
    )
    classify.predict(["A waste of time.", "I laughed all evening."])   # ["negative", "positive"]

The template turns the task into predicting a masked word, which the model was trained for. The score of a
label is the probability of its words at the mask.

A template may have several fields; an item is then a dict with a text for each: "{text} {subject} is the
{mask} of {object}." asks for a relation between two entities.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from ..model import AutoModelForMaskedLM
from ..sentence import check_batch_size, window
from ..text import Tokenizer
from .classifier import PromptClassifier
from .masked import Masked, log_probabilities, masked_model
from .templates import Item, Template, Words, shortened, words_of


class ClozeClassifier(PromptClassifier):
    """A masked language model that chooses among labels by their words.

    Args:
        model: a folder, a name on the hub, or a loaded model (which needs `tokenizer`).
        template: text with ``{mask}`` at the answer, and fields that are filled from the item.
        words: label -> the word or words for it, exactly as they would stand in the template. A word of
            several tokens is scored with all of them masked, by the mean of their log probabilities. The
            probability of a label is the mean of its words'.
        calibrate: divide by the probabilities of items without content (`calibration`), since a model prefers
            some words whatever the text is.
        batch_size: prompts that go through the model at once; it does not change the results.

    If a prompt is too long, the end of the longest text in it is cut, never the template, with a warning.
    """

    model: AutoModelForMaskedLM
    template: Template

    def __init__(
        self,
        model: AutoModelForMaskedLM | str | os.PathLike[str],
        template: str,
        words: Words,
        *,
        tokenizer: Tokenizer | None = None,
        calibrate: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.template = Template(template)
        if not self.template.has_mask:
            raise ValueError(f"a template must have {{mask}} at the answer, and {template!r:.80} has none")
        self.words = words_of(words)
        self.labels = list(self.words)
        self.calibrate = calibrate
        self.batch_size = check_batch_size(batch_size)
        self.model, self.tokenizer = masked_model(model, tokenizer)

    def scores(self, items: Iterable[Item]) -> Tensor:
        """log of the probability of each label's words at the mask, float32 [items, labels]."""
        cut = 0
        prompts: list[list[list[Masked]]] = []  # [item][label][word]
        for item in self._check(items):
            found = [[self._masked(item, word) for word in said] for said in self.words.values()]
            cut += any(was_cut for said in found for _, was_cut in said)
            prompts.append([[prompt for prompt, _ in said] for said in found])
        self._warn_of_cuts(cut, len(prompts))
        every = {prompt for item in prompts for said in item for prompt in said}
        logs = log_probabilities(self.model, every, self.batch_size)
        rows = [[_mean([logs[prompt] for prompt in said]) for said in item] for item in prompts]
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), len(self.labels))

    def _masked(self, item: Item, word: str) -> tuple[Masked, bool]:
        """The prompt with `word` masked, and whether a text was cut. The word is tokenized in its place,
        together with the space before it, and the masks replace those tokens."""
        fields = self.template.fields(item)
        longest, cut = window(self.model, self.tokenizer), False
        while True:
            text, start = self.template.fill(fields, word)
            encoded = self.tokenizer(
                text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
            )
            ids: list[int] = encoded["input_ids"]
            if len(ids) <= longest:
                break
            fields, cut = shortened(fields, len(ids) - longest, self._spans), True
        low, high = len(text[:start].rstrip()), start + len(word)
        places = [
            i
            for i, (begin, end) in enumerate(encoded["offset_mapping"])
            if low < end and begin < high and not encoded["special_tokens_mask"][i]
        ]
        if not places:
            raise ValueError(f"the word {word!r} has no token in the prompt {text!r:.80}")
        answers = tuple(ids[i] for i in places)
        if self.tokenizer.unk_token_id in answers:
            raise ValueError(f"the vocabulary does not have the word {word!r}: choose another for this label")
        assert self.tokenizer.mask_token_id is not None
        for place in places:
            ids[place] = self.tokenizer.mask_token_id
        types = encoded.get("token_type_ids")
        kept = tuple(types) if types is not None and any(types) else None
        return Masked(tuple(ids), kept, tuple(places), answers), cut


def _mean(words: list[list[float]]) -> float:
    """Log probabilities of the tokens of each word of a label -> the log probability of the label."""
    scores = [sum(tokens) / len(tokens) for tokens in words]
    most = max(scores)
    return most + math.log(sum(math.exp(score - most) for score in scores) / len(scores))
