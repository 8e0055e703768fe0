"""fill-mask: predicts the tokens at the masks of a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import AutoModelForMaskedLM
from ..sentence import Ran, Tokens
from .base import Pipeline, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """`top_k`: number of answers per mask. `targets`: score only these words. `tokenizer_kwargs`:
    `truncation` and `max_length` for long texts."""

    top_k: int = 5
    targets: str | Sequence[str] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k must be a positive integer, and is {self.top_k!r}")
        unknown = set(self.tokenizer_kwargs or {}) - {"truncation", "max_length", "padding"}
        if unknown:
            raise TypeError(
                f"tokenizer_kwargs takes truncation and max_length, not {', '.join(sorted(unknown))}"
            )


class FillMaskPipeline(Pipeline[Options]):
    """A text with masks -> for each mask the best tokens: {"score", "token", "token_str", "sequence"}.

    A text with one mask gives a list of answers, a text with several masks a list of such lists. Each mask
    is predicted independently: scores are not joint probabilities.
    """

    task = "fill-mask"
    model_class = AutoModelForMaskedLM
    options_class = Options
    older_names: ClassVar[Mapping[str, str]] = {"topk": "top_k"}

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """As in `Pipeline`, but a list of a single text gives that text's result, as in transformers."""
        found = super().__call__(inputs, batch_size=batch_size, **options)
        return found[0] if isinstance(inputs, list) and len(inputs) == 1 else found

    def prepare(self, item: Any, options: Options) -> Work:
        """One window."""
        mask = self.tokenizer.mask_token
        if mask is None or self.tokenizer.mask_token_id is None:
            raise ValueError("fill-mask needs a tokenizer with a mask_token, which this one does not have")
        asked = options.tokenizer_kwargs or {}
        work = self.encode(self.text(item), None, asked.get("truncation"), asked.get("max_length"))
        if self.tokenizer.mask_token_id not in work.windows[0].ids:
            where = f"in the first {len(work.windows[0])} tokens of" if work.cut else "in"
            raise ValueError(f"there is no {mask} {where} the text {item!r:.80}")
        return work

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Probabilities [masks, V] of each window; the output matrix is applied at the masks only."""
        assert isinstance(self.model, AutoModelForMaskedLM)
        mask = self.tokenizer.mask_token_id
        masked = torch.tensor([token == mask for window in windows for token in window.ids])
        at_masks = result.hidden[masked.to(result.hidden.device)]
        logits: Tensor = self.model.head(at_masks, self.model.body.embeddings.tokens.weight)
        counts = [sum(token == mask for token in window.ids) for window in windows]
        return torch.split(logits.float().softmax(-1).cpu(), counts)

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """The best tokens of each mask."""
        ids, mask = work.windows[0].ids, self.tokenizer.mask_token_id
        columns = [column for column, token in enumerate(ids) if token == mask]
        probabilities: Tensor = outputs[0]
        targets = None if options.targets is None else self._targets(options.targets)
        if targets is not None:
            probabilities = probabilities[:, targets]
        scores, tokens = probabilities.topk(min(options.top_k, probabilities.shape[1]))
        tokens = tokens if targets is None else targets[tokens]
        answers = [
            [
                {
                    "score": score,
                    "token": token,
                    "token_str": self.tokenizer.decode([token]),
                    "sequence": self._sequence(ids, column, token, len(columns) == 1),
                }
                for score, token in zip(*row, strict=True)
            ]
            for column, row in zip(columns, zip(scores.tolist(), tokens.tolist(), strict=True), strict=True)
        ]
        return answers[0] if len(answers) == 1 else answers

    def _sequence(self, ids: list[int], column: int, token: int, alone: bool) -> str:
        """The text with the mask filled; with special tokens, if there are other masks."""
        filled = [*ids[:column], token, *ids[column + 1 :]]
        kept = [token for token in filled if token != self.tokenizer.pad_token_id]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=alone)
        return text

    def _targets(self, targets: str | Sequence[str]) -> Tensor:
        """The token ids of the targets; for a word that is not a token, that of its first token."""
        vocabulary = self.tokenizer.get_vocab()
        ids: dict[int, None] = {}
        for target in [targets] if isinstance(targets, str) else targets:
            token = vocabulary.get(self.text(target))
            if token is None:
                first = self.tokenizer.encode(target, add_special_tokens=False)[:1]
                if not first:
                    logger.warning("the target %r has no token and is left out", target)
                    continue
                token = first[0]
                taken = self.tokenizer.convert_ids_to_tokens(token)
                logger.warning(
                    "the target %r is not a token of the vocabulary; %r is scored instead", target, taken
                )
            ids[token] = None
        if not ids:
            raise ValueError(f"targets must name at least one token, and are {targets!r:.80}")
        return torch.tensor(list(ids))
