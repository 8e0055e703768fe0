"""Contextual calibration (Zhao et al. 2021, arXiv:2102.09690)."""

from __future__ import annotations

from torch import Tensor

NOTHING = ("N/A", "", "...")
"""Items without content: the model's answers to them show its bias."""


def calibrated(scores: Tensor, of_nothing: Tensor) -> Tensor:
    """Log probabilities of labels [items, labels], divided (as probabilities) by those that the model gives
    without content, [`NOTHING`, labels]. Calibrated, an item without content has equally likely labels.

    Both are first normalised over the labels; those of `NOTHING` are averaged as probabilities.
    """
    prior = of_nothing.softmax(-1).mean(0)
    return scores.log_softmax(-1) - prior.log()
