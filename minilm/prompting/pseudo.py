"""How probable a text is to a masked language model, and a sentence after another to a model with a
next-sentence head."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..model import AutoModelForMaskedLM, AutoModelForNextSentencePrediction
from ..sentence import Tokens, by_length, check_batch_size, run, window
from ..text import Tokenizer
from .masked import Masked, log_probabilities, masked_model


def pseudo_log_likelihoods(
    model: AutoModelForMaskedLM | str | os.PathLike[str],
    texts: Iterable[str],
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> list[list[float]]:
    """log P(token | all other tokens) for each token of each text: each is masked in turn (Salazar et al.
    2020, arXiv:1910.14659). Special tokens are not counted.

    Raises ValueError for a text longer than the model's window.
    """
    found, tokenizer = masked_model(model, tokenizer)
    check_batch_size(batch_size)
    longest, mask = window(found, tokenizer), tokenizer.mask_token_id
    assert mask is not None
    prompts: list[list[Masked]] = []
    for text in texts:
        encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if len(ids) > longest:
            raise ValueError(f"the text {text!r:.60} has {len(ids)} tokens, and the model reads {longest}")
        places = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
        prompts.append([Masked((*ids[:i], mask, *ids[i + 1 :]), None, (i,), (ids[i],)) for i in places])
    logs = log_probabilities(found, (prompt for text in prompts for prompt in text), batch_size)
    return [[logs[prompt][0] for prompt in text] for text in prompts]


def pseudo_perplexity(
    model: AutoModelForMaskedLM | str | os.PathLike[str],
    texts: Iterable[str],
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
) -> float:
    """exp of the mean of -log P(token | all others of its text), over all tokens of all texts. Raises
    ValueError if there are none."""
    logs = pseudo_log_likelihoods(model, texts, tokenizer=tokenizer, batch_size=batch_size)
    count = sum(map(len, logs))
    if not count:
        raise ValueError("pseudo-perplexity needs at least one token, and the texts have none")
    return math.exp(-math.fsum(log for text in logs for log in text) / count)


def next_sentence_scores(
    model: AutoModelForNextSentencePrediction,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 32,
) -> Tensor:
    """The probability that the second text of each pair follows the first, float32 [pairs] (the pre-training
    task of BERT; its class 0 is "follows")."""
    check_batch_size(batch_size)
    encoded = tokenizer([a for a, _ in pairs], [b for _, b in pairs], verbose=False) if pairs else {}
    ids, types = encoded.get("input_ids", []), encoded.get("token_type_ids")
    windows = [Tokens(row, types[i] if types is not None else None) for i, row in enumerate(ids)]
    longest = window(model, tokenizer)
    for pair, tokens in zip(pairs, windows, strict=True):
        if len(tokens) > longest:
            raise ValueError(f"the pair {pair!r:.60} has {len(tokens)} tokens, and the model reads {longest}")
    scores = torch.zeros(len(windows))
    with torch.inference_mode():
        for chosen in by_length([len(tokens) for tokens in windows], batch_size):
            ran = run(model.eval(), [windows[i] for i in chosen])
            logits: Tensor = model.answer(ran.hidden, ran.batch, None)["logits"]
            scores[chosen] = logits.float().softmax(-1)[:, 0].cpu()
    return scores
