"""Token, position and type embeddings, added and normalised, in one call of the native extension.

`layers.Embeddings` defines the result; this is an implementation of the op `embed` in the dispatch table. For
a short text, half a dozen Python calls would take as long as a layer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..model import Embedding, Embeddings, Norm
from ..ops.backends import native
from ..quantized import QuantizedEmbedding
from . import released
from .state import hooked, other_code, own_code


def obstacle(embeddings: Embeddings, *_: object) -> str | None:
    """Why these embeddings need the modules, or None."""
    if native.unavailable is not None:
        return native.unavailable
    if embeddings.training and embeddings.config.embedding_dropout:
        return "dropout is on (model.eval() turns it off)"
    if torch.is_grad_enabled() and any(p.requires_grad for p in embeddings.parameters()):
        return "gradients are enabled (torch.inference_mode() or torch.no_grad() disables them)"
    reason = other_code()
    if reason is not None:
        return reason
    parts = {name: module for name, module in embeddings._modules.items() if module is not None}
    if hooked(parts.values()):
        return "a module has forward hooks"
    for name, module in parts.items():
        if released.type_of(module) not in _KINDS[name]:
            return f"a part was replaced by a {type(module).__name__}"
        if getattr(module, "max_norm", None) is not None:
            return "a table has a max_norm, to which lookups rescale its rows"
    return own_code(parts.values())


_KINDS: dict[str, tuple[type, ...]] = {
    "tokens": (Embedding, QuantizedEmbedding),
    "positions": (Embedding,),
    "types": (Embedding,),
    "norm": (Norm,),
}


def run_embed(embeddings: Embeddings, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    """See `layers.Embeddings`."""
    table, norm = embeddings.tokens, embeddings.norm
    scale = minimum = None
    sizes: tuple[int, ...] = ()
    form = released.form_of(table)
    if isinstance(table, QuantizedEmbedding):
        dtype = table.like.dtype
        if form is None:
            vectors, scale, minimum = table.codes, table.scale, table.minimum
        else:
            vectors, sizes = form.packed.data, (form.packed.format, form.rows, form.columns)
    else:
        vectors, dtype = table.weight.contiguous(), table.weight.dtype
    learned = None if embeddings.positions is None else embeddings.positions.weight.contiguous()
    y: Tensor = torch.ops.minilm.embed.default(
        tokens.long().contiguous(),
        vectors,
        scale,
        minimum,
        None if types is None else types.long().contiguous(),
        None if embeddings.types is None else embeddings.types.weight.contiguous(),
        None if learned is None else positions.contiguous(),
        learned,
        None if norm is None else norm.weight.float(),
        None if norm is None or norm.bias is None else norm.bias.float(),
        0.0 if norm is None else norm.eps,
        norm is not None and norm.rms,
        factor(embeddings),
        *sizes,
    )
    return y.to(dtype)


def factor(embeddings: Embeddings) -> float:
    """What token vectors are multiplied by (see `Embeddings.by_modules`)."""
    scale, table = embeddings.config.embedding_scale, embeddings.tokens
    if scale is None:
        return 1.0
    return _rounded(scale, (table.like if isinstance(table, QuantizedEmbedding) else table.weight).dtype)


@lru_cache(maxsize=64)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))
