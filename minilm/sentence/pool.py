"""From hidden states to sentence embeddings in one call of the native extension.

`sentence_modules` says what is computed; this is one more implementation of the usual modules, the mean of a
text's tokens and then perhaps its scaling to length 1, behind the dispatch table, of the op `pool`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.backends import native
from .modules import Features, Module, Normalize, Pooling


def run(modules: Sequence[Module], features: Features) -> Features:
    """All modules after the Transformer."""
    x = features.tokens
    traits = native.WholeTraits(x.device.type, x.dtype, _obstacle(modules, features))
    result: Features = dispatch.select("pool", traits)(modules, features)
    return result


def _obstacle(modules: Sequence[Module], features: Features) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile traces the modules"
    if native.unavailable is not None:
        return native.unavailable
    pooling = modules[0] if modules else None
    if type(pooling) is not Pooling or pooling.modes != ("mean",):
        return "only the mean of the tokens is pooled at once"
    if features.prompt_length and not pooling.include_prompt:
        return "tokens of the prompt are left out"
    usual = all(type(m) is Normalize and m.input == m.output == "sentence_embedding" for m in modules[1:])
    if len(modules) > 2 or not usual:
        return "other modules than a scaling to length 1 come after the pooling"
    if torch.is_grad_enabled() and features.tokens.requires_grad:
        return "gradients are wanted (torch.inference_mode() or torch.no_grad() says that they are not)"
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return "a module has forward hooks"
    return None


def run_native(modules: Sequence[Module], features: Features) -> Features:
    """As `run`."""
    x, cu_seqlens = features.tokens, features.packed.cu_seqlens
    y: Tensor = torch.ops.minilm.pool.default(x.float().contiguous(), cu_seqlens, len(modules) == 2)
    features.sentence = y.to(x.dtype)
    return features


def by_modules(modules: Sequence[Module], features: Features) -> Features:
    """As `run`, module by module."""
    for module in modules:
        features = module(features)
    return features


dispatch.register(dispatch.Implementation("pool", "native", run_native, native.supports_whole))
for _backend in ("triton", "torch", "reference"):
    dispatch.register(dispatch.Implementation("pool", _backend, by_modules))
