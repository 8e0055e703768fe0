"""Contextual calibration (Zhao et al. 2021, arXiv:2102.09690)."""

from __future__ import annotations

from torch import Tensor

NOTHING = ("N/A", "", "...")
"""Items that say nothing: what a model answers to them is its habit."""


def calibrated(scores: Tensor, of_nothing: Tensor) -> Tensor:
    """Log probabilities of labels [items, labels], less what a model gives the labels where there is nothing
    to judge, [`NOTHING`, labels]: there, all labels become equally likely.

    Both are normalised over the labels first, and those of nothing are averaged as probabilities.
    """
    prior = of_nothing.softmax(-1).mean(0)
    return scores.log_softmax(-1) - prior.log()
