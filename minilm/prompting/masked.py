"""The log probabilities of a masked language model at its masks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import AutoModelForMaskedLM
from ..sentence import Tokens, by_length, run
from ..text import AutoTokenizer, Tokenizer


class Masked(NamedTuple):
    """A text with some tokens masked."""

    ids: tuple[int, ...]
    """With special tokens and masks."""
    types: tuple[int, ...] | None
    places: tuple[int, ...]
    """The positions of the masks in `ids`."""
    answers: tuple[int, ...]
    """The token at each mask whose probability is wanted."""


def masked_model(
    model: AutoModelForMaskedLM | str | os.PathLike[str], tokenizer: Tokenizer | None
) -> tuple[AutoModelForMaskedLM, Tokenizer]:
    """The model in inference mode and its tokenizer, loaded if `model` is a name. Raises ValueError for a
    loaded model without a tokenizer, and for a tokenizer without a mask token."""
    if isinstance(model, AutoModelForMaskedLM):
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer=")
        found = model.eval()
    else:
        found = AutoModelForMaskedLM.from_pretrained(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    if tokenizer.mask_token_id is None:
        raise ValueError("a masked language model needs a tokenizer with a mask_token, and this one has none")
    return found, tokenizer


def log_probabilities(
    model: AutoModelForMaskedLM, prompts: Iterable[Masked], batch_size: int
) -> dict[Masked, list[float]]:
    """log P(answer | the text with all its masks) for each mask of each prompt.

    The body reads each masked text once, for all its answers, and the output matrix is applied only at the
    masks.
    """
    answers: dict[tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]], list[Masked]] = {}
    for prompt in prompts:
        answers.setdefault(prompt[:3], []).append(prompt)
    texts = list(answers)
    found: dict[Masked, list[float]] = {}
    with torch.inference_mode():
        for chosen in by_length([len(ids) for ids, _, _ in texts], batch_size):
            batch = [texts[i] for i in chosen]
            ran = run(model, [Tokens(list(ids), None if t is None else list(t)) for ids, t, _ in batch])
            starts = ran.batch.packed.cu_seqlens.tolist()
            at = [
                start + place
                for start, (_, _, places) in zip(starts, batch, strict=False)
                for place in places
            ]
            hidden = ran.hidden[torch.tensor(at, device=ran.hidden.device)]
            logits: Tensor = model.head(hidden, model.body.embeddings.tokens.weight)
            scores = torch.split(logits.float().log_softmax(-1).cpu(), [len(text[2]) for text in batch])
            for text, rows in zip(batch, scores, strict=True):
                for prompt in answers[text]:
                    at_answers = rows.gather(1, torch.tensor(prompt.answers)[:, None])
                    found[prompt] = at_answers.squeeze(1).tolist()
    return found
