"""umT5 (Chung et al. 2023, arXiv:2304.09151): T5 1.1 in which each layer has its own table of relative
biases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import mt5, t5

FAMILY = replace(
    t5.FAMILY,
    model_type="umt5",
    class_prefix="UMT5",
    defaults=mt5.DEFAULTS,
    sides=partial(t5.sides, bias_per_layer=True),
    body=t5.body(bias_per_layer=True),
)
