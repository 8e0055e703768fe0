"""Attention with everything that may be done to a score, in the dtype of its inputs: what kernels are held
to."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, q_lens: list[int],
    k_lens: list[int], scale: float, causal: bool, window: int, cap: float,
) -> Tensor:  # fmt: skip
    """Attention in the dtype of its inputs, one sequence and one head at a time."""
    outputs = []
    for row, (sq, sk) in enumerate(zip(q_lens, k_lens, strict=True)):
        q0, k0 = sum(q_lens[:row]), sum(k_lens[:row])
        heads = []
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            s = torch.einsum("id,jd->ij", q[q0 : q0 + sq, h], k[k0 : k0 + sk, kv]) * scale
            if cap:
                s = cap * torch.tanh(s / cap)
            distance = torch.arange(sk - sq, sk)[:, None] - torch.arange(sk)
            if bias is not None:
                s = s + bias[h, :sq, :sk]
            if slopes is not None:
                s = s - slopes[h] * distance.abs()
            hidden = torch.zeros(sq, sk, dtype=torch.bool)
            if causal:
                hidden |= distance < 0
            if window:
                hidden |= distance.abs() >= window
            p = s.masked_fill(hidden, -math.inf).softmax(-1)
            heads.append(p @ v[k0 : k0 + sk, kv])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)
