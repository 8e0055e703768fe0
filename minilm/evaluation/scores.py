"""Metrics to compare a changed model, such as a quantised one, with the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .. import ops
from ..model import AutoModelForCausalLM

_ROWS = 256
"""Number of positions whose logits are computed at a time: 50 MB for a vocabulary of 49,152."""


def perplexity(
    model: AutoModelForCausalLM,
    token_ids: Sequence[int] | Tensor,
    window: int = 512,
    stride: int | None = None,
) -> float:
    """exp of the mean of -log p(token | tokens before it in its window), over all tokens but the first.

    The text is read in windows of `window` tokens that start `stride` tokens apart (by default half a
    window); tokens counted in the previous window are only context. So each token counts once, and from the
    second window on has at least ``window - stride`` tokens before it. Raises ValueError for a text of fewer
    than two tokens, or a window that the model does not support.
    """
    tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=model.device).flatten()
    stride = max(1, window // 2) if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, and the text has {len(tokens)}")
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to window - 1, and they are {stride} and {window}")
    total, counted = 0.0, 1
    with torch.inference_mode():
        for start in range(0, len(tokens), stride):
            stop = min(start + window, len(tokens))
            hidden = model.body(model.pack(tokens[None, start:stop]))  # [stop - start, C]
            for first in range(counted, stop, _ROWS):
                last = min(first + _ROWS, stop)
                logits = model.logits(hidden[first - 1 - start : last - 1 - start])
                total += float(ops.cross_entropy(logits, tokens[first:last])) * (last - first)
            counted = stop
            if stop == len(tokens):
                break
    return math.exp(total / (len(tokens) - 1))


@dataclass(frozen=True)
class Likeness:
    """Cosine similarity of embeddings to the expected ones: mean, minimum and number of rows."""

    mean: float
    worst: float
    count: int


def likeness(vectors: Tensor, expected: Tensor) -> Likeness:
    """Cosine similarities of the rows of `vectors` [N, C] to those of `expected`, computed in float64."""
    if vectors.shape != expected.shape or vectors.dim() != 2 or len(vectors) == 0:
        raise ValueError(
            "likeness needs two equal shapes [N, C], and these are "
            f"{list(vectors.shape)} and {list(expected.shape)}"
        )
    cosines = cosine_similarity(vectors.double(), expected.double(), dim=1)
    return Likeness(float(cosines.mean()), float(cosines.min()), len(cosines))
