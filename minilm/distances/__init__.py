"""Attention whose scores depend on the distance of query and key too: MPNet, T5, DeBERTa.

A model has one such object for a batch, `Batch.biased`. The attention of a layer, `of_layer`, takes the place
of `Packed.attend`.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .disentangled import disentangled_parts
from .relative import Biased, RelativeBias

__all__ = ["Biased", "RelativeBias", "shared_parts"]


def shared_parts(config: ModelConfig, table: Any, linear: Any, norm: Any) -> tuple[Any, Any]:
    """What all layers of a body share: the weights of distances, with a method `biased`, and a convolution
    beside the first layer; None for what the family does not have. `table`, `linear` and `norm` are the
    classes of its parts."""
    if config.distances is not None:
        return disentangled_parts(config, table, linear, norm)
    buckets = config.relative_buckets
    return RelativeBias(buckets, config.num_heads, both_ways=True) if buckets else None, None
