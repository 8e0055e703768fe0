"""The KV cache of a forward pass in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache
from ..config import ModelConfig


class LateCache(KVCache):
    """A cache that is filled at its first use, after the graph has returned the keys and values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, padded: Any) -> None:
        self._given = (config, dtype, padded.batch, padded.columns, padded.real, padded.kept)

    def __getattr__(self, name: str) -> Any:
        given = self.__dict__.pop("_given", None)
        if given is None:
            raise AttributeError(f"KVCache has no attribute {name!r}")
        _fill(self, *given)
        return getattr(self, name)


@torch.no_grad()
def _fill(
    cache: KVCache, config: ModelConfig, dtype: torch.dtype, batch: int, columns: int, real: Tensor | None,
    kept: list[tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    """Fill the cache as a forward pass without a graph would."""
    device = kept[0][0].device if kept else torch.device("cpu") if real is None else real.device
    KVCache.__init__(cache, config, rows=batch, dtype=dtype, device=device)
    lengths, places = [columns] * batch, None
    if real is not None and not bool(real.all()):
        lengths, places = real.sum(1).tolist(), real.flatten().nonzero().squeeze(1)
        layouts = cache.lay_out(places % max(columns, 1), lengths, columns, None)
    step = cache.extend(cache.rows, lengths)
    if places is not None:
        for row, layout in zip(cache.rows, layouts, strict=True):
            cache.set_layout(row, layout)
    for layer, (k, v) in enumerate(kept):
        if places is not None:
            k, v = k[places], v[places]
        pages = cache.k_pages[layer], cache.v_pages[layer]
        ops.append_kv(k.detach(), v.detach(), *pages, step.slots, *cache.scales(layer))
