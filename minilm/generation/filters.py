"""Filters for sampling beside top-k, top-p and min-p: float32 [B, V] -> float32 [B, V].

An excluded token gets -inf; at least the `keep` best tokens stay. The functions compute the same as
transformers' processors of these options.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_typical(logits: Tensor, mass: float, keep: int = 1) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to `mass` or more, those first whose information is
    closest to the entropy (locally typical sampling: Meister et al. 2023, arXiv:2202.00666)."""
    logs = logits.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    surprise = (-logs - entropy).abs()
    ascending, order = surprise.sort(dim=-1)
    below = logits.gather(-1, order).softmax(-1).cumsum(-1) < mass
    last = below.sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    dropped = ascending > ascending.gather(1, last)
    dropped[:, :keep] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def keep_epsilon(logits: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Exclude tokens less probable than `epsilon` (Hewitt et al. 2022, arXiv:2210.15191)."""
    return _drop(logits, logits.softmax(-1) < epsilon, keep)


def keep_eta(logits: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Exclude tokens less probable than `epsilon`, or than sqrt(epsilon) * exp(-entropy) where that is less
    (eta sampling: Hewitt et al. 2022, arXiv:2210.15191)."""
    logs = logits.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    eta = (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)
    return _drop(logits, logs.exp() < eta, keep)


def _drop(logits: Tensor, dropped: Tensor, keep: int) -> Tensor:
    best = logits.topk(min(keep, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(dropped & (logits < best), -math.inf)


_TOP_H_TOKENS = 100
"""Top-H looks at so many tokens."""


def keep_top_h(logits: Tensor, share: float) -> Tensor:
    """Keep the best tokens as long as their terms of the entropy sum to `share` of it or less; only of the
    100 best, and the best one in any case (top-H decoding: Potraghloo et al. 2025, arXiv:2509.02510)."""
    best, order = logits.topk(min(_TOP_H_TOKENS, logits.shape[1]))
    logs = best.log_softmax(-1)
    terms = (-logs * logs.exp()).nan_to_num(nan=0.0)  # 0 * -inf: excluded before
    sums = terms.cumsum(-1)
    kept = sums <= share * sums[:, -1:]
    kept[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, kept), -math.inf)
